"""Transforms, the local datasets, and `get_data_loaders`, which turns a `Config` into batches.

`HuggingFaceImageNetDataset` and `StreamingDataLoader` are exposed here too.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import albumentations as A
import cv2
import numpy as np
import torch
import xxhash
from filelock import FileLock

import distributed
from augment import Augment
from config import Config
from dummy import make_dummy_data
from durable import read_small
from errors import DataError, UsageError
from loader import ImageDataset, Loader, StreamingDataLoader
from network import Network
from parquet import first_difference
from pictures import AlbumentationsAdapter, EncodedImage, RandomResizedCropAdapter
from resident import ResidentLoader
from streaming import Cache, HuggingFaceImageNetDataset, epoch_order, pick_blocks, pin_revision

__all__ = ["AlbumentationsAdapter", "HuggingFaceImageNetDataset", "StreamingDataLoader", "get_data_loaders"]

EVAL_BATCH = 256
FILES_READ = 256
RESIZE_RATIO = 256 / 224


def train_transform(config: Config) -> AlbumentationsAdapter:
    """A random crop to (image_size, image_size); flips are left to the device, see `batch_augment`."""
    size = config.image_size
    if config.crop == "fixed":
        return AlbumentationsAdapter(_resize_short_side(size), A.RandomCrop(size, size))
    return RandomResizedCropAdapter(A.RandomResizedCrop((size, size), scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3)))


def eval_transform(config: Config) -> AlbumentationsAdapter:
    """The middle of the image: short side to 256/224 of eval_size, with antialiasing, then a centre crop."""
    size = config.eval_size
    return AlbumentationsAdapter(_resize_short_side(size), A.CenterCrop(size, size))


def batch_augment(config: Config) -> Augment:
    """What the device does to training batches: flips (not of digits), padded crops of small sets, cutout if asked."""
    padding = config.image_size // 8 if config.is_small else 0
    return Augment(config.seed, flip=config.dataset != "digits", padding=padding, cutout=config.cutout)


def _resize_short_side(size: int) -> A.SmallestMaxSize:
    return A.SmallestMaxSize(round(size * RESIZE_RATIO), interpolation=cv2.INTER_LINEAR, area_for_downscale="image")


class LocalDataset:
    """Images in memory or in files: every sample is a block of its own, and reading needs no preparation.

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
        """A digest of labels and pixels; of files the names, and the contents of FILES_READ spread evenly."""
        digest = xxhash.xxh3_128(np.array(self.labels, "<i8").tobytes())
        spread = -(-len(self) // FILES_READ)
        for number, image in enumerate(self.images):
            if not isinstance(image, Path):
                digest.update(image.tobytes())
                continue
            digest.update(os.fsencode(os.sep.join(image.parts[-2:])))  # a folder that was moved is still the same
            if number % spread == 0:
                digest.update(bytes(self.read(number)[0]))
        return digest.hexdigest()

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
    """scikit-learn's 1,797 handwritten digits of 8x8 pixels, a fifth of them held out, evenly by class."""
    import sklearn.datasets
    from sklearn.model_selection import train_test_split

    digits = sklearn.datasets.load_digits()
    images = np.repeat((digits.images * (255 / 16)).round().astype(np.uint8)[..., None], 3, axis=-1)
    labels = digits.target
    train, val = train_test_split(np.arange(len(labels)), test_size=0.2, random_state=0, stratify=labels)
    classes = [str(name) for name in digits.target_names]
    return tuple(LocalDataset(images[part], labels[part].tolist(), classes) for part in (train, val))  # type: ignore[return-value]


def load_cifar(name: str, folder: Path) -> tuple[LocalDataset, LocalDataset]:
    """CIFAR-10 or -100 in torchvision's files, downloaded into `folder` if they are not there. Raises DataError."""
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
    """A dataset of torchvision's; where its files are not whole, one process downloads them and others wait for it."""
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


@dataclass(frozen=True)
class Data:
    """The loaders of one process, the class names, and the commit of the Hub dataset they are read from."""

    train: Loader
    val: Loader
    classes: list[str]
    revision: str | None

    def fingerprint(self) -> dict[str, Any]:
        """What a snapshot keeps of the data, to compare it with the data of a resume."""
        parts = {"training": self.train.dataset, "validation": self.val.dataset}
        return {name: {"images": len(part), "digest": part.fingerprint()} for name, part in parts.items()}

    def changes(self, saved: Mapping[str, Any]) -> list[str]:
        """What differs from the data of the run that left this state of a snapshot, a line each."""
        renamed = first_difference(saved["classes"], self.classes)
        lines = [f"{renamed}, the snapshot's there, this data's here"] if renamed else []
        for name, now in self.fingerprint().items():
            before = saved["data"][name]
            if before["images"] != now["images"]:
                lines.append(f"{now['images']:,} {name} images, not {before['images']:,}")
            elif before["digest"] != now["digest"]:
                lines.append(f"other {name} images, though as many")
        return lines


def get_data_loaders(config: Config, device: torch.device, revision: str | None = None) -> Data:
    """This process's training and evaluation loaders. `revision` pins the commit of a run that is resumed.

    Raises DataError when the data is missing, unreachable or of no use, UsageError when the batch does not fit it.
    """
    world = distributed.world_size()
    config.check_world(world)
    train, val, window = _load(config, revision)
    problem = first_difference(train.classes[: len(val.classes)], val.classes)  # a set may lack the last classes
    if problem:
        raise DataError(
            f"validation has other classes than training in {config.dataset_id}: {problem}; make them the same"
        )
    if len(train.classes) < 2:
        raise DataError(f"{config.dataset_id} has one class; a classifier needs two")
    batch_size, eval_batch = config.batch_size // world, min(config.batch_size // config.accumulate_steps, EVAL_BATCH)
    val_ids = _rank_share(len(val), eval_batch)

    def make(dataset: Any, transform: AlbumentationsAdapter, **options: Any) -> Loader:
        if config.is_small:
            return ResidentLoader(dataset, device=device, **options)
        return StreamingDataLoader(
            dataset,
            transform,
            device=device,
            seed=config.seed,
            num_workers=config.num_workers,
            max_bad_fraction=config.max_bad_fraction,
            **options,
        )

    train_loader = make(
        train,
        train_transform(config),
        order=partial(_rank_order, train.block_rows, config.seed, config.streams, window),
        batch_size=batch_size,
        image_size=config.image_size,
        train=True,
        ranks=world,
        augment=batch_augment(config),
    )
    if not len(train_loader):
        raise UsageError(
            f"--batch_size {config.batch_size} is larger than the training set of {len(train)} images; use less"
        )
    val_loader = make(
        val,
        eval_transform(config),
        order=lambda epoch: [val_ids],
        batch_size=eval_batch,
        image_size=config.eval_size,
        train=False,
    )
    data = Data(train_loader, val_loader, train.classes, getattr(train, "revision", None))
    facts = {"the steps of an epoch": len(train_loader), "the images": (len(train), len(val))}
    facts |= {"the classes": data.classes, "the dataset's commit": data.revision}
    distributed.require_agreement(facts, DataError)
    return data


def _load(config: Config, revision: str | None) -> tuple[ImageDataset, ImageDataset, int]:
    """The two datasets, and the shuffle window to use over the first."""
    if config.dataset in ("imagenet1k", "hf"):
        source, cache = str(make_dummy_data()) if config.dummy_data else config.dataset_id, _cache(config)
        asked = revision or config.dataset_revision
        open_split = partial(
            HuggingFaceImageNetDataset,
            source,
            revision=distributed.from_rank0(lambda: pin_revision(source, asked, cache)),
            image_column=config.image_column,
            label_column=config.label_column,
            num_classes=config.num_classes,
            block_bytes=config.block_mb * 2**20,
            max_samples=config.max_samples,
            streaming=not config.no_streaming,
            network=Network(config.stall_timeout, 60 * config.network_patience),
            cache=cache,
        )
        train = open_split(split=[config.train_split])
        val = open_split(split=[config.val_split] if config.val_split else VAL_SPLITS)
        return train, val, config.shuffle_window
    folder = Path(config.data_dir or "data")
    if config.dataset == "digits":
        parts = load_digits()
    elif config.dataset == "imagefolder":
        parts = load_image_folder(folder)
    else:
        parts = load_cifar(config.dataset, folder)
    local_train, local_val = (part.take(config.max_samples) for part in parts)
    return local_train, local_val, len(local_train)


def _cache(config: Config) -> Cache | None:
    if config.cache_dir is None:
        return None
    limit = None if config.cache_limit_gb is None else round(config.cache_limit_gb * 1e9)
    return Cache(Path(config.cache_dir), limit, config.cache_short_side)


VAL_SPLITS = ["validation", "val", "valid", "test"]


def _rank_order(block_rows: np.ndarray, seed: int, streams: int, window: int, epoch: int) -> list[np.ndarray]:
    share = streams // distributed.world_size()
    first = distributed.rank() * share
    return epoch_order(block_rows, epoch, seed, streams, window)[first : first + share]


def _rank_share(images: int, batch: int) -> np.ndarray:
    """The images that this rank evaluates: whole batches, so that no batch depends on the number of ranks."""
    batches = -(-images // batch)
    rank, world = distributed.rank(), distributed.world_size()
    first, last = batches * rank // world, batches * (rank + 1) // world
    return np.arange(first * batch, min(last * batch, images))
