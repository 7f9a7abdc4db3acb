"""The finder leaves no trace: in any precision, on one rank or two, from disk or stream, whatever interrupts it."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub import Hub
from program import ROOT, TIMEOUT, TORCHRUN, environment
from purity import EVENT_STEP, cases_of, differences, run_cases

from training.state import rng_state

pytestmark = pytest.mark.slow

DIGITS = ["--dataset", "digits", "--max_samples", "160"]
STREAM = ["--dataset", "imagenet1k", "--image_size", "32"]
STEPS = {"none": 32, "nan": EVENT_STEP, "exception": EVENT_STEP, "interrupt": EVENT_STEP}


@pytest.fixture(autouse=True)
def hub(hub_root: Path, hub_port: int) -> Iterator[None]:
    with Hub(hub_root, port=hub_port):
        yield


@pytest.mark.parametrize("flags", [DIGITS, STREAM], ids=["digits", "stream"])
def test_one_rank_is_left_as_it_was(flags: list[str], tmp_path: Path) -> None:
    found = run_cases(flags, tmp_path)
    assert [(precision, event) for precision, event, _, _ in found] == cases_of(flags)
    assert [changed for _, _, changed, _ in found] == [[]] * len(found)
    assert [steps for _, _, _, steps in found] == [STEPS[event] for _, event in cases_of(flags)]


@pytest.mark.parametrize("flags", [DIGITS, STREAM], ids=["digits", "stream"])
def test_two_ranks_are_left_as_they_were_and_stop_at_the_same_step(flags: list[str], tmp_path: Path) -> None:
    command = [sys.executable, *TORCHRUN, "2", str(ROOT / "tests" / "purity.py"), str(tmp_path), *flags]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr
    first, second = ((tmp_path / f"cases{rank}").read_text() for rank in range(2))
    assert first == second
    cases = [line.split() for line in first.splitlines()]
    assert [(precision, event) for precision, event, _, _ in cases] == cases_of(flags)
    assert {changed for _, _, _, changed in cases} == {"pure"}


def test_a_difference_would_be_seen() -> None:
    state = rng_state()
    changed = dict(state, torch=state["torch"] + 1)
    assert differences(state, changed) == ["torch"]
