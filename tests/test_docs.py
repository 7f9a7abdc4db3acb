"""The commands that the documents show run as they are written; those that need the Hub or several GPUs are told apart."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from program import ROOT, TIMEOUT, environment

DOCUMENTS = ["docs/LR_FINDER_USAGE.md", "docs/ONECYCLE_LR_GUIDE.md", "README.md"]
NEEDS_MORE = re.compile(
    r"imagenet1k|cifar|imagefolder|--dataset hf|torchrun|NAME|pytest|benchmarks/|pip install|kill_sweep"
)


def commands(document: str) -> list[str]:
    """The lines of indented blocks that start the program, without their comments."""
    lines = re.findall(r"^    uv run (?:python .*)$", (ROOT / document).read_text(), re.MULTILINE)
    return [line.strip().partition("  #")[0].strip() for line in lines]


def offline(document: str) -> list[str]:
    return [command for command in commands(document) if not NEEDS_MORE.search(command)]


def test_there_are_commands_to_run() -> None:
    assert all(offline(document) for document in DOCUMENTS)


@pytest.mark.slow
@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_offline_command_runs_as_written(document: str, tmp_path: Path) -> None:
    for path in (*ROOT.glob("*.py"), ROOT / "examples"):
        (tmp_path / path.name).symlink_to(path)
    for command in offline(document):
        words = shlex.split(command.removeprefix("uv run python "))
        done = subprocess.run(
            [sys.executable, *words],
            cwd=tmp_path,
            env=environment(OMP_NUM_THREADS=str(os.cpu_count())),
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
        )
        assert done.returncode == 0, (command, done.stderr)
