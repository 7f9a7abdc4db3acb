"""A signal ends a run with a snapshot and its own exit status, and the run goes on as if there had been none."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from program import ROOT, assert_same_run, ledger, snapshot_path, start, steps_kept, train, wait, wait_for

pytestmark = pytest.mark.slow

FLAGS: tuple[object, ...] = ("--max_samples", 160, "--batch_size", 16, "--epochs", 1, "--ledger", "--snapshot_steps", 2)
FLAGS = (*FLAGS, "--num_workers", 1)
STEPS = 10


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("signals") / "whole"
    train(*FLAGS, "--run_dir", folder)
    yield folder
    for path in folder.rglob("*.safetensors"):
        path.unlink()


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"])
def test_a_signal_in_mid_epoch_leaves_a_snapshot_of_that_step(
    uninterrupted: Path, tmp_path: Path, signum: signal.Signals, status: int
) -> None:
    folder = tmp_path / "run"
    process = start(*FLAGS, "--run_dir", folder)
    wait_for(snapshot_path(folder, 2), process)
    process.send_signal(signum)
    done = wait(process)
    assert done.status == status
    assert "Traceback" not in done.err
    stopped_at = steps_kept(folder)[-1]
    assert 2 <= stopped_at < STEPS
    assert f"stopped by {signum.name} at step {stopped_at}; snapshot {snapshot_path(folder, stopped_at)}" in done.out
    assert [row["step"] for row in ledger(folder)] == list(range(1, stopped_at + 1))
    train("--resume_from", folder)
    assert_same_run(folder, uninterrupted)


def test_an_interrupt_before_training_is_one_line(tmp_path: Path) -> None:
    process = start("--dataset", "digits", "--model", "resnet152", "--run_dir", tmp_path / "run")
    assert process.stdout is not None
    assert any(line.startswith("images ") for line in process.stdout)
    process.send_signal(signal.SIGINT)
    done = wait(process)
    assert (done.status, done.err) == (130, "interrupted\n")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2], ids=str)
def test_a_signal_before_training_is_one_line(tmp_path: Path, signum: signal.Signals) -> None:
    process = start("--dataset", "digits", "--model", "resnet152", "--run_dir", tmp_path / "run")
    assert process.stdout is not None
    assert any(line.startswith("images ") for line in process.stdout)
    process.send_signal(signum)
    done = wait(process)
    assert (done.status, done.err) == (128 + signum, f"stopped by {signum.name}\n")
    assert not (tmp_path / "run").exists()


def test_a_second_signal_ends_a_run_at_once_in_one_line() -> None:
    code = """
import os, signal, time
from training import signals

signals.ECHO_SECONDS = 0.0
signals.StopRequest.listening()
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(0.1)
os.kill(os.getpid(), signal.SIGINT)
time.sleep(60)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stderr) == (130, "stopped at once by SIGINT\n")


def test_a_signal_ends_the_finder(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    line = ("--lr", "auto", "--lr_iter", 2000, "--batch_size", 16, "--run_dir", folder)
    process = start(*line)
    wait_for(folder / "config.json", process)
    time.sleep(6)  # the finder tells nothing before it ends, and is far from it
    process.send_signal(signal.SIGTERM)
    done = wait(process)
    assert done.status == 143
    assert "stopped in the finder, before anything was trained" in done.out
    assert not (folder / "lr_finder" / "lr_finder.json").exists()
    assert steps_kept(folder) == []


def test_an_interrupt_while_torch_is_imported_is_one_line(tmp_path: Path) -> None:
    process = start("--run_dir", tmp_path / "run")
    maps = Path(f"/proc/{process.pid}/maps")
    while "libtorch_cpu" not in maps.read_text():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    done = wait(process)
    assert (done.status, done.err.count("\n")) == (130, 1), done.err
    assert not (tmp_path / "run").exists()
