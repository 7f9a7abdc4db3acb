"""Images in memory or in files: digits, CIFAR, MNIST and Fashion-MNIST; `folders` finds those of image folders."""

import contextlib
import gzip
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from filelock import FileLock

from errors import DataError
from stream.files import read_small
from stream.images import EncodedImage, UnreadableImage
from stream.labels import numbers_in

FILES_READ = 256


class LocalDataset:
    """Images in memory or in files: every sample is a block of its own, and nothing is prefetched.

    `images` are uint8 arrays (H, W, 3) or the paths of image files, which are told from `root` on. `notes` tell what
    was passed over.
    """

    def __init__(
        self,
        images: "np.ndarray | list[np.ndarray] | list[Path]",
        labels: Sequence[int] | np.ndarray,
        classes: Sequence[str],
        root: Path | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        self.images = images
        self.labels = [int(label) for label in labels]
        self.classes = [*classes]
        self.root = root
        self.notes = [*notes]
        self.block_rows = np.ones(len(labels), np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def all_labels(self) -> np.ndarray:
        """The label (int64) of each sample."""
        return np.array(self.labels, np.int64)

    def take(self, ids: np.ndarray) -> "LocalDataset":
        """The samples with these ids."""
        images = self.images[ids] if isinstance(self.images, np.ndarray) else [self.images[i] for i in ids.tolist()]
        return LocalDataset(images, self.all_labels()[ids], self.classes, self.root, self.notes)

    def with_classes(self, classes: Sequence[str]) -> "LocalDataset":
        """The same samples, whose labels count the classes in this order; those that have a sample are among them."""
        numbers = numbers_in(classes, self.classes)
        return LocalDataset(self.images, numbers[self.all_labels()], classes, self.root, self.notes)

    def name(self, sample_id: int) -> str:
        """The path of an image, or its number in memory."""
        image = self.images[sample_id]
        if not isinstance(image, Path):
            return f"{sample_id}"
        return os.sep.join(image.parts[len(self.root.parts) :]) if self.root else str(image)

    def names(self, sample_ids: np.ndarray) -> Iterator[str]:
        """The same of several images."""
        return map(self.name, sample_ids.tolist())

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
                with contextlib.suppress(UnreadableImage):
                    digest.update(bytes(self.read(number)[0]))
        return digest.hexdigest()

    def inventory(self) -> dict[str, tuple[int, str]]:
        """Of each file: one image, and what it is still called in another folder. Nothing for images in memory."""
        files = [image.relative_to(self.root) for image in self.images if self.root and isinstance(image, Path)]
        return {str(file): (1, file.name) for file in files}

    should_stop: Callable[[], bool] = staticmethod(lambda: False)

    def reader(self, ids: Iterable[np.ndarray]) -> "LocalDataset":
        return self

    def read(self, sample_id: int) -> tuple[EncodedImage, int]:
        image, label = self.images[sample_id], self.labels[sample_id]
        if isinstance(image, Path):
            try:
                return read_small(image, most=2**30), label
            except FileNotFoundError as error:
                raise UnreadableImage("the file is not there any more") from error
            except OSError as error:
                raise UnreadableImage(f"the file cannot be read: {error.strerror}") from error
        return image, label

    def release(self, ids: np.ndarray) -> None:
        pass

    def close(self) -> None:
        pass


def from_arrays(images: np.ndarray, labels: Sequence[int] | np.ndarray, classes: Sequence[str]) -> LocalDataset:
    """A set in memory: uint8 images (N, H, W, 3), or grey ones (N, H, W), and the place of each one's class (N,).

    Raises DataError for arrays of another kind, and for labels that are no places in `classes`.
    """
    images, numbers = np.asarray(images), np.asarray(labels)
    if images.ndim == 3:
        images = np.repeat(images[..., None], 3, axis=-1)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise DataError(f"images are {images.dtype} {images.shape}; they must be uint8 (N, H, W, 3) or (N, H, W)")
    if numbers.shape != images.shape[:1] or not np.isin(numbers, np.arange(len(classes))).all():
        raise DataError(f"labels must be {len(images)} whole numbers from 0 to {len(classes) - 1}, one for each image")
    return LocalDataset(images, numbers, classes)


def from_files(
    samples: Iterable[tuple[Path, str]],
    root: Path | None = None,
    classes: Sequence[str] | None = None,
    notes: Sequence[str] = (),
) -> LocalDataset:
    """A set of image files, each with the name of its class; paths are told, and remembered, from `root` on.

    The `classes` are those that have an image, sorted, if they are not told.
    """
    found = [(Path(path), name) for path, name in samples]
    names = sorted({name for _, name in found}) if classes is None else classes
    numbers = {name: number for number, name in enumerate(names)}
    return LocalDataset([path for path, _ in found], [numbers[name] for _, name in found], names, root, notes)


def load_digits() -> tuple[LocalDataset, LocalDataset]:
    """scikit-learn's 1,797 handwritten digits of 8x8 pixels; a fifth is for validation, stratified by class.

    The images and the split are those of its `load_digits` and `train_test_split(random_state=0)`, without their
    import, which takes nearly as long as PyTorch's. Raises DataError.
    """
    try:
        package = find_spec("sklearn")
        folder = Path(package.origin).parent if package and package.origin else Path()
        table = np.loadtxt(folder / "datasets" / "data" / "digits.csv.gz", np.uint8, delimiter=",")
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise DataError(f"the digits that come with scikit-learn cannot be read ({error}); install it again") from error
    labels, grey = table[:, -1], table[:, :-1].reshape(-1, 8, 8, 1)
    images = np.repeat((grey * (255 / 16)).round().astype(np.uint8), 3, axis=-1)
    classes = [str(label) for label in np.unique(labels)]
    train, val = _split_by_class(labels, -(-len(labels) // 5), np.random.RandomState(0))
    return LocalDataset(images[train], labels[train], classes), LocalDataset(images[val], labels[val], classes)


def _split_by_class(labels: np.ndarray, held_out: int, random: np.random.RandomState) -> tuple[np.ndarray, np.ndarray]:
    """The ids that scikit-learn's StratifiedShuffleSplit draws for training, and those that it holds out."""
    counts = np.bincount(labels)
    kept = _shares(counts, len(labels) - held_out, random)
    held = _shares(counts - kept, held_out, random)
    train, val = [], []
    for label, count in enumerate(counts):
        ids = np.flatnonzero(labels == label)[random.permutation(count)]
        train.append(ids[: kept[label]])
        val.append(ids[kept[label] :][: held[label]])
    return random.permutation(np.concatenate(train)), random.permutation(np.concatenate(val))


def _shares(counts: np.ndarray, wanted: int, random: np.random.RandomState) -> np.ndarray:
    """How many to take of each class: its share of `wanted` rounded down, and one more of those that lose the most."""
    exact = counts / counts.sum() * wanted
    taken = np.floor(exact)
    lost = exact - taken
    for loss in np.unique(lost)[::-1]:
        missing = int(wanted - taken.sum())
        if missing > 0:
            tied = np.flatnonzero(lost == loss)
            taken[random.choice(tied, min(missing, len(tied)), replace=False)] += 1
    return taken.astype(int)


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


def load_mnist(name: str, folder: Path) -> tuple[LocalDataset, LocalDataset]:
    """MNIST or Fashion-MNIST, 70,000 images of 28x28 pixels, from the four IDX files, gzipped or not. Raises DataError.

    They lie in `folder`, as Debian's dataset-fashion-mnist has them, or where torchvision puts them in it, which is
    also where they are downloaded to if they are missing.
    """
    from torchvision.datasets import MNIST, FashionMNIST

    kind = {"mnist": MNIST, "fashion_mnist": FashionMNIST}[name]
    try:
        if not _idx_files(folder, "train-images-idx3-ubyte"):
            folder = folder / kind.__name__ / "raw"
        if not _idx_files(folder, "train-images-idx3-ubyte"):
            _read_or_download(partial(kind, str(folder.parent.parent)), folder.parent.parent / f"{name}.lock")
        parts = [
            LocalDataset(
                np.repeat(_read_idx(folder, f"{part}-images-idx3-ubyte", 3)[..., None], 3, axis=-1),
                _read_idx(folder, f"{part}-labels-idx1-ubyte", 1),
                kind.classes,
            )
            for part in ("train", "t10k")
        ]
    except (OSError, EOFError, RuntimeError, ValueError, zlib.error) as error:
        raise DataError(
            f"{name} is not in {folder}, or damaged, and cannot be downloaded ({error}); put its four IDX files there"
        ) from error
    return parts[0], parts[1]


def _idx_files(folder: Path, name: str) -> list[Path]:
    return [path for path in (folder / name, folder / f"{name}.gz") if path.is_file()]


def _read_idx(folder: Path, name: str, dimensions: int) -> np.ndarray:
    """The uint8 array of an IDX file (http://yann.lecun.com/exdb/mnist). Raises OSError, EOFError, ValueError."""
    (path, *_) = _idx_files(folder, name) or [folder / name]
    data = path.read_bytes()
    if path.suffix == ".gz":
        data = gzip.decompress(data)
    if data[:4] != bytes((0, 0, 8, dimensions)):
        raise ValueError(f"{path} is no IDX file of bytes in {dimensions} dimensions")
    head = 4 + 4 * dimensions
    return np.frombuffer(data, np.uint8, offset=head).reshape(np.frombuffer(data[4:head], ">u4").tolist())


def _read_or_download(kind: Callable[..., Any], lock: Path) -> Any:
    """A torchvision dataset; if its files are incomplete, one process downloads them while the others wait."""
    try:
        return kind(download=False)
    except RuntimeError:
        lock.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(lock):
            return kind(download=True)
