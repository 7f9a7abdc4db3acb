"""What the errors of the Hub's clients, the disk and the file formats mean, in one line that says what to do."""

import contextlib
import re
import ssl
from collections.abc import Iterator
from typing import Any

from datasets.exceptions import DatasetNotFoundError
from huggingface_hub import constants, get_token
from huggingface_hub.errors import (
    GatedRepoError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from errors import DataError, UserError
from stream.retry import Elsewhere, WrongAnswer, asked_delay, first_line


@contextlib.contextmanager
def one_line_errors(source: str, file: str | None = None, commit: str | None = None) -> Iterator[None]:
    """Turns errors of the Hub's clients, the disk, tarfile, pyarrow and json into a DataError that says what to do."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        raise DataError(_explain(error, source, file or source, commit)) from error


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those behind it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _explain(error: Exception, source: str, file: str, commit: str | None) -> str:
    url = f"{constants.ENDPOINT}/datasets/{source}"
    behind = list(_chain(error))
    answers = [getattr(found, "response", None) for found in behind]
    response = next((answer for answer in answers if answer is not None), None)
    code = response.status_code if response is not None else None

    def any_is(*kinds: type[BaseException]) -> bool:
        return any(isinstance(found, kinds) for found in behind)

    if any_is(OfflineModeIsEnabled):
        return f"{file} is not on this machine and HF_HUB_OFFLINE is set; unset it to reach the Hub"
    if any_is(UnicodeEncodeError, UnicodeDecodeError) and _odd_token():
        return _odd_token()
    if code == 401 and get_token() is None:
        return f"{source} needs a token, or does not exist; accept its licence at {url}, then set HF_TOKEN"
    if code == 401:
        return _odd_token() or f"the Hub refused the token for {source}; make a new one and set HF_TOKEN"
    if any_is(GatedRepoError):
        return f"the licence of {source} is not accepted by this token's account; accept it at {url}"
    if code == 403:
        return f"{constants.ENDPOINT} refuses {file} ({_told(response)}); check the token's permissions, and {url}"
    if any_is(RevisionNotFoundError) and commit is not None:
        return (
            f"commit {commit} of {source} is no longer on the Hub; train on another with --dataset_revision main, or "
            "resume on another with --override dataset_revision=main"
        )
    if any_is(RevisionNotFoundError):
        return f"{source} has no such revision; check --dataset_revision"
    if any_is(RepositoryNotFoundError, DatasetNotFoundError):
        return f"{source} does not exist on the Hub, nor is it a folder here; check the name"
    if any_is(ssl.SSLCertVerificationError):
        return (
            f"cannot trust the certificate of {constants.ENDPOINT} ({first_line(error)}); set SSL_CERT_FILE to the "
            "certificates of your network, and check this machine's clock"
        )
    if any_is(Elsewhere):
        return (
            f"cannot fetch {file}: {first_line(error)}, to which {constants.ENDPOINT} sent this machine; resume later"
        )
    if any_is(WrongAnswer):
        fix = "a proxy or a mirror on the way may be at fault: avoid it, then try again"
        return f"cannot read {file}: {first_line(error)}; {fix}"
    asked = asked_delay(error)
    if asked:
        return f"the Hub asks to wait {asked:.0f} s before it sends {file} of {source}; wait, then try again"
    if isinstance(error, HTTPError | ConnectionError | TimeoutError):
        wanted = "" if file == source else f" for {file}"
        where = f"{source} at {constants.ENDPOINT}{wanted}"
        return f"cannot reach {where} ({first_line(error)}); check the network, then try again"
    if any_is(LocalEntryNotFoundError):  # of a download of a whole repository, which tells its reason at length
        return (
            f"cannot reach {constants.ENDPOINT} for {source}, which is no folder here; check its name and the network"
        )
    return f"cannot read {file}: {' '.join(str(error).split()) or type(error).__name__}"


def _told(response: Any) -> str:
    return response.headers.get("X-Error-Message") or f"status {response.status_code}"


def _odd_token() -> str:
    """What is wrong with the form of this user's token, or nothing."""
    token = get_token() or ""
    found = re.search(r"[^A-Za-z0-9_.\-]", token)
    return (
        f"the Hub's token has the character {found[0]} in it, which no token has; set HF_TOKEN without it"
        if found
        else ""
    )
