"""Transforms, and `get_data_loaders`, which turns a `Config` into loaders.

`HuggingFaceImageNetDataset` and `StreamingDataLoader` can be imported from here too.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import albumentations as A
import cv2
import numpy as np
import torch

import distributed
from config import Config
from errors import DataError, UsageError
from stream.augment import Augment
from stream.dataset import Cache, HuggingFaceImageNetDataset, pin_revision
from stream.images import AlbumentationsAdapter, RandomResizedCropAdapter
from stream.labels import first_difference
from stream.loader import ImageDataset, Loader, StreamingDataLoader
from stream.local import load_cifar, load_digits, load_image_folder
from stream.order import epoch_order
from stream.resident import ResidentLoader
from stream.retry import Network
from stream.synthetic import make_dummy_data

__all__ = ["AlbumentationsAdapter", "HuggingFaceImageNetDataset", "StreamingDataLoader", "get_data_loaders"]

EVAL_BATCH = 256
RESIZE_RATIO = 256 / 224


def train_transform(config: Config) -> AlbumentationsAdapter:
    """A random crop to (image_size, image_size); flips happen on the device, see `batch_augment`."""
    size = config.image_size
    if config.crop == "fixed":
        return AlbumentationsAdapter(_resize_short_side(size), A.RandomCrop(size, size))
    return RandomResizedCropAdapter(A.RandomResizedCrop((size, size), scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3)))


def eval_transform(config: Config) -> AlbumentationsAdapter:
    """Resize the short side to 256/224 of eval_size, with antialiasing, then crop the centre."""
    size = config.eval_size
    return AlbumentationsAdapter(_resize_short_side(size), A.CenterCrop(size, size))


def batch_augment(config: Config) -> Augment:
    """The augmentation of training batches on the device: flips (not for digits), padded crops (small sets), cutout."""
    padding = config.image_size // 8 if config.is_small else 0
    return Augment(config.seed, flip=config.dataset != "digits", padding=padding, cutout=config.cutout)


def _resize_short_side(size: int) -> A.SmallestMaxSize:
    return A.SmallestMaxSize(round(size * RESIZE_RATIO), interpolation=cv2.INTER_LINEAR, area_for_downscale="image")


@dataclass(frozen=True)
class Data:
    """The loaders of one process, the class names, and the commit of the Hub dataset (None for local data)."""

    train: Loader
    val: Loader
    classes: list[str]
    revision: str | None

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """What a snapshot records about the data, so that a resume can compare it."""
        parts = {"training": self.train.dataset, "validation": self.val.dataset}
        return {name: {"images": len(part), "digest": part.fingerprint()} for name, part in parts.items()}

    def changes(self, saved: Mapping[str, Any]) -> list[str]:
        """A line for each difference from the data described in `saved`, the state of a snapshot."""
        renamed = first_difference(saved["classes"], self.classes)
        lines = [renamed] if renamed else []
        for name, now in self.fingerprint.items():
            before = saved["data"][name]
            if before["images"] != now["images"]:
                lines.append(f"{now['images']:,} {name} images, not {before['images']:,}")
            elif before["digest"] != now["digest"]:
                lines.append(f"other {name} images, though as many")
        return lines


def get_data_loaders(config: Config, device: torch.device, revision: str | None = None) -> Data:
    """This process's training and evaluation loaders. `revision` pins the commit of a resumed run.

    Raises DataError when the data is missing, unreachable or unusable, UsageError when the batch size does not fit it.
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
        network = Network(config.stall_timeout, 60 * config.network_patience)
        open_split = partial(
            HuggingFaceImageNetDataset.open,
            source,
            revision=distributed.from_rank0(lambda: pin_revision(source, asked, cache, network)),
            configuration=config.dataset_config,
            image_column=config.image_column,
            label_column=config.label_column,
            num_classes=config.num_classes,
            block_bytes=config.block_mb * 2**20,
            max_samples=config.max_samples,
            streaming=not config.no_streaming,
            network=network,
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
