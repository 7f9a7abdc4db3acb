"""Whether the Hub can be reached from here, takes this user's token and lets a dataset be read: asked briefly."""

from dataclasses import dataclass
from queue import Empty, SimpleQueue
from threading import Thread
from time import perf_counter
from typing import Any

from huggingface_hub import constants, get_session, get_token
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

import stream.client  # noqa: F401 (bounds the waits of every request)
from errors import DataError
from stream.explain import one_line_errors

SECONDS = 5.0  # for an answer


@dataclass(frozen=True)
class Answer:
    """What the Hub answers to a question: after how many seconds, and what is wrong with it, if anything is."""

    seconds: float
    problem: str | None = None


@dataclass(frozen=True)
class Reach:
    """The Hub's address; whether HF_HUB_OFFLINE forbids to ask it; whether there is a token; what the Hub answers to
    whoever asks; whether it accepts the token; its answer for the dataset. None is unknown, or not asked.
    """

    endpoint: str
    offline: bool
    has_token: bool
    hub: Answer | None = None
    token_accepted: bool | None = None
    dataset: Answer | None = None


def ask(dataset: str | None) -> Reach:
    """Ask the Hub who this is, and if it answers whether this user may read `dataset`, a Hub id."""
    endpoint, has_token = constants.ENDPOINT, get_token() is not None
    if constants.is_offline_mode():
        return Reach(endpoint, True, has_token)
    began = perf_counter()
    try:
        with one_line_errors("the Hub"):
            code = _get("/api/whoami-v2").status_code
    except DataError as error:
        return Reach(endpoint, False, has_token, Answer(perf_counter() - began, str(error)))
    problem = f"{endpoint} answers with status {code}; try again later" if code >= 500 or code == 429 else None
    hub = Answer(perf_counter() - began, problem)
    accepted = {200: True, 401: False}.get(code) if has_token else None
    return Reach(endpoint, False, has_token, hub, accepted, None if problem or not dataset else _of_dataset(dataset))


def _of_dataset(dataset: str) -> Answer | None:
    """Whether this user may read a dataset; None where a mirror does not know this question."""
    began, problem = perf_counter(), None
    try:
        with one_line_errors(dataset):
            response = _get(f"/api/datasets/{dataset}/auth-check")
            if response.status_code == 404 and "X-Error-Code" not in response.headers:
                return None
            hf_raise_for_status(response)
    except DataError as error:
        problem = str(error)
    return Answer(perf_counter() - began, problem)


def _get(path: str) -> Any:
    """The answer to a request, in SECONDS at most: looking up a name has no bound of its own. Raises its errors."""
    found: SimpleQueue[Any] = SimpleQueue()

    def ask() -> None:
        try:
            url = f"{constants.ENDPOINT}{path}"
            found.put(get_session().get(url, headers=build_hf_headers(), timeout=SECONDS))
        except Exception as error:
            found.put(error)

    Thread(target=ask, daemon=True).start()
    try:
        answer = found.get(timeout=SECONDS)
    except Empty:
        raise TimeoutError(f"no answer within {SECONDS:g} s") from None
    if isinstance(answer, Exception):
        raise answer
    return answer
