"""Parquet files of images and labels, read in blocks of row groups by exact byte ranges."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import xxhash
from datasets import Features

from errors import DataError
from stream.chunks import Chunks
from stream.columns import find_image_column, find_label_column
from stream.explain import one_line_errors
from stream.footers import Keep
from stream.label_column import LabelColumn, features_of
from stream.labels import no_class, unwrapped
from stream.outside import USUAL_BYTES, OutsideImages, as_binary, find_leaves, may_lie_outside, part, rows_outside
from stream.ranges import Files

BATCH_BYTES = 2**20  # of images that are decoded at once
USUAL_COLUMNS = ["image", "label"]  # the names of blocks tell others, which a cache must not mix up with them


@dataclass(frozen=True)
class Block:
    """Consecutive row groups of one file, read together, or the `rows` from `first` on of one. `size` is in bytes."""

    name: str
    file: int
    groups: tuple[int, ...]
    rows: int
    size: int
    first: int = 0


class ParquetShards:
    """The files of one split. Labels are the places of their classes in `classes`, which has the names; `notes` are
    lines for the user about what was derived.

    Raises DataError for a file that is not parquet, lacks an image or label column, or has other classes than the rest.
    """

    tells_labels = True  # without reading images

    def __init__(
        self, source: str, files: Files, keep: Keep, columns: tuple[str | None, str | None], features: Any
    ) -> None:
        self._source = source
        self._files = files
        self._chunks = Chunks(source, files, keep)
        self._footers = self._chunks.footers
        with one_line_errors(source, files.names[0]):
            known = Features.from_dict(features) if features else features_of(self._footers[0])
        self.image_column = find_image_column(known, columns[0], source)
        self.label_column = find_label_column(known, columns[1], self.image_column, source)
        self._labels = LabelColumn(source, self._chunks, self.label_column, columns[1] is not None)
        self._labels.name_classes(known, from_card=bool(features))
        self.classes: list[str] = self._labels.namings[0].names
        self.notes = [naming.note for naming in self._labels.namings[:1] if naming.note]
        self._suffix = self._block_suffix()
        self.index_bytes = sum(footer.serialized_size for footer in self._footers)
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
        naming = self._labels.namings[block.file]
        with one_line_errors(self._source, self._files.names[block.file]):
            if any(may_lie_outside(footer.row_group(group), places) for group in block.groups):
                table = self._read_leaves(block, leaves)
                images, labels = self._images_of(block, table[self.image_column]), unwrapped(table[self.label_column])
                yield from pa.table({"image": images, "label": naming.numbers(labels)}).to_batches()
                return
            rows = max(1, block.rows * BATCH_BYTES // max(1, block.size))
            file, names = self._chunks.open(block.file, block.groups, leaves)
            for batch in file.iter_batches(rows, list(block.groups), names, use_threads=False):
                images = as_binary(part(batch[self.image_column], "bytes", places))
                labels = naming.numbers(unwrapped(batch[self.label_column]))
                yield pa.record_batch({"image": images, "label": labels})

    def requests(self, block: Block) -> int:
        """How many requests a block costs, those for images that lie outside its file included."""
        if not self._files.by_request:
            return 0
        footer, images, leaves = self._footers[block.file], self._images[block.file], self._leaves[block.file]
        outside = sum(min(block.rows, rows_outside(footer.row_group(group), images)) for group in block.groups)
        at_hand = block.file in self._chunks.whole
        return outside + (0 if at_hand else len(self._chunks.ranges(block.file, block.groups, leaves)))

    def label_ranges(self, block: Block) -> list[tuple[int, int, int]] | None:
        """Rows, smallest and largest label of each row group, or None if the footer does not tell."""
        naming, found = self._labels.namings[block.file], []
        if naming.stored is not None:
            return None
        for group in block.groups:
            statistics = self._chunks.column(block.file, group, self._leaves[block.file][-1]).statistics
            if statistics is None or not statistics.has_min_max:
                return None
            rows = min(block.rows, self._footers[block.file].row_group(group).num_rows)
            found.append((rows, statistics.min - naming.first, statistics.max - naming.first))
        return found

    def labels(self, block: Block) -> np.ndarray:
        """The labels of a block (int64). Of a file, the labels alone are fetched, once.

        Raises DataError, also where a row has none.
        """
        stored = self._labels.stored(block.file).slice(self._first_row(block), block.rows)
        with one_line_errors(self._source, self._files.names[block.file]):
            if stored.null_count:
                raise no_class(self._files.names[block.file], None)
            return np.asarray(self._labels.namings[block.file].numbers(stored), np.int64)

    def names(self, block: Block, rows: np.ndarray) -> list[str]:
        """Rows of a block in words: its file, and their numbers in that from 0 on."""
        name = self._files.names[block.file].removeprefix(self._files.root)
        return [f"{name} row {row}" for row in (self._first_row(block) + rows).tolist()]

    def _first_row(self, block: Block) -> int:
        """How many rows of its file precede a block."""
        footer = self._footers[block.file]
        return block.first + sum(footer.row_group(group).num_rows for group in range(block.groups[0]))

    def _block_suffix(self) -> str:
        """What the names of blocks tell of columns and of the numbers of classes, where these are not the usual."""
        columns_read = [quote(column, safe="") for column in (self.image_column, self.label_column)]
        suffix = "" if columns_read == USUAL_COLUMNS else f".{'.'.join(columns_read)}"
        if all(naming.is_plain for naming in self._labels.namings):
            return suffix
        return f"{suffix}.{xxhash.xxh3_64_hexdigest(repr(self.classes).encode())}"

    def _read_leaves(self, block: Block, leaves: Sequence[int]) -> pa.Table:
        """These stored columns of a block."""
        return self._chunks.read(block.file, block.groups, leaves).slice(block.first, block.rows)

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

    def _find_leaves(self, file: int) -> list[int]:
        """The numbers of the stored columns that are read, the labels' last: paths only where images lie outside.

        Raises DataError, naming a file that lacks images.
        """
        footer, images = self._footers[file], self._images[file]
        if images.data is None and images.paths is None:
            wanted = f"{self.image_column}.bytes"
            raise DataError(f"{self._files.names[file]} has no column {wanted}; mend or remove the file")
        groups = range(footer.num_row_groups)
        outside = images.data is None or any(rows_outside(footer.row_group(group), images) for group in groups)
        used = (images.data, images.paths if outside else None, self._labels.leaves[file])
        return [leaf for leaf in used if leaf is not None]

    def _blocks_of(self, file: int, most_bytes: int) -> Iterator[Block]:
        footer = self._footers[file]
        every = range(footer.num_row_groups)
        outside = [USUAL_BYTES * rows_outside(footer.row_group(group), self._images[file]) for group in every]
        sizes = [
            sum(self._chunks.column(file, group, leaf).total_compressed_size for leaf in self._leaves[file])
            + outside[group]
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


def _cut(block: Block, most_bytes: int) -> Iterator[Block]:
    """A block of one row group in parts of nearly as many rows: each up to `most_bytes`, and at least one row."""
    parts = -(-block.rows // max(1, block.rows * most_bytes // block.size))
    ends = [block.rows * number // parts for number in range(parts + 1)]
    for first, end in pairwise(ends):
        size = block.size * (end - first) // block.rows
        yield replace(block, name=f"{block.name}.{first}", rows=end - first, size=size, first=first)
