"""Column chunks of parquet files, read by exact byte ranges."""

import io
from collections.abc import Sequence
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stream.cache import Bytes
from stream.footers import Keep, read_footers, small_files, whole
from stream.pages import check_chunk
from stream.ranges import Files, trust

LARGEST_GAP = 2**20  # bytes: a smaller gap is read and discarded, which is cheaper than a second request


class Chunks:
    """The column chunks of the files of a split, numbered by file, row group and leaf (stored column).

    `footers` has the metadata of each file, `whole` the numbers of those that are fetched whole with the index. Raises
    DataError for a file that is not parquet.
    """

    def __init__(self, source: str, files: Files, keep: Keep) -> None:
        self.files = files
        self.keep = keep
        self.whole = small_files(files)
        self.footers = read_footers(source, files, keep, self.whole)

    def open(self, file: int, groups: Sequence[int], leaves: Sequence[int]) -> tuple[pq.ParquetFile, list[str]]:
        """A file of which only these leaves of these row groups are there, and the names of the leaves."""
        footer = self.footers[file]
        parts = [
            (first, self._fetch(file, groups, first, end, leaves)) for first, end in self.ranges(file, groups, leaves)
        ]
        opened = pq.ParquetFile(_Ranges(parts), metadata=footer, pre_buffer=False)
        return opened, [footer.schema.column(leaf).path for leaf in leaves]

    def read(self, file: int, groups: Sequence[int], leaves: Sequence[int]) -> pa.Table:
        """These leaves of these row groups."""
        opened, names = self.open(file, groups, leaves)
        return opened.read_row_groups(list(groups), names, use_threads=False)

    def column(self, file: int, group: int, leaf: int) -> Any:
        """What the footer tells of a chunk, a `ColumnChunkMetaData`."""
        return self.footers[file].row_group(group).column(leaf)

    def ranges(self, file: int, groups: Sequence[int], leaves: Sequence[int]) -> list[tuple[int, int]]:
        """The byte ranges of these leaves of these row groups; ranges that are close are merged."""
        spans = []
        for group in groups:
            for leaf in leaves:
                column = self.column(file, group, leaf)
                spans.append((_begin(column), _begin(column) + column.total_compressed_size))
        spans.sort()
        ranges = [spans[0]]
        for first, end in spans[1:]:
            if first - ranges[-1][1] <= LARGEST_GAP:
                ranges[-1] = (ranges[-1][0], end)
            else:
                ranges.append((first, end))
        return ranges

    def _fetch(self, file: int, groups: Sequence[int], first: int, end: int, leaves: Sequence[int]) -> Bytes:
        """Bytes of a file, from the index if it has the whole file."""
        if file in self.whole:
            kept = self.keep(f"{self.files.names[file]}.footer", lambda: whole(self.files, file))
            if len(kept) == self.files.size(file):
                return memoryview(kept)[first:end]
        check = partial(self._check_pages, file, groups, first, leaves) if self.files.by_request else trust
        return self.files.read(file, first, end, check)

    def _check_pages(
        self, file: int, groups: Sequence[int], start: int, leaves: Sequence[int], data: bytes | memoryview
    ) -> None:
        """Raise ValueError unless `data`, the bytes of the file from `start` on, holds these leaves of these groups."""
        for group in groups:
            for leaf in leaves:
                column = self.column(file, group, leaf)
                first = _begin(column) - start
                if 0 <= first < len(data):
                    pages = memoryview(data)[first : first + column.total_compressed_size]
                    check_chunk(pages, column.num_values)


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
