"""The documents' commands run as they are written; of those that need the Hub or more machines the flags are real."""

import re
import runpy
import shlex
from pathlib import Path

import pytest
from program import ROOT, run
from purity import shrink

import config
from training import step

DOCUMENTS = ["docs/LR_FINDER_USAGE.md", "docs/ONECYCLE_LR_GUIDE.md"]
NEEDS_MORE = re.compile(r"imagenet1k|torchrun|benchmarks/")


def commands(document: str) -> list[str]:
    """The lines of indented blocks that start something of ours, without their comments."""
    lines = re.findall(r"^    uv run .*\.py.*$", (ROOT / document).read_text(), re.MULTILINE)
    return [re.split(r"  #|\.\.\.", line)[0].strip() for line in lines]


@pytest.mark.parametrize("document", [*DOCUMENTS, "README.md"])
def test_every_command_has_flags_that_exist(document: str) -> None:
    front_doors = [command for command in commands(document) if re.search(r"\b(main|run_lr_finder)\.py", command)]
    assert front_doors
    for command in front_doors:
        config.parse("", "", shlex.split(command.partition(".py")[2]))


@pytest.mark.slow
@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_offline_command_runs_as_written(document: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is run as Python runs a program, but in this process and on the smallest of models."""
    build_model = step.build_model
    monkeypatch.setattr(step, "build_model", lambda *arguments: shrink(build_model(*arguments)))
    monkeypatch.chdir(tmp_path)
    offline = [command for command in commands(document) if not NEEDS_MORE.search(command)]
    assert offline
    for command in offline:
        script, *arguments = shlex.split(command.removeprefix("uv run python "))
        monkeypatch.setattr("sys.argv", [script, *arguments])
        done = run(entry=lambda _, script=script: run_program(ROOT / script))  # type: ignore[misc]
        assert done.status == 0, (command, done.err)


def run_program(path: Path) -> int:
    runpy.run_path(str(path), run_name="__main__")
    return 0
