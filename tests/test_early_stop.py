"""A run ends when its validation figure stops rising, at the same epoch however often it was cut."""

import re
from pathlib import Path
from typing import Any

import pytest
from program import assert_same_run, cut, results, train

pytestmark = pytest.mark.usefixtures("small_model")

EPOCH = 3  # steps
SMALL = ("--max_samples", 48, "--batch_size", 16, "--epochs", 8, "--ledger", "--num_workers", 0, "--save_best")
FLAGS = (*SMALL, "--keep_snapshots", 99, "--snapshot_steps", 2, "--early_stop", 3)
TOP1 = [0.1, 0.5, 0.3, 0.5, 0.4, 0.45, 0.2, 0.1]  # after each epoch: an equal figure is no better one
ENDS = 5


@pytest.fixture(autouse=True)
def _judged(monkeypatch: pytest.MonkeyPatch) -> None:
    """The average, where there is one, rises for ever."""

    def epochs(training: Any) -> int:
        return int(training.model.bn1.num_batches_tracked) // EPOCH

    def evaluate(training: Any, loader: Any, stop: Any) -> dict[str, float]:
        top1 = TOP1[epochs(training) - 1]
        return {"val_loss": 1.0, "val_top1": top1, "val_top5": 1.0, "correct1": 0, "correct5": 0, "images": 48}

    def evaluate_average(training: Any, loader: Any, stop: Any) -> dict[str, float]:
        return {"ema_loss": 1.0, "ema_top1": epochs(training) / 10, "ema_top5": 1.0} if training.average else {}

    monkeypatch.setattr("train.evaluate", evaluate)
    monkeypatch.setattr("train.evaluate_average", evaluate_average)


@pytest.fixture
def stopped(tmp_path: Path) -> Path:
    train(*FLAGS, "--run_dir", tmp_path / "stopped")
    return tmp_path / "stopped"


def test_a_run_ends_after_so_many_epochs_without_a_better_figure_and_says_so(tmp_path: Path) -> None:
    done = train(*FLAGS, "--run_dir", tmp_path / "run")
    assert len(results(tmp_path / "run")) == ENDS
    line = next(line for line in done.out.splitlines() if line.startswith("stopped early: "))
    assert re.search(r"no better val_top1 than 50.00% in 3 epochs", line)
    assert done.out.splitlines()[-1].startswith("done ")


def test_a_run_that_rises_to_the_end_says_nothing(tmp_path: Path) -> None:
    done = train(*FLAGS, "--ema_decay", 0.9, "--run_dir", tmp_path / "run")
    assert len(results(tmp_path / "run")) == 8
    assert "stopped early" not in done.out


def test_a_resume_has_nothing_left_to_do_and_names_the_flag_that_goes_on(stopped: Path) -> None:
    done = train("--resume_from", stopped)
    assert "nothing left to do: no better val_top1 than 50.00% in 3 epochs" in done.out
    assert "--early_stop 0" in done.out
    assert len(results(stopped)) == ENDS


@pytest.mark.parametrize(("patience", "epochs"), [(4, 6), (0, 8), (99, 8)])
def test_a_resume_goes_on_with_more_patience_and_keeps_it(stopped: Path, patience: int, epochs: int) -> None:
    train("--resume_from", stopped, "--early_stop", patience)
    assert len(results(stopped)) == epochs
    done = train("--resume_from", stopped)
    assert "nothing left to do" in done.out
    assert len(results(stopped)) == epochs


@pytest.mark.parametrize("step", [2, 6, 8, 14])
def test_a_run_that_was_cut_ends_at_the_same_epoch(stopped: Path, tmp_path: Path, step: int) -> None:
    copy = cut(stopped, step, tmp_path / "cut")
    train("--resume_from", copy)
    assert_same_run(copy, stopped)


def test_epochs_are_counted_from_the_highest_figure_though_the_file_of_a_later_best_is_dropped(
    stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next epoch takes the place of best.safetensors without being better than the first."""
    copy = cut(stopped, EPOCH, tmp_path / "cut")
    monkeypatch.setitem(globals(), "TOP1", [0.1, 0.05, 0.04, 0.03, 0.02, 0.01, 0.0, 0.0])
    assert "dropped   best.safetensors" in train("--resume_from", copy).out
    assert len(results(copy)) == 1 + 3


def test_patience_may_begin_with_a_resume_and_counts_what_was(tmp_path: Path) -> None:
    train(*SMALL, "--keep_snapshots", 99, "--run_dir", tmp_path / "run")
    copy = cut(tmp_path / "run", 4 * EPOCH, tmp_path / "cut")
    train("--resume_from", copy, "--early_stop", 3)
    assert len(results(copy)) == ENDS
