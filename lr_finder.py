"""The learning rate finder: torch-lr-finder's range test, which restores everything and suggests only readable rates.

Source: Smith 2017, Cyclical Learning Rates for Training Neural Networks; the sweep itself is torch-lr-finder's.
"""

import copy
import csv
import io
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
import torch_lr_finder
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from tqdm import tqdm

import distributed
from config import FEWEST_LR_STEPS, Config
from errors import UsageError
from stream.files import read_small, strict_json, write_durably
from stream.loader import Batch, Loader
from training.lr_curve import METHODS, SWEEP_STEPS, RangeTest, read_sweeps
from training.state import rng_state, set_rng_state

DEFAULT_METHOD = "lowest"
DECIDES_LR = (
    *("dataset", "dataset_name", "dataset_config", "image_size", "augment"),
    *("model", "use_pretrained", "optimizer", "nesterov", "batch_size", "loss", "mixup", "cutmix", "auto_augment"),
)

TrainStep = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _bar(steps: range) -> "tqdm[int]":
    return tqdm(steps, disable=True if distributed.rank() else None, leave=False)


_upstream = torch_lr_finder.LRFinder.range_test
_own = {"tqdm": _bar, "print": lambda *text: None}
_range_test = FunctionType(_upstream.__code__, _upstream.__globals__ | _own)
"""torch-lr-finder's loop with a bar of our own, and without its lines on standard output; nothing of it is patched."""


class _NotFinite(Exception):
    """Ends a sweep whose loss is no longer finite."""


class LRFinder(torch_lr_finder.LRFinder):  # type: ignore[misc]
    """torch-lr-finder's `LRFinder`: its arguments, attributes, methods and errors, with these differences.

    When `train_step(images, labels) -> loss` is given, it performs the steps, so that the sweep trains exactly as
    training will. The smoothed loss is bias-corrected, and the raw loss is kept in `history["raw_loss"]`. The first
    non-finite loss ends the sweep and is left out of the curve. The optimiser may have a schedule attached. A sweep
    prints nothing; `stopped` tells how it ended. `reset` also restores the scaler, the random number generators and the
    training mode, and clears the gradients.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        criterion: nn.Module,
        device: torch.device | str | None = None,
        memory_cache: bool = True,
        cache_dir: str | None = None,
        amp_backend: str | None = None,
        amp_config: dict[str, Any] | None = None,
        grad_scaler: torch.amp.GradScaler | None = None,
        *,
        train_step: TrainStep | None = None,
    ) -> None:
        amp = amp_backend, amp_config, grad_scaler
        super().__init__(model, optimizer, criterion, device, memory_cache, cache_dir, *amp)
        self.train_step = train_step
        self.stopped = ""
        self._was_training = {module: module.training for module in model.modules()}
        self._scaler_state = copy.deepcopy(grad_scaler.state_dict()) if grad_scaler else None
        self._rng = rng_state()

    def range_test(
        self,
        train_loader: Any,
        val_loader: Any = None,
        start_lr: float | list[float] | None = None,
        end_lr: float = 10,
        num_iter: int = 100,
        step_mode: str = "exp",
        smooth_f: float = 0.05,
        diverge_th: float = 5,
        accumulation_steps: int = 1,
        non_blocking_transfer: bool = True,
    ) -> None:
        """One sweep, as torch-lr-finder's `range_test`; `train_loader` may also be one of our `Loader`s."""
        if smooth_f < 0 or smooth_f >= 1:
            raise ValueError("smooth_f is outside the range [0, 1[")
        self._smooth_f = smooth_f
        self._average = 0.0
        self._raw: list[float] = []
        self._validating = bool(val_loader)
        for group in self.optimizer.param_groups:
            group.pop("initial_lr", None)  # of a schedule; the sweep's schedule would start from it
        batches = endless(train_loader)
        self.stopped = "the sweep reached its last learning rate"
        rates = start_lr, end_lr, num_iter, step_mode
        try:
            _range_test(self, batches, val_loader, *rates, 0, diverge_th, accumulation_steps, non_blocking_transfer)
            if len(self._raw) < num_iter:
                self.stopped = "the loss diverged"
        except _NotFinite:
            self.stopped = "the loss stopped being a finite number"
        finally:
            self.history["raw_loss"] = self._raw
            if batches is not train_loader and isinstance(batches, _StreamIterator):
                batches.close()

    def _check_for_scheduler(self) -> None:
        """Accepts an optimiser with a schedule, which torch-lr-finder refuses."""

    def _train_batch(self, train_iter: Iterator[Any], *arguments: Any, **options: Any) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] *= group.get("lr_scale", 1.0)
        if self.train_step is None:
            loss = float(super()._train_batch(train_iter, *arguments, **options))
        else:
            self.model.train()
            loss = float(self.train_step(*next(train_iter)))
        return loss if self._validating and math.isfinite(loss) else self._note(loss)

    def _validate(self, *arguments: Any, **options: Any) -> float:
        return self._note(float(super()._validate(*arguments, **options)))

    def _note(self, loss: float) -> float:
        """Record a loss and return the smoothed loss. Raises _NotFinite."""
        if not math.isfinite(loss):
            raise _NotFinite
        self._raw.append(loss)
        if not self._smooth_f:
            return loss
        self._average += self._smooth_f * (loss - self._average)
        return self._average / (1 - (1 - self._smooth_f) ** len(self._raw))

    def reset(self) -> None:
        """Restore everything as it was when this finder was created."""
        super().reset()
        optimizer = copy.deepcopy(self.state_cacher.retrieve("optimizer"))  # which takes these very tensors for its own
        self.optimizer.load_state_dict(optimizer)
        for module, was_training in self._was_training.items():
            module.training = was_training
        self.optimizer.zero_grad(set_to_none=True)
        if self._scaler_state:
            self.grad_scaler.load_state_dict(self._scaler_state)
        set_rng_state(self._rng)


class _StreamIterator(torch_lr_finder.TrainDataLoaderIter):  # type: ignore[misc]
    """The batches of a `Loader`, epoch after epoch."""

    _iterator: Iterator[Batch]

    def __init__(self, loader: Loader) -> None:
        super().__init__(loader)
        self._stood_at = loader.epoch, loader.start

    def __next__(self) -> tuple[torch.Tensor, torch.Tensor]:
        batch = next(self._iterator, None)
        if batch is None:
            self.data_loader.set_epoch(self.data_loader.epoch + 1)
            self._iterator = iter(self.data_loader)
            batch = next(self._iterator)
        return batch.images, batch.labels

    def close(self) -> None:
        self._iterator.close()  # type: ignore[attr-defined]  # a generator
        self.data_loader.set_epoch(*self._stood_at)


def endless(loader: Any) -> Any:
    """The loader's batches without end, in the form that torch-lr-finder takes; other iterators are returned as is."""
    if isinstance(loader, Loader):
        return _StreamIterator(loader)
    return torch_lr_finder.TrainDataLoaderIter(loader) if isinstance(loader, DataLoader) else loader


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
    smooth_f: float = 0.2,
    diverge_th: float = 5.0,
    method: str = DEFAULT_METHOD,
) -> RangeTest:
    """Sweep the learning rate from `start_lr` to `end_lr`, and return the curve with every method's suggestion.

    The `num_iter` steps are split into sweeps of about SWEEP_STEPS each, all from the same weights but on different
    batches, and their losses are averaged. More steps therefore make the same curve clearer; a single longer sweep
    would give another curve, because the model learns meanwhile. `train_step(images, labels) -> loss` performs a step
    when given. Model, optimiser, scaler and random number generators are restored, also after an exception.
    Raises UsageError for an unknown method or too few steps for a readable curve.
    """
    if method not in METHODS:
        raise UsageError(f"unknown method {method}; choose from {', '.join(METHODS)}")
    if num_iter < FEWEST_LR_STEPS:
        raise UsageError(f"--lr_iter {num_iter} is too short a sweep to read; use {FEWEST_LR_STEPS} or more")
    count = max(1, num_iter // SWEEP_STEPS)
    finder = LRFinder(model, optimizer, criterion, train_step=train_step, grad_scaler=grad_scaler)
    options = {"start_lr": start_lr, "end_lr": end_lr, "num_iter": num_iter // count, "step_mode": step_mode}
    smooth_f = 0.0 if smooth_f == 1 else smooth_f  # either leaves the losses as they are
    sweeps, endings = _sweep(finder, loader, count, **options, smooth_f=smooth_f, diverge_th=diverge_th)
    return read_sweeps(sweeps, endings, smooth_f, method)


def _sweep(finder: LRFinder, loader: Any, count: int, **options: Any) -> tuple[list[dict[str, list[float]]], list[str]]:
    """The history of each of `count` sweeps from the same weights, and how it ended."""
    batches, sweeps, endings = endless(loader), [], []
    try:
        for number in range(count):
            if number:
                torch.manual_seed(number)  # each sweep drops out and shuffles otherwise
            finder.range_test(batches, **options)
            sweeps.append(finder.history)
            endings.append(finder.stopped)
            finder.reset()
    finally:
        finder.reset()
        if isinstance(batches, _StreamIterator):
            batches.close()
    return sweeps, endings


def find_lr(model: nn.Module, optimizer: Optimizer, criterion: nn.Module, loader: Any, **options: Any) -> float:
    """A rate for OneCycle's `max_lr`; options as in `find_lr_advanced`. Raises DivergedError if there is none."""
    return find_lr_advanced(model, optimizer, criterion, loader, **options).suggested_lr


def save(result: RangeTest, folder: Path, config: dict[str, Any]) -> None:
    """Write lr_finder.json and lr_finder.csv."""
    folder.mkdir(parents=True, exist_ok=True)
    columns = {"lr": result.lr, "loss": result.loss, "smoothed_loss": result.smoothed_loss}
    table = io.StringIO(newline="")
    writer = csv.writer(table)
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    write_durably(folder / "lr_finder.csv", table.getvalue().encode())
    found = result.suggestions[result.method] is not None
    report = {
        "suggested_lr": result.suggestions[result.method],
        "constant_lr": result.constant_lr if found else None,
        "confidence": result.confidence[0] if found else None,
        "method": result.method,
        "suggestions": result.suggestions,
        "stopped": result.stopped,
        "sweeps": result.sweeps,
        "halves": result.halves,
        "history": columns,
        "config": config,
    }
    write_durably(folder / "lr_finder.json", strict_json(report, indent=2).encode())


def load_suggestion(path: Path, config: Config) -> float:
    """The learning rate that an lr_finder.json suggests for this schedule.

    Raises UsageError when the file holds none, or one for another model, optimiser, batch size or dataset.
    """
    try:
        report = json.loads(read_small(path))
        lr = report["suggested_lr" if config.scheduler == "onecycle" else "constant_lr"]
        found_with = report["config"]
        names = DECIDES_LR if config.dataset != "imagefolder" else (*DECIDES_LR, "data_dir")
        differing = [name for name in names if found_with.get(name, getattr(config, name)) != getattr(config, name)]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(f"--lr_from {path} is not an lr_finder.json ({error}); run run_lr_finder.py first") from error
    if not isinstance(lr, float) or not 0 < lr < math.inf:
        raise UsageError(f"--lr_from {path} holds no suggestion; give --lr, or run run_lr_finder.py again")
    if differing:
        other = ", ".join(f"--{name} {found_with[name]}, not {getattr(config, name)}" for name in differing)
        raise UsageError(
            f"--lr_from {path} was found with {other}; run run_lr_finder.py again, or insist with --lr {lr:.3g}"
        )
    return lr
