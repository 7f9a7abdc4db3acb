"""Worker processes that decode and transform images, because threads would share one interpreter lock.

`python -m stream.decode_pool` forks them, so that a new one starts at once, and imports only what this module imports.
"""

import contextlib
import ctypes
import functools
import mmap
import os
import pickle
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from multiprocessing import reduction
from multiprocessing.connection import Connection
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

import numpy as np

if __name__ == "__main__":
    sys.modules["torch"] = None  # type: ignore[assignment]  # albumentations imports it if it can, which takes seconds

from errors import SIGNALS, UsageError
from stream.images import EncodedImage, UnreadableImage, decode_into
from stream.shared import InFile, MappedFiles, Moved, SharedMemory, anonymous_file

PROCESS_BYTES = 60 * 2**20  # memory that a decoding process does not share, as measured on Linux
ARENA_BYTES = 4 * 2**20  # shared memory for the encoded images of one task; a large image gets more
ANSWER_SECONDS = 300.0  # for one task, which takes less than a second
GIVEN_UP_SECONDS = 2.0
DIED = "a decoding process died, for lack of memory perhaps; use fewer --num_workers"
POLL_SECONDS = 0.2
MOST_IN_VAIN = 5  # processes in a row that end without an answer; more are the machine's fault
NUMBER_BYTES = 4
FILES_OF_A_PROCESS = 3  # open in the user's process: a socket, and the arena, which its mapping opens again
FEWEST_OTHER_FILES, OTHER_FILES = 50, 1000  # beside those: which a run must have, and which it asks for
PR_SET_PDEATHSIG = 1


def pack(function: Callable[..., Any]) -> bytes:
    """A transform or a conversion, pickled for a decoding process. Pickles pass from a parent to its workers only."""
    return pickle.dumps(function)


class Job(NamedTuple):
    """An image to be decoded, and what its transform is given, see `stream.images.Transform`."""

    image: EncodedImage | InFile
    seed: tuple[int, ...]
    sound: bool = False


class WorkerDied(Exception):
    """Decoding processes end whatever they are given, or cannot be started, or are not waited for any more."""


class EndsProcess(UnreadableImage):
    """An image that twice ended the process that was to decode it, or got no answer from it."""


class _NoAnswer(Exception):
    """A decoding process ended before it answered, or takes too long."""


class DecodingPool:
    """Processes that decode and transform; each serves one thread of this process at a time.

    They start in the background, and end with this object or this process, however that ends. One that ends before, or
    has no answer for ANSWER_SECONDS, is replaced.
    """

    def __init__(self, processes: int) -> None:
        allow_files(processes)
        self.memory = SharedMemory()
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        self._in_vain = 0  # processes that were replaced since the last answer
        control = _start_nursery()
        for number in range(processes):
            self._idle.put(_Worker(control, number))

    def run(
        self, transform: bytes, jobs: Sequence[Job], out: np.ndarray, given_up: Callable[[], bool] = lambda: False
    ) -> list[Exception | None]:
        """Decode images and apply a packed transform, into `out`, uint8 (N, H, W, 3), an array of `memory` or a part.

        Returns for each image None, or the reason it cannot be read; its row of `out` then holds anything. Of images
        that get no answer together each is tried alone, once. Raises WorkerDied, also GIVEN_UP_SECONDS after
        `given_up()`.
        """
        try:
            found = self._run(transform, jobs, out, given_up)
            for number, reason in enumerate(found):
                if isinstance(reason, Moved) and isinstance(image := jobs[number].image, InFile):
                    again = jobs[number]._replace(image=image.data)
                    found[number : number + 1] = self._run(transform, [again], out[number : number + 1], given_up)
        except WorkerDied:
            self.memory.discard(out)
            raise
        return found

    def convert(self, conversion: bytes, images: Sequence[bytes | memoryview]) -> list[bytes | memoryview]:
        """What a packed function makes of each; one that ends its process stays as it is. Raises WorkerDied."""
        found = self._run(conversion, [Job(image, ()) for image in images], None, lambda: False)
        return [made if isinstance(made, bytes) else image for made, image in zip(found, images, strict=True)]

    def _run(
        self, function: bytes, jobs: Sequence[Job], out: np.ndarray | None, given_up: Callable[[], bool]
    ) -> list[Any]:
        """The answers to all jobs: those of a transform, which fills `out`, or without that of a conversion."""
        found: list[Any] = []
        alone, worker = False, self._take(given_up)
        try:
            while len(found) < len(jobs):
                part = slice(len(found), len(found) + 1 if alone else None)
                rows = None if out is None else out[part]
                try:
                    found += worker.run(function, jobs[part], rows, self.memory, given_up)
                    self._in_vain = 0
                except _NoAnswer as error:
                    worker.restart()
                    self._in_vain += not given_up()
                    if self._in_vain >= MOST_IN_VAIN or given_up():
                        raise WorkerDied from error
                    found += [EndsProcess(*error.args)] if alone else []
                    alone = True
        except OSError as error:  # of the process that forks them
            _pool_of.cache_clear()
            raise WorkerDied from error
        finally:
            self._idle.put(worker)
        return found

    def _take(self, given_up: Callable[[], bool]) -> "_Worker":
        while True:
            with contextlib.suppress(Empty):
                return self._idle.get(timeout=POLL_SECONDS)
            if given_up():
                raise WorkerDied


def allow_files(processes: int) -> None:
    """Raise this process's limit of open files to what so many processes take. Raises UsageError where that is low."""
    import resource  # which Windows lacks, as it does these limits

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = sys.maxsize if hard == resource.RLIM_INFINITY else hard
    taken = len(os.listdir("/dev/fd")) + FEWEST_OTHER_FILES
    need = taken + FILES_OF_A_PROCESS * processes
    if need > most:
        raise UsageError(
            f"{processes} decoding processes take {need:,} open files, and {most:,} are allowed here; use "
            f"--num_workers {max(0, (most - taken) // FILES_OF_A_PROCESS)}, or raise the limit (ulimit -Hn)"
        )
    if soft != resource.RLIM_INFINITY and soft < need + OTHER_FILES:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, need + OTHER_FILES), hard))


def shared_pool(processes: int) -> DecodingPool:
    """The pool with this many processes, which all loaders of this process share."""
    return _pool_of(processes, os.getpid())


@functools.cache
def _pool_of(processes: int, pid: int) -> DecodingPool:
    """Cached by `pid` too, because a forked process must not use its parent's sockets."""
    return DecodingPool(processes)


def _start_nursery() -> socket.socket:
    """Start the process that forks the decoding ones; returns the socket at which it is asked to, see `main`."""
    ours, theirs = socket.socketpair()
    with theirs:
        subprocess.Popen(
            [sys.executable, "-m", "stream.decode_pool", str(theirs.fileno())],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    return ours


class _Worker:
    """A decoding process, seen from its user. The arena holds the encoded images of a task."""

    def __init__(self, control: socket.socket, number: int) -> None:
        self._control = control
        self._number = number
        with contextlib.suppress(BrokenPipeError):  # noticed when there is something to decode
            self.restart()

    def restart(self) -> None:
        """Have the process killed, if there is one, and another one forked. Raises OSError."""
        ours, theirs = socket.socketpair()
        arena = anonymous_file(ARENA_BYTES)
        self._known: set[int] = set()  # the regions of memory that it has
        self._connection = Connection(ours.detach())
        self._arena = open(arena, "r+b", buffering=0)  # noqa: SIM115 (closed with this object)
        self._memory = mmap.mmap(arena, 0)
        with theirs:
            socket.send_fds(self._control, [self._number.to_bytes(NUMBER_BYTES, "big")], [theirs.fileno(), arena])

    def run(
        self,
        function: bytes,
        jobs: Sequence[Job],
        out: np.ndarray | None,
        memory: SharedMemory,
        given_up: Callable[[], bool],
    ) -> list[Any]:
        """The answers to the first jobs whose images fit into ARENA_BYTES, at least to one. Raises _NoAnswer."""
        parts = [b"" if isinstance(job.image, InFile) else _bytes(job.image) for job in jobs]
        ends = np.cumsum([len(part) for part in parts])
        count = max(1, int(np.searchsorted(ends, ARENA_BYTES, side="right")))
        self._make_room(int(ends[count - 1]))
        arena, places = np.frombuffer(self._memory, np.uint8), []
        for (image, *given), part, end in zip(jobs[:count], parts, ends.tolist(), strict=False):
            at = end - len(part)
            arena[at:end] = np.frombuffer(part, np.uint8)  # which lets other threads run
            shape = image.shape if isinstance(image, np.ndarray) else None
            places.append((image[:-1] if isinstance(image, InFile) else (at, len(part), shape), *given))
        try:
            where = None if out is None else self._shared(out[:count], memory)
            self._connection.send((memory.numbers(), function, where, places))
            self._await_answer(given_up)
            answer = self._connection.recv()
        except (EOFError, OSError) as error:
            raise _NoAnswer("it ended the decoding process") from error
        if isinstance(answer, str):
            raise RuntimeError(f"a decoding process failed:\n{answer}")
        return list(answer)

    def _shared(self, out: np.ndarray, memory: SharedMemory) -> tuple[int, int, tuple[int, ...]]:
        """The region of `out`, which the process now has, where in it that begins, and its shape."""
        region, offset = memory.find(out) or (None, 0)
        assert region is not None
        if region.number not in self._known:
            self._connection.send((region.number, region.size))
            reduction.send_handle(self._connection, region.descriptor, None)
            self._known.add(region.number)
        return region.number, offset, out.shape

    def _await_answer(self, given_up: Callable[[], bool]) -> None:
        left = ANSWER_SECONDS  # counted in polls, so that the time of a stopped job is not
        while not self._connection.poll(POLL_SECONDS):
            left -= POLL_SECONDS
            if given_up():
                left = min(left, GIVEN_UP_SECONDS)
            if left <= 0:
                raise _NoAnswer(f"it was not decoded within {ANSWER_SECONDS:g} s")

    def _make_room(self, size: int) -> None:
        if size > len(self._memory):
            self._arena.truncate(size)
            self._memory = mmap.mmap(self._arena.fileno(), size)


def main() -> None:
    """Fork a decoding process for each request at the socket in the arguments: a number, and a socket and an arena.

    An earlier process of the same number is killed first, and all of them when the socket is closed. This process never
    decodes, so that it can always answer.
    """
    control = socket.socket(fileno=int(sys.argv[1]))
    processes: dict[bytes, int] = {}
    parent = os.getpid()
    for signum in SIGNALS:  # the user's to handle
        signal.signal(signum, signal.SIG_IGN)
    while True:
        number, descriptors, *_ = socket.recv_fds(control, NUMBER_BYTES, 2)
        for process in [processes[number]] if number in processes else [] if number else processes.values():
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
        if not number:
            return
        processes[number] = os.fork()
        if not processes[number]:
            control.close()
            _end_with(parent)
            with contextlib.suppress(EOFError, ConnectionError):  # the user closed the socket
                serve(Connection(descriptors[0]), descriptors[1])
            return
        for descriptor in descriptors:
            os.close(descriptor)


def _end_with(parent: int) -> None:
    """Have the system, where it can, end this process when its parent ends, even while a decoder hangs."""
    if hasattr(libc := ctypes.CDLL(None), "prctl"):
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def serve(connection: Connection, arena: int) -> None:
    """The loop of a decoding process. A message brings memory (its number and size, then a descriptor), or a task."""
    memory = memoryview(mmap.mmap(arena, 0))
    regions: dict[int, mmap.mmap] = {}
    functions: dict[bytes, Callable[..., Any]] = {}
    files = MappedFiles()
    while True:
        message = connection.recv()
        if len(message) == 2:
            number, size = message
            regions[number] = mmap.mmap(descriptor := reduction.recv_handle(connection), size)
            os.close(descriptor)
            continue
        live, pickled, where, jobs = message
        regions = {known: regions[known] for known in live if known in regions}
        if os.fstat(arena).st_size > len(memory):
            memory = memoryview(mmap.mmap(arena, 0))
        try:
            if pickled not in functions:
                functions[pickled] = pickle.loads(pickled)
            call = functions[pickled]
            images = (files.find(*at) if isinstance(at[0], str) else _image(memory, *at) for at, *_ in jobs)
            if where is None:
                answer: Any = [None if (made := call(image)) is image else made for image in images]
            else:
                number, offset, shape = where
                out = np.frombuffer(regions[number], np.uint8, int(np.prod(shape)), offset).reshape(shape)
                answer = [
                    Moved() if image is None else decode_into(row, image, call, *given)
                    for row, image, (_, *given) in zip(out, images, jobs, strict=True)
                ]
                del out  # which would keep memory that is given up
        except Exception:
            answer = traceback.format_exc()
        connection.send(answer)


def _bytes(image: EncodedImage) -> memoryview:
    return np.ascontiguousarray(image).data.cast("B") if isinstance(image, np.ndarray) else memoryview(image).cast("B")


def _image(memory: memoryview, at: int, size: int, shape: tuple[int, ...] | None) -> EncodedImage:
    """An image in the arena: encoded, or pixels of this shape."""
    data = memory[at : at + size]
    return data if shape is None else np.frombuffer(data, np.uint8).reshape(shape)


if __name__ == "__main__":
    main()
