"""One odd answer in places of their own: images by path, bodies without end, absurd numbers, mirrors, downloads."""

import signal
import threading
import time
from pathlib import Path

import pytest
from fault_sweep import short_waits
from hub import FAULTS, FLIP, LIES, Hub
from huggingface_hub.errors import LocalEntryNotFoundError
from program import start, steps_kept, wait
from shards import REPO_ID
from test_misbehaving import always, each_at_first
from test_paths_only import IMAGES, LABELS, LAYOUTS, make_set
from test_paths_only import REPO_ID as PATHS

from errors import DataError
from stream import retry as network
from stream.allowance import Allowance
from stream.blocks import Pages
from stream.cache import FileStore
from stream.dataset import Cache, HuggingFaceImageNetDataset
from stream.explain import one_line_errors
from stream.hub import resolve
from stream.ranges import HubFiles
from stream.retry import Network, told_wait

ODD = (*LIES, *FAULTS[:2], FLIP, "says abc", 520, 521, 511, 421, 400, 401, 403, 404)
COMMIT = "0" * 40


@pytest.fixture(autouse=True)
def hasty() -> object:
    with short_waits() as patch:
        yield patch


def images_of(source: object, **options: object) -> tuple[list[bytes], list[int]]:
    dataset = HuggingFaceImageNetDataset.open(str(source), split=["train"], **{"network": Network(2, 20)} | options)  # type: ignore[arg-type]
    blocks = [dataset.read_block(number) for number in range(len(dataset.blocks))]
    images = [image.as_buffer().to_pybytes() for block in blocks for image in block.images]
    return images, [int(label) for block in blocks for label in block.labels]


# ---- images by their paths -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ODD)
def test_an_odd_answer_never_becomes_an_image(hub_port: int, tmp_path: Path, kind: str | int) -> None:
    make_set(tmp_path, *LAYOUTS["text"])
    cache = Cache(tmp_path / "cache")
    with Hub(tmp_path, port=hub_port, redirect=kind == FLIP, fault=each_at_first((kind,), "/photos/")):
        for _ in range(2):
            assert images_of(PATHS, cache=cache) == (IMAGES, LABELS)


@pytest.mark.parametrize(("status", "believed"), [(408, False), (429, False), (503, False), (404, True), (421, True)])
def test_refusals_in_a_row_are_believed_only_where_they_do_not_pass_by_themselves(
    hub_port: int, hub_root: Path, status: int, believed: bool
) -> None:
    asked: list[str] = []

    def fault(method: str, path: str) -> int | None:
        asked.append(path)
        return status if "train-00003" in path and len([p for p in asked if "train-00003" in p]) <= 12 else None

    with Hub(hub_root, port=hub_port, fault=fault):
        if believed:
            with pytest.raises(DataError, match=str(status)):
                images_of(REPO_ID)
        else:
            assert len(images_of(REPO_ID)[0]) == 600


def test_a_server_without_ranges_never_fills_the_memory_with_an_image(
    hub_port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_set(tmp_path, *LAYOUTS["text"])
    monkeypatch.setattr("stream.ranges.LARGEST_IMAGE", 2**20)
    with (
        Hub(tmp_path, port=hub_port, fault=always("endless 200", "/photos/05")) as hub,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(network, "_give_up", pytest.fail)
        images, _ = images_of(PATHS)
    assert hub.requests
    assert images[5] == b""
    assert images[:5] + images[6:] == IMAGES[:5] + IMAGES[6:]


# ---- bodies without end ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [200, 404, 503])
@pytest.mark.parametrize("part", ["/revision/", "/tree/", "/data/"])
def test_a_body_without_end_is_bounded_in_time_and_bytes(
    hub_root: Path, hub_port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str, status: int
) -> None:
    monkeypatch.setattr(network, "MOST_BYTES", 2**22)
    monkeypatch.setattr(network, "START_PATIENCE", 1.0)
    began = time.monotonic()
    with (
        Hub(hub_root, port=hub_port, fault=always(f"endless {status}", part)),
        pytest.raises(DataError),
    ):
        images_of(REPO_ID, network=Network(1.0, 2.0), cache=Cache(tmp_path))
    assert time.monotonic() - began < 2 + 20


# ---- what a server asks for ------------------------------------------------------------------------------------------


def test_a_wait_longer_than_patience_is_refused_by_all_who_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = Allowance()
    shared.note(429, {"Retry-After": "86400"})
    with pytest.raises(TimeoutError, match="asks to wait 86400 s"):
        shared.wait_for_turn(1800)
    shared.note(206, {})
    shared.wait_for_turn(1800)


def test_a_good_answer_holds_nobody_longer_than_a_window() -> None:
    shared = Allowance()
    shared.note(302, {"RateLimit": '"resolvers";r=0;t=86400', "RateLimit-Policy": '"w";"resolvers";q=5000;w=300'})
    assert shared._turn() - time.monotonic() <= 301
    assert told_wait(302, {"Retry-After": "20"}) == 0


@pytest.mark.parametrize(
    "headers",
    [
        {"Retry-After": "Fri, 31 Feb 99999 10:00:00 GMT"},
        {"Retry-After": "9" * 400},
        {"RateLimit": f'"resolvers";r=0;t={"9" * 400}'},
        {"RateLimit": f'"resolvers";r=0;t={"9" * 5000}'},
    ],
)
def test_numbers_that_make_no_sense_are_none(headers: dict[str, str]) -> None:
    assert told_wait(429, headers) == 0
    Allowance().note(429, headers)


@pytest.mark.parametrize("says", ["null", "sorry", '{"sha": null}', '"x"'])
@pytest.mark.parametrize("call", ["/revision/", "/tree/", "paths-info", "README.md"])
def test_an_answer_of_the_api_that_makes_no_sense_is_asked_for_again(
    hub_root: Path, hub_port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, says: str
) -> None:
    left = [f"says {says}"]

    def fault(method: str, path: str) -> str | None:
        return left.pop() if call in path and left else None

    with Hub(hub_root, port=hub_port, fault=fault):
        listing = resolve(REPO_ID, "main", FileStore(tmp_path), Network(5, 60))
    assert left == []
    assert {split: len(names) for split, names in listing.splits.items()} == {"train": 30, "validation": 1, "test": 1}


# ---- mirrors and downloads -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["other size", "html", "says abc", 520, 404])
def test_without_a_listing_the_first_thing_heard_is_not_believed(
    hub_root: Path, hub_port: int, tmp_path: Path, kind: str | int
) -> None:
    with Hub(hub_root, port=hub_port, mirror=True, fault=each_at_first((kind,), "/data/train")):
        found = images_of(REPO_ID)
    assert found == images_of(hub_root / "datasets" / REPO_ID)


@pytest.mark.parametrize("kind", [*ODD, "stall"])
def test_odd_answers_to_downloads_change_nothing(
    hub_root: Path, hub_port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str | int
) -> None:
    """Each file is asked about (HEAD), then asked for (GET); the first of either is odd."""
    seen: set[tuple[str, str]] = set()
    lock = threading.Lock()

    def fault(method: str, path: str) -> str | int | None:
        with lock:
            if "/data/validation" not in path or (method, path) in seen:
                return None
            seen.add((method, path))
            return kind

    with Hub(hub_root, port=hub_port, fault=fault):
        dataset = HuggingFaceImageNetDataset.open(
            REPO_ID, split=["validation"], streaming=False, network=Network(2, 20)
        )
        found = dataset.read_block(0)
    disk = HuggingFaceImageNetDataset.open(str(hub_root / "datasets" / REPO_ID), split=["validation"]).read_block(0)
    assert found.images.equals(disk.images)
    assert {method for method, _ in seen} == {"HEAD", "GET"}


# ---- attempts that were given up, and signals ------------------------------------------------------------------------


def test_an_attempt_that_was_given_up_takes_nothing_from_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes on, and finds its bytes wrong, while the next one is under way."""
    files = HubFiles(REPO_ID, COMMIT, ["a"], Network(0.3, 20))
    monkeypatch.setattr(files, "_heard", {0: 500})
    second, refused, calls = threading.Event(), threading.Event(), []

    def get(number: int, first: int, end: int, data: Pages) -> int:
        calls.append(first)
        if len(calls) == 1:
            second.wait(5)
            data.write(b"W" * (end - first))
        else:
            second.set()
            assert refused.wait(5)
            time.sleep(0.1)
            data.write(b"R" * (end - first))
        return 500

    def check(data: bytes | memoryview) -> None:
        if data[:1] == b"W":
            threading.Timer(0.05, refused.set).start()
            raise ValueError("wrong")

    monkeypatch.setattr(files, "_get", get)
    assert bytes(files.read(0, 0, 100, check)) == b"R" * 100


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_heard_while_training_itself_waits_for_a_silent_hub(
    hub_root: Path, hub_port: int, tmp_path: Path, number: int
) -> None:
    flags = ("--dataset", "imagenet1k", "--max_samples", 128, "--model", "resnet18", "--image_size", 33, "--epochs", 2)
    more = ("--batch_size", 64, "--block_mb", 1, "--num_workers", 0, "--run_dir", tmp_path / "run")
    silent = threading.Event()

    def fault(method: str, path: str) -> str | None:
        done = (tmp_path / "run" / "metrics.jsonl").exists() and "/data/" in path
        if done:
            silent.set()
        return "silence" if done else None

    with Hub(hub_root, port=hub_port, fault=fault):
        process = start(*flags, *more, "--log_steps", 1)
        assert silent.wait(90)
        time.sleep(2)
        process.send_signal(number)
        began = time.monotonic()
        done = wait(process)
    assert done.status == 128 + number, done.err
    assert time.monotonic() - began < 30  # --stall_timeout is 60
    assert steps_kept(tmp_path / "run")


def test_a_misspelt_run_without_a_network_is_told_as_no_folder() -> None:
    with pytest.raises(DataError, match="for runs/nix, which is no folder here") as told, one_line_errors("runs/nix"):
        raise LocalEntryNotFoundError("An error happened while trying to locate the files on the Hub.")
    assert "\n" not in str(told.value)
