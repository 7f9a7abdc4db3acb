"""Whatever a Hub, a mirror or a proxy answers: the run of a sound one, or one line that says why; never silence."""

import itertools
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from fault_sweep import STALL, short_waits
from hub import FAULTS, FLIP, LIES, SLOW, Hub
from huggingface_hub import close_session
from program import Outcome, environment, ledger, run, start, train, wait
from shards import REPO_ID
from test_webdataset import make_set

from stream import retry as network
from stream.cache import FileStore
from stream.dataset import HuggingFaceImageNetDataset
from stream.hub import resolve
from stream.retry import Network

pytestmark = pytest.mark.usefixtures("small_model")

HUB: tuple[object, ...] = ("--dataset", "imagenet1k")
SMALL: tuple[object, ...] = ("--max_samples", 128, "--model", "resnet18", "--image_size", 33, "--batch_size", 64)
SMALL = (*SMALL, "--epochs", 1, "--block_mb", 1, "--ledger", "--num_workers", 0)
HASTY = ("--stall_timeout", STALL, "--network_patience", 1.5 / 60)
Fault = Callable[[str, str], int | str | None]


@pytest.fixture
def hasty() -> Iterator[pytest.MonkeyPatch]:
    with short_waits() as patch:
        patch.setattr(network, "START_PATIENCE", 1.0)
        yield patch


@pytest.fixture(scope="module")
def sound(hub_root: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The ledger of a run from the same files on a disk."""
    folder = tmp_path_factory.mktemp("sound") / "run"
    train("--dataset", "hf", "--dataset_name", hub_root / "datasets" / REPO_ID, *SMALL, "--run_dir", folder)
    return ledger(folder)


def each_at_first(kinds: Sequence[int | str], only: str) -> Fault:
    """The first request for each path that has `only` in it fails in the next of these ways, over and over."""
    seen: set[str] = set()
    ways, lock = itertools.cycle(kinds), threading.Lock()

    def fault(method: str, path: str) -> int | str | None:
        with lock:
            if only not in path or path in seen:
                return None
            seen.add(path)
            return next(ways)

    return fault


def always(kind: int | str, only: str) -> Fault:
    return lambda method, path: kind if only in path else None


def assert_one_line(done: Outcome, *parts: str) -> None:
    errors = [line for line in done.err.splitlines() if not line.startswith(("waiting", "'", "HTTP", "Retrying"))]
    assert (done.status, len(errors)) == (3, 1), done.err
    assert errors[0].startswith("error: ")
    assert [part for part in parts if part not in errors[0]] == [], errors[0]


# ---- one odd answer ends nothing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("redirect", [False, True])
def test_odd_answers_for_files_change_nothing(
    hub_root: Path, hub_port: int, sound: list[dict[str, Any]], tmp_path: Path, hasty: None, redirect: bool
) -> None:
    kinds = (*LIES, *SLOW, *FAULTS, "wait 1")
    with Hub(hub_root, port=hub_port, redirect=redirect, fault=each_at_first(kinds, "/data/")):
        train(*HUB, *SMALL, "--stall_timeout", STALL, "--run_dir", tmp_path / "run")
    assert ledger(tmp_path / "run") == sound


@pytest.mark.parametrize("how", ["the index has whole files", "a shard is a whole file"])
def test_a_wrong_bit_in_a_whole_file_is_seen_by_the_hubs_checksum(
    hub_root: Path, hub_port: int, tmp_path: Path, hasty: pytest.MonkeyPatch, how: str
) -> None:
    root, classes = hub_root, None
    if how == "a shard is a whole file":
        root, classes = tmp_path / "root", 10
        make_set(root / "datasets" / REPO_ID)
    hasty.setattr("stream.footers.MANY_FILES", 1)

    def images_of(source: str) -> list[bytes]:
        dataset = HuggingFaceImageNetDataset.open(source, split=["train"], num_classes=classes, network=Network(5, 60))
        return [image.as_py() for number in range(len(dataset.blocks)) for image in dataset.read_block(number).images]

    with Hub(root, port=hub_port, fault=each_at_first((FLIP,), "/train-")):
        assert images_of(REPO_ID) == images_of(str(root / "datasets" / REPO_ID))


@pytest.mark.parametrize(
    ("call", "kinds"),
    [
        ("/revision/", (*SLOW, "html", "wait 9", "reset", 500)),
        ("auth-check", ("silence", "html", "wait 9", 503)),
        ("/tree/", (*SLOW, "html", "wait 9", "reset", 500)),
        ("paths-info", ("silence", "html", "wait 9", 503)),
        ("README.md", ("silence", "wait 9", "reset", 503)),
    ],
)
def test_odd_answers_of_the_api_are_asked_for_again(
    hub_root: Path, hub_port: int, tmp_path: Path, hasty: pytest.MonkeyPatch, call: str, kinds: tuple[int | str, ...]
) -> None:
    """One after the other: the first request fails in the first way, and so on."""
    left = list(kinds)

    def fault(method: str, path: str) -> int | str | None:
        return left.pop(0) if call in path and left else None

    hasty.setattr(network, "pause", lambda seconds, since, text: None)
    hasty.setattr(time, "sleep", lambda seconds: None)  # huggingface_hub's own waits
    hasty.setattr(network, "START_PATIENCE", 60.0)
    with Hub(hub_root, port=hub_port, fault=fault):
        listing = resolve(REPO_ID, "main", FileStore(tmp_path), Network(2.0, 60))
    assert (left, len(listing.told)) == ([], 32)


def test_a_hub_that_knows_no_ranges_serves_small_files_and_is_never_read_into_memory_for_a_large_one(
    hub_root: Path, hub_port: int, sound: list[dict[str, Any]], tmp_path: Path, hasty: pytest.MonkeyPatch
) -> None:
    with Hub(hub_root, port=hub_port, fault=always("whole", "/data/")):
        train(*HUB, *SMALL, "--run_dir", tmp_path / "run")
    assert ledger(tmp_path / "run") == sound
    hasty.setattr("stream.ranges.WHOLE_FILE", 1000)
    with Hub(hub_root, port=hub_port, fault=always("whole", "/data/train")):
        done = run(*HUB, *SMALL, *HASTY, "--cache_dir", tmp_path / "cache", "--run_dir", tmp_path / "other")
    assert_one_line(done, "the whole file came", "data/train-")


# ---- what stays odd ends in one line, in time ------------------------------------------------------------------------

NAMED = {
    "other range": ("bytes", "were asked for, and bytes"),
    "false range": ("bytes",),
    "other size": ("the server has a file of",),
    "no range": ("an unnamed range came",),
    "elsewhere": ("status 403 from 127.0.0.1",),
    "416": ("the server does not have bytes",),
    "wait 5000": ("asks to wait 500",),
}


@pytest.mark.parametrize("kind", [*LIES, *SLOW, "stall", "reset", "wait 5000"])
def test_a_hub_that_stays_odd_is_given_up_in_time(
    hub_root: Path, hub_port: int, tmp_path: Path, hasty: None, kind: str
) -> None:
    """For validation, because all the files of the training set would be asked for at once."""
    began, stall = time.monotonic(), 10 if kind in NAMED else STALL  # else this machine's silence may be named
    with Hub(hub_root, port=hub_port, fault=always(kind, "/data/validation")):
        done = run(*HUB, *SMALL, "--stall_timeout", stall, *HASTY[2:], "--run_dir", tmp_path / "run")
    if kind == "whole":  # small files are taken as they come
        assert done.status == 0, done.err
        return
    assert_one_line(done, "validation", *NAMED.get(kind, ()))
    assert time.monotonic() - began < 1.5 + 20


@pytest.mark.parametrize("kind", ["silence", "trickle", "trickled head", "html"])
@pytest.mark.parametrize("call", ["/revision/", "/tree/"])
def test_an_api_that_stays_odd_is_given_up_in_time(
    hub_root: Path, hub_port: int, tmp_path: Path, hasty: None, kind: str, call: str
) -> None:
    """Of a page of HTML, which does not keep anyone waiting, a busy machine's silence is not to be told instead."""
    began, stall = time.monotonic(), 10 if kind == "html" else STALL
    with Hub(hub_root, port=hub_port, fault=always(kind, call)):
        done = run(*HUB, *SMALL, "--stall_timeout", stall, *HASTY[2:], "--run_dir", tmp_path / "run")
    assert_one_line(done, REPO_ID, *(("log-in",) if kind == "html" else ()))
    assert time.monotonic() - began < 1.5 + 20


@pytest.mark.parametrize("kind", ["silence", "trickled head"])
def test_a_hub_that_is_silent_about_a_model_is_given_up_in_time(
    hub_root: Path, hub_port: int, tmp_path: Path, hasty: None, kind: str
) -> None:
    began = time.monotonic()
    with Hub(hub_root, port=hub_port, fault=always(kind, "/org/")):
        done = run("--use_pretrained", "org/tiny", *HASTY, "--run_dir", tmp_path / "run")
    assert_one_line(done, "org/tiny")
    assert time.monotonic() - began < 1.5 + 20


@pytest.mark.slow
@pytest.mark.parametrize("path", ["/revision/main", "/data/train-"])
@pytest.mark.parametrize("flags", [(), ("--no_streaming",)])
def test_a_run_that_waits_for_a_silent_hub_ends_at_once_when_it_is_interrupted(
    hub_root: Path, hub_port: int, tmp_path: Path, path: str, flags: tuple[str, ...]
) -> None:
    reached = threading.Event()

    def fault(method: str, asked: str) -> str | None:
        if path in asked:
            reached.set()
        return "silence" if path in asked else None

    with Hub(hub_root, port=hub_port, fault=fault):
        process = start(*HUB, *SMALL, *flags, "--run_dir", tmp_path / "run")
        assert reached.wait(60)
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        began = time.monotonic()
        done = wait(process)
    assert (done.status, time.monotonic() - began < 30) == (130, True), done.err
    assert "Traceback" not in done.err


@pytest.mark.slow
def test_nothing_is_silent_for_long_at_the_pace_of_users(hub_root: Path, hub_port: int, tmp_path: Path) -> None:
    """A real process, real waits: the API is silent for 12 s, a refusal says 16 s, then a block trickles for 13 s."""
    times: list[tuple[float, str]] = []
    told, asked = Counter[str](), list[float]()

    def fault(method: str, path: str) -> str | None:
        asked.append(time.monotonic())
        told[path] += 1
        if path.endswith("/revision/main"):
            return "silence" if told[path] == 1 else "wait 16" if told[path] == 2 else None
        return "trickle" if "/data/validation" in path and told[path] == 2 else None

    with Hub(hub_root, port=hub_port, fault=fault):
        process = start(*HUB, *SMALL, "--stall_timeout", 12, "--run_dir", tmp_path / "run")
        out, err = process.stdout, process.stderr
        assert out is not None
        assert err is not None

        def note(stream: Any) -> None:
            times.extend((time.monotonic(), line) for line in stream)

        threads = [threading.Thread(target=note, args=(stream,)) for stream in (out, err)]
        for thread in threads:
            thread.start()
        assert process.wait(180) == 0
        for thread in threads:
            thread.join()
    began = asked[0]
    moments = [began, *sorted(moment for moment, _ in times), time.monotonic()]
    waiting = [line for _, line in times if line.startswith("waiting")]
    timeline = "\n".join(f"{moment - began:6.1f} {line.strip()}" for moment, line in sorted(times))
    assert max(later - earlier for earlier, later in itertools.pairwise(moments)) < 15, timeline
    assert [line for line in waiting if "asks to wait" in line]
    assert [line for line in waiting if "bytes so far" in line]


# ---- locks that stay held --------------------------------------------------------------------------------------------

HOLDS = """
import sys, time
from filelock import FileLock
locks = [FileLock(path) for path in sys.argv[1:]]
for lock in locks: lock.acquire()
print("held", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("limit", [None, 1])
def test_a_peer_that_was_stopped_while_it_held_the_locks_costs_the_cache_and_not_the_run(
    hub_root: Path,
    hub_port: int,
    sound: list[dict[str, Any]],
    tmp_path: Path,
    hasty: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    limit: int | None,
) -> None:
    cache = tmp_path / "cache"
    own = cache / REPO_ID.replace("/", "--") / ".store"
    own.mkdir(parents=True)
    locks = [own / "room.lock"] if limit else [own / f"{number}.lock" for number in range(1024)]
    peer = subprocess.Popen([sys.executable, "-c", HOLDS, *map(str, locks)], env=environment(), stdout=subprocess.PIPE)
    assert peer.stdout is not None
    peer.stdout.readline()
    os.kill(peer.pid, signal.SIGSTOP)
    hasty.setattr("stream.cache.LOCK_PATIENCE", 0.3)
    hasty.setattr("stream.cache.LESS_PATIENCE", 0.01)
    try:
        with Hub(hub_root, port=hub_port):
            flags = ("--cache_dir", cache, *(("--cache_limit_gb", limit) if limit else ()))
            train(*HUB, *SMALL, *flags, "--run_dir", tmp_path / "run")
    finally:
        peer.kill()
        peer.wait()
    assert ledger(tmp_path / "run") == sound
    assert f"cannot keep files in {own.parent} (a lock in it stays held)" in caplog.text
    assert list(cache.rglob("*.arrow")) == []


def test_a_folder_that_does_not_lock_costs_the_cache_and_not_the_run(
    hub_root: Path,
    hub_port: int,
    sound: list[dict[str, Any]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    hasty: pytest.MonkeyPatch,
) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(38, "Function not implemented")

    hasty.setattr("fcntl.flock", flock)
    with Hub(hub_root, port=hub_port):
        done = train(*HUB, *SMALL, "--cache_dir", tmp_path / "cache", "--run_dir", tmp_path / "run")
    assert ledger(tmp_path / "run") == sound
    assert "Function not implemented" in caplog.text
    assert "local disk" in caplog.text
    assert f"{tmp_path / 'run'} cannot be locked" in done.err


# ---- mirrors ---------------------------------------------------------------------------------------------------------


def test_a_mirror_with_a_prefix_another_host_for_data_and_fewer_calls_is_a_hub(
    hub_root: Path, hub_port: int, sound: list[dict[str, Any]], tmp_path: Path
) -> None:
    with Hub(hub_root, port=hub_port, redirect=True, mirror=True, prefix="/mirror/hf") as hub:
        done = wait(start(*HUB, *SMALL, "--run_dir", tmp_path / "run", HF_ENDPOINT=hub.url))
    assert done.status == 0, done.err
    assert [row["ids"] for row in ledger(tmp_path / "run")] == [row["ids"] for row in sound]


# ---- messages --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "parts"),
    [
        ("SSL_CERT_FILE", "/no/such.pem", ("SSL_CERT_FILE", "/no/such.pem", "unset")),
        ("SSL_CERT_FILE", __file__, ("SSL_CERT_FILE", "unset")),
        ("HF_TOKEN", "\u201chf_abcdefgh\u201d", ("\u201c", "HF_TOKEN")),
        ("HF_TOKEN", '"hf_abcdefgh"', ('"', "HF_TOKEN")),
    ],
)
def test_what_is_wrong_with_the_environment_is_named(
    small_hub: Path,
    hub_port: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    value: str,
    parts: tuple[str, ...],
) -> None:
    monkeypatch.setenv(name, value)
    close_session()
    with Hub(small_hub, port=hub_port, token="hf_right"):
        done = run(*HUB, *SMALL, "--run_dir", tmp_path / "run")
    monkeypatch.delenv(name)
    close_session()
    assert_one_line(done, *parts)
    assert "abcdefgh" not in done.err


def test_a_commit_that_was_deleted_is_named_and_another_can_be_trained_on(
    small_hub: Path, hub_port: int, tmp_path: Path
) -> None:
    flags = ("--model", "resnet18", "--image_size", 33, "--batch_size", 4, "--streams", 2, "--epochs", 1)
    with Hub(small_hub, port=hub_port) as hub:
        train(*HUB, *flags, "--run_dir", tmp_path / "run")
        (repo,) = hub.repos.values()
        commit, repo.sha = repo.sha, "f" * 40
        home = Path(os.environ["HF_HOME"])
        for kept in home.rglob(f"*{commit}*/listing"):
            kept.unlink()
        done = run("--resume_from", tmp_path / "run", "--epochs", 1)
        assert_one_line(done, commit, "--override dataset_revision=main")
        more = ("--override", "dataset_revision=main", "--override", "epochs=2", "--verbose")
        done = run("--resume_from", tmp_path / "run", *more)
        assert done.status == 0, done.err
        assert "f" * 40 in done.out
    assert re.search(r"revision +f{40}", done.out)
