"""What a run will read, mix and hold in memory, printed before it starts, and what it does to fit into that."""

import shutil
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard

import numpy as np

import distributed
from beforehand import step_files
from config import Config
from errors import SnapshotError, UsageError
from pages.names import short
from preprocess import Data, get_data_loaders
from stream import allowance
from stream.block_reader import blocks_ahead, fetch_threads
from stream.decode_pool import PROCESS_BYTES
from stream.formats import LARGEST_PIXELS
from stream.loader import BATCHES_AHEAD
from stream.local import LocalDataset
from stream.order import epoch_order
from stream.source import ImageDataset
from training.snapshot import SPARE_BYTES
from training.state import snapshot_bytes
from training.step import Training, passes_that_fit
from units import as_rate, as_size

if TYPE_CHECKING:
    from stream.dataset import HuggingFaceImageNetDataset

POOR_MIXING = 0.9
FEW_IMAGES = 1000  # a second: less than a GPU trains on
BATCHES_LOOKED_AT = 64
PARTS = 16  # in which labels are counted, to save memory
LISTED = 10  # classes
CLIENT_BYTES = 130 * 2**20  # of the Hub's client, and of what the allocators keep, as measured on Linux
TRANSFER_COPIES = 1.0  # what receiving a block takes over its size, as measured
DECODED_OVER_ENCODED = 15  # a photograph of 24 megapixels is 5 MB, or 72 MB of pixels

LARGEST_PICTURE = 14 * LARGEST_PIXELS  # bytes, as measured of a PNG with alpha; a JPEG takes 3 to 9 a pixel


def in_passes_that_fit(config: Config, data: Data, training: Training) -> tuple[Config, Data]:
    """The settings and data with as many passes as the memory asks for, which those of `training` become."""
    parts = passes_that_fit(training, config)
    if parts == 1:
        return config, data
    distributed.print0(
        f"memory    a batch of {config.batch_size} does not fit in one pass; it takes --accumulate_steps {parts}"
    )
    config = replace(config, accumulate_steps=parts)
    training.accumulate_steps = parts
    return config, get_data_loaders(config, training.device, data.revision)


def describe_data(config: Config, data: Data) -> list[str]:
    """Lines that describe the data and, when it is streamed, what streaming it takes."""
    train, val = data.train.dataset, data.val.dataset
    lines = [
        f"images    {config.dataset_id}: {len(train):,} for training, {len(val):,} for validation; "
        f"{len(data.train):,} steps an epoch",
        _class_line(data),
        *data.notes,
    ]
    if not _is_streamed(train) or not _is_streamed(val):
        return lines
    sizes = np.array([block.size for block in train.blocks])
    val_bytes = sum(block.size for block in val.blocks)
    ranks, order = distributed.world_size(), data.train.order(0)
    return [
        f"revision  {train.revision or 'a local folder'}",
        *lines,
        f"blocks    {len(sizes):,} for training, {len(val.blocks):,} for validation, of {as_size(sizes.max())} at most",
        f"bytes     {as_size(sizes.sum())} for training, {as_size(val_bytes)} for validation, in each epoch",
        f"streams   {config.streams}, {config.streams // ranks} for each of {ranks} ranks",
        *([f"mixing    {_mixing_line(config, train, order)}"] if len(data.train) else []),
        f"memory    about {as_size(memory_bytes(config, data, order))} a rank (and {as_size(LARGEST_PICTURE)} while "
        f"one of {LARGEST_PIXELS / 1e6:.0f} megapixels, the largest that are read, is decoded) for "
        f"{_holders(config, data, order)}",
        f"cache     {_cache_line(train)}",
        *_request_lines(train, val),
    ]


def _class_line(data: Data) -> str:
    """The classes if they are few, with their training images if labels are at hand; else the first and the last."""
    train, start = data.train.dataset, f"classes   {len(data.classes):,}: "
    if len(data.classes) > LISTED:
        return f"{start}{short(data.classes[0])} ... {short(data.classes[-1])}"
    names = [short(name) for name in data.classes]
    if _is_streamed(train):  # whose labels would have to be fetched
        return start + ", ".join(names)
    counts = np.bincount(train.all_labels(), minlength=len(names)).tolist()
    return start + ", ".join(f"{name} ({count:,})" for name, count in zip(names, counts, strict=True))


def _is_streamed(dataset: ImageDataset) -> "TypeGuard[HuggingFaceImageNetDataset]":
    """Whether a dataset is read in blocks; what is not needs no import of the library that reads them."""
    if isinstance(dataset, LocalDataset):
        return False
    from stream.dataset import HuggingFaceImageNetDataset

    return isinstance(dataset, HuggingFaceImageNetDataset)


def free_bytes(folder: Path) -> int:
    """The room on the disk of a folder, or of where it would be made."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free


def most_snapshots(config: Config, steps_per_epoch: int, step: int, there: int = 0) -> tuple[int, str]:
    """How many snapshots lie in a run's folder at most, from `step` on, of which some are there; which in words."""
    left = config.epochs * steps_per_epoch - step
    written = -(-left // steps_per_epoch) + (left // config.snapshot_steps if config.snapshot_steps else 0)
    kept = min(config.keep_snapshots, there + written)
    extra = ["the best one"] if config.save_best else []
    extra += ["the one before the cooldown"] if config.scheduler == "trapezoid" else []
    extra += ["one more while a newer one is written"] if kept < there + written else []
    extra += ["one more while the best one is replaced"] if config.save_best and written > 1 else []
    return kept + len(extra), ", ".join([f"the newest {kept}", *extra])


def require_room(config: Config, data: Data, training: Training, folder: Path, step: int) -> None:
    """Refuse a run, at `step`, for whose snapshots or cache the disks have no room.

    Raises SnapshotError, and UsageError for the cache.
    """
    count, kinds = most_snapshots(config, len(data.train), step, len(step_files(folder / "snapshots")))
    snapshot = snapshot_bytes(training.model, training.optimizer, training.average)
    held = sum(path.stat().st_size for path in (folder / "snapshots").glob("*.safetensors"))
    need, free = max(0, count * snapshot - held) + 2 * SPARE_BYTES, free_bytes(folder)
    if free < need:
        fewer = ", keep fewer (--keep_snapshots)" if config.keep_snapshots > 1 else ""
        raise SnapshotError(
            f"the snapshots of this run ({kinds}, of {as_size(snapshot)} each) take {as_size(need)} more, and {folder} "
            f"has {as_size(free)} free; make room{fewer}, or give another --run_dir"
        )
    parts = [part for part in (data.train.dataset, data.val.dataset) if _is_streamed(part) and part.cache]
    unknown = config.cache_short_side or config.max_samples  # how much of the set, in which size
    if not parts or (unknown and not config.cache_limit_gb):
        return
    cache = parts[0].cache
    assert cache is not None
    total, kept = sum(block.size for part in parts for block in part.blocks), sum(cache.sizes().values())
    grows = max(0, min(total, cache.limit or total) - kept)
    is_shared = _device_of(cache.folder) == _device_of(folder)
    free = free_bytes(cache.folder) - (need if is_shared else 0)
    if free < grows:
        raise UsageError(
            f"--cache_dir {config.cache_dir} would grow by {as_size(grows)}, and {as_size(max(0, free))} are free there"
            f"{' beside the snapshots' if is_shared else ''}; make room, or give --cache_limit_gb "
            f"{max(0.1, 0.9 * (kept + free) / 1e9):.1f}"
        )


def _device_of(folder: Path) -> int:
    """The number of the disk of a folder, or of where it would be made."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists()).stat().st_dev


def _holders(config: Config, data: Data, order: list[np.ndarray]) -> str:
    """What the memory is for."""
    train = data.train.dataset
    assert _is_streamed(train)
    rest = f"blocks ahead, batches and {config.num_workers} decoding processes"
    rest = rest if config.num_workers else "blocks ahead, batches"
    if train.cache is None:
        return f"windows, {rest}"
    beyond = windows_bytes(config, data, order)
    if beyond:
        return f"{as_size(beyond)} of windows beyond --cache_limit_gb, {rest}; other windows are mapped from the cache"
    return f"{rest}; windows are mapped from the cache"


def _mixing_line(config: Config, train: "HuggingFaceImageNetDataset", order: list[np.ndarray]) -> str:
    """What the order of an epoch mixes; `order` has this rank's streams."""
    if len(order) < config.streams or config.repeats > 1:
        order = epoch_order(train.block_rows, 0, config.seed, config.streams, config.shuffle_window)
    labels = train.estimated_labels()
    if labels is None:
        return "unknown: the files do not tell their labels"
    share = mixing(labels, order, config.batch_size // config.streams)
    line = f"a batch has {share:.0%} of the classes that a uniform shuffle would give it"
    if share >= POOR_MIXING:
        return line
    return (
        f"{line}. WARNING: the files are sorted; use --shuffle_window {len(train)} with --cache_dir, "
        "which keeps the window on disk"
    )


def mixing(labels: np.ndarray, order: list[np.ndarray], share: int) -> float:
    """The distinct classes in a batch over those under a uniform shuffle, averaged over some batches of an epoch.

    `labels` is indexed by sample id, `order` has the sample ids of each stream, and a batch takes `share` samples from
    each stream.
    """
    steps = min(map(len, order)) // share
    looked_at = np.random.default_rng(0).permutation(steps)[:BATCHES_LOOKED_AT]
    distinct = [
        len(np.unique(np.concatenate([labels[stream[step * share : (step + 1) * share]] for stream in order])))
        for step in looked_at
    ]
    counts = np.zeros(labels.max() + 1, np.int64)
    for part in np.array_split(labels, PARTS):
        counts += np.bincount(part, minlength=len(counts))
    absent = np.ones(len(counts))  # how likely it is that a batch lacks each class
    for drawn in range(share * len(order)):
        absent *= (1 - counts / (len(labels) - drawn)).clip(0)
    uniform = (1 - absent).sum()
    return min(1.0, float(np.mean(distinct) / uniform))


def memory_bytes(config: Config, data: Data, order: list[np.ndarray] | None = None) -> int:
    """The most bytes that this rank's loader holds in its first two epochs, its decoding processes included.

    `order` is that of the first epoch, if it is at hand.
    """
    train, val = data.train.dataset, data.val.dataset
    assert _is_streamed(train)
    largest = max(block.size for block in train.blocks)
    image = max(block.size / block.rows for block in train.blocks)
    total = sum(block.size for block in train.blocks)
    batch = data.train.batch_size * config.image_size**2 * 3
    copies = TRANSFER_COPIES + bool(train.cache)  # what is received, and what is written
    in_transfer = int(min(fetch_threads(largest) * copies * largest, 2 * total))
    decoding = int(image * (DECODED_OVER_ENCODED * max(1, config.num_workers) + config.num_workers))
    footers = train.index_bytes + getattr(val, "index_bytes", 0)
    blocks = windows_bytes(config, data, order) + in_transfer
    return CLIENT_BYTES + footers + blocks + (BATCHES_AHEAD + 2) * batch + decoding + config.num_workers * PROCESS_BYTES


def windows_bytes(config: Config, data: Data, order: list[np.ndarray] | None = None) -> int:
    """The most bytes of blocks, from their arrival to their last use, that are in memory and not in the cache.

    Without a cache that is all of them. A cache with a limit is followed for two epochs: the second finds what the
    first left, and none of that makes room before it is used. Ranks are taken to share the room equally. `order` is
    that of the first epoch, if it is at hand.
    """
    train = data.train.dataset
    assert _is_streamed(train)
    room, kept = 0, dict[int, int]()
    if train.cache is not None:
        if train.cache.limit is None:
            return 0
        found = train.cache.sizes()
        kept = {
            number: found[train.cache_name(number)]
            for number in range(len(train.blocks))
            if train.cache_name(number) in found
        }
        room = (train.cache.limit - sum(found.values()) + sum(kept.values())) // distributed.world_size()
    sizes = np.array([block.size for block in train.blocks])
    share, ahead, most = config.batch_size // config.streams, BATCHES_AHEAD if config.num_workers else 0, 0
    for epoch in range(min(config.epochs, 2) if room else 1):
        streams = data.train.order(epoch) if epoch or order is None else order
        spans = _spans(train, streams, sizes, share, ahead)
        blocks = spans[0]
        on_disk = _kept(sizes, kept, room, *spans)
        most = max(most, _fullest(np.where(on_disk, 0, sizes[blocks]), *spans[1:]))
    return most


def _spans(
    train: "HuggingFaceImageNetDataset", order: list[np.ndarray], sizes: np.ndarray, share: int, ahead: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The blocks of an epoch as they are fetched, the batch that asks for each, and the one begun when it is dropped.

    A batch takes `share` samples of each stream, and `ahead` further batches are begun before it is done.
    """
    first, last = np.full(len(sizes), np.iinfo(np.int64).max), np.full(len(sizes), -1)
    for stream in order:
        blocks, at = train.block_of(stream % len(train)), np.arange(len(stream)) // share
        np.minimum.at(first, blocks, at)
        np.maximum.at(last, blocks, at)
    queue = np.argsort(first, kind="stable")[: int((last >= 0).sum())]
    places = np.maximum(0, np.arange(len(queue)) - blocks_ahead(int(sizes.max())))
    return queue, first[queue][places], last[queue] + ahead


def _kept(
    sizes: np.ndarray, kept: dict[int, int], room: int, blocks: np.ndarray, asked: np.ndarray, last: np.ndarray
) -> np.ndarray:
    """Whether the cache has each block while it is needed. `kept`, the bytes of each block in it, is moved on."""
    done, used, on_disk = deque(np.argsort(last, kind="stable").tolist()), deque[int](), np.zeros(len(blocks), bool)
    total = sum(kept.values())
    for place, block in enumerate(blocks.tolist()):
        while done and last[done[0]] < asked[place]:
            used.append(int(blocks[done.popleft()]))
        size = 0 if block in kept else int(sizes[block])
        while size and total + size > room and used:
            total -= kept.pop(used.popleft(), 0)
        if size and total + size <= room:
            kept[block] = size
            total += size
        on_disk[place] = block in kept
    return on_disk


def _fullest(sizes: np.ndarray, asked: np.ndarray, last: np.ndarray) -> int:
    """The most bytes at any batch of what is there from one batch to another, both included."""
    change = np.zeros(int(last.max()) + 2, np.int64)
    np.add.at(change, asked, sizes)
    np.add.at(change, last + 1, -sizes)
    return int(np.cumsum(change).max())


def _request_lines(train: "HuggingFaceImageNetDataset", val: "HuggingFaceImageNetDataset") -> list[str]:
    """What the Hub is asked for, and how long its limit makes that take; nothing for local files."""
    index, blocks = (sum(pair) for pair in zip(train.requests(), val.requests(), strict=True))
    if not index:
        return []
    per_second = allowance.requests.limit / allowance.requests.window
    minutes, images = blocks / per_second / 60, (len(train) + len(val)) / max(1, blocks) * per_second
    every = "in the first epoch; later ones find them in the cache" if train.cache else "in each epoch"
    line = f"requests  {index:,} for the index, {blocks:,} for blocks {every}"
    if blocks <= allowance.requests.limit:
        return [line]
    line += f"; the Hub's limit of {allowance.requests.limit:,} in {allowance.requests.window} s makes that "
    line += f"{minutes:,.0f} minutes at least, {as_rate(images)} images/s"
    few = " WARNING: the files are small; use --no_streaming, which downloads them once" if images < FEW_IMAGES else ""
    return [f"{line}.{few}"]


def _cache_line(train: "HuggingFaceImageNetDataset") -> str:
    if train.cache is None:
        return "none" if train.revision is None else "none, every epoch streams everything again; see --cache_dir"
    names = train.cache.names()
    kept = sum(train.cache_name(number) in names for number in range(len(train.blocks)))
    limit = f"at most {as_size(train.cache.limit)}" if train.cache.limit else "no limit"
    return f"{train.cache.folder}: {kept:,} of {len(train.blocks):,} training blocks, {limit}"


def fill_cache(config: Config, data: Data) -> None:
    """Keep all blocks of the data in --cache_dir, shared out among the ranks. Raises UsageError, DataError."""
    from stream.dataset import HuggingFaceImageNetDataset
    from stream.filling import fill

    both = (data.train.dataset, data.val.dataset)
    datasets = [dataset for dataset in both if isinstance(dataset, HuggingFaceImageNetDataset)]
    if not datasets:
        raise UsageError(f"{config.dataset_id} is downloaded whole and not kept in blocks; leave out --fill_cache")
    found = fill(datasets, distributed.rank(), distributed.world_size())
    blocks, kept = distributed.sum_over_ranks(np.array(found)).tolist()
    lacking = "" if kept == blocks else "; there is no room for more: raise --cache_limit_gb, or free some"
    distributed.print0(f"cache     {kept:,} of {blocks:,} blocks are in {config.cache_dir}{lacking}", always=True)
