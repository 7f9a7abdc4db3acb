"""The Hub's allowance of requests: how fast the processes of a run may ask."""

import math
import threading
import time
from collections import deque
from collections.abc import Mapping

import distributed
from stream.retry import LOOK_SECONDS, limits, say, told_wait

USUAL_LIMIT, USUAL_WINDOW = 5000, 300  # requests and seconds of a free account, for files
SPARE = 8  # requests of each rank that may be under way while the last answer is read


class Allowance:
    """Spreads requests over the time that an allowance has to last, as the Hub's RateLimit headers tell it.

    Nothing waits while more than half is left. After that each request of a rank waits its share of the time left, and
    when nothing is left, or Retry-After says so, until the moment that was told. A better answer frees all who wait.
    """

    def __init__(self) -> None:
        self.limit, self.window = USUAL_LIMIT, USUAL_WINDOW
        self._changed = threading.Condition()
        self._interval = 0.0
        self._reset = self._last = -1.0
        self._counted = False
        self._waiting: deque[object] = deque()

    def note(self, status: int, headers: Mapping[str, str]) -> None:
        """Take in an answer."""
        info, ranks = limits(headers), distributed.world_size()
        wait = told_wait(status, headers)
        with self._changed:
            if info is not None and info.limit and info.window_seconds:
                self.limit, self.window = info.limit, info.window_seconds
            if info is None and (self._counted or status >= 400) and not wait:
                return  # it tells nothing
            self._counted, self._interval = info is not None, 0.0
            if wait > 0:
                self._interval, self._reset = math.inf, time.monotonic() + wait
            elif info is not None and info.remaining < self.limit / 2:
                left = info.remaining - SPARE * ranks
                seconds = min(info.reset_in_seconds, self.window) + 1  # whole seconds are told
                self._interval = seconds * ranks / left if left > 0 else math.inf
                self._reset = time.monotonic() + seconds
            self._changed.notify_all()

    def wait_for_turn(self, most: float = math.inf) -> None:
        """Wait until this process may ask again, first come, first served, and never longer than was told.

        Raises TimeoutError if that is more than `most` seconds.
        """
        since, me = time.monotonic(), object()
        with self._changed:
            self._waiting.append(me)
            while (left := self._turn() - time.monotonic()) > 0 or self._waiting[0] is not me:
                if left > most:
                    self._waiting.remove(me)
                    raise TimeoutError(f"the Hub asks to wait {left:.0f} s")
                self._changed.wait(min(left, LOOK_SECONDS) if left > 0 else LOOK_SECONDS)
                say(since, f"the Hub asks to wait before the next request, which is due in {left:.0f} s")
            self._waiting.popleft()
            self._last = time.monotonic()
            self._changed.notify_all()

    def _turn(self) -> float:
        """When the next request may be made."""
        return min(self._last + self._interval, self._reset)


requests = Allowance()  # one for the whole process: they are counted by account
