"""Every import points down the layout, wherever in the file it stands, and stays in its wing or leads below it."""

import ast
import graphlib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WINGS = ("stream", "training", "tracking", "results", "pages")
LAYERS = (
    {"main"},
    {"run_lr_finder", "evaluate", "predict", "export", "dry_run", "doctor"},
    {"results"},
    {"train"},
    {"preflight", "lr_finder", "visualization", "speed"},
    {"preprocess", "training", "report", "compare"},
    {"beforehand"},
    {"open_data", "pages", "tracking"},
    {"stream"},
    {"model_resnet50", "config", "distributed"},
    {"checks", "model_zoo"},
    {"blurpool", "flags", "machine", "recipe", "ranks"},
    {"choices"},
    {"registry", "defaults", "hints"},
    {"errors", "units"},
    {"output"},
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
FOLDERS = {folder.name for folder in ROOT.iterdir() if folder.is_dir()}
UNKNOWN_TO_STREAM = {
    "beforehand",
    "blurpool",
    "checks",
    "choices",
    "config",
    "defaults",
    "flags",
    "hints",
    "model_resnet50",
    "model_zoo",
    "recipe",
    "machine",
    "ranks",
    "registry",
}


def modules() -> dict[str, str]:
    """The source of each module by its name: those of the root, and those of the wings as `wing.module`."""
    found = {path.stem: path.read_text() for path in ROOT.glob("*.py")}
    for wing in WINGS:
        for path in (ROOT / wing).glob("*.py"):
            found[wing if path.stem == "__init__" else f"{wing}.{path.stem}"] = path.read_text()
    return found


def imported(source: str) -> set[str]:
    """The full name of everything imported anywhere in the source, in functions and under TYPE_CHECKING too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names} if not node.level else {"."}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            names.add(ast.literal_eval(node.args[0]) if isinstance(node.args[0], ast.Constant) else ".")
    return names


def misplaced(module: str, source: str) -> set[str]:
    """What a module imports of this repository that does not lie below it, nor in its own wing."""
    place, wrong = module.partition(".")[0], set()
    for name in imported(source):
        top = name.partition(".")[0]
        below = LEVEL.get(top, -1) > LEVEL[place] and not (place == "stream" and top in UNKNOWN_TO_STREAM)
        at_home = top == place and place in WINGS and name != module
        if name == "." or ((top in LEVEL or top in FOLDERS) and not below and not at_home):
            wrong.add(name)
    return wrong


def test_every_module_has_its_place_and_imports_only_from_below_or_its_own_wing() -> None:
    found = modules()
    assert {name.partition(".")[0] for name in found} == {*LEVEL}
    assert {name: misplaced(name, source) for name, source in found.items() if misplaced(name, source)} == {}


def test_the_modules_of_a_wing_do_not_import_each_other_in_a_circle() -> None:
    found = modules()
    graph = {}
    for name, source in found.items():
        paths = [f"{path}." for path in imported(source)]
        graph[name] = {other for other in found if any(p.startswith(f"{other}.") for p in paths)} - {name, *WINGS}
    graphlib.TopologicalSorter(graph).prepare()


def test_the_map_of_a_wing_names_its_modules_and_imports_nothing() -> None:
    for wing in WINGS:
        source = (ROOT / wing / "__init__.py").read_text()
        (docstring,) = ast.parse(source).body
        assert isinstance(docstring, ast.Expr)
        here = {path.stem for path in (ROOT / wing).glob("*.py")} - {"__init__"}
        assert {name for name in here if f"\n    {name} " not in source} == set()


def test_a_misplaced_import_cannot_hide() -> None:
    for module, source in [
        ("training.optim", "import train"),
        ("training.optim", "import training.optim"),
        ("training.optim", "from preprocess import Data"),
        ("preprocess", "from training.step import Training"),
        ("stream.loader", "from training import step"),
        ("stream.loader", "from config import Config"),
        ("errors", "def f():\n    from config import Config"),
        ("config", "if TYPE_CHECKING:\n    import distributed as d"),
        ("training.snapshot", "import os, visualization"),
        ("training.snapshot", "try:\n    import visualization\nexcept ImportError:\n    pass"),
        ("stream.augment", "importlib.import_module('train')"),
        ("stream.augment", "from . import optim"),
        ("train", "from tests.shards import draw"),
        ("run_lr_finder", "class A:\n    def f(self):\n        import main"),
    ]:
        assert len(misplaced(module, source)) == 1, (module, source)
    for module, source in [
        ("main", "import run_lr_finder, train, errors"),
        ("stream.loader", "import torch\nfrom torch import optim\nfrom stream.augment import Augment"),
        ("training.step", "from stream.augment import Augment\nfrom config import Config"),
    ]:
        assert misplaced(module, source) == set()
