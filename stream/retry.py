"""Network failures: what to retry and for how long, and what the Hub's refusals mean."""

import contextlib
import email.utils
import logging
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from datasets.exceptions import DatasetNotFoundError
from huggingface_hub import constants, get_token
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import parse_ratelimit_headers

from errors import DataError, UserError, redact

log = logging.getLogger(__name__)
T = TypeVar("T")

TRANSIENT_STATUS = {408, 425, 429, 500, 502, 503, 504}
FIRST_WAIT, LONGEST_WAIT = 0.5, 60.0  # seconds
_jitter = random.Random()


@dataclass(frozen=True)
class Network:
    """Seconds without a byte before a request is retried, and without progress before a run gives up."""

    stall_timeout: float = 60.0
    patience: float = 1800.0


def patiently(call: Callable[[], T], patience: float, progress: Callable[[], int] = lambda: 0) -> T:
    """Return what `call` returns, retrying transient failures until `progress` has stalled for `patience` seconds.

    Then raises the last error.
    """
    since, made, attempt = time.monotonic(), progress(), 0
    while True:
        try:
            return call()
        except (HTTPError, ConnectionError, TimeoutError) as error:
            if not _is_transient(error):
                raise
            if progress() > made:
                since, made, attempt = time.monotonic(), progress(), 0
            backoff = min(LONGEST_WAIT, FIRST_WAIT * 2**attempt) * _jitter.uniform(0.5, 1.0)
            delay = max(backoff, _asked_delay(error))
            attempt += 1
            if time.monotonic() + delay - since > patience:
                raise
            if attempt == 6:
                log.warning("the network fails (%s); trying on for %.0f s", _first_line(error), patience)
            time.sleep(delay)


def _is_transient(error: Exception) -> bool:
    if isinstance(error, OfflineModeIsEnabled):
        return False
    return not isinstance(error, HfHubHTTPError) or error.response.status_code in TRANSIENT_STATUS


def _asked_delay(error: Exception) -> float:
    """The seconds that the server asks to wait, by Retry-After or its rate limit."""
    if not isinstance(error, HfHubHTTPError):
        return 0.0
    headers = error.response.headers
    info = parse_ratelimit_headers(headers)
    if error.response.status_code == 429 and info is not None and info.remaining == 0:
        return info.reset_in_seconds + 1.0
    after = headers.get("Retry-After", "").strip()
    if after.isdigit():
        return float(after)
    date = email.utils.parsedate_tz(after)
    return max(0.0, email.utils.mktime_tz(date) - time.time()) if date else 0.0


@contextlib.contextmanager
def one_line_errors(source: str, file: str | None = None) -> Iterator[None]:
    """Turns errors of the Hub's clients, the disk, tarfile, pyarrow and json into a DataError that says what to do."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        raise DataError(_explain(error, source, file or source)) from error


def _explain(error: Exception, source: str, file: str) -> str:
    url = f"{constants.ENDPOINT}/datasets/{source}"
    response = getattr(error, "response", None)
    code = response.status_code if response is not None else None
    if isinstance(error, OfflineModeIsEnabled):
        return f"{file} is not on this machine and HF_HUB_OFFLINE is set; unset it to reach the Hub"
    if code == 401 and get_token() is None:
        return f"{source} needs a token, or does not exist; accept its licence at {url}, then set HF_TOKEN"
    if code == 401:
        return f"the Hub refused the token for {source}; make a new one and set HF_TOKEN"
    if isinstance(error, GatedRepoError) or code == 403:
        return f"the licence of {source} is not accepted by this token's account; accept it at {url}"
    if isinstance(error, RevisionNotFoundError):
        return f"{source} has no such revision; check --dataset_revision"
    if isinstance(error, RepositoryNotFoundError | DatasetNotFoundError):
        return f"{source} does not exist on the Hub, nor is it a folder here; check the name"
    if isinstance(error, HTTPError | ConnectionError | TimeoutError):
        return f"cannot reach {source} at {constants.ENDPOINT} ({_first_line(error)}); check the network, then resume"
    return f"cannot read {file}: {' '.join(str(error).split()) or type(error).__name__}"


def _first_line(error: Exception) -> str:
    return redact((str(error).strip() or type(error).__name__).splitlines()[0])
