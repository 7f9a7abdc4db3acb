"""Errors a user can cause: each is one line and an exit status, and no traceback."""

import errno
import os
import re
import signal
import sys
from collections.abc import Callable
from types import FrameType

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.ESTALE)
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class UserError(Exception):
    """Base of the errors that are shown as one line, `error: what is wrong; what to do`."""

    status = 1


class UsageError(UserError):
    """Bad arguments, or a resume whose settings changed."""

    status = 2


class DataError(UserError):
    """Data missing, unreachable, not authorised or too corrupt."""

    status = 3


class DivergedError(UserError):
    """The loss stopped being a finite number, or the learning rate finder found nothing."""

    status = 4


class SnapshotError(UserError):
    """No usable snapshot, or no room to write one."""

    status = 5


class Interrupted(Exception):
    """A signal asked the run to stop; what there was to save is saved by the time the front door sees this."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"signal {signum}")
        self.status = 128 + signum


def redact(text: str) -> str:
    """Without the passwords in URLs, the queries of URLs, which may sign them, and the Hub's tokens."""
    text = re.sub(r"(\w:/{1,2})[^/@\s]+@", r"\1", text)
    text = re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\")]+", r"\1", text)
    return re.sub(r"\bhf_[A-Za-z0-9]{30,}", "hf_...", text)


def complain(line: str) -> None:
    """Write a line to stderr, in one piece, for several ranks may be writing."""
    sys.stderr.write(f"{line}\n")


def _leave(signum: int, frame: FrameType | None) -> None:
    """What SIGTERM and SIGUSR1 do before there is anything to save."""
    complain(f"stopped by {signal.Signals(signum).name}")
    os._exit(128 + signum)


def run_front_door(run: Callable[[], None], debug: bool) -> int:
    """Call `run` and return the exit status of the process; with `debug`, tracebacks come through."""
    handlers = {signum: signal.getsignal(signum) for signum in SIGNALS}
    for signum in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(signum, _leave)
    try:
        run()
    except UserError as error:
        if debug:
            raise
        complain(f"error: {redact(str(error))}")
        return error.status
    except Interrupted as stop:
        return stop.status
    except KeyboardInterrupt:
        complain("interrupted")
        return 130
    except OSError as error:
        if debug or error.errno not in DISK_ERRORS:
            raise
        where = f" at {error.filename}" if error.filename else ""
        complain(f"error: {error.strerror}{where}; make room or mend the disk, and resume")
        return SnapshotError.status
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
    return 0
