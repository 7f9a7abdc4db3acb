"""Standard output and error of a program that may outlive whoever reads them: a closed terminal, `| head`, `2>&-`."""

import contextlib
import io
import os
import select
import sys
from pathlib import Path
from typing import Any

_outlives = False
_log: Path | None = None
_diverted: set[int] = set()


class _Lasting(io.FileIO):
    """A stream that, once `outlive` was called, goes on in a file when it cannot be written to any more."""

    def write(self, data: Any) -> int:
        while True:
            try:
                written = super().write(data)
            except OSError:
                if not _outlives or self.fileno() in _diverted:
                    raise
                _diverted.add(self.fileno())
                _divert(self.fileno())
                continue
            if written is not None:
                return written
            select.select([], [self], [])  # of a pipe that does not block, and is full


def last() -> None:
    """Replace standard streams that are closed by nothing, and let the others last; names that are no UTF-8 print too.

    A file that is opened later must not get the number of a closed stream, which libraries write to.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is None or (type(stream) is io.TextIOWrapper and type(_raw(stream)) is io.FileIO):
            encoding, at_once = (stream.encoding, stream.write_through) if stream else ("utf-8", False)
            buffer = io.BufferedWriter(_Lasting(number, "w", closefd=False))
            by_line = number == 2 or os.isatty(number)
            lasting = io.TextIOWrapper(buffer, encoding, "backslashreplace", None, by_line or at_once, at_once)
            setattr(sys, name, lasting)


def _raw(stream: io.TextIOWrapper) -> Any:
    """What a stream writes to, which with `python -u` has no buffer before it."""
    return getattr(stream.buffer, "raw", stream.buffer)


def outlive(log: Path | None = None) -> None:
    """Go on from now on when a stream cannot be written to: what is printed then is added to `log`, if there is one."""
    global _outlives, _log
    _outlives, _log = True, log or _log
    for number in _diverted:
        _divert(number)


def _divert(number: int) -> None:
    """Put the log in place of a stream, or nothing."""
    file = -1
    if _log is not None:
        with contextlib.suppress(OSError):
            file = os.open(_log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    if file < 0:
        file = os.open(os.devnull, os.O_WRONLY)
    os.dup2(file, number)
    os.close(file)
