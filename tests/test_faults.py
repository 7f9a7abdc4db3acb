"""However the Hub fails, the batches are those of a sound one, or the run ends with a snapshot and says why."""

import email.utils
import random
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from fault_sweep import STATUSES, seeded_faults, short_waits, sweep
from hub import FAULTS, Hub
from huggingface_hub.errors import HfHubHTTPError
from program import ledger, run, steps_kept, train
from shards import REPO_ID

from stream import hub as remote
from stream import retry as network
from stream.dataset import HuggingFaceImageNetDataset
from stream.retry import Network, patiently

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


def test_bytes_are_fetched_where_the_hub_redirects_to_and_its_allowance_is_noted(hub_root: Path, hub_port: int) -> None:
    with Hub(hub_root, port=hub_port, redirect=True) as hub:
        dataset = HuggingFaceImageNetDataset.open(REPO_ID, split=["validation"])
        since = len(hub.requests)
        found = dataset.read_block(0)
    files = dataset._files
    assert isinstance(files, remote.HubFiles)
    assert [request.status for request in hub.requests[since:]] == [302, 206]
    assert files._interval == 90 / 900
    on_disk = HuggingFaceImageNetDataset.open(str(hub_root / "datasets" / REPO_ID), split=["validation"]).read_block(0)
    assert found.images.equals(on_disk.images)


# ---- the policy itself -----------------------------------------------------------------------------------------------


def test_a_call_is_repeated_until_it_succeeds_and_waits_longer_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)
    left = [ConnectionError("reset")] * 5

    def call() -> str:
        if left:
            raise left.pop()
        return "done"

    assert patiently(call, 1e9) == "done"
    bounds = [(network.FIRST_WAIT * 2**n / 2, network.FIRST_WAIT * 2**n) for n in range(5)]
    assert [low <= wait <= high for wait, (low, high) in zip(waits, bounds, strict=True)] == [True] * 5


def test_progress_makes_patience_new_and_its_lack_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    monkeypatch.setattr("time.sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    made = [0]

    def call() -> None:
        now[0] += 9
        made[0] += made[0] < 20
        raise TimeoutError("stalled")

    with pytest.raises(TimeoutError):
        patiently(call, 60, lambda: made[0])
    assert made[0] == 20
    assert 180 < now[0] < 300


def test_the_jitter_takes_nothing_from_the_runs_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    left = [ConnectionError("reset")] * 3
    before = random.getstate()
    patiently(lambda: left and (_ for _ in ()).throw(left.pop()), 1e9)
    assert random.getstate() == before


@pytest.mark.parametrize(("remaining", "spread"), [(4000, False), (2500, False), (1000, True), (0, True)])
def test_requests_are_spread_out_when_the_allowance_runs_low(
    monkeypatch: pytest.MonkeyPatch, remaining: int, spread: bool
) -> None:
    files = remote.HubFiles(REPO_ID, "0" * 40, ["a"], Network())
    headers = {"ratelimit": f'"api";r={remaining};t=200', "ratelimit-policy": '"fixed window";"api";q=5000;w=300'}
    files._note_allowance(headers)
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)
    for _ in range(5):
        files._wait_for_turn()
    interval = 200 / max(1, remaining) if spread else 0
    assert np.allclose(waits, [n * interval for n in range(5)], atol=0.05 * interval + 1e-3)


@pytest.mark.parametrize(("value", "low", "high"), [("7", 7, 7), ("", 0, 0), ("soon", 0, 0)])
def test_a_server_that_says_when_to_come_back_is_obeyed(value: str, low: float, high: float) -> None:
    error = refusal(429, {"Retry-After": value})
    assert low <= network._asked_delay(error) <= high


def test_a_date_to_come_back_at_is_obeyed() -> None:
    assert 25 < network._asked_delay(refusal(503, {"Retry-After": email.utils.formatdate(time.time() + 30)})) <= 30


def refusal(status: int, headers: dict[str, str]) -> Exception:
    """What huggingface_hub raises for an answer like this."""
    return HfHubHTTPError("refused", response=SimpleNamespace(status_code=status, headers=headers, request=None))  # type: ignore[arg-type]
