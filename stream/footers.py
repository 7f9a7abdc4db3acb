"""The footers of parquet files, read in parallel and parsed when they are asked for."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

import distributed
from stream.cache import Bytes
from stream.explain import one_line_errors
from stream.ranges import Files
from stream.retry import in_threads

T = TypeVar("T")
Told = dict[bytes, bytes]
Keep = Callable[[str, Callable[[], Bytes]], Bytes]  # the bytes kept under a name, made if absent

FOOTER_THREADS = 16
TAIL_BYTES = 64 * 1024  # most footers are smaller; a larger one costs a second request
MANY_FILES = 256  # of so many files, the small ones are fetched whole with the index, to save requests:
SMALL_FILE, SMALL_FILES = 2**20, 2**28  # bytes that one, and all of them together, may have
ARROW = b"ARROW:schema"  # the key of the Arrow schema in the metadata
LONG = 2**12  # bytes
HELD_BYTES = 2**26  # of footers that stay in memory: all of ImageNet-1K's


def small_files(files: Files) -> frozenset[int]:
    """The files that are fetched whole with the index, because a footer of them costs as much as all of them."""
    if len(files.names) < MANY_FILES:
        return frozenset()
    sizes = {number: files.told_size(number) for number in range(len(files.names))}
    small = {number: size for number, size in sizes.items() if size is not None and size <= SMALL_FILE}
    return frozenset(small) if sum(small.values()) <= SMALL_FILES else frozenset()


def whole(files: Files, number: int) -> bytes | memoryview:
    return files.read(number, 0, files.size(number), _check_magic)


def _check_magic(data: bytes | memoryview) -> None:
    if data[-4:] != b"PAR1":
        raise ValueError("it is not a whole parquet file; fetch or make it again")


class Footers:
    """The metadata of every file by its number: kept as bytes (of `small` files, all of them), parsed when asked for.

    The bytes that were asked for last stay in memory too. Raises DataError for a file that is not parquet.
    """

    def __init__(self, source: str, files: Files, keep: Keep, small: frozenset[int]) -> None:
        self._source = source
        self._files = files
        self._keep = keep
        self._small = small
        self._held: OrderedDict[int, Bytes] = OrderedDict()
        self._held_bytes = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._files.names)

    def __getitem__(self, number: int) -> pq.FileMetaData:
        return self._parsed(number, self._bytes(number))

    def each(self, call: Callable[[pq.FileMetaData, Told, int], T]) -> Iterator[T]:
        """`map` over the metadata of all files, read in parallel, what they tell by key, and their bytes.

        The metadata lack the Arrow schema, and the long values that a file has in common with the first one.
        """
        numbers, quiet = range(len(self)), True if distributed.rank() else None
        repeated = _Repeated(bytes(self._bytes(0)), self[0].metadata or {})

        def call_for(number: int) -> T:
            kept = bytes(self._bytes(number))
            data, told = repeated.cut_out(kept)
            footer = self._parsed(number, data.replace(ARROW, ARROW.lower()))  # which takes long to decode
            with one_line_errors(self._source, self._files.names[number]):
                return call(footer, (footer.metadata or {}) | told, len(kept))

        return iter(tqdm(in_threads(call_for, numbers, FOOTER_THREADS), "index", len(self), leave=False, disable=quiet))

    def _bytes(self, number: int) -> Bytes:
        with self._lock:
            if number in self._held:
                self._held.move_to_end(number)
                return self._held[number]
        data = self._keep(f"{self._files.names[number]}.footer", lambda: self._tail(number))
        with self._lock:
            self._held_bytes += len(data) if number not in self._held else 0
            self._held.setdefault(number, data)
            while self._held_bytes > HELD_BYTES:
                self._held_bytes -= len(self._held.popitem(last=False)[1])
        return data

    def _parsed(self, number: int, data: Bytes) -> pq.FileMetaData:
        with one_line_errors(self._source, self._files.names[number]):
            return pq.read_metadata(pa.BufferReader(data))

    def _tail(self, number: int) -> bytes | memoryview:
        files = self._files
        if number in self._small:
            return whole(files, number)
        size = files.size(number)
        data = files.read(number, max(0, size - TAIL_BYTES), size, _check_magic)
        length = 8 + int.from_bytes(data[-8:-4], "little")
        return data[-length:] if length <= len(data) else files.read(number, max(0, size - length), size)


class _Repeated:
    """The long values in the metadata of a file, which other files may have at the same distance from their end.

    The features of 19,167 classes take 97 % of a footer and most of the time to parse it.
    """

    def __init__(self, tail: bytes, metadata: Told) -> None:
        values = [(key, value, _as_stored(value)) for key, value in metadata.items() if len(value) > LONG]
        found = [(len(tail) - tail.find(stored), key, value, stored) for key, value, stored in values]
        self._found = sorted(found)  # the last one first

    def cut_out(self, tail: bytes) -> tuple[bytes, Told]:
        """The end of a file with nothing in place of these values where it has them; and those it has."""
        told, parts, nothing = dict[bytes, bytes](), list[bytes](), _as_stored(b"")
        length, end = int.from_bytes(tail[-8:-4], "little"), len(tail) - 8
        for back, key, value, stored in self._found:
            first = len(tail) - back
            if first >= 0 and tail.startswith(stored, first):
                parts[:0] = nothing, tail[first + len(stored) : end]
                length, end, told[key] = length - len(stored) + len(nothing), first, value
        return (b"".join([tail[:end], *parts, length.to_bytes(4, "little"), tail[-4:]]) if told else tail), told


def _as_stored(value: bytes) -> bytes:
    """Bytes as Thrift's compact protocol writes them: behind their number, seven bits of it to a byte."""
    left, head = len(value), bytearray()
    while left > 127:
        head.append(left & 127 | 128)
        left >>= 7
    return bytes((*head, left)) + value
