"""Parquet files of images and labels, read in blocks of row groups by exact byte ranges."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import xxhash
from datasets import Features

from errors import DataError
from stream.chunks import Chunks
from stream.columns import find_image_column, find_label_column
from stream.explain import one_line_errors
from stream.footers import HELD_BYTES, Keep
from stream.label_column import LabelColumn, features_of
from stream.labels import no_class, unwrapped
from stream.outside import USUAL_BYTES, ImageLeaves, OutsideImages, as_binary, part
from stream.ranges import Files
from stream.row_groups import ABSENT, DATA, LABEL, PATHS, RowGroups, from_bytes, index_name

if TYPE_CHECKING:
    from stream.cache import FileStore
    from stream.hub import Listing

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
    lines for the user about what was derived. `kept` is what was kept of the `row_groups`, instead of reading footers.

    Raises DataError for a file that is not parquet, lacks an image or label column, or has other classes than the rest.
    """

    tells_labels = True  # without reading images

    def __init__(
        self,
        source: str,
        files: Files,
        keep: Keep,
        columns: tuple[str | None, str | None],
        features: Any,
        kept: RowGroups | None = None,
    ) -> None:
        self._source = source
        self._files = files
        self._chunks = Chunks(source, files, keep)
        with one_line_errors(source, files.names[0]):
            known = Features.from_dict(features) if features else features_of(self._chunks.footers[0])
        self.image_column = find_image_column(known, columns[0], source)
        self.label_column = find_label_column(known, columns[1], self.image_column, source)
        self._chunks.index(kept, self.image_column, self.label_column)
        self.row_groups = self._chunks.row_groups
        self._labels = LabelColumn(source, self._chunks, self.label_column, columns[1] is not None)
        self._labels.name_classes(known, from_card=bool(features))
        self.classes: list[str] = self._labels.namings[0].names
        self.notes = [naming.note for naming in self._labels.namings[:1] if naming.note]
        self._suffix = self._block_suffix()
        self.index_bytes = min(int(self.row_groups.files["footer"].sum()), HELD_BYTES) + self.row_groups.groups.nbytes
        self._outside = OutsideImages(source, files, self.image_column)
        leaves = self.row_groups.files["leaves"].tolist()
        self._images = [ImageLeaves(*(None if leaf == ABSENT else leaf for leaf in found[:LABEL])) for found in leaves]
        self._parts = [self._find_parts(number) for number in range(len(files.names))]

    def blocks(self, most_bytes: int) -> list[Block]:
        """Blocks of consecutive row groups of each file: up to `most_bytes`, and at least one group.

        A group is cut up only if the images that lie outside the file would exceed this. Their bytes are estimated.
        """
        files = range(len(self._parts))
        return [block for file in files for block in self._blocks_of(file, most_bytes)]

    def read(self, block: Block) -> pa.Table:
        """All `batches` of a block."""
        return pa.Table.from_batches(self.batches(block))

    def batches(self, block: Block) -> Iterator[pa.RecordBatch]:
        """The columns `image`, encoded, and `label` (int64) of a block, a few rows at a time. Raises DataError."""
        parts, leaves, naming = self._parts[block.file], self._images[block.file], self._labels.namings[block.file]
        with one_line_errors(self._source, self._files.names[block.file]):
            if self.row_groups.may_lie_outside[self.row_groups.places(block.file, block.groups)].any():
                table = self._read_parts(block, parts)
                images, labels = self._images_of(block, table[self.image_column]), unwrapped(table[self.label_column])
                yield from pa.table({"image": images, "label": naming.numbers(labels)}).to_batches()
                return
            rows = max(1, block.rows * BATCH_BYTES // max(1, block.size))
            file, names = self._chunks.open(block.file, block.groups, parts)
            for batch in file.iter_batches(rows, list(block.groups), names, use_threads=False):
                images = as_binary(part(batch[self.image_column], "bytes", leaves))
                labels = naming.numbers(unwrapped(batch[self.label_column]))
                yield pa.record_batch({"image": images, "label": labels})

    def requests(self, block: Block) -> int:
        """How many requests a block costs, those for images that lie outside its file included."""
        if not self._files.by_request:
            return 0
        parts, outside = self._parts[block.file], 0
        if PATHS in parts:
            counts = self.row_groups.outside[self.row_groups.places(block.file, block.groups)]
            outside = int(counts.clip(max=block.rows).sum())
        at_hand = block.file in self._chunks.whole
        return outside + (0 if at_hand else len(self._chunks.ranges(block.file, block.groups, parts)))

    def label_ranges(self, blocks: Sequence[Block]) -> np.ndarray:
        """Rows, smallest and largest label of each row group (int64, (3, groups)); 0 where the footer does not tell."""
        counts, namings, index = [len(block.groups) for block in blocks], self._labels.namings, self.row_groups
        files = np.repeat([block.file for block in blocks], counts)
        found = index.groups[index.places(files, [group for block in blocks for group in block.groups])]
        told = np.array([naming.stored is None for naming in namings])[files] & index.files["numbers"][files]
        first = np.array([naming.first for naming in namings])[files]
        rows = np.minimum(found["rows"], np.repeat([block.rows for block in blocks], counts))
        return np.array([rows, found["low"] - first, found["high"] - first]) * (told & found["ranged"])

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
        rows = self.row_groups.groups["rows"][self.row_groups.of(block.file)]
        return block.first + int(rows[: block.groups[0]].sum())

    def _block_suffix(self) -> str:
        """What the names of blocks tell of columns and of the numbers of classes, where these are not the usual."""
        columns_read = [quote(column, safe="") for column in (self.image_column, self.label_column)]
        suffix = "" if columns_read == USUAL_COLUMNS else f".{'.'.join(columns_read)}"
        if all(naming.is_plain for naming in self._labels.namings):
            return suffix
        return f"{suffix}.{xxhash.xxh3_64_hexdigest(repr(self.classes).encode())}"

    def _read_parts(self, block: Block, parts: Sequence[int]) -> pa.Table:
        """These parts of a block."""
        return self._chunks.read(block.file, block.groups, parts).slice(block.first, block.rows)

    def _images_of(self, block: Block, column: pa.ChunkedArray) -> pa.ChunkedArray:
        """The encoded images of a block; those that only have a path are read from where it leads."""
        leaves = self._images[block.file]
        data, paths = part(column, "bytes", leaves), part(column, "path", leaves)
        if data is not None and paths is None and leaves.paths is not None and data.null_count > column.null_count:
            column = self._read_parts(block, [PATHS])[self.image_column]  # the footer did not tell of paths
            paths = part(column, "path", leaves)
        if paths is not None and (data is None or data.null_count):
            return self._outside.fill_in(block.file, data, paths)
        return as_binary(data)

    def _find_parts(self, file: int) -> list[int]:
        """The parts that are read: paths only where images lie outside.

        Raises DataError, naming a file that lacks images.
        """
        images = self._images[file]
        if images.data is None and images.paths is None:
            wanted = f"{self.image_column}.bytes"
            raise DataError(f"{self._files.names[file]} has no column {wanted}; mend or remove the file")
        data = [] if images.data is None else [DATA]
        is_outside = images.data is None or self.row_groups.outside[self.row_groups.of(file)].any()
        return [*data, PATHS, LABEL] if is_outside else [*data, LABEL]

    def _blocks_of(self, file: int, most_bytes: int) -> Iterator[Block]:
        there = self.row_groups.of(file)
        every, outside = self.row_groups.groups[there], USUAL_BYTES * self.row_groups.outside[there]
        counts, sizes = every["rows"].tolist(), (every["size"][:, self._parts[file]].sum(1) + outside).tolist()

        def block(groups: list[int], rows: int, size: int) -> Block:
            name = f"{self._files.names[file]}.{groups[0]}-{groups[-1]}{self._suffix}"
            return Block(name, file, tuple(groups), rows, size)

        groups: list[int] = []
        rows = total = 0  # of these, and their bytes
        for group, size in enumerate(sizes):
            if not counts[group]:
                continue
            if groups and total + size > most_bytes:
                yield block(groups, rows, total)
                groups, rows, total = [], 0, 0
            if outside[group] > most_bytes:
                yield from _cut(block([group], counts[group], size), most_bytes)
            else:
                groups.append(group)
                rows += counts[group]
                total += size
        if groups:
            yield block(groups, rows, total)


def _cut(block: Block, most_bytes: int) -> Iterator[Block]:
    """A block of one row group in parts of nearly as many rows: each up to `most_bytes`, and at least one row."""
    parts = -(-block.rows // max(1, block.rows * most_bytes // block.size))
    ends = [block.rows * number // parts for number in range(parts + 1)]
    for first, end in pairwise(ends):
        size = block.size * (end - first) // block.rows
        yield replace(block, name=f"{block.name}.{first}", rows=end - first, size=size, first=first)


def open_parquet(
    source: str,
    files: Files,
    keep: Keep,
    columns: tuple[str | None, str | None],
    listing: "Listing",
    store: "FileStore",
) -> ParquetShards:
    """The shards of the files; their row groups are kept by the commit, if there is one. Raises as `ParquetShards`."""
    index = f"{listing.commit}/{index_name(files.names, columns, listing.features)}"
    kept = store.find(index) if listing.commit else None
    shards = ParquetShards(source, files, keep, columns, listing.features, None if kept is None else from_bytes(kept))
    if listing.commit and kept is None:
        store.put(index, shards.row_groups.to_bytes())
    return shards
