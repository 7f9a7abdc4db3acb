"""A run goes on with the data it was trained on, wherever that lies now; other data is refused unless insisted on."""

import gzip
import shutil
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from program import cut, run, snapshot_path, steps_kept, train
from shards import class_names
from test_classes import make_parquet, rename

from stream.inventory import Inventory, describe_changes
from stream.local import LocalDataset
from training import snapshot

pytestmark = pytest.mark.usefixtures("small_model")

FLAGS = ("--model", "resnet18", "--image_size", 33, "--batch_size", 16, "--epochs", 2, "--num_workers", 0, "--run_dir")


def make_photos(folder: Path) -> Path:
    """An image folder of two classes with 20 images each to train on and 4 for validation."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 20), ("val", 4)):
        for name in ("cat", "dog"):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (20 + number, 20, 3), np.uint8)
                cv2.imwrite(str(folder / split / name / f"{number:02d}.png"), pixels)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    train("--dataset", "imagefolder", "--data_dir", make_photos(folder / "set"), *FLAGS, folder / "run")
    return folder


@pytest.fixture(scope="module")
def parquet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parquet")
    train("--dataset", "hf", "--dataset_name", make_parquet(folder), *FLAGS, folder / "run")
    return folder


def swap_names(data: Path) -> None:
    for split in ("train", "val"):
        (data / split / "cat").rename(data / split / "cow")
        (data / split / "dog").rename(data / split / "cat")
        (data / split / "cow").rename(data / split / "dog")


def remove_one(data: Path) -> None:
    (data / "val" / "cat" / "00.png").unlink()


def rename_one(data: Path) -> None:
    (data / "train" / "cat" / "00.png").rename(data / "train" / "cat" / "0.png")


def draw_one_anew(data: Path) -> None:
    cv2.imwrite(str(data / "train" / "dog" / "03.png"), np.zeros((9, 9, 3), np.uint8))


def add_two_and_remove_one(data: Path) -> None:
    for name in ("new.png", "newer.png"):
        shutil.copy(data / "train" / "cat" / "00.png", data / "train" / "cat" / name)
    (data / "train" / "dog" / "19.png").unlink()


def move_some(data: Path) -> None:
    """To the other class: nothing is gone."""
    for number in (18, 19):
        (data / "train" / "cat" / f"{number}.png").rename(data / "train" / "dog" / f"cat {number}.png")
    (data / "train" / "dog" / "17.png").rename(data / "train" / "cat" / "elsewhere.png")
    (data / "train" / "dog" / "sub").mkdir()
    (data / "train" / "dog" / "16.png").rename(data / "train" / "dog" / "sub" / "16.png")


def rename_a_class(data: Path) -> None:
    for split in ("train", "val"):
        (data / split / "dog").rename(data / split / "fox")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (swap_names, "other training images, though as many"),
        (remove_one, "7 validation images, not 8 (1 removed)"),
        (rename_one, "other training images, though as many (1 added, 1 removed)"),
        (draw_one_anew, "other training images, though as many"),
        (rename_a_class, "class 1 is dog there and fox here"),
        (rename_a_class, "(20 renamed or moved)"),
        (add_two_and_remove_one, "41 training images, not 40 (2 added, 1 removed)"),
        (move_some, "other training images, though as many (3 added, 3 removed, 1 renamed or moved)"),
    ],
)
def test_an_image_folder_that_was_changed_is_refused(
    photos: Path, tmp_path: Path, change: Callable[[Path], None], told: str
) -> None:
    """By a resume; the folder may lie elsewhere than it did. What an evaluation says of it is in test_evaluate.py."""
    data, copy = Path(shutil.copytree(photos / "set", tmp_path / "set")), cut(photos / "run", 2, tmp_path / "run")
    flags = ("--resume_from", copy, "--data_dir", data)
    assert run(*flags, "--evaluate").status == 0
    change(data)
    done = run(*flags)
    assert (done.status, done.err.count("\n")) == (2, 1), done.err
    assert told in done.err
    assert "give that data again, or go on with this with --override data=changed" in done.err
    assert steps_kept(copy) == [2]
    insisting = train(*flags, "--override", "data=changed")
    assert told in insisting.out
    assert steps_kept(copy) == [2, 4]


def other_names(path: Path) -> None:
    rename(["class 1", "class 0", *class_names(10)[2:]])(path)


def other_rows(path: Path) -> None:
    table = pq.read_table(path)
    pq.write_table(table.take(np.roll(np.arange(len(table)), 7)), path, row_group_size=20)


@pytest.mark.parametrize(
    ("change", "told"),
    [(other_names, "class 0 is class 0 there and class 1 here"), (other_rows, "other training images, though as many")],
)
def test_parquet_files_that_were_changed_are_refused(
    parquet: Path, tmp_path: Path, change: Callable[[Path], None], told: str
) -> None:
    made, copy = parquet / "datasets" / "ILSVRC" / "imagenet-1k", cut(parquet / "run", 2, tmp_path / "run")
    kept = Path(shutil.copytree(made, tmp_path / "kept"))
    try:
        for path in made.glob("data/*"):
            change(path)
        done = run("--resume_from", copy)
        assert (done.status, done.err.count("\n")) == (2, 1), done.err
        assert told in done.err
    finally:
        shutil.rmtree(made)
        shutil.copytree(kept, made)
    train("--resume_from", copy)


def add_rows(folder: Path) -> None:
    table = pq.read_table(folder / "data" / "train-00001-of-00002.parquet")
    more = pa.concat_tables([table, table.slice(0, 3)])
    pq.write_table(more, folder / "data" / "train-00001-of-00002.parquet", row_group_size=20)


def remove_a_file(folder: Path) -> None:
    (folder / "data" / "train-00000-of-00002.parquet").unlink()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (add_rows, "43 training images, not 40 (3 added)"),
        (remove_a_file, "20 training images, not 40 (20 removed)"),
    ],
)
def test_what_changed_in_parquet_files_is_told_in_images(
    parquet: Path, tmp_path: Path, change: Callable[[Path], None], told: str
) -> None:
    made, copy = parquet / "datasets" / "ILSVRC" / "imagenet-1k", cut(parquet / "run", 2, tmp_path / "run")
    kept = Path(shutil.copytree(made, tmp_path / "kept"))
    try:
        change(made)
        done = run("--resume_from", copy)
        assert (done.status, done.err.count("\n")) == (2, 1), done.err
        assert told in done.err
    finally:
        shutil.rmtree(made)
        shutil.copytree(kept, made)


@pytest.mark.parametrize(
    ("before", "now", "told"),
    [
        ({"a": (1, "a")}, {"a": (1, "a"), "b": (1, "b")}, "1 added"),
        ({"x/a": (1, "a"), "x/b": (1, "b")}, {"y/a": (1, "a")}, "1 removed, 1 renamed or moved"),
        ({"x/a": (1, "a")}, {"y/a": (1, "a"), "z/a": (1, "a")}, "1 added, 1 renamed or moved"),
        ({"f": (10, "1")}, {"f": (12, "2")}, "2 added"),
        ({"f": (10, "1"), "g": (5, "1")}, {"f": (10, "2"), "g": (3, "2")}, "2 removed, 10 in files that changed"),
        ({"f": (10, "1")}, {"g": (10, "1")}, "10 renamed or moved"),
        ({"f": (10, "1")}, {"f": (10, "1")}, ""),
    ],
)
def test_changes_are_counted_by_kind(before: Inventory, now: Inventory, told: str) -> None:
    assert describe_changes(before, now) == told


def test_a_run_without_an_inventory_or_with_a_strangers_is_told_less(photos: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(photos / "set", tmp_path / "set"))
    remove_one(data)
    for text in (None, b"x", gzip.compress(b"[1]"), gzip.compress(b'{"a": 3}')):
        copy = cut(photos / "run", 2, tmp_path / f"run {text!r}")
        for path in (copy / "data").glob("*"):
            path.unlink() if text is None else path.write_bytes(text)
        done = run("--resume_from", copy, "--data_dir", data)
        assert (done.status, done.err.count("\n")) == (2, 1), done.err
        assert "7 validation images, not 8; give" in done.err


def test_a_pixel_or_a_label_of_images_in_memory_changes_their_fingerprint() -> None:
    images, labels = np.zeros((3, 4, 4, 3), np.uint8), [0, 1, 0]
    other = images.copy()
    other[1, 2, 3, 0] = 1

    def fingerprint(images: np.ndarray, labels: list[int]) -> str:
        return LocalDataset(images, labels, ["a", "b"]).fingerprint()

    assert fingerprint(images, labels) == fingerprint(images.copy(), labels)
    assert len({fingerprint(images, labels), fingerprint(other, labels), fingerprint(images, [0, 1, 1])}) == 3


def test_an_override_of_the_data_itself_needs_no_second_one(tmp_path: Path) -> None:
    flags = ("--max_samples", 64, "--batch_size", 16, "--epochs", 2, "--run_dir", tmp_path / "run")
    train(*flags)
    copy = cut(tmp_path / "run", 4, tmp_path / "cut")
    done = train("--resume_from", copy, "--override", "max_samples=65")
    assert "data      65 training images, not 64" in done.out


def test_a_snapshot_of_an_earlier_version_is_refused_in_one_line(tmp_path: Path) -> None:
    """The order of samples and the crops were others then."""
    train("--max_samples", 32, "--batch_size", 16, "--epochs", 1, "--run_dir", tmp_path / "run")
    path = snapshot_path(tmp_path / "run", 2)
    path.write_bytes(path.read_bytes().replace(snapshot.FORMAT.encode(), b"imagenet1k-snapshot-2", 1))
    done = run("--resume_from", path)
    assert (done.status, done.err.count("\n")) == (5, 1), done.err
    assert "was saved by another version of this program" in done.err
