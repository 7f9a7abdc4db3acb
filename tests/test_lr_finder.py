"""The finder leaves no trace, never answers from a NaN or a flat curve, and reads a curve as its formulas say."""

import inspect
import json
import math
import random
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch_lr_finder
from matplotlib import pyplot
from matplotlib.figure import Figure
from slow import SlowTransform
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from config import FEWEST_LR_STEPS, resolve
from errors import DivergedError, UsageError
from lr_finder import (
    METHODS,
    SWEEP_STEPS,
    LRFinder,
    RangeTest,
    find_lr,
    find_lr_advanced,
    load_suggestion,
    save,
)
from stream.loader import StreamingDataLoader
from stream.local import LocalDataset
from training.lr_curve import Curve, lowest, minimum, slide, steepest, valley
from training.optim import build_optimizer, build_schedule, default_lr
from training.state import rng_state

DIGITS = resolve({})
Parts = tuple[nn.Module, torch.optim.Optimizer, nn.Module, Any]


def make(fresh: bool = False) -> Parts:
    """A small network with BatchNorm and dropout, its optimiser in mid-run or fresh, and a loader it can learn from."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 3))
    optimizer = build_optimizer(model, 0.03, 0.9, 1e-4)
    inputs = torch.randn(96, 8)
    loader: Any = DataLoader(TensorDataset(inputs, inputs[:, :3].argmax(1)), batch_size=16, shuffle=True)
    criterion = nn.CrossEntropyLoss()
    for x, y in () if fresh else loader:
        criterion(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer, criterion, loader


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """All bits that a later training step can depend on."""
    state = {f"model.{name}": tensor.clone() for name, tensor in model.state_dict().items()}
    state |= {f"rng.{name}": tensor.clone() for name, tensor in rng_state().items()}
    for number, group in enumerate(optimizer.param_groups):
        for name, value in group.items():
            if isinstance(value, int | float):
                state[f"group.{number}.{name}"] = torch.tensor(value, dtype=torch.float64)
        for place, parameter in enumerate(group["params"]):
            buffer = optimizer.state.get(parameter, {}).get("momentum_buffer")
            state[f"buffer.{number}.{place}"] = torch.empty(0) if buffer is None else buffer.clone()
            state[f"gradient.{number}.{place}"] = torch.tensor(parameter.grad is None)
    state["modes"] = torch.tensor([module.training for module in model.modules()])
    return state


def assert_no_trace(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> None:
    assert after.keys() == before.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


# ---- no trace --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end_lr", [10.0, 1e30])
@pytest.mark.parametrize("fresh", [True, False])
def test_a_sweep_leaves_no_trace_in_model_optimiser_or_random_numbers(end_lr: float, fresh: bool) -> None:
    model, optimizer, criterion, loader = make(fresh)
    before = everything(model, optimizer)
    result = find_lr_advanced(model, optimizer, criterion, loader, end_lr=end_lr, num_iter=40)
    assert len(result.lr) > 1
    assert_no_trace(before, everything(model, optimizer))


def test_an_exception_in_mid_sweep_leaves_no_trace_either() -> None:
    model, optimizer, criterion, loader = make()
    before = everything(model, optimizer)
    steps = 0

    def step(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        nonlocal steps
        steps += 1
        loss: torch.Tensor = criterion(model(images), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        random.random(), np.random.random(), torch.rand(1)
        if steps == 9:
            raise RuntimeError("out of memory")
        return loss.detach()

    with pytest.raises(RuntimeError, match="out of memory"):
        find_lr_advanced(model, optimizer, criterion, loader, train_step=step)
    assert steps == 9
    assert_no_trace(before, everything(model, optimizer))


def test_training_after_a_sweep_is_training_without_one() -> None:
    losses = []
    for sweep in (False, True):
        model, optimizer, criterion, loader = make()
        if sweep:
            find_lr_advanced(model, optimizer, criterion, loader, num_iter=30)
        trail = []
        for x, y in loader:
            optimizer.zero_grad()
            loss = criterion(model(x), y)
            loss.backward()
            optimizer.step()
            trail.append(loss.item())
        losses.append(trail)
    assert losses[0] == losses[1]


def test_a_frozen_part_of_the_model_stays_frozen() -> None:
    model, optimizer, criterion, loader = make()
    model[1].eval()  # type: ignore[index]
    before = everything(model, optimizer)
    find_lr_advanced(model, optimizer, criterion, loader, num_iter=20)
    assert_no_trace(before, everything(model, optimizer))


def test_the_scaler_is_put_back() -> None:
    model, optimizer, criterion, loader = make()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(()))
    before = dict(scaler.state_dict())

    def step(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        scaler.update(2.0)
        loss: torch.Tensor = criterion(model(images), labels)
        return loss.detach()

    find_lr_advanced(model, optimizer, criterion, loader, train_step=step, grad_scaler=scaler, num_iter=20)
    assert scaler.state_dict() == before


def stream(images: np.ndarray, labels: list[int], order: Callable[[int], np.ndarray], num_workers: int = 0) -> Any:
    """A loader of one stream of 4x4 images in batches of 8."""
    return StreamingDataLoader(
        LocalDataset(images, labels, [str(label) for label in sorted(set(labels))]),
        SlowTransform(0.0),
        lambda epoch: [order(epoch)],
        batch_size=8,
        image_size=4,
        train=True,
        seed=0,
        num_workers=num_workers,
        max_bad_fraction=0.0,
    )


def test_a_streaming_loader_is_read_on_into_its_next_epoch_and_closed() -> None:
    images = np.random.default_rng(0).integers(0, 256, (32, 4, 4, 3), np.uint8)
    streaming = stream(images, [0, 1] * 16, lambda epoch: np.arange(32), num_workers=2)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 2))
    optimizer = build_optimizer(model, 0.1, 0.9, 0.0)
    seen = []

    def step(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        seen.append(images)
        return images.float().mean()

    find_lr_advanced(model, optimizer, nn.CrossEntropyLoss(), streaming, train_step=step, num_iter=18)
    assert len(seen) == 18  # of 4 batches an epoch
    assert torch.equal(seen[0], seen[4])


# ---- the sweep -------------------------------------------------------------------------------------------------------


def sweep(losses: list[float], **options: Any) -> RangeTest:
    """A range test whose raw losses are given."""
    model, optimizer, criterion, loader = make()
    values = iter(losses)
    step = lambda images, labels: torch.tensor(next(values), dtype=torch.float64)
    optimizer.step()  # so that the rate's scheduler, which wants a step of the optimiser first, does not warn
    return find_lr_advanced(
        model, optimizer, criterion, loader, train_step=step, **({"num_iter": len(losses)} | options)
    )


def falling(count: int) -> list[float]:
    return np.linspace(3.0, 1.0, count).tolist()


@pytest.mark.parametrize("step_mode", ["exp", "linear"])
@pytest.mark.parametrize(("start_lr", "end_lr", "num_iter"), [(1e-5, 10.0, 60), (1e-3, 0.5, 17)])
def test_rates_and_losses_are_torch_lr_finders(step_mode: str, start_lr: float, end_lr: float, num_iter: int) -> None:
    given: dict[str, Any] = {
        "start_lr": start_lr,
        "end_lr": end_lr,
        "num_iter": num_iter,
        "step_mode": step_mode,
        "diverge_th": 1e9,
    }
    model, optimizer, criterion, loader = make()
    ours = find_lr_advanced(model, optimizer, criterion, loader, smooth_f=1.0, **given)
    model, optimizer, criterion, loader = make()
    theirs = torch_lr_finder.LRFinder(model, optimizer, criterion)
    theirs.range_test(loader, smooth_f=0, **given)
    assert ours.lr == theirs.history["lr"]
    assert ours.loss == theirs.history["loss"]
    spread = np.geomspace if step_mode == "exp" else np.linspace
    assert ours.lr == pytest.approx(spread(start_lr, end_lr, num_iter).tolist(), rel=1e-9)


def test_each_loss_belongs_to_the_rate_it_was_trained_with() -> None:
    model, optimizer, criterion, loader = make()
    seen = []

    def step(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        seen.append([group["lr"] for group in optimizer.param_groups])
        return torch.tensor(3.0 / len(seen))

    result = find_lr_advanced(model, optimizer, criterion, loader, train_step=step, num_iter=20)
    assert seen == [[lr, lr] for lr in result.lr]


def test_the_smoothed_loss_is_the_bias_corrected_average() -> None:
    raw = [4.0, 2.0, 3.0, 1.0, *falling(16)]
    result = sweep(raw, smooth_f=0.25)
    average, expected = 0.0, []
    for number, loss in enumerate(raw, 1):
        average = average + 0.25 * (loss - average)
        expected.append(average / (1 - 0.75**number))
    assert result.loss == raw
    assert result.smoothed_loss == expected
    assert expected[:2] == pytest.approx([4.0, (0.75 * 4.0 + 2.0) / 1.75], rel=1e-15)


@pytest.mark.parametrize("smooth_f", [0.0, 1.0])
def test_no_smoothing_leaves_the_losses_as_they_are(smooth_f: float) -> None:
    result = sweep(falling(20), smooth_f=smooth_f)
    assert result.smoothed_loss == pytest.approx(result.loss, rel=1e-15)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("after", [20, 0])
def test_a_loss_that_is_no_number_ends_the_sweep_and_stays_out_of_the_curve(bad: float, after: int) -> None:
    result = sweep([*falling(20), bad, *falling(20)[:after]])
    assert len(result.lr) == len(result.loss) == len(result.smoothed_loss) == 20
    assert result.stopped == "the loss stopped being a finite number"
    assert result.loss == falling(20)
    assert all(lr is not None and lr <= result.lr[-1] for lr in result.suggestions.values())


@pytest.mark.parametrize("at", [0, 1, FEWEST_LR_STEPS - 1])
def test_a_sweep_that_breaks_early_suggests_nothing(at: int) -> None:
    result = sweep([*falling(40)[:at], math.nan, *falling(40)])
    assert result.suggestions == dict.fromkeys(METHODS)
    with pytest.raises(DivergedError, match="finite number"):
        _ = result.suggested_lr


def test_a_model_full_of_nans_gets_no_learning_rate() -> None:
    model, optimizer, criterion, loader = make()
    with torch.no_grad():
        model[0].weight.fill_(math.nan)  # type: ignore[index, operator, union-attr]
    with pytest.raises(DivergedError):
        find_lr(model, optimizer, criterion, loader)


FLAT = {
    "flat": [2.0] * 40,
    "rising": np.linspace(1.0, 3.0, 40).tolist(),
    "noise": (2.0 + 0.01 * np.random.default_rng(0).standard_normal(40)).tolist(),
    "a fall of one percent": np.linspace(2.0, 1.98, 40).tolist(),
}


@pytest.mark.parametrize("curve", FLAT)
def test_a_curve_that_never_falls_suggests_nothing_and_says_so(curve: str) -> None:
    result = sweep(FLAT[curve])
    assert result.suggestions == dict.fromkeys(METHODS)
    assert len(result.lr) == 40
    with pytest.raises(DivergedError, match="never fell") as refusal:
        _ = result.suggested_lr
    assert "\n" not in str(refusal.value)


def test_a_diverging_loss_ends_the_sweep_and_is_told_apart_from_a_whole_one() -> None:
    raw = [*falling(30), *[100.0] * 30]
    result = sweep(raw, smooth_f=1.0, diverge_th=5.0)
    assert len(result.lr) == 31
    assert result.stopped == "the loss diverged"
    assert sweep(falling(30)).stopped == "the sweep reached its last learning rate"
    assert len(sweep(raw, smooth_f=1.0, diverge_th=1000.0).lr) == 60


@pytest.mark.parametrize("options", [{"method": "best"}, {"num_iter": FEWEST_LR_STEPS - 1}])
def test_a_sweep_that_could_tell_nothing_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        sweep(falling(40), **options)


@pytest.mark.parametrize("method", METHODS)
def test_find_lr_returns_the_suggestion_of_the_method_asked_for(method: str) -> None:
    model, optimizer, criterion, loader = make()
    lr = find_lr(model, optimizer, criterion, loader, method=method, num_iter=40)
    assert lr == find_lr_advanced(model, optimizer, criterion, loader, num_iter=40).suggestions[method]
    assert 1e-5 <= lr <= 10


def test_steps_beyond_a_sweep_repeat_it_from_the_same_weights_on_other_batches() -> None:
    model, optimizer, criterion, loader = make()
    weights, seen, rates = [], [], []

    def step(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        weights.append(float(sum(p.detach().sum() for p in model.parameters())))
        seen.append(float(images.sum()))
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.zero_grad()
        loss: torch.Tensor = criterion(model(images), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss.detach()

    result = find_lr_advanced(model, optimizer, criterion, loader, train_step=step, num_iter=150, diverge_th=1e9)
    assert (result.sweeps, len(result.lr), len(seen)) == (3, SWEEP_STEPS, 150)
    assert weights[0] == weights[50] == weights[100] != weights[1]
    assert rates[:50] == rates[50:100] == rates[100:] == result.lr
    assert seen[:50] != seen[50:100] != seen[100:]


def test_each_sweep_draws_other_random_numbers() -> None:
    loader = stream(np.zeros((32, 4, 4, 3), np.uint8), list(range(32)), lambda epoch: np.arange(32))
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 32))
    drawn: list[float] = []

    def step(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        drawn.append(torch.rand(()).item())
        return torch.tensor(3.0 - 0.001 * len(drawn))

    optimizer = build_optimizer(model, 0.1, 0.9, 0.0)
    optimizer.step()
    find_lr_advanced(model, optimizer, nn.CrossEntropyLoss(), loader, train_step=step, num_iter=150)
    assert len(set(drawn)) == 150


def sweeps(*curves: list[float]) -> RangeTest:
    """A range test of as many sweeps as there are curves, each SWEEP_STEPS long."""
    return sweep([loss for curve in curves for loss in curve], num_iter=SWEEP_STEPS * len(curves))


def v_shape(at: int) -> list[float]:
    """A fall to a minimum at that step, and a rise."""
    steps = np.arange(SWEEP_STEPS)
    loss: list[float] = (2 + 1 / (1 + np.exp((steps - at + 6) / 2)) + 0.2 * np.maximum(0, steps - at)).tolist()
    return loss


@pytest.mark.parametrize("first", ["whole", "broken"])
def test_the_curve_is_the_mean_of_the_sweeps_as_far_as_all_of_them_came(first: str) -> None:
    whole, broken = v_shape(30), [*v_shape(34)[:40], math.nan]
    result = sweeps(whole, broken) if first == "whole" else sweeps(broken, whole)
    assert result.loss == pytest.approx([(a + b) / 2 for a, b in zip(whole[:40], broken[:40], strict=True)])
    assert len(result.lr) == len(result.loss) == 40
    assert result.stopped == "the loss stopped being a finite number"


@pytest.mark.parametrize(
    ("minima", "level"), [((30, 30), "high"), ((30, 32), "high"), ((29, 32), "medium"), ((22, 38), "low")]
)
def test_halves_that_disagree_lower_the_confidence(minima: tuple[int, int], level: str) -> None:
    result = sweeps(*(v_shape(at) for at in minima))
    assert result.halves == [sweeps(v_shape(at)).suggestions["lowest"] for at in minima]
    assert result.confidence[0] == level
    assert result.confidence[1]


def test_one_sweep_is_never_more_than_low_confidence() -> None:
    result = sweeps(v_shape(30))
    assert (result.halves, result.confidence[0]) == ([], "low")
    assert "--lr_iter 100" in result.confidence[1]


def test_a_half_without_an_answer_is_low_confidence() -> None:
    result = sweeps(v_shape(40), [2.0 - 1e-4 * step for step in range(SWEEP_STEPS)])
    assert result.suggested_lr > 0
    assert None in result.halves
    assert result.confidence[0] == "low"


def test_methods_that_disagree_lower_the_confidence() -> None:
    fall_first = [3.0] * 10 + [2.0] + [2.0 - 0.001 * step for step in range(SWEEP_STEPS - 11)]
    result = sweeps(fall_first, fall_first)
    assert result.halves[0] == result.halves[1]
    assert result.confidence[0] == "low"


def test_the_rate_for_a_constant_schedule_is_the_share_that_the_default_has() -> None:
    onecycle, cosine = (default_lr(resolve({"scheduler": name}))[0] for name in ("onecycle", "cosine"))
    result = sweeps(v_shape(30))
    assert result.constant_lr / result.suggested_lr == pytest.approx(cosine / onecycle)


@pytest.mark.parametrize("attached", ["now", "in a snapshot"])
def test_an_optimiser_with_a_schedule_is_swept_and_given_back(attached: str) -> None:
    model, optimizer, criterion, loader = make()
    build_schedule(optimizer, resolve({"epochs": 2}), 0.3, 10, step=4)
    if attached == "in a snapshot":
        saved = optimizer.state_dict()
        model, optimizer, criterion, loader = make()
        optimizer.load_state_dict(saved)
    before = everything(model, optimizer)
    assert "group.0.initial_lr" in before
    result = find_lr_advanced(model, optimizer, criterion, loader, num_iter=20)
    assert result.lr[0] == pytest.approx(1e-5)
    assert_no_trace(before, everything(model, optimizer))


@pytest.mark.parametrize("smooth_f", [0.25, 0.0])
def test_a_validation_loader_judges_the_steps_in_its_place_and_is_walked_again_each_time(smooth_f: float) -> None:
    model, optimizer, criterion, loader = make()
    held_out = DataLoader(TensorDataset(*next(iter(loader))), batch_size=4)
    finder = LRFinder(model, optimizer, criterion)
    finder.range_test(loader, val_loader=held_out, end_lr=1.0, num_iter=18, smooth_f=smooth_f, diverge_th=1e9)
    judged = list(finder.history["raw_loss"])
    finder.reset()
    theirs = torch_lr_finder.LRFinder(model, optimizer, criterion)
    torch.set_rng_state(finder._rng["torch"])
    theirs.range_test(loader, val_loader=held_out, end_lr=1.0, num_iter=18, smooth_f=0, diverge_th=1e9)
    assert judged == theirs.history["loss"]
    assert (finder.history["loss"] == judged) == (smooth_f == 0.0)


def test_groups_are_swept_at_their_share_of_the_rate() -> None:
    model, optimizer, criterion, loader = make()
    optimizer.param_groups[1]["lr_scale"] = 10.0
    seen = []

    def step(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        seen.append([group["lr"] for group in optimizer.param_groups])
        return torch.tensor(3.0 / len(seen))

    result = find_lr_advanced(model, optimizer, criterion, loader, train_step=step, num_iter=20)
    assert seen == [[lr, pytest.approx(10 * lr)] for lr in result.lr]


def test_a_stream_shorter_than_the_sweep_goes_on_in_its_next_epoch_and_is_put_back() -> None:
    order = lambda epoch: np.random.default_rng(epoch).permutation(32)
    loader = stream(np.zeros((32, 4, 4, 3), np.uint8), list(range(32)), order)
    loader.set_epoch(2, 3)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 32))
    seen: list[int] = []

    def step(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        seen.extend(labels.tolist())
        return torch.tensor(3.0 - 0.001 * len(seen))

    optimizer = build_optimizer(model, 0.1, 0.9, 0.0)
    optimizer.step()
    find_lr_advanced(model, optimizer, nn.CrossEntropyLoss(), loader, train_step=step, num_iter=17)
    orders = [np.random.default_rng(epoch).permutation(32) for epoch in (2, 3, 4, 5, 6)]
    assert seen == np.concatenate([orders[0][24:], *orders[1:]])[: 17 * 8].tolist()
    assert (loader.epoch, loader.start) == (2, 3)


# ---- torch-lr-finder's interface -------------------------------------------------------------------------------------

Finder = type[torch_lr_finder.LRFinder]
SHORT: dict[str, Any] = {"start_lr": 1e-3, "end_lr": 0.5, "num_iter": 16, "smooth_f": 0.0, "diverge_th": 1e9}


class Named(torch_lr_finder.TrainDataLoaderIter):  # type: ignore[misc]
    """The batches of a set of dicts."""

    def inputs_labels_from_batch(self, batch_data: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return batch_data["x"], batch_data["y"]


class NamedJudge(torch_lr_finder.ValDataLoaderIter):  # type: ignore[misc]
    def inputs_labels_from_batch(self, batch_data: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return batch_data["x"], batch_data["y"]


class Unbounded(torch.utils.data.IterableDataset[tuple[torch.Tensor, int]]):
    """A set without a length."""

    def __iter__(self) -> Any:
        return iter([(torch.ones(8), 1)] * 4)


class Pair(nn.Module):
    """Takes a tuple of inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 3)

    def forward(self, inputs: Any) -> Any:
        return self.layer(inputs[0]) + inputs[1]["shift"]


class Told(torch.Tensor):
    """Inputs that tell how they are moved to the device."""

    moved: ClassVar[list[Any]] = []

    def to(self, *args: Any, **kwargs: Any) -> Any:
        self.moved.append(kwargs["non_blocking"])
        return super().to(*args, **kwargs)


def named() -> Any:
    inputs = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
    rows: Any = [{"x": row, "y": int(row[:3].argmax())} for row in inputs]
    return DataLoader(rows, batch_size=8)


def as_told(batch: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.stack([x for x, _ in batch]).as_subclass(Told), torch.stack([y for _, y in batch])


def curve(finder: Any) -> Any:
    """What a sweep leaves in a finder."""
    return finder.history["lr"], finder.history["loss"], finder.best_loss


def swept(kind: Finder, *arguments: Any, constructed: Any = None, loader: Any = None, **options: Any) -> Any:
    """A finder after a sweep."""
    model, optimizer, criterion, usual = make()
    finder = kind(model, optimizer, criterion, **(constructed or {}))
    assert finder.range_test(usual if loader is None else loader, *arguments, **SHORT | options) is None
    return finder


def swept_by_position(kind: Finder, folder: Path) -> Any:
    model, optimizer, criterion, loader = make()
    held_out = DataLoader(TensorDataset(*next(iter(loader))), batch_size=4)
    amp = "torch", {"device_type": "cpu", "dtype": torch.bfloat16}, torch.amp.GradScaler("cpu", init_scale=4.0)
    finder = kind(model, optimizer, criterion, "cpu", False, str(folder), *amp)
    given = finder.device, finder.memory_cache, finder.cache_dir, finder.amp_backend, finder.amp_config
    finder.range_test(loader, held_out, 1e-3, 0.5, 8, "linear", 0, 1e9, 2, False)
    return given, len(list(folder.iterdir())), finder.grad_scaler is amp[2], curve(finder)


def judged(kind: Finder, judge: Any) -> Any:
    return curve(swept(kind, judge))


def given_back(kind: Finder, **constructed: Any) -> Any:
    """Two sweeps with a reset after each: the same curve, and the weights and settings of before."""
    model, optimizer, criterion, loader = make(fresh=True)
    finder = kind(model, optimizer, criterion, **constructed)
    curves = []
    for _ in range(2):
        torch.manual_seed(1)
        finder.range_test(loader, **SHORT)
        curves.append(curve(finder))
        finder.reset()
    groups = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    return curves, groups, {name: tensor.tolist() for name, tensor in model.state_dict().items()}


def rates_of_groups(kind: Finder, start_lr: Any) -> Any:
    model, optimizer, criterion, loader = make()
    optimizer.param_groups[1]["lr"] = 0.2
    finder = kind(model, optimizer, criterion)
    finder.range_test(loader, **SHORT | {"start_lr": start_lr})
    return curve(finder), [group["lr"] for group in optimizer.param_groups]


def moved(kind: Finder, non_blocking: bool) -> Any:
    loader: Any = DataLoader(make()[-1].dataset, batch_size=16, collate_fn=as_told)
    Told.moved.clear()
    swept(kind, loader=loader, num_iter=3, non_blocking_transfer=non_blocking)
    return list(Told.moved)


def in_parts(kind: Finder) -> Any:
    model, rows = Pair(), [((torch.ones(8), {"shift": torch.ones(3)}), 1)] * 8
    finder = kind(model, torch.optim.SGD(model.parameters(), 0.1), nn.CrossEntropyLoss(), torch.device("cpu"))
    finder.range_test(DataLoader(rows, batch_size=4), num_iter=4)  # type: ignore[arg-type]
    return finder.history["lr"]


def interrupted(kind: Finder, error: type[BaseException]) -> Any:
    """What is left of a sweep that an exception ends in its fifth step."""
    model, optimizer, _, loader = make()
    steps: list[int] = []

    def loss(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        steps.append(1)
        if len(steps) == 5:
            raise error("in mid-sweep")
        return nn.functional.cross_entropy(outputs, labels)

    finder = kind(model, optimizer, loss)
    with pytest.raises(error, match="in mid-sweep"):
        finder.range_test(loader, **SHORT)
    return curve(finder)


def forgotten(kind: Finder, folder: Path) -> Any:
    finder = kind(*make()[:3], memory_cache=False, cache_dir=str(folder))
    for path in folder.iterdir():
        path.unlink()
    try:
        finder.reset()
    except RuntimeError as error:
        return str(error).startswith("Failed to load state in")


def plotted(kind: Finder, steps: int = 20, **options: Any) -> Any:
    finder = kind(*make()[:3])
    finder.history["lr"], finder.history["loss"] = list(range(steps)), [abs(step - 9.0) for step in range(steps)]
    figure = Figure()
    axes: Any = figure.add_subplot()
    returned = finder.plot(ax=axes, **options)
    kinds = [type(part) for part in returned] if isinstance(returned, tuple) else type(returned)
    lines = [np.asarray(line.get_data()).tolist() for line in axes.lines]
    points = [part.get_offsets().tolist() for part in axes.collections]
    rate = returned[1] if isinstance(returned, tuple) else None
    return kinds, rate, lines, points, axes.get_xscale(), axes.get_xlabel(), axes.get_ylabel()


def shown(kind: Finder) -> Any:
    """A plot without axes, which makes a figure and shows it."""
    finder = kind(*make()[:3])
    finder.history["lr"], finder.history["loss"] = [1e-3, 1e-2, 1e-1], [3.0, 2.0, 1.0]
    with pytest.MonkeyPatch.context() as patch:
        calls: list[str] = []
        patch.setattr(pyplot, "show", lambda: calls.append("show"))
        axes = finder.plot(0, 0, False, 0.1, None, False)
        pyplot.close(axes.figure)
    return calls, axes.get_xscale(), len(axes.lines)


def state_after(kind: Finder) -> Any:
    """The sweep's last model, mode and random numbers."""
    finder = swept(kind)
    weights = {name: tensor.tolist() for name, tensor in finder.model.state_dict().items()}
    return finder.model.training, weights, torch.rand(3).tolist()


def new(kind: Finder, **options: Any) -> Any:
    finder = kind(*make()[:3], **options)
    names = ("memory_cache", "cache_dir", "amp_backend", "amp_config", "grad_scaler", "device", "model_device")
    return finder.history, finder.best_loss, [getattr(finder, name) for name in names]


def held_out() -> Any:
    return DataLoader(TensorDataset(torch.ones(8, 8), torch.arange(8) % 3), batch_size=4)


SMOOTHED = {"num_iter": 4, "smooth_f": 0.05}
ACCUMULATED = {"accumulation_steps": 3, "num_iter": 5}
AMP = {"amp_backend": "torch", "amp_config": {"device_type": "cpu", "dtype": torch.bfloat16}}
PROBES: dict[str, Callable[[Finder, Path], Any]] = {
    "new": lambda kind, folder: new(kind),
    "new with options": lambda kind, folder: new(kind, device="cpu", memory_cache=False, cache_dir=str(folder)),
    "by position": swept_by_position,
    "exp": lambda kind, folder: curve(swept(kind)),
    "linear": lambda kind, folder: curve(swept(kind, step_mode="linear")),
    "EXP": lambda kind, folder: curve(swept(kind, step_mode="EXP")),
    "cosine": lambda kind, folder: swept(kind, step_mode="cosine"),
    "no step_mode": lambda kind, folder: swept(kind, step_mode=None),
    "smooth_f -0.1": lambda kind, folder: swept(kind, smooth_f=-0.1),
    "smooth_f 1": lambda kind, folder: swept(kind, smooth_f=1),
    "smooth_f 1.5": lambda kind, folder: swept(kind, smooth_f=1.5),
    "smooth_f None": lambda kind, folder: swept(kind, smooth_f=None),
    "smoothed rates": lambda kind, folder: swept(kind, **SMOOTHED).history["lr"],
    "num_iter 0": lambda kind, folder: swept(kind, num_iter=0),
    "num_iter 1": lambda kind, folder: swept(kind, num_iter=1, step_mode="linear"),
    "start_lr None": lambda kind, folder: rates_of_groups(kind, None),
    "start_lr 0": lambda kind, folder: rates_of_groups(kind, 0),
    "start_lr of groups": lambda kind, folder: rates_of_groups(kind, [1e-3, 1e-2]),
    "start_lr of too many": lambda kind, folder: rates_of_groups(kind, [1e-3, 1e-2, 1e-1]),
    "diverging": lambda kind, folder: curve(swept(kind, end_lr=1e4, diverge_th=1.5)),
    "accumulated": lambda kind, folder: curve(swept(kind, **ACCUMULATED)),
    "accumulated none": lambda kind, folder: swept(kind, accumulation_steps=0),
    "blocking": lambda kind, folder: moved(kind, False),
    "non-blocking": lambda kind, folder: moved(kind, True),
    "judged": lambda kind, folder: judged(kind, held_out()),
    "judged by an iterator": lambda kind, folder: judged(kind, torch_lr_finder.ValDataLoaderIter(held_out())),
    "judged by dicts": lambda kind, folder: judged(kind, NamedJudge(named())),
    "judged by nothing": lambda kind, folder: judged(kind, DataLoader([])),  # type: ignore[arg-type]
    "judged by a list": lambda kind, folder: judged(kind, [1]),
    "judged without length": lambda kind, folder: judged(kind, DataLoader(Unbounded())),
    "without length": lambda kind, folder: curve(swept(kind, loader=DataLoader(Unbounded(), batch_size=2))),
    "a list": lambda kind, folder: swept(kind, loader=[(torch.ones(2, 8), torch.ones(2))]),
    "dicts": lambda kind, folder: swept(kind, loader=named()),
    "dicts, named": lambda kind, folder: curve(swept(kind, loader=Named(named()))),
    "once": lambda kind, folder: swept(kind, loader=Named(named(), auto_reset=False)),
    "parts": lambda kind, folder: in_parts(kind),
    "given back": lambda kind, folder: given_back(kind),
    "given back from files": lambda kind, folder: given_back(kind, memory_cache=False, cache_dir=str(folder)),
    "no such folder": lambda kind, folder: new(kind, memory_cache=False, cache_dir=str(folder / "none")),
    "files gone": forgotten,
    "no weights": lambda kind, folder: kind(nn.ReLU(), make()[1], nn.MSELoss()),
    "amp": lambda kind, folder: curve(swept(kind, constructed=AMP | {"grad_scaler": torch.amp.GradScaler("cpu")})),
    "amp of nobody": lambda kind, folder: new(kind, amp_backend="tensorflow"),
    "amp without a scaler": lambda kind, folder: new(kind, **AMP),
    "amp without settings": lambda kind, folder: swept(
        kind, constructed={"amp_backend": "torch", "grad_scaler": torch.amp.GradScaler("cpu")}
    ),
    "an error": lambda kind, folder: interrupted(kind, RuntimeError),
    "an interrupt": lambda kind, folder: interrupted(kind, KeyboardInterrupt),
    "after": lambda kind, folder: state_after(kind),
    "plot": lambda kind, folder: plotted(kind),
    "plot of all": lambda kind, folder: plotted(kind, skip_start=0, skip_end=0, log_lr=False, show_lr=3.0),
    "plot without a suggestion": lambda kind, folder: plotted(kind, suggest_lr=False),
    "plot of nothing": lambda kind, folder: plotted(kind, steps=0, suggest_lr=False),
    "plot of too few": lambda kind, folder: plotted(kind, steps=9),
    "plot from -1": lambda kind, folder: plotted(kind, skip_start=-1),
    "plot to -1": lambda kind, folder: plotted(kind, skip_end=-1),
    "plot with a whole rate": lambda kind, folder: plotted(kind, show_lr=1),
    "plot that is shown": lambda kind, folder: shown(kind),
    "an unknown argument": lambda kind, folder: type(swept(kind, steps=3)),
}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of torch-lr-finder's __del__
@pytest.mark.parametrize("probe", PROBES)
def test_a_finder_does_what_torch_lr_finders_does(probe: str, tmp_path: Path) -> None:
    def outcome(kind: Finder, folder: Path) -> Any:
        folder.mkdir()
        try:
            result = PROBES[probe](kind, folder)
        except Exception as error:
            result = type(error), str(error).replace("_upstream", "range_test")
        return json.loads(json.dumps(result, default=str).replace(str(folder), "folder"))

    assert outcome(LRFinder, tmp_path / "ours") == outcome(torch_lr_finder.LRFinder, tmp_path / "theirs")


@pytest.mark.parametrize("method", ["__init__", "range_test", "plot", "reset"])
def test_a_finder_takes_torch_lr_finders_arguments_in_their_order_with_their_defaults(method: str) -> None:
    ours, theirs = (
        [
            (name, part.default)
            for name, part in inspect.signature(getattr(kind, method)).parameters.items()
            if part.kind != part.KEYWORD_ONLY
        ]
        for kind in (LRFinder, torch_lr_finder.LRFinder)
    )
    assert ours == theirs


def test_a_sweep_changes_nothing_of_the_process_so_that_losses_and_hooks_may_print(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def state() -> list[Any]:
        return [sys.stdout, sys.stderr, print, *vars(torch_lr_finder.lr_finder).items(), *vars(tqdm).items()]

    model, optimizer, _, loader = make()
    before, during = state(), []

    def loss(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        print("loss")
        during.append(state())
        return nn.functional.cross_entropy(outputs, labels)

    model.register_forward_hook(lambda *_: print("hook"))
    finder = LRFinder(model, optimizer, loss)  # type: ignore[arg-type]
    finder.range_test(loader, **SHORT)
    assert capsys.readouterr().out == "hook\nloss\n" * 16
    assert all(now == before for now in (*during, state()))


def test_an_empty_validation_loader_judges_nothing() -> None:
    finder = swept(LRFinder, DataLoader([]), smooth_f=0.5)  # type: ignore[arg-type]
    assert len(finder.history["raw_loss"]) == 16
    assert finder.history["loss"] != finder.history["raw_loss"]
    assert finder.stopped == "the sweep reached its last learning rate"


def test_a_schedule_is_no_reason_to_refuse_an_optimiser_as_torch_lr_finder_does() -> None:
    model, optimizer, criterion, loader = make()
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    with pytest.raises(RuntimeError, match="already has a scheduler"):
        torch_lr_finder.LRFinder(model, optimizer, criterion)
    finder = LRFinder(model, optimizer, criterion)
    finder.range_test(loader, **SHORT)
    assert len(finder.history["raw_loss"]) == 16


# ---- reading a curve -------------------------------------------------------------------------------------------------

LR = 10.0 ** np.arange(-4, 3)
NOISE = np.array([9.0, 8.0] * 5)  # steepest leaves the first ten points out
LR_AFTER_NOISE = np.concatenate([10.0 ** np.arange(-14, -4), LR])
V_SHAPE = np.array([4.0, 4.0, 3.0, 1.0, 2.0, 8.0, 9.0])


@pytest.mark.parametrize(
    ("method", "loss", "expected"),
    [
        (steepest, np.concatenate([NOISE, V_SHAPE]), 1e-1),  # slopes of 4, 4, 3, 1 by np.gradient: 0, -0.5, -1.5, -2
        (steepest, np.concatenate([NOISE, [5.0, 5.0, 1.0, 0.9, 0.8, 9.0, 9.0]]), 1e-2),  # slopes 0, -2, -2.05, -0.1
        (steepest, np.concatenate([NOISE, [5.0, 3.0, 2.0, 0.9, 9.0, 9.0, 1.0]]), 1e-4),  # the last is the steepest
        (minimum, V_SHAPE, 10**-2),
        (minimum, np.array([3.0, 2.0, 2.0, 1.5, 1.0, 0.5, 0.2]), 10**1),
        (lowest, V_SHAPE, 10**-1),
        (lowest, np.array([3.0, 2.0, 2.0, 1.5, 1.0, 0.5, 0.2]), 10**2),
        (slide, np.concatenate([np.linspace(9, 3, 20), np.full(20, 3.0)]), 10 ** (-4 + 0.1 * 24)),
        (valley, V_SHAPE, 10**-2.5),  # 4 at 1e-4, 3, 1 at 1e-1
        (valley, np.array([9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0]), 1e-1),
        (valley, np.array([1.0, 2.0, 3.0, 2.5, 2.0, 1.5, 9.0]), 10**-0.5),  # 3 at 1e-2 to 1.5 at 1e1
    ],
)
def test_each_method_reads_a_known_curve_as_its_formula_says(method: Any, loss: np.ndarray, expected: float) -> None:
    lr = {len(LR): LR, len(LR_AFTER_NOISE): LR_AFTER_NOISE}.get(len(loss), 10 ** (-4 + 0.1 * np.arange(len(loss))))
    assert method(Curve(lr, loss, loss)) == pytest.approx(expected, rel=1e-12)


def test_a_blow_up_at_the_end_does_not_move_the_lowest_loss() -> None:
    lr, loss = np.geomspace(1e-5, 10, 50), np.array([*v_shape(40)[:49], 0.0])
    loss[-1] = 3 * loss[:8].mean()
    expected = lowest(Curve(lr, loss, loss))
    loss[-1] = 1e30
    assert lowest(Curve(lr, loss, loss)) == expected


@pytest.mark.parametrize("method", METHODS)
def test_every_method_survives_the_shortest_curve_there_is(method: str) -> None:
    lr = np.logspace(-4, 0, FEWEST_LR_STEPS)
    for loss in (np.linspace(2, 1, FEWEST_LR_STEPS), np.linspace(1, 2, FEWEST_LR_STEPS), np.ones(FEWEST_LR_STEPS)):
        assert 0 < METHODS[method](Curve(lr, loss, loss)) <= 1


# ---- the report ------------------------------------------------------------------------------------------------------


def test_a_saved_suggestion_is_loaded_to_the_bit_and_the_report_has_its_names(tmp_path: Path) -> None:
    result = sweep(falling(20))
    save(result, tmp_path / "lr_finder", asdict(DIGITS))
    path = tmp_path / "lr_finder" / "lr_finder.json"
    assert load_suggestion(path, DIGITS) == result.suggested_lr
    report = json.loads(path.read_text())
    assert load_suggestion(path, replace(DIGITS, scheduler="cosine")) == result.constant_lr
    assert report.keys() >= {"suggested_lr", "method", "suggestions", "history", "config"}
    assert report.keys() >= {"constant_lr", "confidence", "halves"}
    assert report["history"] == {"lr": result.lr, "loss": result.loss, "smoothed_loss": result.smoothed_loss}
    assert (report["suggestions"], report["config"]["batch_size"]) == (result.suggestions, 64)
    lines = (tmp_path / "lr_finder" / "lr_finder.csv").read_text().splitlines()
    assert lines[0] == "lr,loss,smoothed_loss"
    assert [tuple(map(float, line.split(","))) for line in lines[1:]] == list(
        zip(result.lr, result.loss, result.smoothed_loss, strict=True)
    )


def test_a_sweep_without_a_suggestion_is_saved_with_nulls_and_loads_as_an_error(tmp_path: Path) -> None:
    save(sweep([2.0] * 20), tmp_path, {})
    report = json.loads((tmp_path / "lr_finder.json").read_text())
    assert report["suggested_lr"] is None
    assert report["suggestions"] == dict.fromkeys(METHODS)
    with pytest.raises(UsageError, match="holds no suggestion"):
        load_suggestion(tmp_path / "lr_finder.json", DIGITS)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"batch_size": 128}, "--batch_size 64, not 128"),
        ({"optimizer": "adamw"}, "--optimizer sgd, not adamw"),
        ({"model": "resnet34"}, "--model auto, not resnet34"),
        ({"dataset": "cifar10"}, "--dataset digits, not cifar10, --image_size 8, not 32, --batch_size 64, not 128"),
        ({"dataset": "imagefolder", "data_dir": "b", "image_size": 8, "batch_size": 64}, "--dataset digits"),
        ({"dataset": "hf", "dataset_name": "b"}, "--dataset digits, not hf, --dataset_name None, not b, --image_size"),
        ({"use_pretrained": True}, "--use_pretrained None, not True"),
    ],
)
def test_a_rate_found_for_something_else_is_refused(tmp_path: Path, changed: dict[str, Any], told: str) -> None:
    result = sweep(falling(20))
    save(result, tmp_path, asdict(DIGITS))
    with pytest.raises(UsageError) as refusal:
        load_suggestion(tmp_path / "lr_finder.json", resolve(changed))
    assert told in str(refusal.value)
    assert f"insist with --lr {result.suggested_lr:.3g}" in str(refusal.value)


def test_a_rate_found_in_another_folder_is_refused_and_what_an_older_report_lacks_is_no_reason(tmp_path: Path) -> None:
    one, other = (resolve({"dataset": "imagefolder", "data_dir": name}) for name in "ab")
    older = {name: value for name, value in asdict(one).items() if name != "optimizer"}
    save(sweep(falling(20)), tmp_path, older)
    assert load_suggestion(tmp_path / "lr_finder.json", replace(one, seed=3, weight_decay=0.1)) > 0
    with pytest.raises(UsageError, match="--data_dir a, not b"):
        load_suggestion(tmp_path / "lr_finder.json", other)


BAD_REPORTS = [
    *('{"suggested_lr": null}', '{"suggested_lr": NaN}', '{"suggested_lr": Infinity}', '{"suggested_lr": -0.1}'),
    *('{"suggested_lr": 0.0}', '{"suggested_lr": "0.1"}', '{"suggested_lr": true}', '{"lr": 0.1}', "[]", "0.1", "null"),
    *("", "not json", '{"suggested_lr": 0.1', "\x00\x01"),
]


@pytest.mark.parametrize("text", BAD_REPORTS)
def test_a_report_without_a_usable_rate_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "lr_finder.json"
    path.write_text(text)
    with pytest.raises(UsageError, match="--lr_from") as refusal:
        load_suggestion(path, DIGITS)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", ["nowhere.json", "."])
def test_a_report_that_cannot_be_read_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="--lr_from"):
        load_suggestion(tmp_path / name, DIGITS)


def test_a_report_in_no_encoding_is_refused(tmp_path: Path) -> None:
    (tmp_path / "lr_finder.json").write_bytes(b"\xff\xfe\x80")
    with pytest.raises(UsageError, match="--lr_from"):
        load_suggestion(tmp_path / "lr_finder.json", DIGITS)
