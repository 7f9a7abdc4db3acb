"""MNIST and Fashion-MNIST are read from IDX files, wherever they lie, or refused in one line."""

import gzip
from pathlib import Path

import numpy as np
import pytest
from program import run, train

from config import resolve
from errors import DataError
from preprocess import batch_augment
from stream.augment import Augment
from stream.local import load_mnist

DEBIAN = Path("/usr/share/datasets/fashion-mnist")


def idx(values: np.ndarray) -> bytes:
    """An IDX file of bytes: two zeros, the type, the dimensions, their sizes, the values."""
    return bytes((0, 0, 8, values.ndim)) + np.array(values.shape, ">u4").tobytes() + values.tobytes()


def write(folder: Path, packed: bool, images: int = 64) -> np.ndarray:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (images, 28, 28), np.uint8)
    labels = (np.arange(images) % 10).astype(np.uint8)
    for part in ("train", "t10k"):
        for name, values in ((f"{part}-images-idx3-ubyte", pixels), (f"{part}-labels-idx1-ubyte", labels)):
            data = gzip.compress(idx(values)) if packed else idx(values)
            (folder / (f"{name}.gz" if packed else name)).write_bytes(data)
    return pixels


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    ("name", "where"), [("mnist", "MNIST/raw"), ("fashion_mnist", "FashionMNIST/raw"), ("mnist", "")]
)
def test_the_pixels_and_labels_are_those_of_the_files(name: str, where: str, packed: bool, tmp_path: Path) -> None:
    pixels = write(tmp_path / "data" / where, packed)
    for part in load_mnist(name, tmp_path / "data"):
        assert np.array_equal(np.asarray(part.images), np.repeat(pixels[..., None], 3, axis=3))
        assert part.labels == [number % 10 for number in range(64)]
        assert len(part.classes) == 10
    assert load_mnist(name, tmp_path / "data")[0].classes[9] == ("9 - nine" if name == "mnist" else "Ankle boot")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: b"",
        lambda data: data[:40],
        lambda data: bytes(16) + data[16:],
        lambda data: gzip.compress(data),
    ],
    ids=["empty", "cut", "zeros", "gzip"],
)
def test_a_damaged_file_is_refused_in_one_line(spoil: object, tmp_path: Path) -> None:
    write(tmp_path / "data", packed=False)
    path = tmp_path / "data" / "train-labels-idx1-ubyte"
    path.write_bytes(spoil(path.read_bytes()))  # type: ignore[operator]
    with pytest.raises(DataError, match=r"labels-idx1|reshape") as caught:
        load_mnist("mnist", tmp_path / "data")
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("small_model")
def test_a_run_trains_on_the_files_and_one_without_them_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "data", packed=True)
    flags = ("--dataset", "fashion_mnist", "--data_dir", tmp_path / "data", "--batch_size", 32, "--epochs", 1)
    done = train(*flags, "--run_dir", tmp_path / "run")
    assert "fashion_mnist: 64 for training, 64 for validation; 2 steps an epoch" in done.out
    (tmp_path / "data" / "train-labels-idx1-ubyte.gz").unlink()
    refused = run(*flags, "--run_dir", tmp_path / "other")
    assert (refused.status, refused.err.count("\n")) == (3, 1)
    assert "put its four IDX files there" in refused.err


def test_numerals_are_not_mirrored_and_clothes_are_shifted_by_four_pixels() -> None:
    for name, flip, padding in (("mnist", False, 4), ("digits", False, 1), ("fashion_mnist", True, 4)):
        assert batch_augment(resolve({"dataset": name})).parts == (Augment(0, flip=flip, padding=padding),)


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_debians_files_are_the_published_ones() -> None:
    train_set, val_set = load_mnist("fashion_mnist", DEBIAN)
    assert (len(train_set), len(val_set)) == (60_000, 10_000)
    assert [np.bincount(part.labels).tolist() for part in (train_set, val_set)] == [[6000] * 10, [1000] * 10]
