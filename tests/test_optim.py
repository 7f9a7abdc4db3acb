"""The schedules are PyTorch's to the bit, at every step and however late they are built; norms are never decayed."""

import math
import sys
import warnings
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from timm.optim import Lamb
from timm.scheduler import CosineLRScheduler
from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, OneCycleLR, SequentialLR

from config import Config, resolve
from errors import UsageError
from model_resnet50 import build_model
from training.optim import build_optimizer, build_scaler, build_schedule, describe_schedule, momentum_of, schedule_at

PEAK = 0.37


def make_optimizer(momentum: float = 0.9) -> Optimizer:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    optimizer = build_optimizer(model, 0.1, momentum, 5e-4)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return optimizer


def rates(optimizer: Optimizer) -> list[tuple[float, float]]:
    return [(group["lr"], group["momentum"]) for group in optimizer.param_groups]


def walk(config: Config, steps_per_epoch: int, start: int = 0) -> Iterator[list[tuple[float, float]]]:
    """Rate and momentum of each group at every step from `start` to the last, moved as training moves them."""
    optimizer = make_optimizer(config.momentum)
    total = config.epochs * steps_per_epoch
    schedule = build_schedule(optimizer, config, PEAK, steps_per_epoch, start)
    for step in range(start, total):
        yield rates(optimizer)
        optimizer.step()
        if step + 1 < total:
            schedule.step()


def settings(**given: Any) -> Config:
    return resolve(given)


SCHEDULES: list[dict[str, Any]] = [
    {"epochs": 3},
    {"epochs": 4, "onecycle_anneal_strategy": "linear", "onecycle_pct_start": 0.5},
    {"epochs": 4, "onecycle_three_phase": True},
    {"epochs": 4, "onecycle_three_phase": True, "onecycle_anneal_strategy": "linear", "onecycle_div_factor": 10.0},
    {"epochs": 3, "onecycle_fixed_momentum": True, "onecycle_final_div_factor": 100.0, "momentum": 0.8},
    {"epochs": 5, "warmup_epochs": 1.0},
    {"epochs": 5, "warmup_epochs": 2.5, "onecycle_base_momentum": 0.7, "onecycle_max_momentum": 0.99},
]
OTHERS: list[dict[str, Any]] = [
    {"epochs": 3, "scheduler": "cosine"},
    {"epochs": 4, "scheduler": "cosine", "warmup_epochs": 1.5},
    {"epochs": 5, "scheduler": "step", "step_size": 2, "gamma": 0.3},
    {"epochs": 5, "scheduler": "step", "step_size": 1, "warmup_epochs": 2.0},
    {"epochs": 4, "scheduler": "step", "milestones": "1,3"},
    {"epochs": 4, "scheduler": "cosine", "schedule_per": "epoch", "warmup_epochs": 2, "warmup_start": 0.01},
    {"epochs": 4, "scheduler": "linear", "warmup_epochs": 1, "warmup_start": 1e-4, "min_lr": 0.01},
    {"epochs": 4, "scheduler": "trapezoid", "warmup_epochs": 1, "cooldown": 0.3},
]


def name(given: Any) -> str:
    return ",".join(f"{key}={value}" for key, value in given.items()) if isinstance(given, dict) else ""


@pytest.mark.parametrize("given", SCHEDULES, ids=name)
@pytest.mark.parametrize("steps_per_epoch", [7, 22])
def test_onecycle_rate_and_momentum_are_pytorchs_at_every_step(given: dict[str, Any], steps_per_epoch: int) -> None:
    config = settings(**given)
    total = config.epochs * steps_per_epoch
    theirs = SGD([nn.Parameter(torch.zeros(2))], lr=0.1, momentum=config.momentum)
    schedule = OneCycleLR(
        theirs,
        max_lr=PEAK,
        total_steps=total,
        pct_start=given["warmup_epochs"] / given["epochs"] if "warmup_epochs" in given else config.onecycle_pct_start,
        anneal_strategy=given.get("onecycle_anneal_strategy", "cos"),
        cycle_momentum="onecycle_fixed_momentum" not in given,
        base_momentum=given.get("onecycle_base_momentum", 0.85),
        max_momentum=given.get("onecycle_max_momentum", 0.95),
        div_factor=given.get("onecycle_div_factor", 25.0),
        final_div_factor=given.get("onecycle_final_div_factor", 1e4),
        three_phase="onecycle_three_phase" in given,
    )
    expected = []
    for step in range(total):
        expected.append(rates(theirs) * 2)
        theirs.step()
        if step + 1 < total:
            schedule.step()
    assert list(walk(config, steps_per_epoch)) == expected


@pytest.mark.parametrize("given", [*SCHEDULES, *OTHERS], ids=name)
def test_a_schedule_built_at_any_step_goes_on_with_the_same_bits(given: dict[str, Any]) -> None:
    config = settings(**given)
    whole = list(walk(config, 6))
    assert len({rate for groups in whole for rate, _ in groups}) > 2
    for start in range(len(whole)):
        assert list(walk(config, 6, start)) == whole[start:], f"built at step {start}"


@pytest.mark.parametrize("given", [*SCHEDULES, *OTHERS], ids=name)
def test_no_schedule_warns_of_its_use_or_is_stepped_past_its_end(given: dict[str, Any]) -> None:
    config = settings(**given)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for start in (0, 5):
            assert len(list(walk(config, 4, start))) == config.epochs * 4 - start
        build_schedule(make_optimizer(), config, PEAK, 4, config.epochs * 4)  # a run that is already done


def test_onecycle_starts_peaks_and_ends_where_its_factors_say() -> None:
    seen = [groups[0] for groups in walk(settings(epochs=5, onecycle_pct_start=0.25), 20)]
    assert seen[0] == pytest.approx((PEAK / 25, 0.95), rel=1e-12)
    assert seen[24] == (PEAK, 0.85)  # 0.25 * 100 - 1
    assert seen[99] == pytest.approx((PEAK / 25 / 1e4, 0.95), rel=1e-9)
    assert max(rate for rate, _ in seen) == PEAK


@pytest.mark.parametrize(
    ("given", "factors"),
    [
        ({"scheduler": "cosine", "epochs": 2}, [1, (2 + math.sqrt(2)) / 4, 0.5, (2 - math.sqrt(2)) / 4]),
        (
            {"scheduler": "cosine", "epochs": 3, "warmup_epochs": 1.0},
            [0.5, 1, 1, (2 + math.sqrt(2)) / 4, 0.5, (2 - math.sqrt(2)) / 4],
        ),
        ({"scheduler": "step", "epochs": 3, "step_size": 1, "gamma": 0.5}, [1, 1, 0.5, 0.5, 0.25, 0.25]),
        ({"scheduler": "step", "epochs": 3, "step_size": 2, "gamma": 0.1}, [1, 1, 1, 1, 0.1, 0.1]),
        (
            {"scheduler": "step", "epochs": 4, "step_size": 2, "warmup_epochs": 2.0, "gamma": 0.1},
            [0.25, 0.5, 0.75, 1, 0.1, 0.1, 0.1, 0.1],
        ),
        ({"scheduler": "step", "epochs": 2, "step_size": 30}, [1, 1, 1, 1]),
        ({"scheduler": "step", "epochs": 4, "milestones": "1,3", "gamma": 0.2}, [1, 1, 0.2, 0.2, 0.2, 0.2, 0.04, 0.04]),
        ({"scheduler": "linear", "epochs": 2}, [1, 0.75, 0.5, 0.25]),
        ({"scheduler": "trapezoid", "epochs": 4, "cooldown": 0.5}, [1, 1, 1, 1, 1, 0.75, 0.5, 0.25]),
        ({"scheduler": "trapezoid", "epochs": 2, "warmup_epochs": 1.0, "cooldown": 0.25}, [0.5, 1, 1, 1]),
        (
            {"scheduler": "trapezoid", "epochs": 3, "cooldown": 0.5, "min_lr": PEAK / 2},
            [1, 1, 1, 1, 1 - 0.5 / 3, 1 - 1 / 3],
        ),
        ({"scheduler": "cosine", "epochs": 2, "schedule_per": "epoch"}, [1, 1, 0.5, 0.5]),
        (
            {"scheduler": "cosine", "epochs": 2, "warmup_epochs": 1.0, "warmup_overlaps": True},
            [0.5, 1, 0.5, (2 - math.sqrt(2)) / 4],
        ),
    ],
    ids=name,
)
def test_cosine_step_and_warmup_give_the_published_factors(given: dict[str, Any], factors: list[float]) -> None:
    seen = [[rate / PEAK for rate, _ in groups] for groups in walk(settings(**given), 2)]
    assert [rates for rates in seen if rates[0] != rates[1]] == []
    assert [first for first, _ in seen] == pytest.approx(factors, rel=1e-12)


def factors_of(given: dict[str, Any], steps_per_epoch: int) -> list[float]:
    return [groups[0][0] / PEAK for groups in walk(settings(**given), steps_per_epoch)]


def test_the_warm_up_and_cosine_of_torchvisions_reference() -> None:
    theirs = SGD([nn.Parameter(torch.zeros(2))], lr=1.0)
    warmup = LinearLR(theirs, start_factor=0.01, total_iters=5)
    schedule = SequentialLR(theirs, [warmup, CosineAnnealingLR(theirs, T_max=15, eta_min=0.001)], milestones=[5])
    expected = []
    for _ in range(20):
        expected += [theirs.param_groups[0]["lr"]] * 3
        theirs.step()
        schedule.step()
    given = {"scheduler": "cosine", "schedule_per": "epoch", "epochs": 20, "warmup_epochs": 5, "warmup_start": 0.01}
    assert factors_of(given | {"min_lr": 0.001 * PEAK}, 3) == pytest.approx(expected, rel=1e-12)


def test_the_warm_up_and_cosine_of_timm() -> None:
    theirs = SGD([nn.Parameter(torch.zeros(2))], lr=1.0)
    schedule = CosineLRScheduler(theirs, t_initial=20, lr_min=1e-3, warmup_t=5, warmup_lr_init=0.02)
    expected = []
    for epoch in range(20):
        schedule.step(epoch)
        expected += [theirs.param_groups[0]["lr"]] * 3
    given = {"scheduler": "cosine", "schedule_per": "epoch", "epochs": 20, "warmup_epochs": 5, "warmup_start": 0.02}
    assert factors_of(given | {"min_lr": 1e-3 * PEAK, "warmup_overlaps": True}, 3) == pytest.approx(expected, rel=1e-12)


def test_the_triangle_of_ffcv() -> None:
    steps = 7
    ends = np.interp(np.arange(17), [0, 2, 16], [1e-4, 1, 0])
    expected = [
        rate for first, last in pairwise(ends) for rate in np.interp(np.arange(steps), [0, steps], [first, last])
    ]
    given = {"scheduler": "linear", "epochs": 16, "warmup_epochs": 2, "warmup_start": 1e-4}
    assert factors_of(given, steps) == pytest.approx(expected, rel=1e-9)


def test_the_warm_up_and_cosine_of_nvidias_examples() -> None:
    expected = [(epoch + 1) / 8 for epoch in range(8)]
    expected += [0.5 * (1 + math.cos(math.pi * epoch / 12)) for epoch in range(12)]
    given = {"scheduler": "cosine", "schedule_per": "epoch", "epochs": 20, "warmup_epochs": 8}
    assert factors_of(given, 2) == pytest.approx(np.repeat(expected, 2).tolist(), rel=1e-12)


def test_the_cosine_and_step_schedules_leave_the_momentum_alone() -> None:
    for scheduler in ("cosine", "step"):
        config = settings(scheduler=scheduler, epochs=2, momentum=0.77)
        assert {momentum for groups in walk(config, 5) for _, momentum in groups} == {0.77}


@pytest.mark.parametrize("three_phase", [False, True])
def test_onecycle_trains_in_any_number_of_steps_also_where_torch_would_divide_by_zero(three_phase: bool) -> None:
    for steps in range(1, 13):
        for pct_start in (0.0, 0.1, 0.125, 0.25, 1 / 3, 0.5, 1.0):
            config = settings(epochs=1, onecycle_pct_start=pct_start, onecycle_three_phase=three_phase)
            found = [groups[0][0] for groups in walk(config, steps)]
            assert len(found) == steps
            assert all(0 < rate <= 1.0000001 * PEAK for rate in found)
            if pct_start * steps == 1 and not three_phase:
                assert found[0] == pytest.approx(PEAK)
    ((only, *_),) = walk(settings(epochs=1), 1)
    assert only == pytest.approx((PEAK, 0.85))


def test_tensors_of_rank_one_are_never_decayed_and_all_others_are() -> None:
    model = build_model(10, 8)
    optimizer = build_optimizer(model, 0.1, 0.9, 5e-4)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {n: decay[id(p)] for n, p in model.named_parameters()} == {
        n: 5e-4 if p.ndim > 1 else 0.0 for n, p in model.named_parameters()
    }
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(decay)


def test_a_step_moves_decayed_weights_only_towards_zero() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    optimizer = build_optimizer(model, 0.5, 0.0, 0.01)
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    after = dict(model.named_parameters())
    torch.testing.assert_close(after["0.weight"], before["0.weight"] * (1 - 0.5 * 0.01))
    for key in before.keys() - {"0.weight"}:
        assert torch.equal(after[key], before[key]), key


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_momentum_is_nesterovs_where_there_is_any(momentum: float) -> None:
    optimizer = build_optimizer(nn.Linear(2, 2), 0.1, momentum, 0.0)
    assert {(group["momentum"], group["nesterov"]) for group in optimizer.param_groups} == {(momentum, momentum > 0)}


def test_norms_and_biases_have_weight_decays_of_their_own() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    optimizer = build_optimizer(model, 0.1, 0.9, 1e-2, norm_weight_decay=1e-3, bias_weight_decay=1e-4)
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    found = {name: decays[id(parameter)] for name, parameter in model.named_parameters()}
    assert found == {
        "0.weight": 1e-2,
        "0.bias": 1e-4,
        "1.weight": 1e-3,
        "1.bias": 1e-3,
        "3.weight": 1e-2,
        "3.bias": 1e-4,
    }


def test_plain_momentum_is_sgds_to_the_bit() -> None:
    ours, theirs = nn.Linear(3, 2), nn.Linear(3, 2)
    theirs.load_state_dict(ours.state_dict())
    optimizers = (
        build_optimizer(ours, 0.1, 0.9, 0.0, nesterov=False),
        SGD(theirs.parameters(), lr=0.1, momentum=0.9, fused=True),
    )
    for _ in range(3):
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            model(torch.ones(2, 3)).square().sum().backward()
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_lamb_is_timms_and_is_told_where_timm_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert type(build_optimizer(nn.Linear(2, 2), 0.1, 0.9, 0.02, "lamb")) is Lamb
    monkeypatch.setitem(sys.modules, "timm.optim", None)
    with pytest.raises(UsageError, match="install timm"):
        build_optimizer(nn.Linear(2, 2), 0.1, 0.9, 0.02, "lamb")


def test_the_gradient_scaler_works_for_float16_only() -> None:
    enabled = {dtype: build_scaler(torch.device("cpu"), dtype).is_enabled() for dtype in (torch.bfloat16, None)}
    assert enabled == {torch.bfloat16: False, None: False}
    assert build_scaler(torch.device("cpu"), torch.float16).is_enabled()


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({}, "onecycle, 1,234 steps; momentum cycles 0.95 -> 0.85 -> 0.95, so --momentum is not used"),
        ({"onecycle_fixed_momentum": True, "momentum": 0.8}, "onecycle, 1,234 steps; momentum 0.8"),
        ({"scheduler": "cosine"}, "cosine, 1,234 steps; momentum 0.9"),
    ],
)
def test_the_schedule_line_says_which_momentum_is_in_force(given: dict[str, Any], line: str) -> None:
    assert describe_schedule(settings(**given), 1234) == line


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("scheduler", ["onecycle", "cosine", "step"])
def test_the_head_keeps_its_share_of_the_rate_at_every_step(kind: str, scheduler: str) -> None:
    model = nn.Sequential()
    model.add_module("body", nn.Linear(3, 3))
    model.add_module("fc", nn.Linear(3, 2))
    optimizer = build_optimizer(model, 0.1, 0.9, 5e-4, kind, head_lr_scale=4.0)
    config = settings(epochs=3, scheduler=scheduler, step_size=1)
    schedule = build_schedule(optimizer, config, PEAK, 10)
    heads = {id(p) for p in model.fc.parameters()}  # type: ignore[union-attr]
    seen = []
    for _ in range(29):
        lrs = {group["lr"] for group in optimizer.param_groups if id(group["params"][0]) not in heads}
        head_lrs = {group["lr"] for group in optimizer.param_groups if id(group["params"][0]) in heads}
        assert len(lrs) == 1
        assert [lr / 4 for lr in head_lrs] == [pytest.approx(lrs.pop())]
        seen.append(momentum_of(optimizer.param_groups[0]))
        schedule.step()
    assert (min(seen), max(seen)) == ((pytest.approx(0.85, abs=1e-3), 0.95) if scheduler == "onecycle" else (0.9, 0.9))


def test_a_point_of_the_plan_is_what_training_has_there_and_draws_no_random_numbers() -> None:
    config = settings(epochs=3)
    state = torch.get_rng_state()
    planned = [schedule_at(config, PEAK, 10, step) for step in range(30)]
    assert torch.equal(torch.get_rng_state(), state)
    assert planned == [groups[0] for groups in walk(config, 10)]
