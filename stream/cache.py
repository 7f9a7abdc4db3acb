"""Bytes that threads and processes share on one disk. An entry is whole and checked, or it is not there."""

import contextlib
import logging
import mmap
import re
import stat
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path

import xxhash
from filelock import FileLock, Timeout

from stream.files import open_plain, read_small, write_durably
from stream.retry import LOOK_SECONDS, say

log = logging.getLogger(__name__)

HEADER = 64  # bytes: the XXH3-128 digest of what follows, and zeros, so that what follows is aligned
Bytes = bytes | memoryview
OWN = ".store"  # the subfolder of the locks and of the total
LOCKS = 1024  # files that all names share; so many that a thread seldom waits for another name
LOCK_PATIENCE = 60.0  # seconds after which what another process makes is made here too, and not kept
LESS_PATIENCE = 1.0  # when one lock has stayed held
UNLOCKABLE = (OSError, NotImplementedError)


class FileStore:
    """Bytes by name in a folder.

    Whoever makes an entry holds the lock of its name, so that it is made once. It is written beside its place, synced
    and renamed, so that readers need no lock. A disk that refuses it costs a warning and no data.
    A `limit` is in bytes. What is marked as used makes room for what is new; when nothing is, the new is not kept. All
    stores with a limit share a total, in a file. Each measures the folder once, for what others added.
    A thread holds the lock of one name at most and takes that of the room last, so no circle of waiting can close.
    """

    def __init__(self, folder: Path, limit: int | None = None) -> None:
        self.folder = folder
        self.limit = limit
        self._checked: set[str] = set()
        self._used: OrderedDict[str, None] = OrderedDict()
        self._measured = False
        self._complained = False
        self._patience = LOCK_PATIENCE

    def get(self, name: str, make: Callable[[], Bytes]) -> Bytes:
        """What is kept under `name`. If nothing sound is, `make` it and keep it; `make` must not ask the store."""
        if (kept := self.find(name)) is not None:
            return kept
        with self._claim(name) as keep:
            if (kept := self.find(name)) is not None:
                return kept
            data = make()
            keep(data)
        return self.find(name) or data

    def put(self, name: str, data: Bytes) -> None:
        """Keep `data` under `name`, in place of what is there."""
        with self._claim(name) as keep:
            keep(data)

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
                self._measured = False
                return None
            self._checked.add(name)
        return data[HEADER:]

    def mark_used(self, name: str) -> None:
        """This one may make room for others."""
        self._used[name] = None

    def forget_used(self) -> None:
        """A new epoch needs everything again."""
        self._used = OrderedDict()

    def names(self) -> set[str]:
        """What is kept, unchecked, by names relative to the folder."""
        return {*self.sizes()}

    def sizes(self) -> dict[str, int]:
        """The bytes that each entry takes on the disk, by its name."""
        return {name: size for name, size in self._walk() if not name.endswith(".tmp")}

    @contextlib.contextmanager
    def _claim(self, name: str) -> Iterator[Callable[[Bytes], None]]:
        """Hold the lock of a name, and give what keeps data under it: nothing where the disk refuses the lock."""
        try:
            lock = self._lock(f"{xxhash.xxh32_intdigest(name.encode()) % LOCKS}.lock")
        except UNLOCKABLE as error:
            self._complain(error)
            yield lambda data: None
        else:
            with lock:
                yield lambda data: self._keep(name, data)

    def _lock(self, name: str) -> contextlib.AbstractContextManager[object]:
        """A lock that is held already. FileLock does not open a link, but it would go through a folder that is one."""
        if (self.folder / OWN).is_symlink():
            raise OSError(None, "its locks lie behind a link")
        lock, since = FileLock(self.folder / OWN / name, poll_interval=0.01, fallback_to_soft=False), time.monotonic()
        while True:
            try:
                return lock.acquire(timeout=min(LOOK_SECONDS, self._patience))
            except Timeout:
                if time.monotonic() - since >= self._patience:
                    self._patience = LESS_PATIENCE
                    raise
                say(since, f"another process holds {lock.lock_file}, and has stopped perhaps")

    def _keep(self, name: str, data: Bytes) -> None:
        try:
            if self.limit is None:
                self._write(name, data)
            else:
                with self._lock("room.lock"):
                    self._write_within(self.limit, name, data)
        except UNLOCKABLE as error:
            self._complain(error)

    def _write(self, name: str, data: Bytes) -> None:
        (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_durably(self.folder / name, xxhash.xxh3_128_digest(data).ljust(HEADER, b"\0"), data)
        self._checked.add(name)

    def _write_within(self, limit: int, name: str, data: Bytes) -> None:
        size, total, used = HEADER + len(data), self._take_total(), self._used
        while total + size > limit and used:
            oldest, _ = used.popitem(last=False)
            self._checked.discard(oldest)
            total -= _size(self.folder / oldest)
            (self.folder / oldest).unlink(missing_ok=True)
        if total + size <= limit:
            total += size - sum(_size(self.folder / old) for old in (name, f"{name}.tmp"))
            self._write(name, data)
        (self.folder / OWN / "total").write_text(f"{total} {total}")

    def _take_total(self) -> int:
        """Bytes in the folder. The file is gone until the next total: if a write fails, the folder is measured anew."""
        path, noted = self.folder / OWN / "total", None
        with contextlib.suppress(OSError):
            noted = re.fullmatch(rb"(\d{1,18}) \1", read_small(path))
        path.unlink(missing_ok=True)
        if noted and self._measured:
            return int(noted[1])
        self._measured = True
        return sum(size for _, size in self._walk())

    def _walk(self) -> Iterator[tuple[str, int]]:
        """The name and the size of each file that is not empty, the store's own left out."""
        for path in self.folder.rglob("*"):
            name = path.relative_to(self.folder).as_posix()
            if not name.startswith(f"{OWN}/") and (size := _size(path)):
                yield name, size

    def _complain(self, error: OSError | NotImplementedError) -> None:
        if not self._complained:
            why = "a lock in it stays held" if isinstance(error, Timeout) else getattr(error, "strerror", error)
            log.warning(
                "cannot keep files in %s (%s); going on without; a folder on a local disk can", self.folder, why
            )
        self._complained = True


def _size(path: Path) -> int:
    """Bytes of a file, 0 for what is none and for what another process has just renamed or removed."""
    with contextlib.suppress(FileNotFoundError):
        status = path.lstat()
        return status.st_size if stat.S_ISREG(status.st_mode) else 0
    return 0
