"""The footers of parquet files: which row groups they have, and where."""

from collections.abc import Callable

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

import distributed
from stream.cache import Bytes
from stream.explain import one_line_errors
from stream.ranges import Files
from stream.retry import in_threads

Keep = Callable[[str, Callable[[], Bytes]], Bytes]  # the bytes kept under a name, made if absent

FOOTER_THREADS = 16
TAIL_BYTES = 64 * 1024  # most footers are smaller; a larger one costs a second request
MANY_FILES = 256  # of so many files, the small ones are fetched whole with the index, to save requests:
SMALL_FILE, SMALL_FILES = 2**20, 2**28  # bytes that one, and all of them together, may have


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


def read_footers(source: str, files: Files, keep: Keep, small: frozenset[int]) -> list[pq.FileMetaData]:
    """The metadata of every file, read in parallel and kept; of a small file, all of it is kept."""

    def tail(number: int) -> bytes | memoryview:
        if number in small:
            return whole(files, number)
        size = files.size(number)
        data = files.read(number, max(0, size - TAIL_BYTES), size, _check_magic)
        length = 8 + int.from_bytes(data[-8:-4], "little")
        return data[-length:] if length <= len(data) else files.read(number, max(0, size - length), size)

    def read(number: int) -> pq.FileMetaData:
        data = keep(f"{files.names[number]}.footer", lambda: tail(number))
        with one_line_errors(source, files.names[number]):
            return pq.read_metadata(pa.BufferReader(data))

    numbers, quiet = range(len(files.names)), True if distributed.rank() else None
    return list(tqdm(in_threads(read, numbers, FOOTER_THREADS), "index", len(numbers), leave=False, disable=quiet))
