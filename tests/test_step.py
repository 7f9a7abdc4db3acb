"""A step never waits for its device."""

import os
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from program import train as run_main
from purity import shrink
from torch.utils._python_dispatch import TorchDispatchMode

import train
from config import resolve
from training import step
from training.step import build_training

CPU = torch.device("cpu")
SMALL = ("--max_samples", 64, "--batch_size", 16, "--epochs", 2, "--log_steps", 1000, "--model", "resnet18")
STEPS = 8

# ---- no waiting for the device ---------------------------------------------------------------------------------------

METHODS = ("item", "cpu", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "__format__", "__array__")
OPERATORS = ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal", "unique", "_unique", "_unique2")
MAY_WAIT = ("self.flush()", "pictures.samples(", "self.save()")
REAL_BUILD = step.build_model


class Guard(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While `on`, notes in `seen` what would make the host wait for a GPU, and where, but for `may_wait`'s calls."""

    def __init__(self, may_wait: tuple[str, ...]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.may_wait = may_wait
        self.on = False
        self.batches = 0
        self.seen: list[str] = []

    def note(self, what: str) -> None:
        if self.on and threading.current_thread() is threading.main_thread():  # another one writes snapshots
            lines = [f for f in traceback.extract_stack() if "torch" not in f.filename and f.filename != __file__]
            if not any(call in str(f.line) for f in lines for call in self.may_wait):
                self.seen.append(f"{what} at {lines[-1].filename}:{lines[-1].lineno}")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name == "index" and any(part is not None and part.dtype == torch.bool for part in args[1])
        if name in OPERATORS or by_mask:
            self.note(name)
        return func(*args, **(kwargs or {}))

    def noting(self, name: str) -> Callable[..., Any]:
        real = getattr(torch.Tensor, name)

        def call(*arguments: Any, **options: Any) -> Any:
            self.note(name)
            return real(*arguments, **options)

        return call


@contextmanager
def watched(may_wait: tuple[str, ...] = MAY_WAIT) -> Iterator[Guard]:
    """A guard over all that the training and evaluation loops do with a batch, on a small model."""
    guard, batches_until = Guard(may_wait), train.batches_until

    def watch(*arguments: Any, **options: Any) -> Iterator[Any]:
        for batch in batches_until(*arguments, **options):
            guard.on, guard.batches = True, guard.batches + 1
            yield batch
            guard.on = False

    with pytest.MonkeyPatch.context() as patch, guard:
        patch.setattr(step, "build_model", lambda *arguments: shrink(REAL_BUILD(*arguments)))
        patch.setattr(train, "batches_until", watch)
        for name in METHODS:
            patch.setattr(torch.Tensor, name, guard.noting(name))
        yield guard


FP16 = ("--amp", "--amp_dtype", "fp16")
CASES: dict[str, tuple[object, ...]] = {
    "fp32": (),
    "bf16": ("--amp", "--amp_dtype", "bf16"),
    "fp16": FP16,
    "clipped": ("--max_grad_norm", 1),
    "accumulated": ("--accumulate_steps", 2),
    "adamw": ("--optimizer", "adamw", "--lr", 1e-3),
    "all": (*FP16, "--max_grad_norm", 1, "--accumulate_steps", 2, "--optimizer", "adamw", "--lr", 1e-3),
    "cosine": ("--scheduler", "cosine", "--cutout", 2),
    "averaged": ("--ema_decay", 0.9, "--warmup_epochs", 1),  # copied, then averaged
}


@pytest.mark.parametrize("case", CASES)
def test_neither_a_step_nor_an_evaluation_pass_asks_the_device_for_a_number(case: str, tmp_path: Path) -> None:
    with watched() as guard:
        run_main(*SMALL, *CASES[case], "--run_dir", tmp_path / "run")
    evaluated = 2 * 4 * (2 if "--accumulate_steps" in CASES[case] else 1)  # in batches of what a pass trains on
    evaluated *= 2 if case == "averaged" else 1
    assert guard.batches == STEPS + evaluated
    assert guard.seen == []


WAITS: dict[str, Callable[[torch.Tensor], object]] = {
    "item": lambda loss: loss.item(),
    "__float__": float,
    "__bool__": lambda loss: loss > 0 or None,
    "cpu": lambda loss: loss.cpu(),
    "__format__": lambda loss: f"{loss}",
    "equal": lambda loss: torch.equal(loss, loss + 1),
    "nonzero": torch.nonzero,
    "index": lambda loss: loss[None][loss[None] > 0],
}


@pytest.mark.parametrize("name", WAITS)
def test_the_guard_notices_a_step_that_waits(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def waiting(*arguments: Any) -> step.StepNumbers:
        numbers = step.train_step(*arguments)
        WAITS[name](numbers.loss)
        return numbers

    monkeypatch.setattr(train, "train_step", waiting)
    with watched() as guard:
        run_main(*SMALL, "--epochs", 1, "--run_dir", tmp_path / "run")
    assert len(guard.seen) >= STEPS // 2


def test_the_guard_notices_that_fetching_the_numbers_waits(tmp_path: Path) -> None:
    with watched(may_wait=()) as guard:
        run_main(*SMALL, "--epochs", 1, "--run_dir", tmp_path / "run")
    assert any(what.startswith("tolist at") for what in guard.seen)


# ---- deterministic ---------------------------------------------------------------------------------------------------


def test_a_deterministic_run_asks_cublas_too_and_leaves_a_choice_of_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "CUBLAS_WORKSPACE_CONFIG"
    monkeypatch.setenv(name, ":16:8")
    for given, expected in ((None, ":4096:8"), (":16:8", ":16:8")):
        if given is None:
            monkeypatch.delenv(name)
        else:
            monkeypatch.setenv(name, given)
        try:
            build_training(resolve({"deterministic": True}), 10, CPU)
            assert os.environ[name] == expected
            assert torch.are_deterministic_algorithms_enabled()
        finally:
            torch.use_deterministic_algorithms(False)
