"""The documents' commands run as they are written; of those that need the Hub or more machines the flags are real."""

import re
import runpy
import shlex
from pathlib import Path
from typing import Any

import pytest
from program import ROOT, run
from torch import nn

import config
import evaluate
import export
import predict
from training import step

DOCUMENTS = ["docs/LR_FINDER_USAGE.md", "docs/ONECYCLE_LR_GUIDE.md"]
DOORS: dict[str, Any] = {
    **dict.fromkeys(("main", "run_lr_finder"), lambda argv: config.parse("", "", argv)),
    "evaluate": evaluate.parse,
    "predict": predict.parse,
    "export": export.parse,
}
BUILD_MODEL = step.build_model
NEEDS_MORE = re.compile(r"imagenet1k|torchrun|benchmarks/")


def commands(document: str) -> list[str]:
    """The lines of indented blocks that start something of ours, without their comments."""
    lines = re.findall(r"^    uv run .*\.py.*$", (ROOT / document).read_text(), re.MULTILINE)
    return [re.split(r"  #|\.\.\.", line)[0].strip() for line in lines]


@pytest.mark.parametrize("document", [*DOCUMENTS, "README.md", "docs/EXPORTING.md"])
def test_every_command_has_flags_that_exist(document: str) -> None:
    found = [re.search(rf"\b({'|'.join(DOORS)})\.py(.*)", command) for command in commands(document)]
    front_doors = [match.groups() for match in found if match]
    assert front_doors
    for door, flags in front_doors:
        DOORS[door](shlex.split(flags))


@pytest.mark.slow
@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_offline_command_runs_as_written(document: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is run as Python runs a program, but in this process and on a model for which there is a rate to find."""
    monkeypatch.setattr(step, "build_model", first_blocks)
    monkeypatch.chdir(tmp_path)
    offline = [command for command in commands(document) if not NEEDS_MORE.search(command)]
    assert offline
    for command in offline:
        script, *arguments = shlex.split(command.removeprefix("uv run python "))
        monkeypatch.setattr("sys.argv", [script, *arguments])
        done = run(entry=lambda _, script=script: run_program(ROOT / script))  # type: ignore[misc]
        assert done.status == 0, (command, done.err)


def first_blocks(*arguments: Any) -> Any:
    model: Any = BUILD_MODEL(*arguments)
    model.layer2 = model.layer3 = model.layer4 = nn.Identity()  # type: ignore[assignment]
    model.fc = nn.Linear(model.conv1.out_channels, model.fc.out_features)
    return model


def run_program(path: Path) -> int:
    runpy.run_path(str(path), run_name="__main__")
    return 0
