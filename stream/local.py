"""Images in memory or in files: digits, CIFAR and folders of images."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from filelock import FileLock

from errors import DataError
from stream.files import read_small
from stream.images import EncodedImage
from stream.order import pick_blocks

FILES_READ = 256


class LocalDataset:
    """Images in memory or in files: every sample is a block of its own, and nothing is prefetched.

    `images` are uint8 arrays (H, W, 3) or the paths of image files.
    """

    def __init__(
        self, images: "np.ndarray | list[np.ndarray] | list[Path]", labels: list[int], classes: list[str]
    ) -> None:
        self.images = images
        self.labels = labels
        self.classes = classes
        self.block_rows = np.ones(len(labels), np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, limit: int | None) -> "LocalDataset":
        """At most `limit` samples, spread evenly."""
        picks, _ = pick_blocks(self.block_rows, limit)
        return LocalDataset([self.images[i] for i in picks], [self.labels[i] for i in picks], self.classes)  # type: ignore[arg-type]

    def fingerprint(self) -> str:
        """A digest of labels and pixels; for files, of the names and the contents of FILES_READ evenly spread ones."""
        digest = xxhash.xxh3_128(np.array(self.labels, "<i8").tobytes())
        spread = -(-len(self) // FILES_READ)
        for number, image in enumerate(self.images):
            if not isinstance(image, Path):
                digest.update(image.tobytes())
                continue
            digest.update(os.fsencode(os.sep.join(image.parts[-2:])))  # a folder that was moved keeps its digest
            if number % spread == 0:
                digest.update(bytes(self.read(number)[0]))
        return digest.hexdigest()

    should_stop: Callable[[], bool] = staticmethod(lambda: False)

    def reader(self, ids: np.ndarray) -> "LocalDataset":
        return self

    def read(self, sample_id: int) -> tuple[EncodedImage, int]:
        image = self.images[sample_id]
        if isinstance(image, Path):
            try:
                image = read_small(image, most=2**30)
            except OSError:
                image = b""  # not an image either: counted and replaced like any other
        return image, self.labels[sample_id]

    def release(self, ids: np.ndarray) -> None:
        pass

    def close(self) -> None:
        pass


def load_digits() -> tuple[LocalDataset, LocalDataset]:
    """scikit-learn's 1,797 handwritten digits of 8x8 pixels; a fifth is for validation, stratified by class."""
    import sklearn.datasets
    from sklearn.model_selection import train_test_split

    digits = sklearn.datasets.load_digits()
    images = np.repeat((digits.images * (255 / 16)).round().astype(np.uint8)[..., None], 3, axis=-1)
    labels = digits.target
    train, val = train_test_split(np.arange(len(labels)), test_size=0.2, random_state=0, stratify=labels)
    classes = [str(name) for name in digits.target_names]
    return tuple(LocalDataset(images[part], labels[part].tolist(), classes) for part in (train, val))  # type: ignore[return-value]


def load_cifar(name: str, folder: Path) -> tuple[LocalDataset, LocalDataset]:
    """CIFAR-10 or -100 from torchvision's files in `folder`, downloaded if missing. Raises DataError."""
    from torchvision.datasets import CIFAR10, CIFAR100

    kind = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name]
    parts = []
    for train in (True, False):
        try:
            part = _read_or_download(partial(kind, str(folder), train=train), folder / f"{name}.lock")
        except (OSError, RuntimeError) as error:
            raise DataError(
                f"{name} is not in {folder} and cannot be downloaded ({error}); put torchvision's files there"
            ) from error
        parts.append(LocalDataset(part.data, part.targets, part.classes))
    return parts[0], parts[1]


def _read_or_download(kind: Callable[..., Any], lock: Path) -> Any:
    """A torchvision dataset; if its files are incomplete, one process downloads them while the others wait."""
    try:
        return kind(download=False)
    except RuntimeError:
        lock.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(lock):
            return kind(download=True)


def load_image_folder(folder: Path) -> tuple[LocalDataset, LocalDataset]:
    """train/ and val/ with a folder of images for each class. Raises DataError."""
    from torchvision.datasets import ImageFolder

    parts = []
    for split in ("train", "val"):
        if not (folder / split).is_dir():
            raise DataError(f"{folder / split} is not a folder; --data_dir needs train/ and val/ with a folder a class")
        try:
            part = ImageFolder(str(folder / split))
        except (FileNotFoundError, OSError) as error:
            raise DataError(f"{folder / split} has no images in class folders ({error})") from error
        parts.append(LocalDataset([Path(path) for path, _ in part.samples], part.targets, part.classes))
    return parts[0], parts[1]
