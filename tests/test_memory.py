"""A batch that the memory of the device cannot hold is cut into passes; given passes end with what would fit."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from program import ROOT, Outcome, assert_same_run, cut, environment, metrics, run, train, wait

from config import resolve
from errors import UsageError
from training import step
from training.step import build_training, within_memory

OUT_OF_MEMORY = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried"),
)


def fails(error: BaseException) -> Callable[[], None]:
    def run() -> None:
        raise error

    return run


def told(monkeypatch: pytest.MonkeyPatch, error: RuntimeError, share: int, most: int, parts: int = 1) -> str:
    """What a run is told whose batch does not fit into memory in `parts` passes, where one of `most` images does."""
    monkeypatch.setattr(step, "_fits", lambda training, share, parts, size: share // parts <= most)
    training: Any = SimpleNamespace(accumulate_steps=parts, optimizer=SimpleNamespace(zero_grad=lambda **_: None))
    with pytest.raises(UsageError) as raised:
        within_memory(training, resolve({"batch_size": share, "streams": 2}), fails(error))
    return str(raised.value)


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
@pytest.mark.parametrize(
    ("share", "parts", "most", "advised"),
    [(24, 1, 12, 2), (24, 1, 11, 3), (24, 1, 5, 6), (24, 2, 23, 3), (24, 6, 3, 8), (24, 1, 2, 12), (26, 1, 12, 13)],
)
def test_the_fewest_passes_that_divide_the_batch_and_fit_are_named(
    error: RuntimeError, share: int, parts: int, most: int, advised: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = told(monkeypatch, error, share, most, parts)
    assert f"a pass of {share // parts} images does not fit" in text
    assert f"one of {share // advised} does; use --accumulate_steps {advised}, " in text
    assert f"keeps --batch_size {share}" in text


@pytest.mark.parametrize(("share", "parts", "most"), [(24, 1, 1), (24, 12, 24), (2, 1, 2), (26, 1, 1)])
def test_no_passes_are_named_when_none_would_fit(
    share: int, parts: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = told(monkeypatch, OUT_OF_MEMORY[0], share, most, parts)
    assert "not even a pass of two images" in text
    assert "--accumulate_steps" not in text


def test_what_is_no_lack_of_memory_comes_through_and_so_does_a_result() -> None:
    error, training, config = RuntimeError("mat1 and mat2 shapes cannot be multiplied"), SimpleNamespace(), resolve({})
    with pytest.raises(RuntimeError) as raised:
        within_memory(training, config, fails(error))  # type: ignore[arg-type]
    assert raised.value is error
    assert within_memory(training, config, lambda: 7) == 7  # type: ignore[arg-type]


@pytest.mark.usefixtures("small_model")
def test_only_a_lack_of_memory_makes_a_step_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    training = build_training(resolve({"batch_size": 16}), 10, torch.device("cpu"))
    assert step._fits(training, 4, 2, 8)
    for error in OUT_OF_MEMORY:
        monkeypatch.setattr(training, "normalize", lambda images, error=error: fails(error)())
        assert not step._fits(training, 4, 2, 8)
    monkeypatch.setattr(training, "normalize", lambda images: fails(RuntimeError("shapes"))())
    with pytest.raises(RuntimeError, match="shapes"):
        step._fits(training, 4, 2, 8)


MOST = 4  # images in a pass


@pytest.fixture
def limited(small_model: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models that are out of memory after the first statistics and random numbers of a larger pass."""
    build = step.build_model

    def check(layer: Any, inputs: Any) -> None:
        if len(inputs[0]) > MOST:
            torch.rand(7)
            raise OUT_OF_MEMORY[0]

    def built(*arguments: Any) -> Any:
        model: Any = build(*arguments)
        model.layer2.register_forward_pre_hook(check)
        return model

    monkeypatch.setattr(step, "build_model", built)


SMALL = ("--max_samples", 48, "--batch_size", 16, "--epochs", 2, "--ledger", "--keep_snapshots", 9, "--num_workers", 0)


@pytest.mark.usefixtures("limited")
@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--optimizer", "adamw", "--ema_decay", 0.9),
        *(
            pytest.param(flags, marks=pytest.mark.slow)
            for flags in (("--amp", "--amp_dtype", "fp16"), ("--mixup", 0.2), ("--lr", "auto"))
        ),
    ],
    ids=str,
)
def test_a_batch_that_does_not_fit_is_the_run_that_was_told_its_passes(
    flags: tuple[object, ...], tmp_path: Path
) -> None:
    done = train(*SMALL, *flags, "--run_dir", tmp_path / "found")
    assert [line for line in done.out.splitlines() if line.startswith("memory ")] == [
        "memory    a batch of 16 does not fit in one pass; it takes --accumulate_steps 4"
    ]
    train(*SMALL, *flags, "--accumulate_steps", 4, "--run_dir", tmp_path / "told")
    assert_same_run(tmp_path / "found", tmp_path / "told")
    assert json.loads((tmp_path / "found" / "config.json").read_text())["config"]["accumulate_steps"] == 4
    copy = cut(tmp_path / "found", 3, tmp_path / "cut")
    assert "memory " not in train("--resume_from", copy).out
    assert_same_run(copy, tmp_path / "told")


@pytest.mark.usefixtures("limited")
def test_passes_that_were_given_are_kept_and_what_would_fit_is_named(tmp_path: Path) -> None:
    done = run(*SMALL, "--accumulate_steps", 2, "--run_dir", tmp_path / "run")
    assert done.status == 2
    assert "use --accumulate_steps 4, which keeps --batch_size 16" in done.err


@pytest.mark.usefixtures("limited")
def test_all_ranks_take_the_passes_of_the_one_that_needs_most(monkeypatch: pytest.MonkeyPatch) -> None:
    config = resolve({"batch_size": 16})
    training = build_training(config, 10, torch.device("cpu"))
    monkeypatch.setattr("distributed.largest_over_ranks", lambda parts: max(parts, 8))
    assert step.passes_that_fit(training, config) == 8
    monkeypatch.setattr("distributed.largest_over_ranks", lambda parts: 16)
    with pytest.raises(UsageError, match="not even a pass of two images"):
        step.passes_that_fit(training, config)


LIMITED = """
import resource, sys
sys.path[:0] = ["tests"]
import torch, preflight, train, sklearn.datasets, main
from purity import shrink
from training import step
build, call = step.build_model, preflight.passes_that_fit
step.build_model = lambda *arguments: shrink(build(*arguments))

def limited(*arguments):
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 650 * 2**20,) * 2)
    return call(*arguments)

preflight.passes_that_fit = limited
sys.exit(main.main(sys.argv[1:]))
"""
HUGE = ("--max_samples", 256, "--batch_size", 128, "--image_size", 128, "--eval_size", 8, "--epochs", 1)


@pytest.mark.slow
def test_a_batch_too_large_for_the_memory_is_trained_on_in_passes(tmp_path: Path) -> None:
    def launch(*arguments: object) -> Outcome:
        command = [sys.executable, "-c", LIMITED, *map(str, (*HUGE, *arguments))]
        pipe = subprocess.PIPE
        return wait(subprocess.Popen(command, env=environment(), cwd=ROOT, stdout=pipe, stderr=pipe, text=True))

    done = launch("--run_dir", tmp_path / "run")
    assert done.status == 0, done.err
    assert re.search(
        r"^memory    a batch of 128 does not fit in one pass; it takes --accumulate_steps \d+$", done.out, re.M
    )
    assert [row["step"] for row in metrics(tmp_path / "run")] == [1, 2]
