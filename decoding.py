"""Processes that decode and transform images, for they do not share this one's interpreter lock.

A decoding process imports no more than this module does.
"""

import contextlib
import functools
import mmap
import os
import pickle
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from queue import SimpleQueue
from tempfile import TemporaryFile
from typing import Any, cast

import numpy as np

from errors import SIGNALS
from pictures import EncodedImage, Transform, decode_into

WITHOUT_TORCH = "sys.modules['torch'] = None"  # which albumentations would import, for seconds, and need not
PROCESS_BYTES = 60 * 2**20  # of memory that a decoding process does not share, as seen on Linux
ARENA_BYTES = 4 * 2**20  # what a process is given at once, and gives back, lies in so much shared memory


def pack(transform: Transform) -> bytes:
    """A transform as a decoding process takes it. Only a parent and its own processes exchange pickles, never files."""
    return pickle.dumps(transform)


class WorkerDied(Exception):
    """A decoding process has ended unasked, or could not be started."""


class DecodingPool:
    """Processes that decode and transform; each serves one thread of this process at a time.

    They start in the background, and end when this object or this process does, however it ends.
    """

    def __init__(self, processes: int) -> None:
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        descriptors = []
        for _ in range(processes):
            ours, theirs = socket.socketpair()
            arena = _anonymous_file()
            os.ftruncate(arena, ARENA_BYTES)
            self._idle.put(_Worker(Connection(ours.detach()), mmap.mmap(arena, ARENA_BYTES)))
            descriptors += [theirs.detach(), arena]
        if processes:
            code = f"import sys; sys.path = {sys.path!r}; {WITHOUT_TORCH}; import decoding; decoding.main()"
            command = [sys.executable, "-c", code, *map(str, descriptors)]
            subprocess.Popen(command, pass_fds=descriptors, stdin=subprocess.DEVNULL, start_new_session=True)
        for descriptor in descriptors:
            os.close(descriptor)

    def run(
        self, transform: bytes, images: Sequence[EncodedImage], seeds: Sequence[tuple[int, ...]], out: np.ndarray
    ) -> list[Exception | None]:
        """Decodes and transforms (by a Transform, packed) into `out`, uint8 (N, H, W, 3).

        Returns for each image None, or why it cannot be read and its row of `out` was left as it is. Raises WorkerDied.
        """
        worker = self._idle.get()
        try:
            found: list[Exception | None] = []
            while len(found) < len(images):
                done = len(found)
                found += worker.run(transform, images[done:], seeds[done:], out[done:])
            return found
        finally:
            self._idle.put(worker)


def shared_pool(processes: int) -> DecodingPool:
    """The pool of so many processes that all loaders of this process share."""
    return _pool_of(processes, os.getpid())


@functools.cache
def _pool_of(processes: int, pid: int) -> DecodingPool:
    """By the process too, for one that was forked must not speak on its parent's sockets."""
    return DecodingPool(processes)


def _anonymous_file() -> int:
    """The descriptor of an empty file that no other process can open: in memory on Linux."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("decoding")
    with TemporaryFile() as file:
        return os.dup(file.fileno())


class _Worker:
    """A decoding process as its parent sees it. The arena holds transformed images first, then encoded ones."""

    def __init__(self, connection: Connection, arena: mmap.mmap) -> None:
        self._connection = connection
        self._memory = memoryview(arena)

    def run(
        self, transform: bytes, images: Sequence[EncodedImage], seeds: Sequence[tuple[int, ...]], out: np.ndarray
    ) -> list[Exception | None]:
        """As `DecodingPool.run`, for as many images from the first on as the arena has room for, and at least one."""
        count, end = 0, 0
        for image in images:
            if isinstance(image, np.ndarray) or end + len(image) + out[: count + 1].nbytes > ARENA_BYTES:
                break
            count, end = count + 1, end + len(image)
        if not count:
            return [decode_into(out[0], images[0], pickle.loads(transform), seeds[0])]
        at, jobs = out[:count].nbytes, []
        for image, seed in zip(images[:count], seeds, strict=False):
            self._memory[at : at + len(image)] = memoryview(cast(bytes, image)).cast("B")
            jobs.append((at, len(image), seed))
            at += len(image)
        try:
            self._connection.send((transform, out.shape[1:], jobs))
            answer = self._connection.recv()
        except (EOFError, OSError) as error:
            _pool_of.cache_clear()
            raise WorkerDied from error
        if isinstance(answer, str):
            raise RuntimeError(f"a decoding process failed:\n{answer}")
        found = np.frombuffer(self._memory, np.uint8, out[:count].nbytes).reshape(out[:count].shape)
        if not any(answer):
            out[:count] = found
            return list(answer)
        for row, problem in enumerate(answer):
            if problem is None:
                out[row] = found[row]
        return list(answer)


def main() -> None:
    """Become as many decoding processes as there are pairs of a socket and an arena among the arguments."""
    numbers = [int(argument) for argument in sys.argv[1:]]
    pairs = list(zip(numbers[::2], numbers[1::2], strict=True))
    mine = next((pair for pair in pairs[1:] if not os.fork()), pairs[0])
    for number in {*numbers} - {*mine}:
        os.close(number)
    with contextlib.suppress(EOFError, ConnectionError):  # the parent hung up
        serve(Connection(mine[0]), memoryview(mmap.mmap(mine[1], 0)))


def serve(connection: Connection, memory: memoryview) -> None:
    """What a decoding process does. Signals are for its parent to act on."""
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_IGN)
    transforms: dict[bytes, Transform] = {}
    while True:
        pickled, shape, jobs = connection.recv()
        try:
            if pickled not in transforms:
                transforms[pickled] = pickle.loads(pickled)
            out = np.frombuffer(memory, np.uint8, len(jobs) * int(np.prod(shape))).reshape(len(jobs), *shape)
            answer: Any = [
                decode_into(row, memory[at : at + size], transforms[pickled], seed)
                for row, (at, size, seed) in zip(out, jobs, strict=True)
            ]
        except Exception:
            answer = traceback.format_exc()
        connection.send(answer)
