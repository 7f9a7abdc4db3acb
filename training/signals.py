"""How a run is stopped from outside: by a signal, or by data that no longer arrives."""

import os
import signal
import time
from collections.abc import Iterator
from types import FrameType

import distributed
from errors import SIGNALS, DataError, Interrupted
from stream.loader import Batch, Cancelled, Loader

ECHO_SECONDS = 1.0
FAILED = 1000  # greater than any signal


class StopRequest:
    """Remembers the first stop signal. A second one more than ECHO_SECONDS later ends the process at once."""

    def __init__(self) -> None:
        self.signum = 0
        self._since = 0.0

    @classmethod
    def listening(cls, *loaders: Loader) -> "StopRequest":
        """Handle SIGNALS from now on, but those that this process was told to ignore.

        After one the loaders stop waiting for data.
        """
        stop = cls()
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, stop._note)
        for loader in loaders:
            loader.should_stop = lambda: bool(stop.signum)
        return stop

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if not self.signum:
            self.signum, self._since = signum, time.monotonic()
        elif time.monotonic() - self._since > ECHO_SECONDS:
            if distributed.rank() == 0:
                os.write(2, f"stopped at once by {signal.Signals(signum).name}\n".encode())  # sys.stderr may be in use
            os._exit(128 + signum)

    def check(self, failure: DataError | None = None) -> None:
        """Raise on all ranks when one of them was told to stop (Interrupted) or has a `failure` (DataError).

        All ranks must call this together.
        """
        worst = distributed.largest_over_ranks(FAILED if failure else self.signum)
        if worst == FAILED:
            raise failure or DataError("another process has no data to go on with")
        if worst:
            raise Interrupted(worst)


def batches_until(stop: StopRequest, loader: Loader | list[Batch], every_step: bool) -> Iterator[Batch]:
    """Yield the loader's batches until a rank must stop, then raise on all ranks (see StopRequest.check).

    With `every_step`, ranks step together and check before each batch; otherwise they check only when they have no
    batch left. Raises RuntimeError when there were fewer batches than the loader's length.
    """
    batches, failure, given = iter(loader), None, 0
    expected = len(loader) - (loader.start if isinstance(loader, Loader) else 0)
    while True:
        batch = None
        try:
            batch = None if stop.signum else next(batches, None)
        except DataError as error:
            failure = error
        except Cancelled:
            pass
        if every_step or batch is None:
            stop.check(failure)
        if batch is None:
            break
        given += 1
        yield batch
    if given != expected:
        raise RuntimeError(f"the data ended after {given} of {expected} batches")
