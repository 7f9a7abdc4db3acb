"""Parquet files of images and labels, read in blocks of row groups by exact byte ranges."""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise, zip_longest
from typing import Any
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Features, Image

from errors import DataError, UsageError
from stream.cache import Bytes
from stream.explain import one_line_errors
from stream.footers import Keep, read_footers, small_files, whole
from stream.outside import USUAL_BYTES, OutsideImages, as_binary, find_leaves, may_lie_outside, part, rows_outside
from stream.pages import check_chunk
from stream.ranges import Files, trust

BATCH_BYTES = 2**20  # of images that are decoded at once
USUAL_COLUMNS = ["image", "label"]  # the names of blocks tell others, which a cache must not mix up with them
LARGEST_GAP = 2**20  # bytes: a smaller gap is read and discarded, which is cheaper than a second request


@dataclass(frozen=True)
class Block:
    """Consecutive row groups of one file, read together, or the `rows` from `first` on of one. `size` is in bytes."""

    name: str
    file: int
    groups: tuple[int, ...]
    rows: int
    size: int
    first: int = 0


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
        self._keep = keep
        self._whole = small_files(files)
        self._footers = read_footers(source, files, keep, self._whole)
        with one_line_errors(source, files.names[0]):
            known = Features.from_dict(features) if features else self._features_of(0)
        self.image_column = _find_column(known, Image, columns[0], "--image_column", source)
        self.label_column = _find_column(known, ClassLabel, columns[1], "--label_column", source)
        columns_read = [quote(column, safe="") for column in (self.image_column, self.label_column)]
        self._suffix = "" if columns_read == USUAL_COLUMNS else f".{'.'.join(columns_read)}"
        self.classes: list[str] = list(known[self.label_column].names)
        self.index_bytes = sum(footer.serialized_size for footer in self._footers)
        self._check_class_names("the dataset's card" if features else files.names[0], renamed=bool(features))
        self._outside = OutsideImages(source, files, self.image_column)
        self._images = [find_leaves(footer.schema, self.image_column) for footer in self._footers]
        self._leaves = [self._find_leaves(number) for number in range(len(files.names))]

    def blocks(self, most_bytes: int) -> list[Block]:
        """Blocks of consecutive row groups of each file: up to `most_bytes`, and at least one group.

        A group is cut up only if the images that lie outside the file would exceed this. Their bytes are estimated.
        """
        files = range(len(self._footers))
        return [block for file in files for block in self._blocks_of(file, most_bytes)]

    def read(self, block: Block) -> pa.Table:
        """All `batches` of a block."""
        return pa.Table.from_batches(self.batches(block))

    def batches(self, block: Block) -> Iterator[pa.RecordBatch]:
        """The columns `image`, encoded, and `label` (int64) of a block, a few rows at a time. Raises DataError."""
        footer, leaves, places = self._footers[block.file], self._leaves[block.file], self._images[block.file]
        with one_line_errors(self._source, self._files.names[block.file]):
            if any(may_lie_outside(footer.row_group(group), places) for group in block.groups):
                table = self._read_leaves(block, leaves)
                images, labels = self._images_of(block, table[self.image_column]), table[self.label_column]
                yield from pa.table({"image": images, "label": labels.cast(pa.int64())}).to_batches()
                return
            rows = max(1, block.rows * BATCH_BYTES // max(1, block.size))
            file, names = self._open(block, leaves)
            for batch in file.iter_batches(rows, list(block.groups), names, use_threads=False):
                images = as_binary(part(batch[self.image_column], "bytes", places))
                yield pa.record_batch({"image": images, "label": batch[self.label_column].cast(pa.int64())})

    def requests(self, block: Block) -> int:
        """How many requests a block costs, those for images that lie outside its file included."""
        if not self._files.by_request:
            return 0
        footer, images = self._footers[block.file], self._images[block.file]
        outside = sum(min(block.rows, rows_outside(footer.row_group(group), images)) for group in block.groups)
        return outside + (0 if block.file in self._whole else len(self._ranges(block, self._leaves[block.file])))

    def _fetch(self, block: Block, first: int, end: int, leaves: Sequence[int]) -> Bytes:
        """Bytes of the block's file, from the index if it has the whole file."""
        number = block.file
        if number in self._whole:
            kept = self._keep(f"{self._files.names[number]}.footer", lambda: whole(self._files, number))
            if len(kept) == self._files.size(number):
                return memoryview(kept)[first:end]
        check = partial(self._check_pages, block, first, leaves) if self._files.by_request else trust
        return self._files.read(number, first, end, check)

    def _check_pages(self, block: Block, start: int, leaves: Sequence[int], data: bytes | memoryview) -> None:
        """Raise ValueError unless `data`, the bytes of the file from `start` on, holds these columns of the block."""
        for group in block.groups:
            for leaf in leaves:
                column = self._column(block.file, group, leaf)
                first = _begin(column) - start
                if 0 <= first < len(data):
                    pages = memoryview(data)[first : first + column.total_compressed_size]
                    check_chunk(pages, column.num_values)

    def label_ranges(self, block: Block) -> list[tuple[int, int, int]] | None:
        """Rows, smallest and largest label of each row group, or None if the footer lacks statistics."""
        found = []
        for group in block.groups:
            statistics = self._column(block.file, group, self._leaves[block.file][-1]).statistics
            if statistics is None or not statistics.has_min_max:
                return None
            rows = min(block.rows, self._footers[block.file].row_group(group).num_rows)
            found.append((rows, statistics.min, statistics.max))
        return found

    def _open(self, block: Block, leaves: Sequence[int]) -> tuple[pq.ParquetFile, list[str]]:
        """The file of a block, of which only these stored columns of the block are there, and their names."""
        footer = self._footers[block.file]
        ranges = [(first, self._fetch(block, first, end, leaves)) for first, end in self._ranges(block, leaves)]
        file = pq.ParquetFile(_Ranges(ranges), metadata=footer, pre_buffer=False)
        return file, [footer.schema.column(leaf).path for leaf in leaves]

    def _read_leaves(self, block: Block, leaves: Sequence[int]) -> pa.Table:
        """These stored columns of a block."""
        file, names = self._open(block, leaves)
        return file.read_row_groups(list(block.groups), names, use_threads=False).slice(block.first, block.rows)

    def _images_of(self, block: Block, column: pa.ChunkedArray) -> pa.ChunkedArray:
        """The encoded images of a block; those that only have a path are read from where it leads."""
        leaves = self._images[block.file]
        data, paths = part(column, "bytes", leaves), part(column, "path", leaves)
        if data is not None and paths is None and leaves.paths is not None and data.null_count > column.null_count:
            column = self._read_leaves(block, [leaves.paths])[self.image_column]  # the footer did not tell of paths
            paths = part(column, "path", leaves)
        if paths is not None and (data is None or data.null_count):
            return self._outside.fill_in(block.file, data, paths)
        return as_binary(data)

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

    def _find_leaves(self, file: int) -> list[int]:
        """The numbers of the stored columns that are read, the labels' last: paths only where images lie outside.

        Raises DataError, naming a file that lacks images or labels.
        """
        footer, images = self._footers[file], self._images[file]
        names = [footer.schema.column(number).path for number in range(len(footer.schema.names))]
        if images.data is None and images.paths is None:
            wanted = f"{self.image_column}.bytes"
            raise DataError(f"{self._files.names[file]} has no column {wanted}; mend or remove the file")
        if self.label_column not in names:
            raise DataError(f"{self._files.names[file]} has no column {self.label_column}; mend or remove the file")
        groups = range(footer.num_row_groups)
        outside = images.data is None or any(rows_outside(footer.row_group(group), images) for group in groups)
        used = (images.data, images.paths if outside else None, names.index(self.label_column))
        return [leaf for leaf in used if leaf is not None]

    def _column(self, file: int, group: int, leaf: int) -> Any:
        return self._footers[file].row_group(group).column(leaf)

    def _blocks_of(self, file: int, most_bytes: int) -> Iterator[Block]:
        footer = self._footers[file]
        every = range(footer.num_row_groups)
        outside = [USUAL_BYTES * rows_outside(footer.row_group(group), self._images[file]) for group in every]
        sizes = [
            sum(self._column(file, group, leaf).total_compressed_size for leaf in self._leaves[file]) + outside[group]
            for group in every
        ]
        groups: list[int] = []
        for group, size in enumerate(sizes):
            if not footer.row_group(group).num_rows:
                continue
            if groups and sum(sizes[g] for g in groups) + size > most_bytes:
                yield self._block(file, groups, sizes)
                groups = []
            if outside[group] > most_bytes:
                yield from _cut(self._block(file, [group], sizes), most_bytes)
            else:
                groups.append(group)
        if groups:
            yield self._block(file, groups, sizes)

    def _block(self, file: int, groups: list[int], sizes: list[int]) -> Block:
        rows = sum(self._footers[file].row_group(group).num_rows for group in groups)
        name = f"{self._files.names[file]}.{groups[0]}-{groups[-1]}{self._suffix}"
        return Block(name, file, tuple(groups), rows, sum(sizes[group] for group in groups))

    def _ranges(self, block: Block, leaves: Sequence[int]) -> list[tuple[int, int]]:
        """The byte ranges of these stored columns of a block; ranges that are close are merged."""
        spans = []
        for group in block.groups:
            for leaf in leaves:
                column = self._column(block.file, group, leaf)
                spans.append((_begin(column), _begin(column) + column.total_compressed_size))
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

    def __init__(self, ranges: Sequence[tuple[int, Bytes]]) -> None:
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


def _begin(column: Any) -> int:
    """Where a column chunk begins in its file."""
    return int(column.dictionary_page_offset if column.has_dictionary_page else column.data_page_offset)


def _cut(block: Block, most_bytes: int) -> Iterator[Block]:
    """A block of one row group in parts of nearly as many rows: each up to `most_bytes`, and at least one row."""
    parts = -(-block.rows // max(1, block.rows * most_bytes // block.size))
    ends = [block.rows * number // parts for number in range(parts + 1)]
    for first, end in pairwise(ends):
        size = block.size * (end - first) // block.rows
        yield replace(block, name=f"{block.name}.{first}", rows=end - first, size=size, first=first)


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
