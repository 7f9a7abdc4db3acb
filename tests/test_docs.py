"""The documents' commands run as they are written; of those that need the Hub or more machines the flags are real."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from program import ROOT, TIMEOUT, environment

import config

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
def test_every_offline_command_runs_as_written(document: str, tmp_path: Path) -> None:
    for path in (*ROOT.glob("*.py"), ROOT / "examples"):
        (tmp_path / path.name).symlink_to(path)
    offline = [command for command in commands(document) if not NEEDS_MORE.search(command)]
    assert offline
    for command in offline:
        done = subprocess.run(
            [sys.executable, *shlex.split(command.removeprefix("uv run python "))],
            cwd=tmp_path,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
        )
        assert done.returncode == 0, (command, done.stderr)
