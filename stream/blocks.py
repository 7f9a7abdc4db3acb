"""Blocks of images and labels as one run of bytes, in memory that goes back to the system as soon as nobody uses it."""

import contextlib
import mmap
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from stream.images import UnreadableImage
from stream.shared import DIGEST, InFile

NO_IMAGE = "the dataset has no image here"
LARGE = 2**21  # bytes: from here on pages of 2 MiB, which are ten times as quick to fill
ROOM = 2**16  # bytes: more than the schema and the first offsets take


@dataclass
class BlockData:
    """Encoded images (binary) and their labels (int64)."""

    images: pa.ChunkedArray
    labels: np.ndarray

    def image(self, row: int) -> "memoryview | InFile":
        """Raises UnreadableImage where there is none."""
        image = self.images[row].as_buffer()
        if not image:
            raise UnreadableImage(NO_IMAGE)
        return memoryview(image)


class KeptBlock(BlockData):
    """A block in a file of a cache, of which `kept` is mapped: a decoding process can read it there itself."""

    def __init__(self, images: pa.ChunkedArray, labels: np.ndarray, path: str, kept: memoryview) -> None:
        super().__init__(images, labels)
        file = memoryview(kept.obj)  # from its digest on
        first = np.frombuffer(file, np.uint8).__array_interface__["data"][0]
        parts = [_places(chunk) for chunk in images.chunks]
        starts, ends = (np.concatenate(part) - first for part in zip(*parts, strict=True))
        self._spans = [*zip(starts.tolist(), ends.tolist(), strict=True)]
        self._file = path, bytes(file[:DIGEST]), file

    def image(self, row: int) -> InFile:
        """Raises UnreadableImage where there is none."""
        start, end = self._spans[row]
        if start == end:
            raise UnreadableImage(NO_IMAGE)
        path, digest, file = self._file
        return InFile(path, digest, start, end - start, file[start:end])


def _places(chunk: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Where each value of binary data begins and ends in memory; the same where there is none."""
    _, offsets, values = chunk.buffers()
    width = np.int64 if pa.types.is_large_binary(chunk.type) else np.int32
    ends = np.frombuffer(offsets, width)[chunk.offset : chunk.offset + len(chunk) + 1].astype(np.int64)
    begin = values.address if values else 0
    return begin + ends[:-1], begin + np.where(np.asarray(chunk.is_valid()), ends[1:], ends[:-1])


def to_bytes(batches: Iterator[pa.RecordBatch], expected: int) -> memoryview:
    """An Arrow IPC stream of the batches, of which there is at least one, of about `expected` bytes."""
    first = next(batches)
    sink = Pages(expected + expected // 8 + ROOM)
    with pa.PythonFile(sink, "w") as file, pa.ipc.new_stream(file, first.schema) as writer:
        writer.write_batch(first)
        del first
        for batch in batches:
            writer.write_batch(batch)
    return sink.written()


class Pages:
    """A file in private pages; those that are never written cost nothing.

    Allocators keep what is freed, in each thread anew, which can double what a process holds; so this is mapped.
    """

    closed = False

    def __init__(self, capacity: int, data: bytes | memoryview = b"") -> None:
        self._pages, self._end = _map(capacity), 0
        self.write(data)

    def write(self, data: bytes | memoryview) -> int:
        begin, self._end = self._end, self._end + len(data)
        if self._end > len(self._pages):
            old, self._pages = self._pages, _map(2 * self._end)
            self._copy(0, memoryview(old)[:begin])
        self._copy(begin, data)
        return len(data)

    def _copy(self, begin: int, data: bytes | memoryview) -> None:
        """Copies with numpy, which lets other threads run."""
        np.frombuffer(self._pages, np.uint8)[begin : begin + len(data)] = np.frombuffer(data, np.uint8)

    def tell(self) -> int:
        return self._end

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass

    def cut(self, length: int) -> None:
        """Forget what follows the first `length` bytes."""
        self._end = length

    def written(self) -> memoryview:
        return memoryview(self._pages)[: self._end]


def _map(size: int) -> mmap.mmap:
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if size >= LARGE and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages
            pages.madvise(mmap.MADV_HUGEPAGE)
    return pages
