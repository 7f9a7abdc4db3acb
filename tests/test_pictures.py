"""What a run draws are pictures, in which there is something to see."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from program import run, train

import run_lr_finder
from visualization import plot_samples

pytestmark = pytest.mark.usefixtures("small_model")


@pytest.fixture(scope="module", autouse=True)
def unrendered() -> None:
    """These pictures are rendered."""


SMALL = ("--max_samples", 48, "--batch_size", 16, "--num_workers", 0)


def assert_can_be_seen(path: Path) -> None:
    image = cv2.imread(str(path))
    assert image is not None
    assert image.std() > 1


def test_a_run_draws_its_samples_its_plan_and_its_curves(tmp_path: Path) -> None:
    done = train(*SMALL, "--epochs", 2, "--plot_schedule", "--run_dir", tmp_path / "run")
    assert "plots/schedule.png" in done.out
    assert sorted(path.name for path in (tmp_path / "run" / "plots").iterdir()) == [
        "curves.png",
        "samples.png",
        "schedule.png",
    ]
    for path in (tmp_path / "run" / "plots").iterdir():
        assert_can_be_seen(path)


def test_few_samples_are_drawn_without_empty_room_beside_them(tmp_path: Path) -> None:
    images = np.full((4, 8, 8, 3), 90, np.uint8)
    picture = cv2.imread(str(plot_samples(images, [0] * 4, ["ant"], tmp_path / "samples.png")))
    assert picture is not None
    assert (picture[:, -picture.shape[1] // 8 :] < 100).any()


def test_the_finder_draws_its_sweep(tmp_path: Path) -> None:
    done = run(*SMALL, "--lr_iter", 16, "--run_dir", tmp_path / "run", entry=run_lr_finder.main)
    assert done.status in (0, 4), done.err
    assert_can_be_seen(tmp_path / "run" / "lr_finder" / "lr_finder.png")
