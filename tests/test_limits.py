"""What a machine does not give: open files, shared memory, room on disks, a compiler, numbers that are some."""

import json
import math
import os
import resource
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hub import Hub
from program import ROOT, environment, metrics, run, train
from torch._inductor.exc import InductorError

import evaluate
import predict
import train as loop
from errors import UsageError
from stream.decode_pool import allow_files
from training.predictor import Predictor
from training.step import StepNumbers, train_step

pytestmark = pytest.mark.usefixtures("small_model")

SMALL: tuple[object, ...] = ("--max_samples", 48, "--batch_size", 16, "--epochs", 2, "--num_workers", 0)
STREAM = ("--model", "resnet18", "--image_size", 33, "--epochs", 1, "--batch_size", 64, "--block_mb", 1)


def assert_one_line(done: Any, status: int, *parts: str) -> None:
    assert (done.status, done.err.count("\n")) == (status, 1), done.err
    assert [part for part in ("error: ", *parts) if part not in done.err] == [], done.err


# ---- open files and shared memory ------------------------------------------------------------------------------------


@pytest.fixture
def few_files() -> Iterator[int]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = len(os.listdir("/proc/self/fd")) + 20
    resource.setrlimit(resource.RLIMIT_NOFILE, (few, hard))
    yield few
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_the_soft_limit_of_open_files_is_raised_for_many_decoding_processes(few_files: int) -> None:
    allow_files(100)
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= few_files + 300


def test_a_hard_limit_of_open_files_is_told_with_the_workers_that_fit(
    monkeypatch: pytest.MonkeyPatch, image_set: Path, tmp_path: Path
) -> None:
    limit = len(os.listdir("/proc/self/fd")) + 90
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (limit, limit))
    monkeypatch.setattr(resource, "setrlimit", lambda kind, limits: None)
    with pytest.raises(UsageError, match=r"use --num_workers (\d+)") as refusal:
        allow_files(600)
    fitting = int(str(refusal.value).partition("--num_workers ")[2].split(",")[0])
    allow_files(fitting)
    with pytest.raises(UsageError):
        allow_files(fitting + 1)
    data = ("--dataset", "hf", "--dataset_name", image_set, *STREAM)
    done = run(*data, "--num_workers", 600, "--run_dir", tmp_path / "run")
    assert_one_line(done, 2, "600 decoding processes", "--num_workers")


def test_open_files_that_run_out_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr("training.logs._append", refuse)
    assert_one_line(run(*SMALL, "--run_dir", tmp_path / "run"), 2, "Too many open files", "ulimit -n")


@pytest.mark.slow
def test_shared_memory_of_64_megabytes_is_enough_and_files_may_be_few(image_set: Path, tmp_path: Path) -> None:
    """In a namespace of its own, whose /dev/shm is full but for less than a batch takes."""
    setup = "mount -t tmpfs -o size=64m none /dev/shm && dd if=/dev/zero of=/dev/shm/x bs=1M count=63 status=none"
    if subprocess.run(["unshare", "-Urm", "sh", "-c", setup], capture_output=True).returncode:
        pytest.skip("no namespace can be made here")
    flags = [
        "--dataset",
        "hf",
        "--dataset_name",
        image_set,
        *STREAM,
        "--max_samples",
        128,
        "--num_workers",
        40,
        "--run_dir",
        tmp_path / "run",
    ]
    line = f'{setup} && ulimit -Sn 64 && exec "$0" "$@"'
    command = ["unshare", "-Urm", "sh", "-c", line, sys.executable, ROOT / "main.py", *flags]
    done = subprocess.run([*map(str, command)], env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "done " in done.stdout


# ---- room on disks ---------------------------------------------------------------------------------------------------


def leave_free(patch: pytest.MonkeyPatch, free: int) -> None:
    patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 10**12 - free, free))  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("flags", "count"), [(("--keep_snapshots", 1), 2), (("--save_best",), 4), (("--scheduler", "trapezoid"), 3)]
)
def test_room_for_all_snapshots_is_asked_for_before_the_first_step(
    flags: tuple[object, ...], count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(*SMALL, "--run_dir", tmp_path / "size")
    size, spare = next((tmp_path / "size" / "snapshots").iterdir()).stat().st_size, 2 * 2**20
    with monkeypatch.context() as patch:
        leave_free(patch, int((count - 0.5) * size) + spare)
        refused = run(*SMALL, *flags, "--run_dir", tmp_path / "run")
    assert_one_line(refused, 5, "the snapshots of this run", "--run_dir")
    assert ("keep fewer" in refused.err) == ("--keep_snapshots" not in flags)  # than one is none
    assert not list((tmp_path / "run").rglob("*.safetensors"))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    leave_free(monkeypatch, count * size + spare)
    train(*SMALL, *flags, "--run_dir", tmp_path / "run")
    leave_free(monkeypatch, 2 * size + spare)  # on a resume what is there already needs no more room
    train("--resume_from", tmp_path / "run", "--override", "epochs=3")


def test_room_for_the_cache_is_asked_for_before_the_first_step(
    hub_root: Path, hub_port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = ("--dataset", "imagenet1k", *STREAM, "--num_workers", 0, "--run_dir", tmp_path / "run")
    monkeypatch.setattr("preflight.free_bytes", lambda folder: 1000 if "cache" in folder.parts else 10**9)
    with Hub(hub_root, port=hub_port):
        done = run(*data, "--cache_dir", tmp_path / "cache")
    assert_one_line(done, 2, f"--cache_dir {tmp_path / 'cache'} would grow by", "--cache_limit_gb 0.")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    monkeypatch.setattr("preflight.free_bytes", lambda folder: 10**9)
    with Hub(hub_root, port=hub_port):
        train(*data, "--cache_dir", tmp_path / "cache")


# ---- a compiler ------------------------------------------------------------------------------------------------------


def test_compile_without_a_compiler_or_headers_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    flags = (*SMALL, "--compile", "--run_dir", tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(sysconfig, "get_path", lambda *names: "/nowhere")
        assert_one_line(run(*flags), 2, "--compile", "/nowhere/Python.h", "override compile=false")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert_one_line(run(*flags), 2, "--compile", "g++", "apt install")
    assert not (tmp_path / "run").exists()


def test_a_compiler_that_fails_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise InductorError(RuntimeError("cc1plus: fatal error\nno such file"), None)

    monkeypatch.setattr("training.step.train_step", fail)
    assert_one_line(run(*SMALL, "--run_dir", tmp_path / "run"), 2, "--compile fails here")


# ---- numbers that are none -------------------------------------------------------------------------------------------


def strict(path: Path) -> list[Any]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{path} holds {constant}")

    texts = [path.read_text()] if path.suffix == ".json" else path.read_text().splitlines()
    return [json.loads(text, parse_constant=refuse) for text in texts]


def test_every_log_is_json_when_a_loss_is_no_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([math.nan, math.inf, 1.0, -math.inf, math.nan, 1.0])

    def odd(*arguments: Any) -> StepNumbers:
        numbers = train_step(*arguments)
        return numbers._replace(loss=numbers.loss * next(losses), grad_norm=torch.tensor(math.inf))

    monkeypatch.setattr(loop, "train_step", odd)
    folder = tmp_path / "run"
    train(*SMALL, "--ledger", "--log_steps", 1, "--max_grad_norm", 1, "--track", "tensorboard", "--run_dir", folder)
    assert [row["loss"] is None for row in metrics(folder)] == [True, True, False, True, True, False]
    assert len(strict(folder / "ledger.jsonl")) == 6
    for path in (*folder.rglob("*.json"), folder / "metrics.jsonl"):
        strict(path)


def test_a_model_that_answers_no_numbers_is_evaluated_in_json_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(*SMALL, "--run_dir", tmp_path / "run")
    monkeypatch.setattr(Predictor, "logits", lambda self, images: torch.full((len(images), 10), math.nan))
    done = run(tmp_path / "run", "--num_workers", 0, entry=evaluate.main)
    assert done.status == 0, done.err
    assert strict(next((tmp_path / "run").rglob("evaluation.json")))[0]["loss"] is None
    done = run(tmp_path / "run", ROOT / "docs" / "layout.png", "--num_workers", 0, "--json", entry=predict.main)
    (tmp_path / "told.json").write_text(done.out)
    assert strict(tmp_path / "told.json")[0][0]["top"][0]["probability"] is None
