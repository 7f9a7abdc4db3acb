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
from stream.retry import TRANSIENT_STATUS, Attempt, Elsewhere, WrongAnswer, attempt, told_wait

SILENCE = 120.0  # seconds: ends the threads of calls that were given up before
LIBRARIES_WAIT = 8.0  # seconds that huggingface_hub waits by itself; what is longer is waited for here, and aloud


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
    """Give every wait of a request a bound, as most of the libraries' have none; refuse it if nobody waits for it."""
    if attempt.get(Attempt()).given_up:
        raise WrongAnswer("the call was given up")
    told = request.extensions.get("timeout") or {}
    bounds = {kind: told.get(kind) or SILENCE for kind in ("connect", "read", "write", "pool")}
    request.extensions = {**request.extensions, "timeout": bounds}


def _look_at(response: Any) -> None:
    """Count an answer, note the allowance, and refuse what the libraries would wait for or believe."""
    attempt.get(Attempt()).answered(response)
    url, status = response.request.url, response.status_code
    if "/resolve/" in url.path:
        allowance.requests.note(status, response.headers)
    if told_wait(status, response.headers) > LIBRARIES_WAIT:
        hf_raise_for_status(response)
    hubs_own = "/api/" in url.path or "X-Error-Code" in response.headers or _host(url) == _host(constants.ENDPOINT)
    if status >= 400 and status not in TRANSIENT_STATUS and not hubs_own:
        raise Elsewhere(f"status {status} from {url.host}")
    page = "html" in response.headers.get("Content-Type", "") and not url.path.endswith((".html", ".htm"))
    if status == 200 and page and ("/api/" in url.path or "/resolve/" in url.path):
        raise WrongAnswer(f"{url.host} answers with a web page: a network that wants a log-in, or no Hub")


def _host(url: object) -> tuple[str | None, int | None]:
    parts = urlsplit(str(url))
    return parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


set_client_factory(_make_client)
