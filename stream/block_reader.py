"""BlockReader: the blocks of an epoch, fetched some way ahead of use."""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Future, wait
from queue import SimpleQueue
from typing import TYPE_CHECKING, Protocol

import numpy as np

from stream.blocks import BlockData
from stream.cache import FileStore
from stream.loader import POLL_SECONDS, Cancelled
from stream.retry import say
from stream.shared import InFile

if TYPE_CHECKING:
    from stream.parquet import Block

FETCH_THREADS = 8
SMALL_BLOCK, SMALL_THREADS = 2**20, 32  # bytes: what takes longer to ask for than to send is asked for in more threads
AHEAD_BYTES = 256 * 2**20
TRANSFER_BYTES = 128 * 2**20
OPEN_BLOCKS = 256
CLOSE_SECONDS = 1.0


class BlockDataset(Protocol):
    """Samples in blocks, each of a name and a size in bytes."""

    blocks: "list[Block]"
    cache: FileStore | None

    def locate(self, sample_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The block of each sample, and its row in that block."""

    def block_of(self, sample_ids: np.ndarray) -> np.ndarray:
        """The block of each sample."""

    def cache_name(self, number: int) -> str:
        """The name of a block in the cache."""

    def read_block(self, number: int) -> BlockData:
        """A block from the cache or from where it comes. Raises DataError."""

    def find_block(self, number: int) -> BlockData | None:
        """A block in the cache, memory-mapped from disk, or None."""


def blocks_ahead(largest: int) -> int:
    """How many blocks are prefetched when the largest has `largest` bytes."""
    return max(1, min(_most(largest), AHEAD_BYTES // largest))


def fetch_threads(largest: int) -> int:
    """How many blocks are in transfer at once: two at least, so that one that stalls does not hold up the others."""
    return max(2, min(_most(largest), TRANSFER_BYTES // largest))


def _most(largest: int) -> int:
    return SMALL_THREADS if largest <= SMALL_BLOCK else FETCH_THREADS


class BlockReader:
    """Reads each block of an epoch once, some blocks ahead of use, and drops it after its last sample was used.

    A block in the cache is not kept in memory: it is memory-mapped from disk when a sample of it is read.
    """

    def __init__(self, dataset: BlockDataset, ids: Iterable[np.ndarray]) -> None:
        self._dataset = dataset
        counts, seen = np.zeros(len(dataset.blocks), np.int64), 0
        first_use = np.full(len(counts), np.iinfo(np.int64).max)
        for blocks in map(dataset.block_of, ids):
            counts += np.bincount(blocks, minlength=len(counts))
            np.minimum.at(first_use, blocks, np.arange(seen, seen + len(blocks)))
            seen += len(blocks)
        used = np.argsort(first_use)[: np.count_nonzero(counts)]
        self._left = dict(zip(used.tolist(), counts[used].tolist(), strict=True))
        self._queue = [*self._left]
        self._place = {block: place for place, block in enumerate(self._queue)}
        largest = max(dataset.blocks[block].size for block in self._queue)
        self._ahead = blocks_ahead(largest)
        self._asked = 0
        self._blocks: dict[int, Future[BlockData | None]] = {}
        self._open: OrderedDict[int, BlockData] = OrderedDict()
        self._lock = threading.Lock()
        self._wanted: SimpleQueue[int | None] = SimpleQueue()
        self._closed = False
        self.should_stop: Callable[[], bool] = lambda: False
        if dataset.cache is not None:
            dataset.cache.forget_used()
        self._threads = [
            threading.Thread(target=self._fetch, name="fetch", daemon=True) for _ in range(fetch_threads(largest))
        ]
        for thread in self._threads:
            thread.start()

    def read(self, sample_id: int) -> tuple[memoryview | InFile, int]:
        blocks, rows = self._dataset.locate(np.array([sample_id]))
        data, row = self._block(int(blocks[0])), int(rows[0])
        return data.image(row), int(data.labels[row])

    def release(self, ids: np.ndarray) -> None:
        blocks, counts = np.unique(self._dataset.block_of(ids), return_counts=True)
        with self._lock:
            for block, count in zip(blocks.tolist(), counts.tolist(), strict=True):
                self._left[block] -= count
                if not self._left[block]:
                    self._forget(block)

    def close(self) -> None:
        self._closed = True
        for _ in self._threads:
            self._wanted.put(None)
        deadline = time.monotonic() + CLOSE_SECONDS
        for thread in self._threads:  # one that still waits for the network ends with the process
            thread.join(max(0.0, deadline - time.monotonic()))

    def _block(self, block: int) -> BlockData:
        with self._lock:
            ahead = self._place.get(block, 0) + self._ahead
            for other in [*self._queue[self._asked : ahead + 1], block]:
                if other not in self._blocks:
                    self._blocks[other] = Future()
                    self._wanted.put(other)
            self._asked = max(self._asked, ahead + 1)
            future = self._blocks[block]
        since = time.monotonic()
        while not future.done():
            wait([future], POLL_SECONDS)
            say(since, f"{self._dataset.blocks[block].name}, before training can go on")
            if self._closed or self.should_stop():
                raise Cancelled
        data = future.result()
        return self._from_disk(block) if data is None else data

    def _from_disk(self, block: int) -> BlockData:
        with self._lock:
            data = self._open.get(block) or self._dataset.find_block(block)
        data = data or self._dataset.read_block(block)
        with self._lock:
            self._open[block] = data
            if len(self._open) > OPEN_BLOCKS:
                self._open.popitem(last=False)
            return data

    def _fetch(self) -> None:
        """The body of each fetching thread."""
        while (block := self._wanted.get()) is not None:
            if self._closed:
                continue
            future = self._blocks[block]
            try:
                data = self._dataset.read_block(block)
                future.set_result(None if self._dataset.find_block(block) else data)
            except BaseException as error:
                future.set_exception(error)

    def _forget(self, block: int) -> None:
        del self._blocks[block]
        self._open.pop(block, None)
        if self._dataset.cache is not None:
            self._dataset.cache.mark_used(self._dataset.cache_name(block))
