"""Every module imports only modules below it in the layout, wherever in the file the import stands."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYOUT = [
    *("main", "run_lr_finder", "train", "profiling", "step", "lr_finder", "lr_methods", "preflight", "preprocess"),
    *("resident", "dummy", "streaming", "webdataset", "parquet", "remote", "network", "store", "stopping", "loader"),
    *("visualization", "tracking", "state", "snapshot", "durable", "decoding", "pictures", "jpeg", "augment", "optim"),
    *("model_resnet50", "distributed", "config", "seeds", "errors"),
]
OURS = {*LAYOUT, *(folder.name for folder in ROOT.iterdir() if folder.is_dir())}


def imported_modules(source: str) -> set[str]:
    """The first name of every module imported anywhere in the source, in functions and under TYPE_CHECKING too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {"." if node.level else str(node.module).split(".")[0]}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            names.add(ast.literal_eval(node.args[0]).split(".")[0] if isinstance(node.args[0], ast.Constant) else ".")
    return names


def misplaced_imports(module: str, source: str) -> set[str]:
    """What `module` imports of this repository that does not lie below it."""
    below = set(LAYOUT[LAYOUT.index(module) + 1 :])
    return {name for name in imported_modules(source) if name == "." or (name in OURS and name not in below)}


def test_every_top_level_module_has_its_place_in_the_layout() -> None:
    assert sorted(path.stem for path in ROOT.glob("*.py")) == sorted(LAYOUT)


@pytest.mark.parametrize("module", LAYOUT)
def test_no_module_imports_sideways_or_upwards(module: str) -> None:
    assert misplaced_imports(module, (ROOT / f"{module}.py").read_text()) == set()


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("optim", "import train"),
        ("optim", "import optim"),
        ("loader", "from streaming import Block"),
        ("errors", "def f():\n    from config import Config"),
        ("config", "if TYPE_CHECKING:\n    import distributed as d"),
        ("snapshot", "import os, tracking"),
        ("snapshot", "try:\n    import visualization\nexcept ImportError:\n    pass"),
        ("augment", "importlib.import_module('train')"),
        ("augment", "from . import optim"),
        ("train", "from tests.shards import draw"),
        ("run_lr_finder", "class A:\n    def f(self):\n        import main"),
    ],
)
def test_a_misplaced_import_cannot_hide(module: str, source: str) -> None:
    assert len(misplaced_imports(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [("main", "import run_lr_finder, train, errors"), ("loader", "import torch\nfrom torch import optim")],
)
def test_an_import_from_below_or_from_outside_is_allowed(module: str, source: str) -> None:
    assert misplaced_imports(module, source) == set()
