"""However the Hub fails, the batches are those of a sound one, or the run ends with a snapshot and says why."""

import email.utils
import heapq
import itertools
import math
import random
import re
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fault_sweep import STATUSES, seeded_faults, short_waits, sweep
from hub import FAULTS, Hub
from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled
from program import ledger, run, steps_kept, train
from shards import REPO_ID

from stream import allowance
from stream import retry as network
from stream.allowance import Allowance
from stream.dataset import HuggingFaceImageNetDataset
from stream.retry import Network, patiently, told_wait

pytestmark = pytest.mark.usefixtures("small_model")

SMALL: tuple[object, ...] = ("--dataset", "imagenet1k", "--max_samples", 256, "--model", "resnet18", "--image_size", 33)
SMALL = (*SMALL, "--batch_size", 64, "--epochs", 2, "--block_mb", 1, "--ledger")


@pytest.fixture
def hasty() -> Iterator[None]:
    with short_waits():
        yield


@pytest.fixture(scope="module")
def sound(hub_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run from the same files on a disk."""
    folder = tmp_path_factory.mktemp("sound") / "run"
    flags = ("--dataset", "hf", "--dataset_name", hub_root / "datasets" / REPO_ID)
    train(*flags, *SMALL[2:], "--run_dir", folder)
    yield folder
    for path in folder.rglob("*.safetensors"):
        path.unlink()


def test_a_run_with_a_fifth_of_all_requests_failing_is_the_sound_one(
    hub_root: Path, hub_port: int, sound: Path, tmp_path: Path, hasty: None
) -> None:
    fault = seeded_faults(1, 0.2, (*STATUSES, *FAULTS))
    with Hub(hub_root, port=hub_port, fault=fault) as hub:
        train(*SMALL, "--stall_timeout", 0.5, "--run_dir", tmp_path / "run")
    assert {request.status for request in hub.requests} >= {206, 503}
    assert ledger(tmp_path / "run") == ledger(sound)


@pytest.mark.slow
def test_a_hub_that_stays_away_ends_the_run_with_a_snapshot_to_go_on_from(
    hub_root: Path, hub_port: int, sound: Path, tmp_path: Path, hasty: None
) -> None:
    """It goes away when two steps are done: after that every request is answered with 503."""
    folder = tmp_path / "run"

    def fault(method: str, path: str) -> int | None:
        steps = (folder / "metrics.jsonl").exists() and len((folder / "metrics.jsonl").read_text().splitlines())
        return 503 if steps and steps >= 2 else None

    with Hub(hub_root, port=hub_port, fault=fault):
        done = run(*SMALL, "--log_steps", 1, "--network_patience", 0.01, "--run_dir", folder)
    assert (done.status, done.err.count("\n")) == (3, 1), done.err
    assert done.err.startswith("error: cannot reach ILSVRC/imagenet-1k")
    assert "stopped by a failure of the data at step" in done.out
    assert len(steps_kept(folder)) >= 1
    with Hub(hub_root, port=hub_port):
        train("--resume_from", folder, "--network_patience", 1)
    assert ledger(folder) == ledger(sound)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 50, 10))
def test_no_schedule_of_faults_changes_the_order_or_hangs(hub_root: Path, hub_port: int, first: int) -> None:
    """50 of the 500 schedules that fault_sweep.py goes through."""
    assert sweep(hub_root, range(first, first + 10)).total() == 10


def test_bytes_are_fetched_where_the_hub_redirects_to_and_its_allowance_is_noted(
    hub_root: Path, hub_port: int, hasty: None
) -> None:
    with Hub(hub_root, port=hub_port, redirect=True) as hub:
        dataset = HuggingFaceImageNetDataset.open(REPO_ID, split=["validation"])
        since = len(hub.requests)
        found = dataset.read_block(0)
    assert [request.status for request in hub.requests[since:]] == [302, 206]
    assert allowance.requests._interval == 91 / (900 - allowance.SPARE)
    on_disk = HuggingFaceImageNetDataset.open(str(hub_root / "datasets" / REPO_ID), split=["validation"]).read_block(0)
    assert found.images.equals(on_disk.images)


# ---- the policy itself -----------------------------------------------------------------------------------------------


def refusal(status: int, headers: dict[str, str]) -> HfHubHTTPError:
    """What huggingface_hub raises for an answer like this."""
    response = SimpleNamespace(status_code=status, headers=headers, request=None)
    return HfHubHTTPError("refused", response=response)  # type: ignore[arg-type]


def wrapped(error: Exception, *causes: Exception) -> Exception:
    """An error as a library raises it from another one."""
    error.__cause__ = causes[0]
    return error


def date(seconds: float) -> str:
    return email.utils.formatdate(1_800_000_000 + seconds, usegmt=True)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, moved by sleeping alone; the sleeps follow it."""
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds
        now.append(seconds)

    monkeypatch.setattr("time.monotonic", lambda: now[0])
    monkeypatch.setattr("time.sleep", sleep)
    monkeypatch.setattr(network, "_last_said", -math.inf)
    monkeypatch.setattr(network, "watched", lambda call, stall, begun, what, **bounds: call())
    return now


def failing(*errors: Exception) -> Callable[[], str]:
    """Raises these, one a call, and is done then."""
    left = list(errors)

    def call() -> str:
        if left:
            raise left.pop(0)
        return "done"

    return call


def test_a_call_is_repeated_until_it_succeeds_and_waits_longer_each_time(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(network, "pause", lambda seconds, since, text: waits.append(seconds))
    assert patiently(failing(*[ConnectionError("reset")] * 5), Network(), "it") == "done"
    bounds = [(network.FIRST_WAIT * 2**n / 2, network.FIRST_WAIT * 2**n) for n in range(5)]
    assert [low <= wait <= high for wait, (low, high) in zip(waits, bounds, strict=True)] == [True] * 5


@pytest.mark.parametrize(("rate", "goes_on"), [(2 * network.LEAST_RATE, True), (network.LEAST_RATE / 2, False)])
def test_only_progress_at_a_least_rate_makes_patience_new(clock: list[float], rate: float, goes_on: bool) -> None:
    made = [0]

    def call() -> None:
        clock[0] += 9
        if clock[0] < 200:
            made[0] = int(rate * clock[0])
        raise TimeoutError("stalled")

    with pytest.raises(TimeoutError):
        patiently(call, Network(60, 60), "it", progress=lambda: made[0])
    assert (clock[0] > 200) == goes_on
    assert clock[0] < 300


def test_the_jitter_takes_nothing_from_the_runs_random_numbers(clock: list[float]) -> None:
    before = random.getstate()
    patiently(failing(*[ConnectionError("reset")] * 3), Network(), "it")
    assert random.getstate() == before


@pytest.mark.parametrize("at_start", [True, False])
@pytest.mark.parametrize("told", [7, 40, 290])
def test_a_wait_that_the_hub_asks_for_is_waited_out_and_no_longer(
    clock: list[float], told: int, at_start: bool
) -> None:
    refused = refusal(429, {"RateLimit": f'"resolvers";r=0;t={told}'})
    assert patiently(failing(refused), Network(60, 300), "it", at_start=at_start) == "done"
    assert told <= clock[0] <= told + 1


@pytest.mark.parametrize(("status", "seconds"), [(503, 20), (429, 300)])
def test_at_the_start_a_hub_that_only_fails_is_given_up_soon(clock: list[float], status: int, seconds: float) -> None:
    headers = {"Retry-After": "45"} if status == 429 else {}
    with pytest.raises(HfHubHTTPError):
        patiently(failing(*[refusal(status, headers)] * 99), Network(60, 300), "it", at_start=True)
    assert seconds / 3 < clock[0] <= seconds


def test_long_waits_are_told_and_short_ones_are_not(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    network.pause(9, 0.0, "it is slow")
    assert caplog.messages == []
    network.pause(35, 9.0, "it is slow")
    assert [re.sub(r"\d+", "N", text) for text in caplog.messages] == ["waiting for N s: it is slow"] * 3


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (ConnectionError("refused"), True),
        (wrapped(FileNotFoundError("no file"), ConnectionError("refused")), True),
        (wrapped(ConnectionError("cannot reach"), refusal(404, {})), False),
        (wrapped(ConnectionError("cannot reach"), OfflineModeIsEnabled("offline")), False),
        (wrapped(FileNotFoundError("no file"), refusal(503, {})), True),
        (refusal(404, {}), False),
        (ValueError("bad"), False),
        (wrapped(HTTPError("no such name"), OSError(-2, "no such name")), True),
    ],
)
def test_what_passes_is_seen_through_the_errors_of_libraries(error: Exception, passes: bool) -> None:
    assert (network.passing_cause(error) is not None) == passes


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry-After": "7"}, 7),
        ({"Retry-After": ""}, 0),
        ({"Retry-After": "soon"}, 0),
        ({"Retry-After": "²"}, 0),
        ({"Retry-After": "-5"}, 0),
        ({"Retry-After": date(30), "Date": date(0)}, 30),
        ({"Retry-After": date(9030), "Date": date(9000)}, 30),  # this machine's clock is wrong
        ({"Retry-After": date(0), "Date": date(30)}, 0),
        ({"RateLimit": '"resolvers";r=0;t=55'}, 56),
        ({"RateLimit": '"resolvers";r=9;t=55'}, 0),
        ({"RateLimit": '"resolvers";r=0;t=55', "Retry-After": "60"}, 60),
    ],
)
def test_a_server_that_says_when_to_come_back_is_obeyed(headers: dict[str, str], seconds: float) -> None:
    assert max(0, network.told_wait(429, headers)) == pytest.approx(seconds, abs=0.01)


def test_a_date_without_the_servers_own_is_compared_with_this_clock() -> None:
    assert 25 < network.told_wait(503, {"Retry-After": email.utils.formatdate(time.time() + 30)}) <= 30


# ---- the allowance ---------------------------------------------------------------------------------------------------


def limits(remaining: int, seconds: int) -> dict[str, str]:
    return {"RateLimit": f'"resolvers";r={remaining};t={seconds}', "RateLimit-Policy": '"w";"resolvers";q=5000;w=300'}


@pytest.fixture
def shared(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> Allowance:
    """An allowance whose waits move the clock."""
    monkeypatch.setattr("threading.Condition.wait", lambda self, timeout: time.sleep(timeout))
    return Allowance()


def waits(shared: Allowance, clock: list[float], count: int = 4) -> list[float]:
    """When each of so many requests may be made, counted from now."""
    began, times = clock[0], []
    for _ in range(count):
        shared.wait_for_turn()
        times.append(clock[0] - began)
    return times


@pytest.mark.parametrize(("remaining", "spread"), [(4000, False), (2500, False), (1000, True)])
def test_requests_are_spread_out_when_the_allowance_runs_low(
    shared: Allowance, clock: list[float], remaining: int, spread: bool
) -> None:
    shared.wait_for_turn()
    shared.note(200, limits(remaining, 200))
    interval = 201 / (remaining - allowance.SPARE) if spread else 0
    assert waits(shared, clock) == pytest.approx([n * interval for n in range(1, 5)], abs=0.01)


def test_nobody_waits_longer_than_until_the_moment_that_was_told(shared: Allowance, clock: list[float]) -> None:
    shared.note(429, limits(0, 20))
    assert waits(shared, clock) == pytest.approx([21] * 4)
    assert waits(shared, clock) == [0] * 4, "what was slept off is waited for again"


def test_a_wait_without_numbers_holds_all_until_it_is_over_or_an_answer_is_good(
    shared: Allowance, clock: list[float]
) -> None:
    shared.note(503, {"Retry-After": "40"})
    shared.note(503, {})
    assert waits(shared, clock, 2) == pytest.approx([40, 40])
    shared.note(503, {"Retry-After": "40"})
    shared.note(206, {})
    assert waits(shared, clock, 2) == [0, 0]


def test_an_answer_that_tells_nothing_does_not_end_the_spreading_and_a_good_one_does(
    shared: Allowance, clock: list[float]
) -> None:
    shared.wait_for_turn()
    shared.note(302, limits(108, 99))
    shared.note(206, {})
    assert waits(shared, clock, 2) == pytest.approx([1, 2])
    shared.note(302, limits(4999, 300))
    assert waits(shared, clock, 2) == [0, 0]


def simulate(
    ranks: int, threads: int, limit: int, window: int, minutes: int, patch: pytest.MonkeyPatch, others: int = 0
) -> tuple[list[float], list[float], list[float]]:
    """When the requests of ranks that share an allowance were refused and granted, and how long each thread waited.

    Each process knows only the answers that it gets, 50 ms after its request. `others` use up a part of each window.
    """
    now = [1000.0]
    patch.setattr("time.monotonic", lambda: now[0])
    patch.setattr("distributed.world_size", lambda: ranks)
    shared = [Allowance() for _ in range(ranks)]
    counts: Counter[int] = Counter()
    refused: list[float] = []
    granted: list[float] = []
    idle: list[float] = []
    order = itertools.count()
    waiting = [deque([now[0]] * threads) for _ in range(ranks)]
    due = [math.inf] * ranks
    events: list[Any] = [(now[0], next(order), rank, None) for rank in range(ranks)]
    while events[0][0] < 1000 + 60 * minutes:
        now[0], _, rank, answer = heapq.heappop(events)
        if isinstance(answer, tuple):
            shared[rank].note(*answer)
            heapq.heappush(events, (now[0] + told_wait(*answer), next(order), rank, "a thread is free"))
            continue
        if answer:
            waiting[rank].append(now[0])
        else:
            due[rank] = math.inf
        while waiting[rank] and shared[rank]._turn() <= now[0]:
            shared[rank]._last = now[0]
            idle.append(now[0] - waiting[rank].popleft())
            period, into = divmod(now[0], window)
            counts[int(period)] += 1
            left = limit - others - counts[int(period)]
            (granted if left >= 0 else refused).append(now[0])
            headers = {"RateLimit": f'"resolvers";r={max(0, left)};t={int(window - into)}'}
            headers["RateLimit-Policy"] = f'"w";"resolvers";q={limit};w={window}'
            heapq.heappush(events, (now[0] + 0.05, next(order), rank, (302 if left >= 0 else 429, headers)))
        turn = max(now[0] + 0.01, shared[rank]._turn())
        if waiting[rank] and turn < due[rank]:
            due[rank] = turn
            heapq.heappush(events, (turn, next(order), rank, None))
    return refused, granted, idle


def test_eight_ranks_share_one_allowance(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight ranks of eight threads, each request taking 50 ms, on one allowance of 5,000 in 300 s, for 20 minutes."""
    refused, times, idle = simulate(ranks=8, threads=8, limit=5000, window=300, minutes=20, patch=monkeypatch)
    assert refused == []
    assert len(times) >= 0.95 * 5000 * 4
    assert max(idle) < 10


def test_what_others_use_of_the_allowance_is_left_to_them(monkeypatch: pytest.MonkeyPatch) -> None:
    refused, _, idle = simulate(8, 8, 5000, 300, minutes=20, others=2400, patch=monkeypatch)
    assert refused == []
    assert max(idle) < 10
