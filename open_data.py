"""Which datasets a `Config` names: opened, made to agree on their classes, sampled and held out of each other."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

import distributed
from choices import DATASETS
from config import Config
from defaults import SMALL_SET
from errors import DataError, UsageError, printable
from registry import naming
from stream.image_folders import is_unsplit, open_image_folder, open_to_evaluate
from stream.labels import CLASSES_TOLD, NUMBER, without_images
from stream.local import LocalDataset, load_cifar, load_digits, load_mnist
from stream.picks import fair_sample, hold_out, places
from stream.retry import Network
from stream.source import ImageDataset

if TYPE_CHECKING:
    from stream.dataset import Cache, HuggingFaceImageNetDataset

VAL_SPLITS = ["validation", "val", "valid", "test"]
VAL_SHARE = 0.2
Open = TypeVar("Open", bound=Callable[[Config], Any])


def open_sets(
    config: Config, revision: str | None, classes: Sequence[str] | None
) -> tuple[ImageDataset, ImageDataset, int, list[str]]:
    """The two datasets, of the same classes; the shuffle window to use over the first; and what is to be told."""
    train, val, window = _load(config, revision)
    train, val, notes = _agree(train, val, classes, config.dataset_id)
    if not len(val):
        raise DataError(
            f"validation in {config.dataset_id} has no images of the sampled classes; use more --max_samples"
        )
    is_cheap = getattr(train, "revision", None) is None and len(train) <= SMALL_SET  # to read every label
    if config.max_samples:
        names = _sampled(train, config.max_samples)
        told = "unknown how many" if names is None else f"{len(names):,}"
        notes.append(f"a sample of {len(train):,} training images, of {told} of the {len(train.classes):,} classes")
    elif is_cheap and (absent := without_images(train)):
        notes.append(f"no image of {len(absent)} of the {len(train.classes):,} classes: {_few(absent)}")
    told_of_val = [note for note in val.notes if CLASSES_TOLD not in note]  # training's classes are what counts
    return train, val, window, list(dict.fromkeys([*train.notes, *told_of_val, *notes]))


def open_validation(config: Config, revision: str | None, sampled_with_training: bool = False) -> ImageDataset:
    """The set to evaluate on, and of training only what tells which images that is: where --val_share holds it out.

    A sample of it is, as in training, one of the classes of the sample to train on if `sampled_with_training`. An image
    folder without splits is evaluated whole. Raises DataError.
    """
    limit = config.max_samples
    if config.val_share or (limit and sampled_with_training):
        return _load(config, revision)[1]
    dataset = DATASETS[config.dataset]
    if dataset.on_hub:
        return _opener(config, revision)(split=_val_splits(config), max_samples=limit)
    if dataset.open_validation is not None:
        other = _opened(config, dataset.open_validation)
    else:
        _, other = _open_local(config)
        if other is None:
            return _load(config, revision)[1]
    return other.take(fair_sample(other.all_labels(), limit)) if limit else other


def with_val_share(config: Config) -> tuple[Config, list[str]]:
    """The settings with a share to validate on, where an image folder has no splits and none are named; and a note."""
    named = config.val_share or config.val_split or config.val_labels
    if config.dataset != "imagefolder" or named or not is_unsplit(Path(config.data_dir or ""), config.train_split):
        return config, []
    note = f"{config.data_dir} has no splits: --val_share {VAL_SHARE:g} of each class is held out for validation"
    return replace(config, val_share=VAL_SHARE), [note]


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
    if DATASETS[config.dataset].on_hub:
        open_split = _opener(config, revision)
        at_first = int(limit / (1 - share)) if limit and share else limit
        streamed = open_split(split=[config.train_split], max_samples=at_first)
        if share:
            return *_held_out(streamed, share, config), config.shuffle_window
        val = open_split(split=_val_splits(config), max_samples=limit, like=_sampled(streamed, limit))
        return streamed, val, config.shuffle_window
    whole, other = _open_local(config)
    if other is None and not share:
        share = VAL_SHARE
        whole.notes.append(
            f"{config.dataset} has no set to validate on: --val_share {share:g} of each class is held out"
        )
    if share:
        parts = _held_out(whole, share, config)
        return *parts, len(parts[0])
    assert other is not None
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
    train_ids, val_ids = hold_out(labels, whole.names(np.arange(len(whole))), share, config.seed)
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


def _val_splits(config: Config) -> list[str]:
    return [config.val_split] if config.val_split else VAL_SPLITS


def _open_local(config: Config) -> tuple[LocalDataset, LocalDataset | None]:
    """The set to train on and the one to validate on, if there is one. Raises UserError, which names the dataset."""
    dataset = DATASETS[config.dataset]
    if dataset.open is None:
        raise UsageError(f"--dataset {config.dataset} is evaluated whole; leave out --val_share")
    found = _opened(config, dataset.open)
    parts = [*found] if isinstance(found, tuple | list) else [found, None]
    if (
        len(parts) != 2
        or not all(hasattr(part, "all_labels") for part in parts if part is not None)
        or parts[0] is None
    ):
        raise DataError(
            f"--dataset {config.dataset} gave {printable(str(found))[:80]}; its function must return a set, or one to "
            "train on and one to validate on"
        )
    train, val = parts
    for part in (train, val):
        if dataset.in_memory and part is not None and np.ndim(part.images) != 4:
            raise UsageError(
                f"--dataset {config.dataset} is registered in_memory, but its images are no array (N, H, W, 3); make "
                "one, or leave in_memory out"
            )
    return train, val


def _opened(config: Config, open: Callable[[Config], Any]) -> Any:
    with naming("--dataset", config.dataset, DataError):
        return open(config)


def _opens(*names: str) -> Callable[[Open], Open]:
    """Says how built-in datasets are opened."""

    def define(function: Open) -> Open:
        for name in names:
            DATASETS[name].open = function
        return function

    return define


@_opens("digits")
def _open_digits(config: Config) -> tuple[LocalDataset, LocalDataset]:
    return load_digits()


@_opens("cifar10", "cifar100")
def _open_cifar(config: Config) -> tuple[LocalDataset, LocalDataset]:
    return load_cifar(config.dataset, Path(config.data_dir or "data"))


@_opens("mnist", "fashion_mnist")
def _open_mnist(config: Config) -> tuple[LocalDataset, LocalDataset]:
    return load_mnist(config.dataset, Path(config.data_dir or "data"))


@_opens("imagefolder")
def _open_folder(config: Config) -> tuple[LocalDataset, LocalDataset | None]:
    folder, labels = Path(config.data_dir or ""), Path(config.val_labels) if config.val_labels else None
    whole = bool(config.val_share)
    parts = open_image_folder(folder, config.train_split, _val_splits(config), labels, whole=whole)
    for part in parts:
        if part is not None and part.root is not None and part.root.is_relative_to(folder):
            part.root = folder  # that an image of one split is told from its namesake in the other
    return parts


def _folder_to_evaluate(config: Config) -> LocalDataset:
    splits = [] if DATASETS[config.dataset].evaluated_only else _val_splits(config)
    return open_to_evaluate(Path(config.data_dir or ""), splits, Path(config.val_labels) if config.val_labels else None)


for _name in DATASETS.names():
    if _name == "imagefolder" or DATASETS[_name].evaluated_only:
        DATASETS[_name].open_validation = _folder_to_evaluate


def _opener(config: Config, revision: str | None) -> "Callable[..., HuggingFaceImageNetDataset]":
    """Opens a split of a dataset on the Hub or of a local folder, at one commit."""
    from stream.dataset import HuggingFaceImageNetDataset, pin_revision  # with `datasets`, which takes a second
    from stream.synthetic import make_dummy_data

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


def _cache(config: Config) -> "Cache | None":
    from stream.dataset import Cache

    if config.cache_dir is None:
        return None
    limit = None if config.cache_limit_gb is None else round(config.cache_limit_gb * 1e9)
    as_planes = config.cache_format == "planes"
    return Cache(Path(config.cache_dir), limit, config.cache_short_side, as_planes, config.num_workers)
