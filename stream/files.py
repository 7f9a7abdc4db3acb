"""Files that are either complete or absent, whenever a process is killed or a disk fills up."""

import contextlib
import errno
import json
import math
import os
import stat
from pathlib import Path
from typing import Any


def write_durably(path: Path, *parts: bytes | memoryview) -> None:
    """Write a file with these contents: to a temporary file beside it, fsync, rename, fsync of the folder.

    After a crash there is either the old file or the new one. Raises OSError; the old file is then intact.
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


def strict_json(value: Any, **options: Any) -> str:
    """The JSON of dicts, lists, texts and numbers; one that is not finite is null, as JSON has none."""

    def plain(part: Any) -> Any:
        if isinstance(part, dict):
            return {name: plain(inside) for name, inside in part.items()}
        if isinstance(part, list | tuple):
            return [plain(inside) for inside in part]
        return None if isinstance(part, float) and not math.isfinite(part) else part

    return json.dumps(plain(value), allow_nan=False, **options)


def sync(path: Path) -> None:
    """Wait until the contents of a file, or the entries of a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_plain(path: str, flags: int) -> int:
    """An opener for `open` that does not follow symbolic links and does not block on a pipe."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)


def read_small(path: Path, most: int = 2**26) -> bytes:
    """A file's contents. Raises OSError, also for a pipe or a device, or a file larger than `most` bytes."""
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_size > most:
            raise OSError(errno.EINVAL, "it is no file, or too large a one", str(path))
        return file.read()
