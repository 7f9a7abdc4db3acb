"""A run says where its time went and what would help, and traces the steps that were asked for."""

import json
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from program import train
from purity import shrink
from slow import SlowTransform

import open_data
import preprocess
from config import Config, resolve
from preprocess import get_data_loaders
from stream.loader import Loader, StreamingDataLoader
from stream.local import LocalDataset
from training import journal, step
from training import timing as profiling
from training.console import INDENT
from training.timing import ROWS, WARMUP_STEPS, TimeSpent, describe_time

pytestmark = pytest.mark.usefixtures("small_model")

CPU = torch.device("cpu")
SMALL = ("--max_samples", 64, "--batch_size", 16, "--epochs", 2)
LONGEST = {"data": 0.02, "step": 0.9, "evaluation": 0.05, "snapshot": 0.02}


# ---- the trace -------------------------------------------------------------------------------------------------------


def trace_of(folder: Path) -> list[dict[str, Any]]:
    events = json.loads((folder / "profile" / "trace.json").read_text())["traceEvents"]
    return list(events)


def operator_rows(text: str) -> list[str]:
    """The rows of the table, between its second and its third rule."""
    lines = text.splitlines()
    rules = [number for number, line in enumerate(lines) if line.startswith("-----")]
    assert len(rules) == 3
    return lines[rules[1] + 1 : rules[2]]


@pytest.mark.parametrize("steps", [1, 2, 100])
def test_the_steps_asked_for_are_traced_or_as_many_as_there_are(steps: int, tmp_path: Path) -> None:
    done = train(*SMALL, "--profile", steps, "--run_dir", tmp_path / "run")
    names = [event.get("name") for event in trace_of(tmp_path / "run")]
    assert names.count("Optimizer.step#SGD.step") == min(steps, 8 - WARMUP_STEPS)
    assert "aten::convolution_backward" in names
    rows = operator_rows(done.out)
    assert 1 <= len(rows) <= ROWS == 10
    assert f"profile   {tmp_path / 'run' / 'profile' / 'trace.json'}" in done.out.splitlines()


def test_nothing_is_traced_unless_asked_for(tmp_path: Path) -> None:
    done = train(*SMALL, "--run_dir", tmp_path / "run")
    assert not (tmp_path / "run" / "profile").exists()
    assert "profile" not in done.out


# ---- the shares ------------------------------------------------------------------------------------------------------


def test_each_part_gets_its_seconds_and_the_rest_of_training_goes_to_data(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(profiling, "perf_counter", lambda: now)
    spent = TimeSpent(CPU)
    now += 50
    spent.begin()
    for seconds in (3, 2):
        now += 5
        with spent.step():
            now += seconds
    with spent.part("snapshot"):
        now += 1
    spent.collect()
    spent.end_training()
    with spent.part("evaluation"):
        now += 4
    now += 5
    expected = {"data": 0.4, "step": 0.2, "evaluation": 0.16, "snapshot": 0.04, "other": 0.2}
    assert spent.shares() == pytest.approx(expected)
    spent.begin()
    now += 1
    assert spent.shares() == {"data": 0.0, "step": 0.0, "evaluation": 0.0, "snapshot": 0.0, "other": 1.0}


def test_a_run_says_with_verbose_once_an_epoch_where_its_time_went(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def noting(shares: dict[str, float], *rest: Any) -> str:
        seen.append(shares)
        return describe_time(shares, *rest)

    monkeypatch.setattr(journal, "describe_time", noting)
    done = train(*SMALL, "--epochs", 3, "--snapshot_steps", 3, "--run_dir", tmp_path / "run", "--verbose")
    lines = [line for line in done.out.splitlines() if line.startswith("time ")]
    assert len(lines) == len(seen) == 3
    for line, shares in zip(lines, seen, strict=True):
        assert sum(shares.values()) == pytest.approx(1.0)
        assert all(share > 0 for name, share in shares.items() if name != "data")
        assert re.match(r"time      data \d+%, step \d+%, evaluation \d+%, snapshot \d+%, other \d+%; ", line)


# ---- the advice ------------------------------------------------------------------------------------------------------


def resident(**given: Any) -> tuple[Config, Loader]:
    config = resolve({"dataset": "digits", "batch_size": 16, "max_samples": 32} | given)
    return config, get_data_loaders(config, CPU).train


def streaming(monkeypatch: pytest.MonkeyPatch, **given: Any) -> tuple[Config, StreamingDataLoader]:
    """A loader of images from a folder, which took nothing yet."""
    part = LocalDataset(np.zeros((32, 8, 8, 3), np.uint8), [0, 1] * 16, ["a", "b"])
    monkeypatch.setattr(open_data, "open_image_folder", lambda *given, **options: (part, part))
    config = resolve({"dataset": "imagefolder", "data_dir": "x", "batch_size": 16, "num_workers": 2} | given)
    loader = get_data_loaders(config, CPU).train
    assert isinstance(loader, StreamingDataLoader)
    return config, loader


def flags_in(text: str) -> list[str]:
    return re.findall(r"--\w+", text)


WAITING = {"data": 0.5, "step": 0.3, "evaluation": 0.1, "snapshot": 0.1}


def test_a_resident_dataset_that_keeps_training_waiting_wants_a_larger_batch() -> None:
    text = describe_time(WAITING, *resident(), 10.0)
    assert text.startswith("data 50%, step 30%, evaluation 10%, snapshot 10%; ")
    assert flags_in(text) == ["--batch_size"]


@pytest.mark.parametrize(
    ("given", "read_seconds", "named"),
    [
        ({"num_workers": 0}, 0.0, ["--num_workers"]),
        ({"num_workers": 0}, 9.0, ["--num_workers"]),
        ({}, 10.5, ["--cache_dir"]),
        ({"cache_dir": "x"}, 10.5, []),
        ({}, 9.5, ["--num_workers", "--cache_dir", "--cache_format"]),
        ({"num_workers": 4}, 10.5, ["--num_workers", "--cache_dir", "--cache_format"]),
    ],
)
def test_what_kept_the_data_decides_which_flag_is_named(
    given: dict[str, Any], read_seconds: float, named: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, loader = streaming(monkeypatch, **given)
    loader.read_seconds = read_seconds
    assert flags_in(describe_time(WAITING, config, loader, 10.0)) == named


@pytest.mark.parametrize(
    ("given", "device", "shares", "named"),
    [
        ({}, "cpu", {}, []),
        ({}, "cuda", {}, ["--amp", "--compile"]),
        ({"amp": True}, "cuda", {}, ["--compile"]),
        ({"compile": True}, "cuda", {}, ["--amp"]),
        ({"amp": True, "compile": True}, "cuda", {}, []),
        ({"snapshot_steps": 5}, "cuda", {"snapshot": 0.2}, ["--snapshot_steps"]),
        ({"snapshot_steps": 5}, "cuda", {"snapshot": 0.05}, ["--amp", "--compile"]),
        ({}, "cuda", {"snapshot": 0.2}, ["--amp", "--compile"]),
        ({}, "cuda", {"step": 0.2, "evaluation": 0.7}, []),
        ({}, "cuda", {"step": 0.2, "other": 0.7}, []),
        ({"snapshot_steps": 5}, "cuda", {"snapshot": 0.2, "data": 0.3}, ["--batch_size"]),
    ],
)
def test_flags_are_named_only_where_they_would_help(
    given: dict[str, Any], device: str, shares: dict[str, float], named: list[str]
) -> None:
    config, loader = resident(**given)
    loader.device = torch.device(device)
    text = describe_time(LONGEST | shares, config, loader, 10.0)
    assert flags_in(text) == named
    assert ("evaluation takes longest" in text) == ("evaluation" in shares)
    assert ("pictures and logs take longest" in text) == ("other" in shares)


def test_compiling_is_not_named_where_it_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    config, loader = streaming(monkeypatch)
    loader.device = torch.device("cuda")
    assert flags_in(describe_time(LONGEST, config, loader, 10.0)) == ["--amp"]


# ---- runs that wait --------------------------------------------------------------------------------------------------


class SlowToRead(LocalDataset):
    """Images that a slow disk or network holds."""

    seconds = 0.0

    def take(self, ids: np.ndarray) -> LocalDataset:
        return self

    def read(self, sample_id: int) -> Any:
        time.sleep(self.seconds)
        return super().read(sample_id)


def times_of(folder: Path, read: float, transform: float, epochs: int) -> list[str]:
    """The time lines of a run whose training images take so many seconds each to read and to transform."""
    images = np.random.default_rng(0).integers(0, 256, (48, 32, 32, 3), np.uint8)
    slow, val = (kind(images, [0, 1] * 24, ["a", "b"]) for kind in (SlowToRead, LocalDataset))
    slow.seconds = read  # type: ignore[attr-defined]

    build_model = step.build_model
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "build_model", lambda *arguments: shrink(build_model(*arguments)))
        patch.setattr(open_data, "open_image_folder", lambda *given, **options: (slow, val))
        patch.setattr(preprocess, "train_transform", lambda config: SlowTransform(transform))
        data = ("--dataset", "imagefolder", "--data_dir", folder, "--image_size", 32)
        flags = (
            "--verbose",
            "--num_workers",
            2,
            "--model",
            "resnet18",
            "--batch_size",
            16,
            "--epochs",
            epochs,
            "--lr",
            0.01,
        )
        done = train(*data, *flags, "--run_dir", folder / "run")
    unfolded = done.out.replace(f"\n{INDENT}", " ")
    return [line for line in unfolded.splitlines() if line.startswith("time ")]


def largest(line: str) -> str:
    return max(re.findall(r"(\w+) (\d+)%", line), key=lambda part: int(part[1]))[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("read", "transform", "named"),
    [(0.2, 0.0, ["--cache_dir"]), (0.0, 0.2, ["--num_workers", "--cache_dir", "--cache_format"])],
)
def test_a_run_that_waits_is_told_what_for(read: float, transform: float, named: list[str], tmp_path: Path) -> None:
    """For 4.8 s an epoch, besides which the rest of it is little on a slow machine too."""
    line = times_of(tmp_path, read, transform, epochs=2)[-1]
    assert largest(line) == "data"
    assert flags_in(line) == named


def test_reading_in_earlier_epochs_is_not_held_against_a_later_one(monkeypatch: pytest.MonkeyPatch) -> None:
    now, read = [0.0], LocalDataset.read

    def slowly(self: LocalDataset, sample_id: int) -> Any:
        now[0] += 0.5
        return read(self, sample_id)

    monkeypatch.setattr("stream.loader.perf_counter", lambda: now[0])
    monkeypatch.setattr(LocalDataset, "read", slowly)
    _, loader = streaming(monkeypatch, num_workers=0, image_size=8)
    seconds = []
    for epoch in range(3):
        loader.set_epoch(epoch)
        for _ in loader:
            pass
        seconds.append(loader.read_seconds)
    assert seconds == [16.0, 16.0, 16.0]
