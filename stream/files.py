"""Files that are whole or not there, whatever instant a process is killed or a disk fills."""

import contextlib
import errno
import os
import stat
from pathlib import Path


def write_durably(path: Path, *parts: bytes | memoryview) -> None:
    """Put a file in place with these contents: written beside it, synced, renamed, and the folder synced.

    A crash leaves the old file or the new one. Raises OSError, with the old file intact.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        with open(temporary, "xb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until the contents of a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_plain(path: str, flags: int) -> int:
    """An opener for `open` that neither follows a link nor waits for a pipe."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)


def read_small(path: Path, most: int = 2**26) -> bytes:
    """A file's contents. Raises OSError, also for what is no file but a pipe or a device, or larger than `most`."""
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_size > most:
            raise OSError(errno.EINVAL, "it is no file, or too large a one", str(path))
        return file.read()
