"""A stream from the Hub: every byte fetched once, footers kept, and the same batches as from a disk."""

import re
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hub import Hub
from program import Outcome, ledger, metrics, results, run, snapshot_path, start, steps_kept, tensors, train, wait

pytestmark = pytest.mark.usefixtures("small_model")

TOKEN = "hf_right"
SMALL: tuple[object, ...] = (
    "--dataset",
    "imagenet1k",
    "--max_samples",
    256,
    "--model",
    "resnet18",
    "--batch_size",
    64,
    "--epochs",
    1,
)
SMALL = (*SMALL, "--image_size", 33, "--ledger", "--block_mb", 1)
BLOCKS_PICKED = {"train": 13, "validation": 1}
FILES = {"train": 30, "validation": 1}
STEPS = 4
LABELS = 1000  # bytes: more than the labels of a row group have, and fewer than its images
FOOTER = -1  # in place of the end of a range that reaches the end of the file


def ranges(hub: Hub, split: str, since: int = 0) -> list[tuple[str, int, int]]:
    """What was read of the files of a split: the file, the first byte, and one past the last."""
    found = []
    for request in hub.requests[since:]:
        span = re.fullmatch(r"bytes=(\d+)-(\d+)", request.range or "")
        if span and request.method == "GET" and f"/{split}-" in request.path and request.sent:
            file = request.path.rpartition("/")[2]
            found.append((file, int(span[1]), FOOTER if request.at_end else int(span[2]) + 1))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_commit_is_asked_for_once_for_both_splits_and_all_ranks(
    hub_root: Path, hub_port: int, tmp_path: Path, ranks: int
) -> None:
    """Or a push in between would have one rank, or validation, read other files."""
    with Hub(hub_root, port=hub_port) as hub:
        done = wait(start(*SMALL, "--run_dir", tmp_path / "run", ranks=ranks))
    assert done.status == 0, done.err
    assert len([request for request in hub.requests if request.path.endswith("/revision/main")]) == 1


def test_every_byte_of_the_picked_set_is_fetched_once(
    hub_root: Path, image_set: Path, hub_port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("stream.chunks.LARGEST_GAP", 10_000)  # bytes: less than the images between labels
    with Hub(hub_root, token=TOKEN, gated=True, port=hub_port) as hub:
        train(*SMALL, "--run_dir", tmp_path / "one")
        second = len(hub.requests)
        train(*SMALL, "--run_dir", tmp_path / "two")
        third = len(hub.requests)
        train(*SMALL, "--seed", 1, "--run_dir", tmp_path / "other")
    whole_files = [request for request in hub.requests if request.sent > 100_000 and not request.range]
    assert whole_files == []
    for split in ("train", "validation"):
        spans = ranges(hub, split)[: len(ranges(hub, split)) - len(ranges(hub, split, second))]
        blocks = [span for span in spans if span[2] != FOOTER and span[2] - span[1] > LABELS]
        labels = [span for span in spans if span[2] != FOOTER and span[2] - span[1] <= LABELS]
        assert len(labels) == len({*labels})  # a fair sample asks for them first
        footers = [span for span in spans if span[2] == FOOTER]
        assert len(blocks) == BLOCKS_PICKED[split]
        assert len({file for file, _, _ in footers}) == len(footers) == FILES[split]
        assert [(file, times) for file, times in Counter(file for file, _, _ in blocks).items() if times > 1] == []
        for file, first, end in blocks:
            metadata = pq.read_metadata(image_set / "data" / file)
            columns = [metadata.row_group(g).column(c) for g in range(metadata.num_row_groups) for c in (0, 2)]
            stored = sum(column.total_compressed_size for column in columns)
            assert stored <= end - first <= stored + 10_000
    for split in ("train", "validation"):
        again = ranges(hub, split, second)
        assert [span for span in again if span[2] == FOOTER] == []
        second_run = again[: len(again) - len(ranges(hub, split, third))]
        assert len([span for span in second_run if span[2] - span[1] > LABELS]) == BLOCKS_PICKED[split]
    assert ledger(tmp_path / "one") == ledger(tmp_path / "two")
    assert {row["ids"] for row in ledger(tmp_path / "one")}.isdisjoint(row["ids"] for row in ledger(tmp_path / "other"))


@pytest.mark.slow
def test_a_downloaded_set_trains_as_the_streamed_one(hub_root: Path, hub_port: int, tmp_path: Path) -> None:
    with Hub(hub_root, port=hub_port) as hub:
        train(*SMALL, "--run_dir", tmp_path / "streamed")
        before = len(hub.requests)
        train(*SMALL, "--no_streaming", "--run_dir", tmp_path / "downloaded")
        assert [request for request in hub.requests[before:] if request.range and "parquet" in request.path] == []
    assert ledger(tmp_path / "streamed") == ledger(tmp_path / "downloaded")
    assert results(tmp_path / "streamed") == results(tmp_path / "downloaded")


@pytest.mark.slow
def test_the_command_of_the_manual_trains_on_a_gated_set(
    hub_root: Path, hub_port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    folder = tmp_path / "run"
    with Hub(hub_root, token=TOKEN, gated=True, port=hub_port) as hub:
        train(*SMALL, "--scheduler", "onecycle", "--amp", "--run_dir", folder)
    assert [row["epoch"] for row in results(folder)] == ["1"]
    assert results(folder)[0]["step"] == str(STEPS)
    assert [row["step"] for row in metrics(folder)] == [1, 2, 3, 4]
    assert steps_kept(folder) == [STEPS]
    assert tensors(snapshot_path(folder, STEPS))["model.fc.weight"].shape == (10, 128)
    assert {request.status for request in hub.requests if request.range} == {206}


@pytest.mark.slow
@pytest.mark.parametrize("split", ["--train_split", "--val_split"])
def test_a_split_without_labels_is_refused_before_it_is_trained_with(
    hub_root: Path, hub_port: int, tmp_path: Path, split: str
) -> None:
    flags = (*SMALL, "--max_samples", 10, "--batch_size", 8, split, "test")
    with Hub(hub_root, port=hub_port):
        done = run(*flags, "--run_dir", tmp_path / "run")
    assert_refused_without_a_trace(done, tmp_path / "run")


def assert_refused_without_a_trace(done: Outcome, folder: Path) -> None:
    assert done.status == 3
    assert done.err.startswith("error: ")
    assert done.err.count("\n") == 1
    assert "-1" in done.err
    assert not folder.exists()
