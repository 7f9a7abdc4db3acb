"""Training neither waits for the picture of its curves nor ends with it."""

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from program import results, train

import visualization
from visualization import CURVE_POINTS, RunPictures

pytestmark = pytest.mark.usefixtures("small_model")


@pytest.fixture(scope="module", autouse=True)
def unrendered() -> None:
    """These pictures are rendered."""


SMALL = ("--max_samples", 32, "--batch_size", 16, "--num_workers", 0, "--epochs", 3)


def test_training_goes_on_while_a_picture_is_drawn_and_the_last_one_shows_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first picture is finished only once the second epoch's row is written."""
    rows: list[int] = []

    def slowly(folder: Path) -> None:
        limit = time.monotonic() + 60
        while len(results(folder)) < 2:
            assert time.monotonic() < limit
            time.sleep(0.01)
        rows.append(len(results(folder)))

    monkeypatch.setattr(visualization, "plot_curves", slowly)
    train(*SMALL, "--run_dir", tmp_path / "run")
    assert rows[-1] == 3


def test_a_picture_that_cannot_be_drawn_is_warned_of_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(folder: Path) -> None:
        raise ValueError("no such font\nnowhere")

    monkeypatch.setattr(visualization, "plot_curves", fail)
    done = train(*SMALL, "--run_dir", tmp_path / "run")
    assert done.err.count("no such font") == done.err.count("\n") == 1
    assert len(results(tmp_path / "run")) == 3


def test_a_thread_that_draws_is_asked_for_no_more_than_it_can_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free, drawn = threading.Event(), []

    def wait_and_draw(folder: Path) -> None:
        free.wait(60)
        drawn.append(folder)

    monkeypatch.setattr(visualization, "plot_curves", wait_and_draw)
    pictures = RunPictures(tmp_path, [])
    for _ in range(50):
        pictures.curves()
    free.set()
    pictures.close()
    assert len(drawn) == 2


def test_a_picture_of_a_long_run_looks_at_some_of_its_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count, read, loads = 50_000, [0], json.loads
    row = {"loss": 1.0, "lr": 0.1, "momentum": 0.9}
    lines = (json.dumps({"step": step, **row}) for step in range(1, count + 1))
    (tmp_path / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    header = "epoch,step,train_loss,train_top1,val_loss,val_top1,val_top5,lr,images_per_s,seconds"
    (tmp_path / "results.csv").write_text(f"{header}\n1,{count},1,0.5,1,0.5,1,0.1,9,9\n")

    def counted(text: str) -> Any:
        read[0] += 1
        return loads(text)

    monkeypatch.setattr(json, "loads", counted)
    assert visualization.plot_curves(tmp_path).stat().st_size > 10_000
    assert CURVE_POINTS <= read[0] <= 2 * CURVE_POINTS
