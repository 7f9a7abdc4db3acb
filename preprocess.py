"""Transforms, and `get_data_loaders`, which turns a `Config` into loaders.

`HuggingFaceImageNetDataset` and `StreamingDataLoader` can be imported from here too.
"""

import contextlib
from collections.abc import Callable, Collection, Mapping, Sequence
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
from errors import DataError, UsageError, printable
from stream import inventory
from stream.augment import Augment, BatchAugment, Chain
from stream.auto_augment import AutoAugment
from stream.dataset import Cache, HuggingFaceImageNetDataset, pin_revision
from stream.erasing import RandomErasing
from stream.image_folders import open_image_folder
from stream.images import AlbumentationsAdapter, RandomResizedCropAdapter, SquareOfStrip
from stream.jitter import ColorJitter
from stream.labels import CLASSES_TOLD, NUMBER, first_difference, without_images
from stream.loader import Loader, StreamingDataLoader
from stream.local import LocalDataset, load_cifar, load_digits, load_mnist
from stream.order import epoch_order
from stream.picks import fair_sample, hold_out, places
from stream.resident import ResidentLoader
from stream.retry import Network
from stream.source import ImageDataset
from stream.synthetic import make_dummy_data

__all__ = ["AlbumentationsAdapter", "HuggingFaceImageNetDataset", "StreamingDataLoader", "get_data_loaders"]

EVAL_BATCH = 256
RESIZE_RATIO = 256 / 224


def train_transform(config: Config) -> AlbumentationsAdapter:
    """A random crop to (image_size, image_size); flips happen on the device, see `batch_augment`."""
    size = config.image_size
    if config.crop == "fixed":
        return AlbumentationsAdapter(SquareOfStrip(at_random=True), _resize_short_side(size), A.RandomCrop(size, size))
    return RandomResizedCropAdapter(A.RandomResizedCrop((size, size), scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3)))


def eval_transform(config: Config) -> AlbumentationsAdapter:
    """Resize the short side to 256/224 of eval_size, with antialiasing, then crop the centre."""
    size = config.eval_size
    return AlbumentationsAdapter(SquareOfStrip(at_random=False), _resize_short_side(size), A.CenterCrop(size, size))


def batch_augment(config: Config) -> Chain:
    """What the device does to training batches: flips (not of numerals), padded crops (small sets), cutout; colour
    jitter, automatic augmentation and erasing where asked for. Raises UsageError.
    """
    padding = round(config.image_size / 8) if config.is_small else 0
    flip = config.dataset not in ("digits", "mnist")
    parts: list[BatchAugment] = [Augment(config.seed, flip=flip, padding=padding, cutout=config.cutout)]
    try:
        if config.color_jitter:
            amounts = [float(part) for part in config.color_jitter.split(",")]
            parts.append(ColorJitter(config.seed, *(amounts * 3 if len(amounts) == 1 else amounts)))
        if config.auto_augment:
            parts.append(AutoAugment.parse(config.auto_augment, config.seed))
    except (TypeError, ValueError) as error:
        raise UsageError(f"--auto_augment or --color_jitter: {error}") from error
    if config.random_erasing:
        parts.append(RandomErasing(config.seed, config.random_erasing))
    return Chain(tuple(parts))


def _resize_short_side(size: int) -> A.SmallestMaxSize:
    return A.SmallestMaxSize(round(size * RESIZE_RATIO), interpolation=cv2.INTER_LINEAR, area_for_downscale="image")


@dataclass(frozen=True)
class Data:
    """The loaders of one process, and the settings that suit them; `notes` tell what was passed over or derived."""

    train: Loader
    val: Loader
    config: Config
    notes: list[str]

    @property
    def classes(self) -> list[str]:
        """The names of the classes, which labels count."""
        return self.train.dataset.classes  # type: ignore[no-any-return]

    @property
    def revision(self) -> str | None:
        """The commit of the Hub dataset, None for local data."""
        return getattr(self.train.dataset, "revision", None)

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """What a snapshot records about the data, so that a resume can compare it."""
        return {name: {"images": len(part), "digest": part.fingerprint()} for name, part in self._sets.items()}

    def changes(self, saved: Mapping[str, Any], folder: Path | None) -> list[str]:
        """A line for each difference from the data described in `saved`, the state of a snapshot of a run's folder."""
        renamed = first_difference(saved["classes"], self.classes)
        lines = [renamed] if renamed else []
        for name, now in self.fingerprint.items():
            before: dict[str, Any] = saved["data"][name]
            if before == now:
                continue
            kept = inventory.load(folder, str(before["digest"])) if folder else {}
            told = inventory.describe_changes(kept, self._sets[name].inventory()) if kept else ""
            if before["images"] != now["images"]:
                line = f"{now['images']:,} {name} images, not {before['images']:,}"
            else:
                line = f"other {name} images, though as many"
            lines.append(f"{line} ({told})" if told else line)
        return lines

    def keep_inventory(self, folder: Path) -> None:
        """Write down in a run's folder which files the data has, for a resume; a disk that refuses costs only that."""
        with contextlib.suppress(OSError):
            for name, part in self._sets.items():
                inventory.save(folder, self.fingerprint[name]["digest"], part.inventory())

    @property
    def _sets(self) -> dict[str, ImageDataset]:
        return {"training": self.train.dataset, "validation": self.val.dataset}


def get_data_loaders(
    config: Config,
    device: torch.device,
    revision: str | None = None,
    classes: Sequence[str] | None = None,
    derived: Collection[str] = (),
) -> Data:
    """This process's training and evaluation loaders.

    `revision` pins the commit of a resumed run, `classes` are those of its model. Of the settings, the `derived` ones
    are fitted to a small set. Raises DataError when the data is missing, unreachable or unusable, UsageError when the
    batch size does not fit it.
    """
    world = distributed.world_size()
    train, val, window, notes = _open_sets(config, revision, classes)
    config, lines = config.fitted(len(train), derived, world)
    config.check_world(world)
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
    if not len(train_loader) and not config.evaluate:
        batch = f"--batch_size {config.batch_size}"
        if "batch_size" in derived:
            batch = f"a batch of {config.batch_size} (for --streams {config.streams}, --accumulate_steps "
            batch += f"{config.accumulate_steps} and {world} ranks)"
        raise UsageError(f"{batch} is larger than the training set of {len(train)} images; use less")
    val_loader = make(
        val,
        eval_transform(config),
        order=lambda epoch: [val_ids],
        batch_size=eval_batch,
        image_size=config.eval_size,
        train=False,
    )
    data = Data(train_loader, val_loader, config, [*(f"note      {line}" for line in notes), *lines])
    facts: dict[str, Any] = {"the steps of an epoch": len(train_loader), "the images": (len(train), len(val))}
    facts |= {"the classes": data.classes, "the dataset's commit": data.revision}
    distributed.require_agreement(facts, DataError)
    return data


def _open_sets(
    config: Config, revision: str | None, classes: Sequence[str] | None
) -> tuple[ImageDataset, ImageDataset, int, list[str]]:
    """The two datasets, of the same classes; the shuffle window to use over the first; and what is to be told."""
    train, val, window = _load(config, revision)
    train, val, notes = _agree(train, val, classes, config.dataset_id)
    if not len(val):
        raise DataError(
            f"validation in {config.dataset_id} has no images of the sampled classes; use more --max_samples"
        )
    if config.max_samples:
        names = _sampled(train, config.max_samples)
        told = "unknown how many" if names is None else f"{len(names):,}"
        notes.append(f"a sample of {len(train):,} training images, of {told} of the {len(train.classes):,} classes")
    elif getattr(train, "revision", None) is None and (absent := without_images(train)):
        notes.append(f"no image of {len(absent)} of the {len(train.classes):,} classes: {_few(absent)}")
    told_of_val = [note for note in val.notes if CLASSES_TOLD not in note]  # training's classes are what counts
    return train, val, window, list(dict.fromkeys([*train.notes, *told_of_val, *notes]))


def _agree(
    train: ImageDataset, val: ImageDataset, classes: Sequence[str] | None, where: str
) -> tuple[ImageDataset, ImageDataset, list[str]]:
    """Both sets with labels that count the same classes: those of training, or those of a model.

    Raises DataError for a class that these do not have, and if there is but one.
    """
    if classes is not None:
        train = _renumbered(train, _seated(train.classes, classes))
    if len(train.classes) < 2:
        why = f"{where} has one class, {printable(train.classes[0])}, but a classifier needs two"
        raise DataError("; ".join([why, *train.notes]))
    trained, validated = {*train.classes}, {*val.classes}
    lacking = [name for name in train.classes if name not in validated]
    unknown = [name for name in val.classes if name not in trained]
    if all(map(NUMBER.fullmatch, unknown)):  # numbers up to the highest that is there
        absent = {*without_images(val)} if unknown else set()
        unknown = [name for name in unknown if name not in absent]
    if unknown:
        raise DataError(
            f"validation in {where} has the class {printable(unknown[0])}, which training has not (it has "
            f"{_few(train.classes)}); make their names the same"
        )
    notes = [f"validation lacks {len(lacking)} of the {len(train.classes)} classes: {_few(lacking)}"] if lacking else []
    return train, _renumbered(val, train.classes), notes


def _seated(names: Sequence[str], classes: Sequence[str]) -> Sequence[str]:
    """A model's classes, with new ones in place of those that are gone; `names` as they are if these do not fit."""
    known, there = {*classes}, {*names}
    new, gone = [name for name in names if name not in known], [name for name in classes if name not in there]
    if len(new) > len(gone):
        return names
    instead = dict(zip(gone, new, strict=False))
    return [instead.get(name, name) for name in classes]


def _renumbered(dataset: ImageDataset, classes: Sequence[str]) -> ImageDataset:
    return dataset if dataset.classes == [*classes] else dataset.with_classes(classes)


def _few(names: Sequence[str]) -> str:
    return ", ".join(map(printable, names[:5])) + (", ..." if len(names) > 5 else "")


def _load(config: Config, revision: str | None) -> tuple[ImageDataset, ImageDataset, int]:
    """The two datasets, and the shuffle window to use over the first."""
    limit, share = config.max_samples, config.val_share
    val_splits = [config.val_split] if config.val_split else VAL_SPLITS
    if config.dataset in ("imagenet1k", "hf"):
        open_split = _opener(config, revision)
        at_first = int(limit / (1 - share)) if limit and share else limit
        streamed = open_split(split=[config.train_split], max_samples=at_first)
        if share:
            return *_held_out(streamed, share, config), config.shuffle_window
        val = open_split(split=val_splits, max_samples=limit, like=_sampled(streamed, limit))
        return streamed, val, config.shuffle_window
    whole, other = _open_local(config, val_splits)
    if other is None or share:
        parts = _held_out(whole, share or 0.0, config)
        return *parts, len(parts[0])
    train = whole.take(fair_sample(whole.all_labels(), limit))
    wanted = places(other.classes, _sampled(train, limit))
    return train, other.take(fair_sample(other.all_labels(), limit, wanted)), len(train)


def _sampled(train: ImageDataset, limit: int | None) -> list[str] | None:
    """The classes that a sample to train on has, which validation is to have too; None for a set that is no sample."""
    labels = train.all_labels() if limit else None
    return None if labels is None else [train.classes[number] for number in np.unique(labels)]


def _held_out(whole: ImageDataset, share: float, config: Config) -> tuple[ImageDataset, ImageDataset]:
    """Training and validation from one set. Raises DataError."""
    labels, limit = whole.all_labels(), config.max_samples
    if labels is None:
        raise DataError(f"{config.dataset_id} tells its labels only with the images; give --val_split, not --val_share")
    train_ids, val_ids = hold_out(labels, map(whole.name, range(len(whole))), share, config.seed)
    if not len(val_ids):
        more = " or more --max_samples" if limit else ""
        raise DataError(f"--val_share {share:g} of {len(labels)} images is none; give a larger share{more}")
    if limit is None:
        return whole.take(train_ids), whole.take(val_ids)
    validated = np.unique(labels[val_ids])  # a sample of fewer images than classes is of some that can be validated
    wanted = validated if limit < len(np.unique(labels[train_ids])) else None
    train_ids = train_ids[fair_sample(labels[train_ids], limit, wanted)]
    val_limit = max(1, min(limit, int(limit / (1 - share)) - limit))
    val_ids = val_ids[fair_sample(labels[val_ids], val_limit, np.unique(labels[train_ids]))]
    return whole.take(train_ids), whole.take(val_ids)


def _open_local(config: Config, val_splits: list[str]) -> tuple[LocalDataset, LocalDataset | None]:
    folder = Path(config.data_dir or "data")
    if config.dataset == "digits":
        return load_digits()
    if config.dataset == "imagefolder":
        labels = Path(config.val_labels) if config.val_labels else None
        parts = open_image_folder(folder, config.train_split, val_splits, labels, whole=bool(config.val_share))
        for part in parts:
            if part is not None and part.root is not None and part.root.is_relative_to(folder):
                part.root = folder  # that an image of one split is told from its namesake in the other
        return parts
    return (load_mnist if config.dataset.endswith("mnist") else load_cifar)(config.dataset, folder)


def _opener(config: Config, revision: str | None) -> Callable[..., HuggingFaceImageNetDataset]:
    """Opens a split of a dataset on the Hub or of a local folder, at one commit."""
    source, cache = str(make_dummy_data()) if config.dummy_data else config.dataset_id, _cache(config)
    asked = revision or config.dataset_revision
    network = Network(config.stall_timeout, 60 * config.network_patience)
    return partial(
        HuggingFaceImageNetDataset.open,
        source,
        revision=distributed.from_rank0(lambda: pin_revision(source, asked, cache, network)),
        configuration=config.dataset_config,
        image_column=config.image_column,
        label_column=config.label_column,
        num_classes=config.num_classes,
        block_bytes=config.block_mb * 2**20,
        streaming=not config.no_streaming,
        network=network,
        cache=cache,
    )


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
