"""What a streamed run will read, mix and hold in memory, printed before the model is built."""

import numpy as np

import distributed
from config import Config
from preprocess import Data
from stream.dataset import FETCH_THREADS, HuggingFaceImageNetDataset, blocks_ahead
from stream.decode_pool import PROCESS_BYTES
from stream.loader import BATCHES_AHEAD
from stream.order import epoch_order

POOR_MIXING = 0.9
BATCHES_LOOKED_AT = 64


def describe_data(config: Config, data: Data) -> list[str]:
    """Lines that describe the data and, when it is streamed, what streaming it takes."""
    train, val = data.train.dataset, data.val.dataset
    lines = [
        f"images    {config.dataset_id}: {len(train):,} for training, {len(val):,} for validation; "
        f"{len(data.train):,} steps an epoch",
        f"classes   {len(data.classes):,}: {data.classes[0]} ... {data.classes[-1]}",
    ]
    if not isinstance(train, HuggingFaceImageNetDataset) or not isinstance(val, HuggingFaceImageNetDataset):
        return lines
    sizes = np.array([block.size for block in train.blocks])
    val_bytes = sum(block.size for block in val.blocks)
    ranks = distributed.world_size()
    decoding = f"batches and {config.num_workers} decoding processes" if config.num_workers else "batches"
    held = (
        f"blocks ahead, {decoding}; windows are mapped from the cache"
        if train.cache
        else f"windows, blocks ahead, {decoding}"
    )
    return [
        f"revision  {train.revision or 'a local folder'}",
        *lines,
        f"blocks    {len(sizes):,} for training, {len(val.blocks):,} for validation, of {_size(sizes.max())} at most",
        f"bytes     {_size(sizes.sum())} for training, {_size(val_bytes)} for validation, in each epoch",
        f"streams   {config.streams}, {config.streams // ranks} for each of {ranks} ranks",
        f"mixing    {_mixing_line(config, train)}",
        f"memory    about {_size(memory_bytes(config, data))} a rank for {held}",
        f"cache     {_cache_line(train)}",
    ]


def _size(count: float) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def _mixing_line(config: Config, train: HuggingFaceImageNetDataset) -> str:
    labels = train.estimated_labels()
    if labels is None:
        return "unknown: the files do not tell their labels"
    share = mixing(labels, _order(config, train), config.batch_size // config.streams)
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
    frequency = np.bincount(labels) / len(labels)
    uniform = (1 - (1 - frequency) ** (share * len(order))).sum()
    return float(np.mean(distinct) / uniform)


def memory_bytes(config: Config, data: Data) -> int:
    """The most bytes that this rank's loader holds: blocks in use, prefetched and in transfer, batches, processes."""
    train = data.train.dataset
    assert isinstance(train, HuggingFaceImageNetDataset)
    sizes = np.array([block.size for block in train.blocks])
    largest = int(sizes.max())
    ahead = (blocks_ahead(largest) + FETCH_THREADS) * largest
    batch = data.train.batch_size * config.image_size**2 * 3
    in_use = 0 if train.cache else _most_in_use(train, data.train.order(0), sizes, config.batch_size // config.streams)
    held = min(in_use + ahead, int(2 * sizes.sum())) + (BATCHES_AHEAD + 2) * batch
    return held + config.num_workers * PROCESS_BYTES


def _most_in_use(train: HuggingFaceImageNetDataset, order: list[np.ndarray], sizes: np.ndarray, share: int) -> int:
    """The most bytes of blocks in use at any step: those between their first and their last use."""
    steps = max(map(len, order)) // share + 1
    first, last = np.full(len(sizes), steps), np.full(len(sizes), -1)
    for stream in order:
        blocks, at = train.locate(stream)[0], np.arange(len(stream)) // share
        np.minimum.at(first, blocks, at)
        np.maximum.at(last, blocks, at)
    change = np.zeros(steps + 2, np.int64)
    used = last >= 0
    np.add.at(change, first[used], sizes[used])
    np.add.at(change, last[used] + 1, -sizes[used])
    return int(np.cumsum(change).max())


def _order(config: Config, train: HuggingFaceImageNetDataset) -> list[np.ndarray]:
    return epoch_order(train.block_rows, 0, config.seed, config.streams, config.shuffle_window)


def _cache_line(train: HuggingFaceImageNetDataset) -> str:
    if train.cache is None:
        return "none" if train.revision is None else "none, every epoch streams everything again; see --cache_dir"
    names = train.cache.names()
    kept = sum(train.cache_name(number) in names for number in range(len(train.blocks)))
    limit = f"at most {_size(train.cache.limit)}" if train.cache.limit else "no limit"
    return f"{train.cache.folder}: {kept:,} of {len(train.blocks):,} training blocks, {limit}"
