"""Errors a user can cause: each is shown as one line, without a traceback, and has an exit status."""

import contextlib
import errno
import importlib.util
import io
import os
import re
import select
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn, Protocol

import output

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.ESTALE)
FILE_LIMITS = (errno.EMFILE, errno.ENFILE)
STOPPING = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2")
SIGNALS = tuple(signal.Signals[name] for name in STOPPING if hasattr(signal, name))
NEEDED_CALLS, NEEDED_MODULES = ("fork", "register_at_fork", "O_NOFOLLOW", "O_NONBLOCK"), ("fcntl", "resource")

ENDED_WITHIN = 5.0  # seconds in which a launcher ends the ranks of one that failed

_is_abandoned = False
peers: "Peers | None" = None  # once the ranks have met


class UserError(Exception):
    """Base class of errors that are shown as one line, `error: what is wrong; what to do`."""

    status = 1


class UsageError(UserError):
    """Bad arguments, a resume whose settings changed, or a system that is not supported."""

    status = 2


class DataError(UserError):
    """Data missing, unreachable, not authorised or too corrupt."""

    status = 3


class DivergedError(UserError):
    """The loss is no longer finite, or the learning rate finder found no rate."""

    status = 4


class SnapshotError(UserError):
    """No usable snapshot, or no room to write one."""

    status = 5


class Peers(Protocol):
    """What a rank asks the others when it ends with an error."""

    def is_first(self, status: int) -> bool:
        """Note that this rank ends with this exit status. Whether it is the first one to do so."""

    def status_of(self, error: Exception) -> int | None:
        """The exit status of the rank that ended before, if that is what the error comes from."""


class Interrupted(Exception):
    """A signal asked the run to stop. By the time the front door sees this, everything has been saved."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"signal {signum}")
        self.status = 128 + signum


def redact(text: str) -> str:
    """The text without passwords in URLs, the query strings of URLs (they may hold signatures) and Hub tokens."""
    text = re.sub(r"(\w:/{1,2})[^/@\s]+@", r"\1", text)
    text = re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\")]+", r"\1", text)
    return re.sub(r"\bhf_[A-Za-z0-9]{30,}", "hf_...", text)


def printable(text: str) -> str:
    """The text with escapes for line ends and for what is no character."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def complain(line: str) -> None:
    """Write a line to stderr with one call, because several ranks may write at once."""
    sys.stderr.write(f"{line}\n")


def greet(arguments: Sequence[str]) -> None:
    """Say on rank 0 what was started, and when, before anything slow is imported."""
    if os.environ.get("RANK", "0") == "0" and "--quiet" not in arguments:
        told = redact(f"{Path(sys.argv[0]).name} {shlex.join(arguments)}")
        print(f"start     {time.strftime('%Y-%m-%d %H:%M:%S')}  {printable(told)[:120]}", flush=True)


def _leave(signum: int, frame: FrameType | None) -> None:
    """Handles signals but SIGINT while there is nothing to save yet."""
    if os.environ.get("RANK", "0") == "0":
        complain(f"stopped by {signal.Signals(signum).name}")
    os._exit(128 + signum)


def _reader_left() -> bool:
    """Whether what read standard output, such as `head`, has ended; what is left to print is then dropped."""
    if not isinstance(sys.stdout, io.TextIOWrapper):
        return False
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    if not any(events & select.POLLERR for _, events in poll.poll(0)):
        return False
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
    return True


def abandon() -> None:
    """Note that a thread, or what a library does when the process ends, may never come to an end; see `leave`."""
    global _is_abandoned
    _is_abandoned = True


def leave(main: Callable[[], int]) -> NoReturn:
    """Call a front door and end the process with its status, without waiting for what was abandoned."""
    try:
        status = main()
    except Exception:
        if not _is_abandoned:
            raise
        traceback.print_exc()
        status = 1
    if _is_abandoned:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(status)
    sys.exit(status)


def _require_posix() -> None:
    """Raise UsageError where the system lacks what runs are made of, as Windows does."""
    missing = [f"os.{name}" for name in NEEDED_CALLS if not hasattr(os, name)]
    missing += [name for name in NEEDED_MODULES if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(
            f"this system has no {missing[0]}, without which nothing runs here; use Linux or macOS, on Windows WSL"
        )


def _fail(line: str, status: int) -> int:
    """Tell of an error, on one rank of all: the first that fails. Until they have met that is rank 0, which has the
    same flags; another one speaks if nothing ends it, as then the error is its own.
    """
    if peers is not None:
        told = peers.is_first(status)
    else:
        if os.environ.get("WORLD_SIZE", "1") != "1" and os.environ.get("RANK", "0") != "0":
            time.sleep(ENDED_WITHIN)
        told = True
    if told:
        complain(f"error: {line}")
    return status


def run_front_door(run: Callable[[], None], debug: bool) -> int:
    """Call `run` and return the exit status of the process; with `debug`, exceptions propagate with their traceback."""
    output.last()
    os.environ["MPLBACKEND"] = "agg"  # that of a notebook is not there outside it, and ends the import of matplotlib
    handlers = {signum: signal.getsignal(signum) for signum in SIGNALS}
    for signum in handlers.keys() - {signal.SIGINT}:
        if handlers[signum] != signal.SIG_IGN:  # as nohup asks for
            signal.signal(signum, _leave)
    try:
        _require_posix()
        run()
        sys.stdout.flush()
    except UserError as error:
        if debug:
            raise
        return _fail(redact(str(error)), error.status)
    except Interrupted as stop:
        return stop.status
    except KeyboardInterrupt:
        complain("interrupted")
        return 130
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _reader_left():
            complain("stopped: nobody reads the output any more")
            return 128 + signal.SIGPIPE
        if debug or error.errno not in (*DISK_ERRORS, *FILE_LIMITS):
            raise
        if error.errno in FILE_LIMITS:
            mend = "use fewer --num_workers, or raise the limit (ulimit -n)"
            return _fail(f"{error.strerror}; {mend}", UsageError.status)
        where = f" at {error.filename}" if error.filename else ""
        mend = "make room or mend the disk, then resume, or start again if there is no snapshot"
        return _fail(f"{error.strerror}{where}; {mend}", SnapshotError.status)
    except RuntimeError as error:
        status = None if debug or peers is None else peers.status_of(error)
        if status is None:
            raise
        return status
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
    return 0
