"""Files that several processes share on one disk: each is whole and checked, or not there."""

import contextlib
import fcntl
import logging
import mmap
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import xxhash

from stream.files import open_plain

log = logging.getLogger(__name__)

HEADER = 64  # bytes: the XXH3-128 digest of what follows, and zeros, so that what follows is aligned


class FileStore:
    """Bytes by name in a folder. What is kept was written to a temporary file, synced and renamed.

    With a `limit`, in bytes, what is marked as used makes room for what is new; when nothing is, the new is not kept.
    """

    def __init__(self, folder: Path, limit: int | None = None) -> None:
        self.folder = folder
        self.limit = limit
        self._checked: set[str] = set()
        self._used: dict[str, None] = {}
        self._complained = False

    def get(self, name: str, make: Callable[[], bytes]) -> bytes | memoryview:
        """What is kept under `name`; if nothing sound is, `make` it, in one process at a time, and keep it."""
        kept = self.find(name)
        if kept is not None:
            return kept
        with self._claim(name) as file:
            kept = self.find(name)
            if kept is not None:
                return kept
            data = make()
            if file is not None:
                self._keep(name, file, data)
        return self.find(name) or data

    def put(self, name: str, data: bytes) -> None:
        """Keep `data` under `name`, in place of what is there."""
        with self._claim(name) as file:
            if file is not None:
                self._keep(name, file, data)

    def find(self, name: str) -> memoryview | None:
        """What is kept under `name`, mapped from the disk, or None. What is damaged is thrown away."""
        path = self.folder / name
        try:
            with open(path, "rb", opener=open_plain) as file:
                data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except (OSError, ValueError):
            return None
        if name not in self._checked:
            if xxhash.xxh3_128_digest(data[HEADER:]) != bytes(data[:16]):
                log.warning("%s is damaged and will be made again", path)
                with contextlib.suppress(OSError):
                    path.unlink()
                return None
            self._checked.add(name)
        return data[HEADER:]

    def mark_used(self, name: str) -> None:
        """This one may make room for others."""
        self._used[name] = None

    def forget_used(self) -> None:
        """A new epoch needs everything again."""
        self._used.clear()

    def names(self) -> set[str]:
        """What is kept, unchecked, by names relative to the folder."""
        files = (path for path in self.folder.rglob("*") if path.is_file() and path.suffix not in (".tmp", ".lock"))
        return {path.relative_to(self.folder).as_posix() for path in files}

    @contextlib.contextmanager
    def _claim(self, name: str) -> Iterator[IO[bytes] | None]:
        """A temporary file for `name` that no other process has at the same time; None where the disk refuses one."""
        temporary = self.folder / f"{name}.tmp"
        try:
            file = _lock(temporary)
        except OSError as error:
            self._complain(error)
            yield None
            return
        with file:
            try:
                yield file
            finally:  # still locked, and only if it is ours: once renamed, another process may have made the next
                with contextlib.suppress(OSError):
                    if os.path.samestat(os.fstat(file.fileno()), temporary.stat()):
                        temporary.unlink()

    def _keep(self, name: str, file: IO[bytes], data: bytes) -> None:
        if self.limit is None:
            self._write(name, file, data)
            return
        try:
            with _lock(self.folder / "room.lock"):
                if self._make_room(HEADER + len(data), self.limit):
                    self._write(name, file, data)
        except OSError as error:
            self._complain(error)

    def _write(self, name: str, file: IO[bytes], data: bytes) -> None:
        try:
            file.truncate(0)
            for part in (xxhash.xxh3_128_digest(data).ljust(HEADER, b"\0"), data):
                left = memoryview(part)
                while left:
                    left = left[file.write(left) :]
            os.fsync(file.fileno())
            os.replace(file.name, self.folder / name)
            self._checked.add(name)
        except OSError as error:
            with contextlib.suppress(OSError):
                file.truncate(0)
            self._complain(error)

    def _make_room(self, size: int, limit: int) -> bool:
        total = sum(_size(path) for path in self.folder.rglob("*"))
        while total + size > limit and self._used:
            name = next(iter(self._used))
            del self._used[name]
            self._checked.discard(name)
            with contextlib.suppress(FileNotFoundError):
                total -= (self.folder / name).stat().st_size
                (self.folder / name).unlink()
        return total + size <= limit

    def _complain(self, error: OSError) -> None:
        if not self._complained:
            log.warning("cannot keep files in %s (%s); going on without", self.folder, error.strerror)
        self._complained = True


def _size(path: Path) -> int:
    """Bytes of a file, 0 for a folder and for what another process has just renamed or removed."""
    with contextlib.suppress(FileNotFoundError):
        status = path.stat()
        return status.st_size if stat.S_ISREG(status.st_mode) else 0
    return 0


def _lock(path: Path) -> IO[bytes]:
    """The file at `path`, made if need be and locked. One that was renamed or removed meanwhile is no longer it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        file = open(path, "ab", buffering=0, opener=open_plain)  # noqa: SIM115 (the caller closes it)
        fcntl.flock(file, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()
