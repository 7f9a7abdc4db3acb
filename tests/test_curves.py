"""Training neither waits for the picture of its curves nor ends with it."""

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from logs_of_runs import write_logs
from matplotlib.figure import Figure
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
        pictures.curves(1)
    free.set()
    pictures.close()
    assert len(drawn) == 2


def test_short_epochs_are_not_spent_on_drawing_and_the_last_one_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[float] = []

    def draw(folder: Path) -> None:
        time.sleep(0.02)
        drawn.append(time.monotonic())

    monkeypatch.setattr(visualization, "plot_curves", draw)
    pictures, told = RunPictures(tmp_path, [], lambda path, step: steps.append(step)), list(range(1, 101))
    steps: list[int] = []
    for step in told:
        pictures.curves(step)
        time.sleep(0.005)
    pictures.close()
    assert len(drawn) < 10
    assert (steps[0], steps[-1]) == (1, 100)


def test_a_picture_of_a_long_run_looks_at_some_of_its_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, loads = [0], json.loads
    folder = write_logs(tmp_path / "run", epochs=2, steps=25_000)

    def counted(text: str) -> Any:
        read[0] += 1
        return loads(text)

    monkeypatch.setattr(json, "loads", counted)
    assert visualization.plot_curves(folder).stat().st_size > 10_000
    assert 0.9 * CURVE_POINTS <= read[0] <= 2 * CURVE_POINTS


@pytest.mark.parametrize(("losses", "scale"), [((0.5, 0.9, 2.0), "linear"), ((0.05, 0.9, 18.0), "log")])
def test_no_loss_of_an_epoch_lies_outside_the_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, losses: tuple[float, ...], scale: str
) -> None:
    """A validation loss that leaves the training loss behind is the sign of overfitting."""
    folder = write_logs(tmp_path / "run", epochs=3, done=0)
    rows = (f"{epoch},{20 * epoch},0.5,0.5,{loss},0.5,0.9,0.1,99,1\n" for epoch, loss in enumerate(losses, 1))
    with open(folder / "results.csv", "a") as file:
        file.writelines(rows)
    figures: list[Figure] = []
    monkeypatch.setattr(visualization, "save_picture", lambda figure, path: figures.append(figure))
    visualization.plot_curves(folder)
    axes = figures[0].axes[0]
    low, high = axes.get_ylim()
    assert low <= min(losses)
    assert max(losses) <= high
    assert axes.get_yscale() == scale
    assert any("best 50.00% (epoch 1)" in axes.get_title() for axes in figures[0].axes)
