"""Transforms, and `get_data_loaders`, which turns a `Config` into loaders.

`HuggingFaceImageNetDataset` and `StreamingDataLoader` can be imported from here too.
"""

import contextlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import distributed
from beforehand import require_trainable
from choices import AUGMENTATIONS, DATASETS
from config import Config
from errors import DataError, UsageError
from flags import listed
from open_data import open_sets, with_val_share
from registry import naming
from stream import inventory
from stream.augment import Augment, BatchAugment, Chain, Registered
from stream.auto_augment import AutoAugment
from stream.erasing import RandomErasing
from stream.jitter import ColorJitter
from stream.labels import first_difference
from stream.loader import Loader, StreamingDataLoader
from stream.order import epoch_order, repeated
from stream.pipelines import Pipeline, centre_crop, fixed_crop, resized_crop
from stream.resident import ResidentLoader
from stream.source import ImageDataset

if TYPE_CHECKING:
    from stream.dataset import HuggingFaceImageNetDataset
    from stream.transforms import AlbumentationsAdapter

__all__ = ["AlbumentationsAdapter", "HuggingFaceImageNetDataset", "StreamingDataLoader", "get_data_loaders"]

EVAL_BATCH = 256
RESIZE_RATIO = 256 / 224


def __getattr__(name: str) -> Any:
    """The two classes of others, imported when they are asked for: their libraries take a second each."""
    if name == "AlbumentationsAdapter":
        from stream.transforms import AlbumentationsAdapter

        return AlbumentationsAdapter
    if name == "HuggingFaceImageNetDataset":
        from stream.dataset import HuggingFaceImageNetDataset

        return HuggingFaceImageNetDataset
    raise AttributeError(f"module {__name__} has no attribute {name}")


def train_transform(config: Config, size: int | None = None) -> Pipeline:
    """A random crop to a square of `size` pixels, image_size by default; `batch_augment` does the rest."""
    size = size or config.image_size
    if config.crop == "fixed":
        return Pipeline(fixed_crop, round(size * RESIZE_RATIO), size)
    return Pipeline(resized_crop, size, config.train_interpolation)


def eval_transform(config: Config) -> Pipeline:
    """Resize the short side to 256/224 of eval_size (or as eval_crop_pct says), with antialiasing, then cut the centre.

    With Pillow's interpolations the sides and the place are torchvision's.
    """
    size, share = config.eval_size, config.eval_crop_pct
    short = int(size / share) if share else round(size * RESIZE_RATIO)
    return Pipeline(centre_crop, short, size, config.eval_interpolation)


def batch_augment(config: Config) -> Chain:
    """What the device does to training batches, by the functions of `CHAIN` in their order. Raises UsageError."""
    try:
        return Chain(tuple(part for parts in CHAIN for part in parts(config)))
    except (TypeError, ValueError) as error:
        raise UsageError(f"--auto_augment or --color_jitter: {error}") from error


def _moves(config: Config) -> list[BatchAugment]:
    padding = round(config.image_size / 8) if config.is_small else 0
    return [Augment(config.seed, flip=DATASETS[config.dataset].flips, padding=padding, cutout=config.cutout)]


def _colours(config: Config) -> list[BatchAugment]:
    if not config.color_jitter:
        return []
    amounts = [float(part) for part in config.color_jitter.split(",")]
    return [ColorJitter(config.seed, *(amounts * 3 if len(amounts) == 1 else amounts))]


def _policy(config: Config) -> list[BatchAugment]:
    if not config.auto_augment:
        return []
    interpolation = None if config.auto_augment.startswith("rand") else "bilinear"  # as torchvision's reference
    return [AutoAugment.parse(config.auto_augment, config.seed, interpolation)]


def _registered(config: Config) -> list[BatchAugment]:
    names = listed(config.augment)
    return [Registered(config.seed, name, _one_line(name), AUGMENTATIONS[name].draws) for name in names]


def _one_line(name: str) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """A registered augmentation, whose errors are a line; where memory is short, smaller passes may do."""

    def change(images: torch.Tensor, random: torch.Tensor) -> torch.Tensor:
        with naming("--augment", name, passing=lambda error: "memory" in str(error)):
            return AUGMENTATIONS[name].function(images, random)

    return change


def _erasing(config: Config) -> list[BatchAugment]:
    return [RandomErasing(config.seed, config.random_erasing)] if config.random_erasing else []


CHAIN: tuple[Callable[[Config], list[BatchAugment]], ...] = (
    _moves,  # flips (not of numerals), padded crops of small sets, cutout
    _colours,  # --color_jitter
    _policy,  # --auto_augment
    _registered,  # --augment
    _erasing,  # --random_erasing
)


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
            if before != now:
                lines.append(describe_change(name, before, self._sets[name], folder))
        return lines

    def keep_inventory(self, folder: Path) -> None:
        """Write down in a run's folder which files the data has, for a resume; a disk that refuses costs only that."""
        with contextlib.suppress(OSError):
            for name, part in self._sets.items():
                inventory.save(folder, self.fingerprint[name]["digest"], part.inventory())

    @property
    def _sets(self) -> dict[str, ImageDataset]:
        return {"training": self.train.dataset, "validation": self.val.dataset}


def describe_change(name: str, before: Mapping[str, Any], part: ImageDataset, folder: Path | None) -> str:
    """How a set differs from the one that a snapshot describes, with what the run's folder remembers of its files."""
    kept = inventory.load(folder, str(before["digest"])) if folder else {}
    told = inventory.describe_changes(kept, part.inventory()) if kept else ""
    if before["images"] != len(part):
        line = f"{len(part):,} {name} images, not {before['images']:,}"
    else:
        line = f"other {name} images, though as many"
    return f"{line} ({told})" if told else line


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
    require_trainable(config)
    world = distributed.world_size()
    config, told = with_val_share(config)
    train, val, window, notes = open_sets(config, revision, classes)
    config, lines = config.fitted(len(train), derived, world)
    config.check_world(world)
    batch_size = config.batch_size // world
    train_loader = _loader(
        config,
        device,
        train,
        partial(train_transform, config),
        order=partial(_rank_order, train.block_rows, config, window),
        batch_size=batch_size,
        image_size=config.image_size,
        train=True,
        ranks=world,
        augment=batch_augment(config),
    )
    if config.progressive_size:
        train_loader.of_epoch = partial(_of_epoch, config)
    if not len(train_loader):
        raise UsageError(_too_large(config, "batch_size" in derived, len(train)))
    val_loader = evaluation_loader(config, device, val)
    data = Data(train_loader, val_loader, config, [*(f"note      {line}" for line in (*told, *notes)), *lines])
    facts: dict[str, Any] = {"the steps of an epoch": len(train_loader), "the images": (len(train), len(val))}
    facts |= {"the classes": data.classes, "the dataset's commit": data.revision}
    distributed.require_agreement(facts, DataError)
    return data


def evaluation_loader(
    config: Config, device: torch.device, dataset: ImageDataset, ids: np.ndarray | None = None
) -> Loader:
    """A loader of this process's share of a dataset as it is evaluated, or of the samples with these `ids` (int64)."""
    batch = min(config.batch_size // config.accumulate_steps, EVAL_BATCH)
    share = _rank_share(len(dataset), batch) if ids is None else ids
    return _loader(
        config,
        device,
        dataset,
        partial(eval_transform, config),
        order=lambda epoch: [share],
        batch_size=batch,
        image_size=config.eval_size,
        train=False,
    )


def _loader(
    config: Config, device: torch.device, dataset: Any, transform: Callable[[], Pipeline], **options: Any
) -> Loader:
    if config.is_small:
        return ResidentLoader(dataset, device=device, **options)
    return StreamingDataLoader(
        dataset,
        transform(),
        device=device,
        seed=config.seed,
        num_workers=config.num_workers,
        max_bad_fraction=config.max_bad_fraction,
        **options,
    )


def _too_large(config: Config, is_derived: bool, images: int) -> str:
    batch = f"--batch_size {config.batch_size}"
    if is_derived:
        batch = f"a batch of {config.batch_size} (for --streams {config.streams}, --accumulate_steps "
        batch += f"{config.accumulate_steps} and {distributed.world_size()} ranks)"
    return f"{batch} is larger than the training set of {images} images; use less"


def _of_epoch(config: Config, epoch: int) -> tuple[int, Pipeline]:
    """The size and the transform of an epoch's training images."""
    size = config.size_at(epoch)
    return size, train_transform(config, size)


def _rank_order(block_rows: np.ndarray, config: Config, window: int, epoch: int) -> list[np.ndarray]:
    share = config.streams // distributed.world_size()
    first, images = distributed.rank() * share, int(block_rows.sum())
    streams = epoch_order(block_rows, epoch, config.seed, config.streams, window, range(first, first + share))
    if config.repeats == 1:
        return streams
    apart = max(2, config.batch_size // config.streams // config.repeats)  # that images are not mixed with themselves
    return [repeated(stream, config.repeats, apart, images) for stream in streams]


def _rank_share(images: int, batch: int) -> np.ndarray:
    """The images that this rank evaluates: whole batches, so that no batch depends on the number of ranks."""
    batches = -(-images // batch)
    rank, world = distributed.rank(), distributed.world_size()
    first, last = batches * rank // world, batches * (rank + 1) // world
    return np.arange(first * batch, min(last * batch, images))
