"""Memory that a process shares with its decoding processes, which is used again and again."""

import itertools
import mmap
import os
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable
from tempfile import TemporaryFile
from typing import NamedTuple

import numpy as np

Pin = Callable[[int, int], Callable[[], None]]
"""`pin(address, bytes)` has the system keep this memory in place, and returns what undoes that."""

OPEN_FILES = 256  # that a decoding process keeps mapped
DIGEST = 16  # bytes at the beginning of a file that tell what it holds
PAGE = 2**21  # bytes: regions are whole numbers of these, so that batches of nearly one size share them


class Region:
    """Memory in a file that no other process can open, but one that is given its descriptor."""

    numbers = itertools.count()

    def __init__(self, size: int, pin: Pin | None) -> None:
        self.number, self.size = next(self.numbers), size
        self.descriptor = anonymous_file(size)
        self.array = np.frombuffer(mmap.mmap(self.descriptor, size), np.uint8)
        self.address = self.array.__array_interface__["data"][0]
        self.reusable = True
        self.close = weakref.finalize(self, _close, self.descriptor, pin(self.address, size) if pin else None)
        self.close.atexit = False


def _close(descriptor: int, unpin: Callable[[], None] | None) -> None:
    """Give up the descriptor of a region. The memory goes when nothing refers to it."""
    if unpin is not None:
        unpin()
    os.close(descriptor)


class SharedMemory:
    """Arrays in regions. One whose array nobody refers to any more serves the next array that fits."""

    def __init__(self) -> None:
        self._live: dict[int, Region] = {}
        self._free: deque[Region] = deque()
        self._lock = threading.Lock()

    def array(self, shape: tuple[int, ...], pin: Pin | None = None) -> np.ndarray:
        """An array (uint8) with any contents. Views of it do not count as references to it; tensors of it do."""
        size = int(np.prod(shape))
        with self._lock:
            region = self._take(size) or self._make(size, pin)
        array = region.array[:size].reshape(shape)
        weakref.finalize(array, self._put_back, region).atexit = False
        return array

    def find(self, array: np.ndarray) -> tuple[Region, int] | None:
        """The region of an array or of a view of one, and where in it that begins; None for another array."""
        address = array.__array_interface__["data"][0]
        for region in [*self._live.values()]:
            if region.address <= address < region.address + region.size:
                return region, address - region.address
        return None

    def numbers(self) -> tuple[int, ...]:
        """Of the regions that there are."""
        return (*self._live,)  # at once: other threads may run while a tuple is made of a dictionary

    def discard(self, array: np.ndarray) -> None:
        """Use the memory of this array for no other: a process that was given up may still write to it.

        It goes with the array, as other threads may still have parts of it filled.
        """
        if found := self.find(array):
            found[0].reusable = False

    def _give_up(self, region: Region) -> None:
        if self._live.pop(region.number, None):
            region.close()

    def _put_back(self, region: Region) -> None:
        if region.reusable:
            self._free.append(region)
        else:
            self._give_up(region)

    def _take(self, size: int) -> Region | None:
        """A free region that is large enough; those that are not are given up, for a larger one takes their place."""
        for _ in range(len(self._free)):
            region = self._free.popleft()
            if region.size >= size:
                return region
            self._give_up(region)
        return None

    def _make(self, size: int, pin: Pin | None) -> Region:
        region = Region(max(1, -(-size // PAGE)) * PAGE, pin)
        self._live[region.number] = region
        return region


class InFile(NamedTuple):
    """An image in a file of a cache: the file and its digest, its bytes there, and the same bytes in memory."""

    path: str
    digest: bytes
    start: int
    size: int
    data: memoryview


class Moved(Exception):
    """The file of an InFile is gone, or another one by now."""


def in_memory(image: bytes | memoryview | np.ndarray | InFile) -> bytes | memoryview | np.ndarray:
    """The image itself."""
    return image.data if isinstance(image, InFile) else image


class MappedFiles:
    """Files of a cache, which this process reads by mapping them."""

    def __init__(self) -> None:
        self._open: OrderedDict[str, tuple[int, memoryview]] = OrderedDict()

    def find(self, path: str, digest: bytes, start: int, size: int) -> memoryview | None:
        """These bytes of a file; None where it is gone, or is another one by now."""
        inode, found = self._open.get(path, (0, None))
        if found is None or found[:DIGEST] != digest:
            try:
                with open(path, "rb") as file:
                    inode = os.fstat(file.fileno()).st_ino
                    found = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            except (OSError, ValueError):
                return None
            if found[:DIGEST] != digest:
                return None
            self._close_removed()
            self._open[path] = inode, found
            if len(self._open) > OPEN_FILES:
                self._open.popitem(last=False)
        return found[start : start + size]

    def _close_removed(self) -> None:
        """Files that a cache has removed to make room take that room until nobody maps them."""
        for path, (inode, _) in [*self._open.items()]:
            try:
                if os.stat(path).st_ino == inode:
                    continue
            except OSError:
                pass
            del self._open[path]


def anonymous_file(size: int) -> int:
    """The descriptor of a file of so many bytes that no other process can open: in memory on Linux."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("decoding")
    else:
        with TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, size)
    return descriptor
