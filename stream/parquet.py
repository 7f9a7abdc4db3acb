"""Parquet files of images and labels, read in blocks of row groups by exact byte ranges."""

import io
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Features, Image
from tqdm import tqdm

import distributed
from errors import DataError, UsageError
from stream.hub import Files
from stream.retry import one_line_errors

Keep = Callable[[str, Callable[[], bytes]], bytes | memoryview]  # the bytes kept under a name, made if absent

FOOTER_THREADS = 16
TAIL_BYTES = 64 * 1024  # most footers are smaller; a larger one costs a second request
BATCH_BYTES = 2**20  # of images that are decoded at once
LARGEST_GAP = 2**20  # bytes: a smaller gap is read and discarded, which is cheaper than a second request


@dataclass(frozen=True)
class Block:
    """Consecutive row groups of one file, read together. `size` is in bytes."""

    name: str
    file: int
    groups: tuple[int, ...]
    rows: int
    size: int


def first_difference(classes: Sequence[str], others: Sequence[str], renamed: bool = False) -> str | None:
    """Where two lists of class names first differ, in words, or None if they agree.

    If classes may be `renamed`, only a name that both lists have under different numbers counts as a difference.
    """

    def moved(name: str | None) -> bool:
        places = ({number for number, other in enumerate(names) if other == name} for names in (classes, others))
        return name in others and set.isdisjoint(*places)

    for number, (ours, theirs) in enumerate(zip_longest(classes, others)):
        if ours != theirs and (moved(ours) or not renamed):
            return f"class {number} is {ours or 'none'} there and {theirs or 'none'} here"
    return None


class ParquetShards:
    """The files of one split. Raises DataError for a file that is not parquet, lacks an image or label column, or has
    other class names than the rest.
    """

    def __init__(
        self, source: str, files: Files, keep: Keep, columns: tuple[str | None, str | None], features: Any
    ) -> None:
        self._source = source
        self._files = files
        self._footers = _read_footers(source, files, keep)
        with one_line_errors(source, files.names[0]):
            known = Features.from_dict(features) if features else self._features_of(0)
        self.image_column = _find_column(known, Image, columns[0], "--image_column", source)
        self.label_column = _find_column(known, ClassLabel, columns[1], "--label_column", source)
        self.classes: list[str] = list(known[self.label_column].names)
        self.index_bytes = sum(footer.serialized_size for footer in self._footers)
        self._check_class_names("the dataset's card" if features else files.names[0], renamed=bool(features))
        self._leaves = [self._find_leaves(number) for number in range(len(files.names))]

    def blocks(self, most_bytes: int) -> list[Block]:
        """Blocks of consecutive row groups of each file: up to `most_bytes`, and at least one group."""
        files = range(len(self._footers))
        return [block for file in files for block in self._blocks_of(file, most_bytes)]

    def read(self, block: Block) -> pa.Table:
        """All `batches` of a block."""
        return pa.Table.from_batches(self.batches(block))

    def batches(self, block: Block) -> Iterator[pa.RecordBatch]:
        """The columns `image`, encoded, and `label` (int64) of a block, a few rows at a time. Raises DataError."""
        names = [f"{self.image_column}.bytes", self.label_column]
        rows = max(1, block.rows * BATCH_BYTES // max(1, block.size))
        with one_line_errors(self._source, self._files.names[block.file]):
            ranges = [(first, self._files.read(block.file, first, end)) for first, end in self._ranges(block)]
            file = pq.ParquetFile(_Ranges(ranges), metadata=self._footers[block.file], pre_buffer=False)
            for batch in file.iter_batches(rows, list(block.groups), names, use_threads=False):
                (images,) = batch[self.image_column].flatten()
                yield pa.record_batch({"image": images, "label": batch[self.label_column].cast(pa.int64())})

    def label_ranges(self, block: Block) -> list[tuple[int, int, int]] | None:
        """Rows, smallest and largest label of each row group, or None if the footer lacks statistics."""
        found = []
        for group in block.groups:
            statistics = self._column(block.file, group, self._leaves[block.file][1]).statistics
            if statistics is None or not statistics.has_min_max:
                return None
            found.append((self._footers[block.file].row_group(group).num_rows, statistics.min, statistics.max))
        return found

    def _features_of(self, file: int) -> Features:
        return Features.from_arrow_schema(self._footers[file].schema.to_arrow_schema())

    def _check_class_names(self, where: str, renamed: bool) -> None:
        """Compare the class names in the files' own metadata with those in use, which come from `where`.

        Only the dataset's card may rename classes.
        """
        told: dict[bytes, int] = {}  # one file for each distinct metadata; most sets have only one
        for file, footer in enumerate(self._footers):
            told.setdefault((footer.metadata or {}).get(b"huggingface", b""), file)
        for file in told.values():
            name = self._files.names[file]
            with one_line_errors(self._source, name):
                labels = self._features_of(file).get(self.label_column)
            if isinstance(labels, ClassLabel):
                problem = first_difference(self.classes, labels.names, renamed)
                if problem:
                    raise DataError(f"{name} has other classes than {where}: {problem}; make them the same")

    def _find_leaves(self, file: int) -> tuple[int, int]:
        """The numbers of the two stored columns that are read. Raises DataError, naming a file that lacks one."""
        schema = self._footers[file].schema
        paths = [schema.column(number).path for number in range(len(schema.names))]
        for wanted in (f"{self.image_column}.bytes", self.label_column):
            if wanted not in paths:
                raise DataError(f"{self._files.names[file]} has no column {wanted}; mend or remove the file")
        return paths.index(f"{self.image_column}.bytes"), paths.index(self.label_column)

    def _column(self, file: int, group: int, leaf: int) -> Any:
        return self._footers[file].row_group(group).column(leaf)

    def _blocks_of(self, file: int, most_bytes: int) -> Iterator[Block]:
        footer = self._footers[file]
        sizes = [
            sum(self._column(file, group, leaf).total_compressed_size for leaf in self._leaves[file])
            for group in range(footer.num_row_groups)
        ]
        groups: list[int] = []
        for group, size in enumerate(sizes):
            if not footer.row_group(group).num_rows:
                continue
            if groups and sum(sizes[g] for g in groups) + size > most_bytes:
                yield self._block(file, groups, sizes)
                groups = []
            groups.append(group)
        if groups:
            yield self._block(file, groups, sizes)

    def _block(self, file: int, groups: list[int], sizes: list[int]) -> Block:
        rows = sum(self._footers[file].row_group(group).num_rows for group in groups)
        name = f"{self._files.names[file]}.{groups[0]}-{groups[-1]}"
        return Block(name, file, tuple(groups), rows, sum(sizes[group] for group in groups))

    def _ranges(self, block: Block) -> list[tuple[int, int]]:
        """The byte ranges of the block's two columns; ranges that are close are merged."""
        spans = []
        for group in block.groups:
            for leaf in self._leaves[block.file]:
                column = self._column(block.file, group, leaf)
                first = column.dictionary_page_offset if column.has_dictionary_page else column.data_page_offset
                spans.append((first, first + column.total_compressed_size))
        spans.sort()
        ranges = [spans[0]]
        for first, end in spans[1:]:
            if first - ranges[-1][1] <= LARGEST_GAP:
                ranges[-1] = (ranges[-1][0], end)
            else:
                ranges.append((first, end))
        return ranges


class _Ranges(io.RawIOBase):
    """A file of which only some byte ranges are present."""

    def __init__(self, ranges: Sequence[tuple[int, bytes | bytearray]]) -> None:
        self._ranges = ranges
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        end = self._ranges[-1][0] + len(self._ranges[-1][1])
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: end}[whence]
        return self._position

    def read(self, size: int = -1) -> memoryview:
        for first, data in self._ranges:
            if first <= self._position < first + len(data):
                start = self._position - first
                found = memoryview(data)[start : start + size]
                self._position += len(found)
                return found
        return memoryview(b"")


def _read_footers(source: str, files: Files, keep: Keep) -> list[pq.FileMetaData]:
    """The metadata of every file, read in parallel and kept."""

    def tail(number: int) -> bytes:
        data = files.read_tail(number, TAIL_BYTES)
        length = 8 + int.from_bytes(data[-8:-4], "little")
        if data[-4:] != b"PAR1":
            raise DataError(f"{files.names[number]} is not a whole parquet file; fetch or make it again")
        return data[-length:] if length <= len(data) else files.read_tail(number, length)

    def read(number: int) -> pq.FileMetaData:
        data = keep(f"{files.names[number]}.footer", lambda: tail(number))
        with one_line_errors(source, files.names[number]):
            return pq.read_metadata(pa.BufferReader(data))

    with ThreadPoolExecutor(FOOTER_THREADS) as pool:
        quiet = True if distributed.rank() else None
        return list(
            tqdm(pool.map(read, range(len(files.names))), "index", len(files.names), leave=False, disable=quiet)
        )


def _find_column(features: Features, kind: type, wanted: str | None, flag: str, source: str) -> str:
    fitting = [name for name, feature in features.items() if isinstance(feature, kind)]
    if wanted is not None:
        if wanted not in fitting:
            raise UsageError(
                f"{source} has no {kind.__name__} column {wanted}; {flag} may be {', '.join(fitting) or 'none'}"
            )
        return wanted
    if len(fitting) != 1:
        several = f"several {kind.__name__} columns ({', '.join(fitting)}); choose with {flag}"
        raise DataError(f"{source} has {several if fitting else f'no {kind.__name__} column'}")
    return str(fitting[0])
