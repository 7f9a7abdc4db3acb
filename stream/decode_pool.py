"""Worker processes that decode and transform images, because threads would share one interpreter lock.

`python -m stream.decode_pool` is such a process, and imports only what this module imports.
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
from typing import Any, NamedTuple

import numpy as np

if __name__ == "__main__":
    sys.modules["torch"] = None  # type: ignore[assignment]  # albumentations imports it if it can, which takes seconds

from errors import SIGNALS
from stream.images import EncodedImage, Transform, decode_into

PROCESS_BYTES = 60 * 2**20  # memory that a decoding process does not share, as measured on Linux
ARENA_BYTES = 4 * 2**20  # shared memory for the images of one task and their results; a large image gets more


def pack(transform: Transform) -> bytes:
    """A transform, pickled for a decoding process. Pickles pass between a parent and its workers only."""
    return pickle.dumps(transform)


class Job(NamedTuple):
    """An image to be decoded, and what its transform is given, see `stream.images.Transform`."""

    image: EncodedImage
    seed: tuple[int, ...]
    sound: bool = False


class WorkerDied(Exception):
    """A decoding process ended unexpectedly, or could not be started."""


class DecodingPool:
    """Processes that decode and transform; each serves one thread of this process at a time.

    They start in the background, and end with this object or this process, however that ends.
    """

    def __init__(self, processes: int) -> None:
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        descriptors = []
        for _ in range(processes):
            ours, theirs = socket.socketpair()
            arena = _anonymous_file()
            os.ftruncate(arena, ARENA_BYTES)
            self._idle.put(_Worker(Connection(ours.detach()), arena))
            descriptors += [theirs.detach(), arena]
        if processes:
            command = [sys.executable, "-m", "stream.decode_pool", *map(str, descriptors)]
            path = {"PYTHONPATH": os.pathsep.join(sys.path)}
            subprocess.Popen(
                command,
                env=os.environ | path,
                pass_fds=descriptors,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        for descriptor in descriptors[::2]:
            os.close(descriptor)

    def run(self, transform: bytes, jobs: Sequence[Job], out: np.ndarray) -> list[Exception | None]:
        """Decode images and apply a packed transform, into `out`, uint8 (N, H, W, 3).

        Returns for each image None, or the reason it cannot be read; its row of `out` is then unchanged. Raises
        WorkerDied.
        """
        worker = self._idle.get()
        try:
            found: list[Exception | None] = []
            while len(found) < len(jobs):
                found += worker.run(transform, jobs[len(found) :], out[len(found) :])
            return found
        finally:
            self._idle.put(worker)


def shared_pool(processes: int) -> DecodingPool:
    """The pool with this many processes, which all loaders of this process share."""
    return _pool_of(processes, os.getpid())


@functools.cache
def _pool_of(processes: int, pid: int) -> DecodingPool:
    """Cached by `pid` too, because a forked process must not use its parent's sockets."""
    return DecodingPool(processes)


def _anonymous_file() -> int:
    """The descriptor of an empty file that no other process can open: in memory on Linux."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("decoding")
    with TemporaryFile() as file:
        return os.dup(file.fileno())


class _Worker:
    """A decoding process, seen from its parent. The arena holds the transformed images, then the encoded ones."""

    def __init__(self, connection: Connection, arena: int) -> None:
        self._connection = connection
        self._arena = open(arena, "r+b", buffering=0)  # noqa: SIM115 (closed with this object)
        self._memory = mmap.mmap(arena, 0)

    def run(self, transform: bytes, jobs: Sequence[Job], out: np.ndarray) -> list[Exception | None]:
        """As `DecodingPool.run`, for the first images that fit into ARENA_BYTES, and at least one."""
        parts = [_bytes(job.image) for job in jobs]
        ends = np.cumsum([len(part) for part in parts]) + out[0].nbytes * np.arange(1, len(jobs) + 1)
        count = max(1, int(np.searchsorted(ends, ARENA_BYTES, side="right")))
        self._make_room(int(ends[count - 1]))
        at, places = out[:count].nbytes, []
        for (image, *given), part in zip(jobs[:count], parts, strict=False):
            self._memory[at : at + len(part)] = part
            places.append((at, len(part), image.shape if isinstance(image, np.ndarray) else None, *given))
            at += len(part)
        try:
            self._connection.send((transform, out.shape[1:], places))
            answer = self._connection.recv()
        except (EOFError, OSError) as error:
            _pool_of.cache_clear()
            raise WorkerDied from error
        if isinstance(answer, str):
            raise RuntimeError(f"a decoding process failed:\n{answer}")
        found = np.frombuffer(self._memory, np.uint8, out[:count].nbytes).reshape(out[:count].shape)
        readable = [problem is None for problem in answer]
        if all(readable):
            out[:count] = found
        else:
            out[:count][readable] = found[readable]
        return list(answer)

    def _make_room(self, size: int) -> None:
        if size > len(self._memory):
            self._arena.truncate(size)
            self._memory = mmap.mmap(self._arena.fileno(), size)


def main() -> None:
    """Fork into one decoding process for each pair of descriptors, a socket and an arena, in the arguments."""
    numbers = [int(argument) for argument in sys.argv[1:]]
    pairs = list(zip(numbers[::2], numbers[1::2], strict=True))
    mine = next((pair for pair in pairs[1:] if not os.fork()), pairs[0])
    for number in {*numbers} - {*mine}:
        os.close(number)
    with contextlib.suppress(EOFError, ConnectionError):  # the parent closed the socket
        serve(Connection(mine[0]), mine[1])


def serve(connection: Connection, arena: int) -> None:
    """The loop of a decoding process. It ignores signals, which its parent handles."""
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_IGN)
    memory = memoryview(mmap.mmap(arena, 0))
    transforms: dict[bytes, Transform] = {}
    while True:
        pickled, shape, jobs = connection.recv()
        if os.fstat(arena).st_size > len(memory):
            memory = memoryview(mmap.mmap(arena, 0))
        try:
            if pickled not in transforms:
                transforms[pickled] = pickle.loads(pickled)
            out = np.frombuffer(memory, np.uint8, len(jobs) * int(np.prod(shape))).reshape(len(jobs), *shape)
            answer: Any = [
                decode_into(row, _image(memory[at : at + size], pixels), transforms[pickled], *given)
                for row, (at, size, pixels, *given) in zip(out, jobs, strict=True)
            ]
        except Exception:
            answer = traceback.format_exc()
        connection.send(answer)


def _bytes(image: EncodedImage) -> memoryview:
    return np.ascontiguousarray(image).data.cast("B") if isinstance(image, np.ndarray) else memoryview(image).cast("B")


def _image(data: memoryview, shape: tuple[int, ...] | None) -> EncodedImage:
    """An image in the arena: encoded, or pixels of this shape."""
    return data if shape is None else np.frombuffer(data, np.uint8).reshape(shape)


if __name__ == "__main__":
    main()
