"""HuggingFaceImageNetDataset: images in blocks, on the Hub or on disk."""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
from huggingface_hub import constants

from errors import DataError
from stream.block_reader import BlockReader
from stream.blocks import BlockData, KeptBlock, to_bytes
from stream.cache import Bytes, FileStore
from stream.data_files import in_blocks, is_tar
from stream.explain import one_line_errors
from stream.hub import open_files, pin, resolve
from stream.kept import reduce_all
from stream.labels import no_class, numbers_in
from stream.other_formats import first_split, open_other
from stream.parquet import Block, ParquetShards, open_parquet
from stream.picks import classes_within, fair_sample, places, spread
from stream.ranges import Files, HubFiles
from stream.retry import Network, in_threads
from stream.webdataset import TarShards, require_used

LABEL_THREADS = 8


@dataclass(frozen=True)
class Cache:
    """The folder for fetched blocks, its limit in bytes, and the short side (pixels) that images are reduced to, by so
    many decoding processes (0: by the fetching threads), to be kept as JPEG or as `planes`.
    """

    folder: Path
    limit: int | None = None
    short_side: int | None = None
    planes: bool = False
    processes: int = 0


class HuggingFaceImageNetDataset:
    """One split of an image classification dataset in parquet files or WebDataset shards, read block by block.

    Construct it with `open`. `revision` is a commit, None for a local folder. Of each block `block_rows` rows are used:
    the first, or after `take` those it took. `notes` tell what was passed over or derived.
    """

    def __init__(
        self,
        source: str,
        revision: str | None,
        files: Files,
        shards: "ParquetShards | TarShards",
        blocks: list[Block],
        cache: FileStore | None,
        form: Cache | None,
    ) -> None:
        self.source = source
        self.revision = revision
        self.classes = shards.classes
        self.notes = shards.notes
        self.index_bytes = shards.index_bytes  # of memory, for what tells where the blocks are
        self.blocks = blocks
        self.block_rows = np.array([block.rows for block in blocks], np.int64)
        self.cache = cache
        self._files = files
        self._shards = shards
        self._form = form if form and form.short_side else None
        self._ends = np.cumsum(self.block_rows)
        self._rows: np.ndarray | None = None  # of each sample, its row in its block, where not all rows are used
        self._numbers: np.ndarray | None = None  # of each stored label, the number of its class, where that is another

    @classmethod
    def open(
        cls,
        source: str,
        *,
        split: list[str],
        revision: str = "main",
        configuration: str | None = None,
        image_column: str | None = None,
        label_column: str | None = None,
        num_classes: int | None = None,
        block_bytes: int = 32 * 2**20,
        max_samples: int | None = None,
        like: Sequence[str] | None = None,
        streaming: bool = True,
        network: Network = Network(),  # noqa: B008 (frozen)
        cache: Cache | None = None,
    ) -> Any:
        """Find the files of a split and read their indexes.

        What is neither parquet files nor tar shards becomes an `ImageTable`, which has no blocks to be cached.
        `source` is a Hub id or a local folder. `datasets` resolves the files, features and licence gate; the revision
        is pinned to its commit. With `streaming` off the files are downloaded first. `split` may list alternatives; the
        first that exists is used. `configuration` is one of those that the dataset's card tells, None its default. A
        sample of `max_samples` is of the classes that `like` names, or of all.
        Raises DataError when the data is missing, unreachable, not authorised or not labelled, UsageError when a
        requested configuration or column does not exist.
        """
        store = _store_of(source, cache)
        listing = resolve(source, revision, store, network, configuration)
        columns = (image_column, label_column)
        if not in_blocks(listing.splits):
            require_used(source, False, columns, num_classes)
            table = open_other(source, listing, split, columns, network)
            return table.take(fair_sample(table.all_labels(), max_samples, places(table.classes, like)))
        name = first_split(source, split, listing.splits)
        files = open_files(source, listing, listing.splits[name], streaming, network)

        def keep_by_commit(name: str, make: Callable[[], Bytes]) -> Bytes:
            return store.get(f"{listing.commit}/{name}", make) if listing.commit else make()

        shards: ParquetShards | TarShards
        require_used(source, is_tar(files.names[0]), columns, num_classes)
        if is_tar(files.names[0]):
            shards = TarShards(source, files, keep_by_commit, num_classes, listing.lengths)
        else:
            shards = open_parquet(source, files, keep_by_commit, columns, listing, store)
        kept_in, form = (store, cache) if cache and isinstance(files, HubFiles) else (None, None)
        dataset = cls(source, listing.commit, files, shards, shards.blocks(block_bytes), kept_in, form)
        if not len(dataset):
            raise DataError(f"{source} has no images in split {name}; give another split")
        dataset._check_ranges()
        if max_samples is None or (max_samples >= len(dataset) and like is None):
            return dataset
        groups = cls(source, listing.commit, files, shards, shards.blocks(1), kept_in, form)
        wanted = places(dataset.classes, like)
        return dataset._sample(max_samples, wanted, doubling=False) or groups._sample(max_samples, wanted)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def locate(self, sample_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The block of each sample, and its row in that block."""
        blocks = self.block_of(sample_ids)
        if self._rows is not None:
            return blocks, self._rows[sample_ids]
        return blocks, sample_ids - (self._ends - self.block_rows)[blocks]

    def block_of(self, sample_ids: np.ndarray) -> np.ndarray:
        """The block of each sample."""
        if len(sample_ids) < len(self) // 64:
            return np.searchsorted(self._ends, sample_ids, side="right")
        return np.repeat(np.arange(len(self.blocks), dtype=np.int32), self.block_rows)[sample_ids]

    def name(self, sample_id: int) -> str:
        """Where a sample lies: its file and row, or its shard and key."""
        (name,) = self.names(np.array([sample_id]))
        return name

    def names(self, sample_ids: np.ndarray) -> Iterator[str]:
        """The same of sorted samples."""
        blocks, rows = self.locate(sample_ids)
        used, first = np.unique(blocks, return_index=True)
        for number, part in zip(used.tolist(), np.split(rows, first[1:]), strict=True):
            yield from self._shards.names(self.blocks[number], part)

    def all_labels(self) -> np.ndarray | None:
        """The label (int64) of each sample, read without its image; None where only whole shards would tell.

        Raises DataError.
        """
        if not self._shards.tells_labels:
            return None
        blocks, rows = self.locate(np.arange(len(self)))

        def read(block: Block) -> np.ndarray:
            labels = self._shards.labels(block)
            self._check_labels(block, labels.min(), labels.max())
            return labels

        parts = in_threads(read, self.blocks, LABEL_THREADS)
        starts = np.cumsum([0, *(block.rows for block in self.blocks[:-1])])
        return self._numbered(np.concatenate(list(parts))[starts[blocks] + rows])

    def take(self, ids: np.ndarray) -> "HuggingFaceImageNetDataset":
        """The samples with these sorted ids; blocks without one are left out."""
        blocks, rows = self.locate(ids)
        used, counts = np.unique(blocks, return_counts=True)
        part = copy.copy(self)
        part.blocks, part.block_rows = [self.blocks[number] for number in used], counts
        part._ends, part._rows = np.cumsum(counts), rows
        return part

    def with_classes(self, classes: Sequence[str]) -> "HuggingFaceImageNetDataset":
        """The same samples, whose labels count the classes in this order; those that have a sample are among them."""
        part = copy.copy(self)
        part.classes = [*classes]
        numbers = numbers_in(classes, self.classes)
        part._numbers = numbers if self._numbers is None else numbers[self._numbers]
        return part

    def cache_name(self, number: int) -> str:
        """The name of a block in the cache."""
        form = f".{self._form.short_side}{'.planes' if self._form.planes else ''}" if self._form else ""
        return f"{self.revision}/{self.blocks[number].name}{form}.arrow"

    def read_block(self, number: int) -> BlockData:
        """A block from the cache or by range requests; one request is enough for a file of only images and labels.

        Raises DataError, also for a label outside the classes.
        """
        block = self.blocks[number]
        kept = (
            self.cache.get(self.cache_name(number), lambda: self._serialise(block))
            if self.cache
            else self._serialise(block)
        )
        with one_line_errors(self.source, self.cache_name(number)):
            table = pa.ipc.open_stream(kept).read_all()
            if table.num_rows != block.rows or table["image"].type not in (pa.binary(), pa.large_binary()):
                raise ValueError("it is another block")
        images, labels = table["image"], table["label"].cast(pa.int64())
        if labels.null_count:
            self._check_labels(block, None, None)
        values = labels.to_numpy()
        self._check_labels(block, values.min(), values.max())
        return BlockData(images, self._numbered(values))

    def find_block(self, number: int) -> BlockData | None:
        """A block in the cache, memory-mapped from disk, or None."""
        if self.cache is None or (kept := self.cache.find(name := self.cache_name(number))) is None:
            return None
        table, path = pa.ipc.open_stream(kept).read_all(), str(self.cache.folder / name)
        return KeptBlock(table["image"], self._numbered(table["label"].to_numpy()), path, kept)

    def estimated_labels(self) -> np.ndarray | None:
        """A label (int32) for each sample, estimated from the range of those of its row group; None if unknown.

        Groups that share at most one class with their neighbours are taken to be sorted, the others to be shuffled.
        """
        rows, low, high = self._shards.label_ranges(self.blocks)
        if not rows.all():
            return None
        shared = np.minimum(high[1:], high[:-1]) - np.maximum(low[1:], low[:-1]) + 1
        apart = np.concatenate([[len(rows) > 1], shared <= 1, [True]])
        share = np.random.default_rng(0).random(rows.sum(), np.float32)  # of the way from the smallest to the largest
        ends = np.cumsum(rows)
        for group in np.flatnonzero(apart[1:] & apart[:-1]).tolist():
            share[ends[group] - rows[group] : ends[group]] = np.arange(rows[group]) / rows[group]
        share *= np.repeat((high - low + 1).astype(np.float32), rows)
        labels = np.repeat(low.astype(np.int32), rows)
        np.add(labels, share, out=labels, casting="unsafe")  # rounded down
        if self._rows is None:
            return labels
        blocks, within = self.locate(np.arange(len(self)))
        starts = np.cumsum([0, *(block.rows for block in self.blocks[:-1])])
        return labels[starts[blocks] + within]

    def fingerprint(self) -> str:
        """A digest of the number of rows and bytes of each block, and of the rows used."""
        sizes = np.array([(block.rows, block.size) for block in self.blocks], "<i8")
        rows = self.block_rows if self._rows is None else np.concatenate([self.block_rows, self._rows])
        return xxhash.xxh3_128_hexdigest(sizes.tobytes() + rows.astype("<i8").tobytes())

    def inventory(self) -> dict[str, tuple[int, str]]:
        """Of each file its images that are used, and its blocks, which stay the same under another name."""
        found: dict[str, tuple[int, str]] = {}
        for block, rows in zip(self.blocks, self.block_rows.tolist(), strict=True):
            images, sizes = found.get(self._files.names[block.file], (0, ""))
            found[self._files.names[block.file]] = images + rows, f"{sizes} {block.rows}/{block.size}"
        return {name.removeprefix(self._files.root): contents for name, contents in found.items()}

    def requests(self) -> tuple[int, int]:
        """How many requests the index cost at least, if it was not kept, and how many all blocks cost."""
        index = len(self._files.names) if self._files.by_request else 0
        return index, sum(self._shards.requests(block) for block in self.blocks)

    def reader(self, ids: Iterable[np.ndarray]) -> "BlockReader":
        return BlockReader(self, ids)

    def _serialise(self, block: Block) -> memoryview:
        shards = self._shards
        batches = iter(shards.read(block).to_batches()) if isinstance(shards, TarShards) else shards.batches(block)
        return to_bytes(map(self._reduced, batches), block.size)

    def _reduced(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        form = self._form
        if form is None or form.short_side is None:
            return batch
        images = batch["image"]
        encoded = [memoryview(image.as_buffer() or b"") for image in images]
        made = reduce_all(encoded, form.short_side, form.planes, form.processes)
        missing = images.is_null().to_numpy(zero_copy_only=False)
        return batch.set_column(0, "image", pa.array(made, images.type, mask=missing))

    def _sample(self, limit: int, wanted: np.ndarray, doubling: bool = True) -> "HuggingFaceImageNetDataset | None":
        """At most `limit` samples of the wanted classes, of each its share, from as few blocks as that takes.

        The blocks are evenly spread, and doubled until all of these classes are there or no further one comes; without
        `doubling`, None is returned where the fewest blocks are not enough.
        """

        def classes(picks: Iterable[int]) -> int:
            """How many of the wanted classes these blocks may have."""
            return classes_within(self._shards.label_ranges([self.blocks[pick] for pick in picks])[1:], wanted)

        known, every = bool(len(wanted) and self._shards.label_ranges(self.blocks)[0].all()), range(len(self.blocks))
        count, before = -(-limit * len(every) // len(self)), -1
        while True:
            picks = spread(min(count, len(every)), len(every))
            last = len(picks) == len(every)
            if last or not known or classes(picks) >= min(limit, classes(every)):
                part = self.take(np.flatnonzero(np.isin(self.locate(np.arange(len(self)))[0], picks)))
                labels = part.all_labels()
                if labels is None:
                    return part.take(spread(min(limit, len(part)), len(part)))
                ids = fair_sample(labels, limit, wanted)
                found = len(np.unique(labels[ids]))
                if last or (len(ids) == limit and (found >= min(limit, len(wanted)) or found <= before)):
                    return part.take(ids)
                before = found
            if not doubling:
                return None
            count *= 2

    def _numbered(self, labels: np.ndarray) -> np.ndarray:
        return labels if self._numbers is None else self._numbers[labels]

    def _check_ranges(self) -> None:
        _, low, high = self._shards.label_ranges(self.blocks)
        if low.min() < 0 or high.max() >= len(self._shards.classes):
            for block in self.blocks:
                _, low, high = self._shards.label_ranges([block])
                self._check_labels(block, int(low.min()), int(high.max()))

    def _check_labels(self, block: Block, low: int | None, high: int | None) -> None:
        for label in (low, high):
            if label is None or not 0 <= label < len(self._shards.classes):
                raise no_class(self._files.names[block.file], label)


def _store_of(source: str, cache: Cache | None) -> FileStore:
    root = cache.folder if cache else Path(constants.HF_HOME) / "imagenet1k"
    return FileStore(root / source.replace("/", "--"), cache.limit if cache else None)


def pin_revision(source: str, revision: str, cache: Cache | None, network: Network) -> str:
    """The commit that a revision of a Hub dataset points to now. Raises DataError."""
    return revision if Path(source).is_dir() else pin(source, revision, _store_of(source, cache), network)
