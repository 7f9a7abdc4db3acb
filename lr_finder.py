"""The learning rate finder: torch-lr-finder's range test, made to leave no trace and to answer only when it can.

Source: Smith 2017, Cyclical Learning Rates for Training Neural Networks; the sweep itself is torch-lr-finder's.
"""

import contextlib
import copy
import csv
import io
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch_lr_finder
from torch import nn
from torch.optim import Optimizer
from tqdm import tqdm

import distributed
from durable import read_small, write_durably
from errors import DivergedError, UsageError
from loader import StreamingDataLoader
from state import rng_state, set_rng_state

DEFAULT_METHOD = "minimum"
FEWEST_POINTS = 16
FIRST_POINTS = 8
LEAST_FALL = 0.02
SKIP_START = 10

TrainStep = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class RangeTest:
    """One sweep: learning rates, raw and smoothed losses of equal length, and each method's suggestion or None."""

    lr: list[float]
    loss: list[float]
    smoothed_loss: list[float]
    suggestions: dict[str, float | None]
    method: str
    stopped: str

    @property
    def suggested_lr(self) -> float:
        """The default method's learning rate. Raises DivergedError when the curve shows none."""
        lr = self.suggestions[self.method]
        if lr is None:
            raise DivergedError(
                f"the finder suggests no learning rate: {self.stopped}; give --lr, or mend the model or data"
            )
        return lr


class _NotFinite(Exception):
    """Ends a sweep whose loss is no longer a number."""


class LRFinder(torch_lr_finder.LRFinder):  # type: ignore[misc]
    """torch-lr-finder's `LRFinder`, with these differences.

    `train_step(images, labels) -> loss` is used for the steps when given, so that the sweep trains exactly as training
    will. The smoothed loss is bias-corrected, the raw one is kept in `history["raw_loss"]`, the first non-finite loss
    ends the sweep and stays out of the curve, and `reset` restores the scaler, the random number generators, the
    training mode and the gradients too.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        criterion: nn.Module,
        device: torch.device | str | None = None,
        *,
        train_step: TrainStep | None = None,
        grad_scaler: torch.amp.GradScaler | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, optimizer, criterion, device, grad_scaler=grad_scaler, **options)
        self.train_step = train_step
        self.stopped = ""
        self._was_training = {module: module.training for module in model.modules()}
        self._scaler_state = copy.deepcopy(grad_scaler.state_dict()) if grad_scaler else None
        self._rng = rng_state()

    def range_test(self, train_loader: Any, *arguments: Any, smooth_f: float = 0.05, **options: Any) -> None:
        """The sweep, as torch-lr-finder's `range_test`; also takes a `StreamingDataLoader`."""
        self._smooth_f = smooth_f or 1.0
        self._average = 0.0
        self._raw: list[float] = []
        streaming = isinstance(train_loader, StreamingDataLoader)
        batches = torch_lr_finder.TrainDataLoaderIter(train_loader) if streaming else train_loader
        self.stopped = "the sweep reached its last learning rate"
        try:
            torch_lr_finder.lr_finder.tqdm = partial(tqdm, disable=True if distributed.rank() else None)
            with contextlib.redirect_stdout(None):
                super().range_test(batches, *arguments, smooth_f=0, **options)
            planned = options.get("num_iter", 100)
            if len(self._raw) < planned:
                self.stopped = "the loss diverged"
        except _NotFinite:
            self.stopped = "the loss stopped being a finite number"
        finally:
            if streaming:
                batches._iterator.close()
        self.history["raw_loss"] = self._raw

    def _train_batch(self, train_iter: Iterator[Any], *arguments: Any, **options: Any) -> float:
        if self.train_step is None:
            loss = float(super()._train_batch(train_iter, *arguments, **options))
        else:
            self.model.train()
            loss = float(self.train_step(*next(train_iter)))
        if not math.isfinite(loss):
            raise _NotFinite
        self._raw.append(loss)
        self._average += self._smooth_f * (loss - self._average)
        return self._average / (1 - (1 - self._smooth_f) ** len(self._raw))

    def reset(self) -> None:
        """Put back everything as it was when this finder was made."""
        super().reset()
        for module, was_training in self._was_training.items():
            module.training = was_training
        self.optimizer.zero_grad(set_to_none=True)
        if self._scaler_state:
            self.grad_scaler.load_state_dict(self._scaler_state)
        set_rng_state(self._rng)


def find_lr_advanced(
    model: nn.Module,
    optimizer: Optimizer,
    criterion: nn.Module,
    loader: Any,
    *,
    train_step: TrainStep | None = None,
    grad_scaler: torch.amp.GradScaler | None = None,
    start_lr: float = 1e-5,
    end_lr: float = 10.0,
    num_iter: int = 100,
    step_mode: str = "exp",
    smooth_f: float = 0.05,
    diverge_th: float = 5.0,
    method: str = DEFAULT_METHOD,
) -> RangeTest:
    """Sweep the learning rate from `start_lr` to `end_lr` and return the curve with every method's suggestion.

    Model, optimiser, scaler and random number generators are as before afterwards, also after an exception.
    Raises UsageError for an unknown method or a sweep too short to tell anything.
    """
    if method not in METHODS:
        raise UsageError(f"unknown method {method}; choose from {', '.join(METHODS)}")
    if num_iter < FEWEST_POINTS:
        raise UsageError(f"--lr_iter {num_iter} is too short a sweep to read; use {FEWEST_POINTS} or more")
    finder = LRFinder(model, optimizer, criterion, train_step=train_step, grad_scaler=grad_scaler)
    try:
        finder.range_test(
            loader,
            start_lr=start_lr,
            end_lr=end_lr,
            num_iter=num_iter,
            step_mode=step_mode,
            smooth_f=smooth_f,
            diverge_th=diverge_th,
        )
    finally:
        finder.reset()
    history = finder.history
    problem = _why_unreadable(np.array(history["raw_loss"]), np.array(history["loss"]), smooth_f, finder.stopped)
    suggestions = {
        name: None if problem else suggest(np.array(history["lr"]), np.array(history["loss"]))
        for name, suggest in METHODS.items()
    }
    return RangeTest(
        history["lr"], history["raw_loss"], history["loss"], suggestions, method, problem or finder.stopped
    )


def find_lr(model: nn.Module, optimizer: Optimizer, criterion: nn.Module, loader: Any, **options: Any) -> float:
    """One learning rate for OneCycle's `max_lr`; options as `find_lr_advanced`. Raises DivergedError without one."""
    return find_lr_advanced(model, optimizer, criterion, loader, **options).suggested_lr


def _why_unreadable(loss: np.ndarray, smoothed: np.ndarray, smooth_f: float, stopped: str) -> str | None:
    """Why this curve shows no learning rate, if so: it is short, or its fall is small, or within three deviations of
    the noise, that of the first few losses' mean and of an exponential average (2 - f) / f losses wide together.
    """
    if len(loss) < FEWEST_POINTS:
        return f"{stopped} after {len(loss)} of the {FEWEST_POINTS} steps that a curve needs"
    first, lowest = loss[:FIRST_POINTS].mean(), smoothed[FIRST_POINTS:].min()
    falling = loss[: max(FIRST_POINTS, smoothed.argmin() + 1)]
    noise = np.diff(falling).std() / math.sqrt(2)
    width = min(len(falling), (2 - smooth_f) / smooth_f) if smooth_f else 1
    if first - lowest < max(LEAST_FALL * abs(first), 3 * noise * math.sqrt(1 / FIRST_POINTS + 1 / width)):
        return f"the loss never fell clearly: {first:.4g} at first, {lowest:.4g} at best, {noise:.2g} of noise"
    return None


def steepest(lr: np.ndarray, loss: np.ndarray) -> float:
    """Where the smoothed loss falls fastest against log10(lr), left of its minimum.

    The first points are left out as noise (after torch-lr-finder).
    """
    part = slice(SKIP_START, max(int(loss.argmin()), SKIP_START + 1) + 1)
    return float(lr[part][np.gradient(loss[part], np.log10(lr[part])).argmin()])


def minimum(lr: np.ndarray, loss: np.ndarray) -> float:
    """Half a decade below the learning rate with the lowest smoothed loss."""
    return float(lr[loss.argmin()]) / math.sqrt(10)


def valley(lr: np.ndarray, loss: np.ndarray) -> float:
    """Half way, in log lr, along the longest falling subsequence of the smoothed loss (after fastai's rule)."""
    length, previous = np.ones(len(loss), int), np.full(len(loss), -1)
    for i in range(1, len(loss)):
        above = np.flatnonzero(loss[:i] > loss[i])
        if len(above):
            previous[i] = above[length[above].argmax()]
            length[i] = length[previous[i]] + 1
    path = [int(length.argmax())]
    while previous[path[-1]] >= 0:
        path.append(int(previous[path[-1]]))
    return float(np.sqrt(lr[path[0]] * lr[path[-1]]))


METHODS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "steepest": steepest,
    "minimum": minimum,
    "valley": valley,
}


def save(result: RangeTest, folder: Path, config: dict[str, Any]) -> None:
    """Write lr_finder.json and lr_finder.csv."""
    folder.mkdir(parents=True, exist_ok=True)
    columns = {"lr": result.lr, "loss": result.loss, "smoothed_loss": result.smoothed_loss}
    table = io.StringIO(newline="")
    writer = csv.writer(table)
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    write_durably(folder / "lr_finder.csv", table.getvalue().encode())
    report = {
        "suggested_lr": result.suggestions[result.method],
        "method": result.method,
        "suggestions": result.suggestions,
        "stopped": result.stopped,
        "history": columns,
        "config": config,
    }
    write_durably(folder / "lr_finder.json", json.dumps(report, indent=2).encode())


def load_suggestion(path: Path) -> float:
    """The suggested learning rate of an lr_finder.json. Raises UsageError when the file holds none."""
    try:
        lr = json.loads(read_small(path))["suggested_lr"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise UsageError(f"--lr_from {path} is not an lr_finder.json ({error}); run run_lr_finder.py first") from error
    if not isinstance(lr, float) or not 0 < lr < math.inf:
        raise UsageError(f"--lr_from {path} holds no suggestion; give --lr, or run run_lr_finder.py again")
    return lr
