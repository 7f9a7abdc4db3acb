"""A run that was killed again and again, in the middle of a save too, is the run that was left alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hub import Hub
from kill_sweep import DIGITS, STREAMED, sweep, train
from program import assert_same_run, cut, ledger, snapshot_path

from training.snapshot import encode, read

pytestmark = pytest.mark.slow

STEP = 12
Edit = Callable[[dict[str, torch.Tensor], dict[str, Any]], None]


def test_ten_kills_of_digits_change_nothing(tmp_path: Path) -> None:
    sweep(DIGITS, tmp_path, kills=10, seed=0)


def test_ten_kills_of_a_stream_change_nothing(hub_root: Path, hub_port: int, tmp_path: Path) -> None:
    with Hub(hub_root, port=hub_port):
        sweep(STREAMED, tmp_path, kills=10, seed=0)


def without_rng(tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
    tensors["rng.torch"] = torch.Generator().manual_seed(9).get_state()[None]


def without_optimizer(tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
    for name in [name for name in tensors if name.startswith("optimizer.")]:
        del tensors[name]


def without_position(tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
    state["step"] = state["epoch"] * state["steps_per_epoch"]


def without_schedule(tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
    state["lr"] /= 2


def without_scaler(tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
    state["scaler"] = {}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kill") / "whole"
    train(*DIGITS, "--epochs", 2, "--keep_snapshots", 9, "--run_dir", folder, log=folder.with_name("log"))
    return folder


def same(one: Path, other: Path) -> bool:
    try:
        assert_same_run(one, other)
    except AssertionError:
        return False
    last = [max((folder / "snapshots").glob("step-*")) for folder in (one, other)]
    return read(last[0]).state["scaler"] == read(last[1]).state["scaler"]


@pytest.mark.parametrize(
    ("leave_out", "equal"),
    [
        (lambda tensors, state: None, True),
        (without_rng, False),
        (without_optimizer, False),
        (without_position, False),
        (without_schedule, False),
    ],
    ids=["nothing", "rng", "optimizer", "position", "schedule"],
)
def test_what_is_left_out_of_a_snapshot_is_noticed(whole: Path, tmp_path: Path, leave_out: Edit, equal: bool) -> None:
    copy = resume_without(leave_out, whole, STEP, tmp_path)
    assert same(copy, whole) == equal
    assert (ledger(copy) == ledger(whole)) == equal


def test_a_scaler_that_is_left_out_of_a_snapshot_is_noticed(tmp_path: Path) -> None:
    few: tuple[object, ...] = ("--max_samples", 24, "--batch_size", 8, "--epochs", 1, "--streams", 4)
    few = (*few, "--snapshot_steps", 1, "--keep_snapshots", 9)
    whole = tmp_path / "whole"
    train(*DIGITS, *few, "--amp", "--amp_dtype", "fp16", "--run_dir", whole, log=tmp_path / "log")
    assert same(resume_without(lambda tensors, state: None, whole, 2, tmp_path / "with"), whole)
    assert not same(resume_without(without_scaler, whole, 2, tmp_path / "without"), whole)


def resume_without(leave_out: Edit, whole: Path, step: int, folder: Path) -> Path:
    """A copy of a run that went on from a snapshot of that step which lacks something."""
    copy = cut(whole, step, folder / "cut")
    path = snapshot_path(copy, step)
    snapshot = read(path)
    leave_out(snapshot.tensors, snapshot.state)
    path.unlink()
    path.write_bytes(b"".join(encode(snapshot.tensors, snapshot.state)))
    train("--resume_from", path, log=folder / "log")
    return copy
