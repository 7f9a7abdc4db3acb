"""Waiting for the network: for how long, what to try again, and what to say meanwhile."""

import email.utils
import json
import logging
import math
import random
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, TypeVar

from huggingface_hub.errors import FileMetadataError, HfHubHTTPError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import RateLimitInfo, parse_ratelimit_headers

from errors import redact

log = logging.getLogger(__name__)
S = TypeVar("S")
T = TypeVar("T")

TRANSIENT_STATUS = {408, 425, 429, 500, 502, 503, 504}
FIRST_WAIT, LONGEST_WAIT = 0.5, 60.0  # seconds
START_PATIENCE = 20.0  # seconds: at the start giving up loses nothing, and the user may be watching
STALLS_AT_START = 3
REFUSALS = 5  # in a row, after which a refusal without a code is believed
LEAST_RATE = 1024.0  # bytes a second
MOST_BYTES = 2**28  # of what the Hub tells of a dataset
SAY_SECONDS = 10.0  # of waiting before the first line, and between lines
LOOK_SECONDS = 1.0  # between looks whether a line is due
POLL_SECONDS = 0.25
_jitter = random.Random()
_last_said = -math.inf


@dataclass(frozen=True)
class Network:
    """Seconds in which a request must bring `LEAST_RATE` bytes a second, and without progress before a run gives up."""

    stall_timeout: float = 60.0
    patience: float = 1800.0


def in_threads(call: Callable[[S], T], items: Sequence[S], threads: int) -> Iterator[T]:
    """`map` with so many calls at once. The first error ends it.

    The threads are daemons: a process that ends does not wait for those that still wait for the network.
    """
    futures: list[Future[T]] = [Future() for _ in items]
    numbers = iter(range(len(items)))
    ended = threading.Event()

    def work() -> None:
        while not ended.is_set() and (number := next(numbers, None)) is not None:
            try:
                futures[number].set_result(call(items[number]))
            except BaseException as error:
                futures[number].set_exception(error)
                ended.set()
                first_error.append(error)

    first_error: list[BaseException] = []
    for _ in range(min(threads, len(items))):
        threading.Thread(target=work, name="call", daemon=True).start()
    try:
        for future in futures:
            while not future.done():
                wait([future], POLL_SECONDS)
                if first_error:
                    raise first_error[0]
            yield future.result()
    finally:
        ended.set()


class WrongAnswer(ConnectionError):
    """An answer that is not what was asked for."""


class Elsewhere(ConnectionError):
    """A refusal by another host, to which the Hub redirected. If its signed URL ran out, the Hub has a new one."""


class Stalled(TimeoutError):
    """A call brought too few bytes for too long."""


def say(since: float, text: str) -> None:
    """Warn what is waited for since then (`time.monotonic`): after a while, and not too often in the whole process.

    While one wait follows another, there is a line every `SAY_SECONDS`, though each may be short.
    """
    global _last_said
    now = time.monotonic()
    patience = SAY_SECONDS if now - _last_said > 3 * SAY_SECONDS else LOOK_SECONDS
    if now - since >= patience and now - _last_said >= SAY_SECONDS:
        _last_said = now
        log.warning("waiting for %.0f s: %s", now - since, redact(text))


def pause(seconds: float, since: float, text: str) -> None:
    """Sleep, and say why; what is waited for has been since then."""
    while seconds > 0:
        time.sleep(min(seconds, LOOK_SECONDS))
        seconds -= LOOK_SECONDS
        say(since, text)


class Attempt:
    """A call under way in a thread of its own. The Hub's client tells it of each response."""

    def __init__(self) -> None:
        self.given_up = False
        self._counted = 0
        self._response: Any = None

    def answered(self, response: Any) -> None:
        self._counted, self._response = self.received(), response

    def count(self, received: int) -> None:
        """Count bytes that came in another way than by the Hub's client."""
        self._counted += received

    def received(self) -> int:
        """The bytes that have come."""
        return self._counted + (self._response.num_bytes_downloaded if self._response is not None else 0)

    def give_up(self) -> None:
        """Nobody waits for this call any more. Its connection is closed, so that its thread ends."""
        self.given_up = True
        stream = self._response.extensions.get("network_stream") if self._response is not None else None
        if stream is not None:
            with suppress(OSError):
                stream.get_extra_info("socket").shutdown(socket.SHUT_RDWR)


attempt: ContextVar[Attempt] = ContextVar("attempt")


class _Runner:
    """A daemon thread that makes calls, one after the other; a thread for each call would fault its memory in anew."""

    def __init__(self) -> None:
        self.calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        threading.Thread(target=_make_calls, args=(self.calls,), name="hub", daemon=True).start()

    def __del__(self) -> None:
        self.calls.put(None)


def _make_calls(calls: "SimpleQueue[Callable[[], None] | None]") -> None:
    while (call := calls.get()) is not None:
        call()


_own = threading.local()  # `runner`: the one of this thread


def watched(
    call: Callable[[], T],
    stall: float,
    begun: float,
    what: str,
    *,
    aloud: bool = True,
    longest: float = math.inf,
    most: float = math.inf,
) -> T:
    """Return what `call` returns, from another thread; it has been waited for since `begun`.

    Raises Stalled, and gives the call up, when it brings less than `LEAST_RATE` for `stall` seconds or takes `longest`,
    WrongAnswer when it brings more than `most` bytes. What brings enough is waited for in silence, unless it is to be
    `aloud`.
    """
    trying, result = Attempt(), Future[T]()

    def run() -> None:
        attempt.set(trying)
        try:
            result.set_result(call())
        except BaseException as error:
            result.set_exception(error)

    runner = _own.runner = getattr(_own, "runner", None) or _Runner()
    runner.calls.put(run)
    since = started = time.monotonic()
    before = 0
    while not result.done():
        wait([result], min(POLL_SECONDS, stall))
        now, came = time.monotonic(), trying.received() - before
        if not result.done() and (before + came > most or now - started >= longest):
            _give_up(trying)
            kind = WrongAnswer if before + came > most else Stalled
            raise kind(f"{before + came:,} bytes in {now - started:.0f} s, and no end")
        if now - since >= stall and not result.done():
            if came < LEAST_RATE * stall:
                _give_up(trying)
                raise Stalled(f"{came:,} bytes in {now - since:.0f} s")
            since, before, came = now, before + came, 0
        if aloud or came < LEAST_RATE * (now - since):
            say(begun, f"{what}, {before + came:,} bytes so far")
    return result.result()


def _give_up(trying: Attempt) -> None:
    trying.give_up()
    _own.runner = None


def patiently(
    call: Callable[[], T],
    network: Network,
    what: str,
    *,
    progress: Callable[[], int] | None = None,
    turn: Callable[[float], None] = lambda most: None,
    most: float = MOST_BYTES,
    at_start: bool = False,
    aloud: bool = True,
) -> T:
    """Return what `call` returns, repeating it when it stalls or fails in a way that may pass.

    Gives up, and raises the last error, when for `network.patience` seconds `progress` (bytes) has grown by less than
    `LEAST_RATE`; without `progress` no try may take longer. Waiting for one's `turn` does not count, but `turn` raises
    what would take longer than patience. `at_start` it gives up sooner, but waits as the Hub asks.
    """
    stall, longest = min(network.stall_timeout, network.patience), math.inf if progress else network.patience
    progress = progress or (lambda: 0)
    begun = since = time.monotonic()
    made, tries, told, refusals = progress(), 0, 0.0, 0
    while True:
        before_turn = time.monotonic()
        turn(network.patience)
        since += time.monotonic() - before_turn
        try:
            return watched(call, stall, begun, what, aloud=aloud, longest=longest, most=most)
        except Exception as error:
            cause = passing_cause(error)
            if cause is None:
                raise
            now = time.monotonic()
            if progress() - made > LEAST_RATE * (now - since):
                begun = since = now
                made, tries, told, refusals = progress(), 0, 0.0, 0
            refusals += is_refusal(cause)
            asked = asked_delay(cause)
            delay = asked or min(LONGEST_WAIT, FIRST_WAIT * 2**tries) * _jitter.uniform(0.5, 1.0)
            tries += 1
            limit = network.patience
            if at_start and not asked:
                stalls = STALLS_AT_START * network.stall_timeout if isinstance(cause, TimeoutError) else 0.0
                limit = min(limit, told + max(START_PATIENCE, stalls))
            if now + delay - since > limit or refusals == REFUSALS:
                raise
            told += asked
            left = limit - (now - since)
            asks = f"the Hub asks to wait {asked:.0f} s" if asked else f"trying on for {left:.0f} s"
            pause(delay, begun, f"{what}: {first_line(cause)}; {asks}")


def passing_cause(error: BaseException | None) -> Exception | None:
    """The network's error behind an error, if what it tells may pass; libraries wrap such errors in their own."""
    while error is not None:
        if isinstance(error, OfflineModeIsEnabled):
            return None
        if isinstance(error, HfHubHTTPError):
            status = error.response.status_code
            return error if status in TRANSIENT_STATUS or status >= 500 or is_refusal(error) else None
        if isinstance(error, HTTPError) or (isinstance(error, ConnectionError | TimeoutError) and not error.__cause__):
            return error
        if isinstance(error, json.JSONDecodeError | FileMetadataError) or "Consistency check failed" in str(error):
            return WrongAnswer(first_line(error))
        error = error.__cause__ or error.__context__
    return None


def is_refusal(error: Exception) -> bool:
    """Whether an error is a refusal of a file without the Hub's own code for it, which may be a proxy's."""
    if not isinstance(error, HfHubHTTPError) or "X-Error-Code" in error.response.headers:
        return False
    status = error.response.status_code
    refused = 400 <= status < 500 and status not in TRANSIENT_STATUS
    return refused and "/resolve/" in str(getattr(error.response, "url", ""))


def asked_delay(error: Exception) -> float:
    """The seconds that the server asks to wait, by Retry-After or its rate limit; 0 if it does not."""
    if not isinstance(error, HfHubHTTPError):
        return 0.0
    return told_wait(error.response.status_code, error.response.headers)


def told_wait(status: int, headers: Mapping[str, str]) -> float:
    """The seconds that an answer with these headers asks to wait. A date is compared with the answer's own."""
    info = limits(headers)
    limited = info.reset_in_seconds + 1.0 if status == 429 and info is not None and info.remaining == 0 else 0.0
    after = headers.get("Retry-After", "").strip()
    if status < 400:
        return 0.0
    if re.fullmatch("[0-9]{1,9}", after):
        return max(limited, float(after))
    try:
        until, now = (
            email.utils.parsedate_to_datetime(text).timestamp() if text else None
            for text in (after, headers.get("Date", ""))
        )
    except (ValueError, OverflowError):
        return limited
    return limited if until is None else max(limited, until - (time.time() if now is None else now))


def limits(headers: Mapping[str, str]) -> RateLimitInfo | None:
    """The allowance that an answer tells, if it makes sense."""
    try:
        info = parse_ratelimit_headers(headers)
    except ValueError:  # more digits than Python reads
        return None
    return info if info is None or max(info.reset_in_seconds, info.remaining) < 10**9 else None


def first_line(error: BaseException) -> str:
    return redact((str(error).strip() or type(error).__name__).splitlines()[0])
