"""The HTTP client that this program, `huggingface_hub` and `datasets` share: no wait without a bound.

Importing this module installs it.
"""

import os
import ssl
from typing import Any
from urllib.parse import urlsplit

from huggingface_hub import constants, set_client_factory
from huggingface_hub.utils import hf_raise_for_status
from huggingface_hub.utils._http import default_client_factory

from errors import DataError
from stream import allowance
from stream.retry import Attempt, Elsewhere, WrongAnswer, attempt, told_wait

SILENCE = 120.0  # seconds: ends the threads of calls that were given up before
LIBRARIES_WAIT = 8.0  # seconds that huggingface_hub waits by itself; what is longer is waited for here, and aloud
ENDPOINT_HOST = urlsplit(constants.ENDPOINT).netloc.rpartition("@")[2].encode()


def _make_client() -> Any:
    try:
        client = default_client_factory()
    except (OSError, ssl.SSLError) as error:
        name = "SSL_CERT_FILE" if "SSL_CERT_FILE" in os.environ else "SSL_CERT_DIR"
        raise DataError(
            f"{name} names {os.environ.get(name)}, which holds no certificates ({error}); mend it, or unset it"
        ) from error
    hooks = client.event_hooks
    client.event_hooks = {
        "request": [*hooks["request"], _bound],
        "response": [*hooks["response"], _look_at],
    }
    return client


def _bound(request: Any) -> None:
    """Give every wait of a request a bound: most calls of the libraries have none."""
    told = request.extensions.get("timeout") or {}
    bounds = {kind: told.get(kind) or SILENCE for kind in ("connect", "read", "write", "pool")}
    request.extensions = {**request.extensions, "timeout": bounds}


def _look_at(response: Any) -> None:
    """Count an answer, note the allowance, and refuse what the libraries would wait for or believe."""
    trying = attempt.get(Attempt())
    trying.answered(response)
    if trying.given_up:
        raise WrongAnswer("the answer came too late")
    url, status = response.request.url, response.status_code
    if "/resolve/" in url.path:
        allowance.requests.note(status, response.headers)
    if told_wait(status, response.headers) > LIBRARIES_WAIT:
        hf_raise_for_status(response)
    if status >= 400 and url.netloc != ENDPOINT_HOST:
        raise Elsewhere(f"status {status} from {url.host}")
    if status == 200 and "/api/" in url.path and "html" in response.headers.get("Content-Type", ""):
        raise WrongAnswer(f"{url.host} answers with a web page: a network that wants a log-in, or no Hub")


set_client_factory(_make_client)
