"""Column chunks of parquet files, read by exact byte ranges."""

import io
from collections.abc import Sequence
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq

from stream.cache import Bytes
from stream.footers import Footers, Keep, small_files, whole
from stream.pages import check_chunk
from stream.ranges import Files, trust
from stream.row_groups import RowGroups, read_row_groups

LARGEST_GAP = 2**20  # bytes: a smaller gap is read and discarded, which is cheaper than a second request


class Chunks:
    """The column chunks of the files of a split, numbered by file, row group and part: DATA, PATHS or LABEL.

    `row_groups` has what is held of the footers, once `index` was called; `footers` has all of each file, `whole` the
    numbers of those that are fetched whole with the index.
    """

    row_groups: RowGroups

    def __init__(self, source: str, files: Files, keep: Keep) -> None:
        self.files = files
        self.keep = keep
        self.whole = small_files(files)
        self.footers = Footers(source, files, keep, self.whole)

    def index(self, kept: RowGroups | None, image: str, label: str) -> None:
        """Take what was kept of the footers, or read them, for these columns. Raises DataError for a file that is not
        parquet.
        """
        self.row_groups = kept or read_row_groups(self.footers, image, label)

    def open(self, file: int, groups: Sequence[int], parts: Sequence[int]) -> tuple[pq.ParquetFile, list[str]]:
        """A file of which only these parts of these row groups are there, and the names of their columns."""
        footer, leaves = self.footers[file], self.row_groups.files["leaves"][file]
        found = [
            (first, self._fetch(file, groups, first, end, parts)) for first, end in self.ranges(file, groups, parts)
        ]
        opened = pq.ParquetFile(_Ranges(found), metadata=footer, pre_buffer=False)
        return opened, [footer.schema.column(int(leaves[part])).path for part in parts]

    def read(self, file: int, groups: Sequence[int], parts: Sequence[int]) -> pa.Table:
        """These parts of these row groups."""
        opened, names = self.open(file, groups, parts)
        return opened.read_row_groups(list(groups), names, use_threads=False)

    def ranges(self, file: int, groups: Sequence[int], parts: Sequence[int]) -> list[tuple[int, int]]:
        """The byte ranges of these parts of these row groups; ranges that are close are merged."""
        chunks = self.row_groups.at(file, groups)
        begins, sizes = (chunks[name][:, parts].ravel().tolist() for name in ("begin", "size"))
        spans = sorted((begin, begin + size) for begin, size in zip(begins, sizes, strict=True))
        ranges = [spans[0]]
        for first, end in spans[1:]:
            if first - ranges[-1][1] <= LARGEST_GAP:
                ranges[-1] = (ranges[-1][0], end)
            else:
                ranges.append((first, end))
        return ranges

    def _fetch(self, file: int, groups: Sequence[int], first: int, end: int, parts: Sequence[int]) -> Bytes:
        """Bytes of a file, from the index if it has the whole file."""
        if file in self.whole:
            kept = self.keep(f"{self.files.names[file]}.footer", lambda: whole(self.files, file))
            if len(kept) == self.files.size(file):
                return memoryview(kept)[first:end]
        check = partial(self._check_pages, file, groups, first, parts) if self.files.by_request else trust
        return self.files.read(file, first, end, check)

    def _check_pages(
        self, file: int, groups: Sequence[int], start: int, parts: Sequence[int], data: bytes | memoryview
    ) -> None:
        """Raise ValueError unless `data`, the bytes of the file from `start` on, holds these parts of these groups."""
        chunks = self.row_groups.at(file, groups)
        told = (chunks[name][:, parts].ravel().tolist() for name in ("begin", "size", "values"))
        for begin, size, values in zip(*told, strict=True):
            if 0 <= begin - start < len(data):
                check_chunk(memoryview(data)[begin - start : begin - start + size], values)


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
