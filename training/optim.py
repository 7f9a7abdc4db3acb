"""Parameter groups, optimisers and learning rate schedules, which count in optimiser steps."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

from choices import DATASETS, SCHEDULES, Moment, Schedule
from config import Config
from defaults import ADAPTIVE_LR, LINEAR_SCALING_BATCH, PEAK_MOMENTUM
from errors import UsageError
from registry import naming

PLAN = (
    *("epochs", "scheduler", "schedule_per", "warmup_epochs", "warmup_start", "warmup_overlaps", "min_lr", "cooldown"),
    *("step_size", "milestones", "gamma", "onecycle_pct_start", "onecycle_div_factor", "onecycle_final_div_factor"),
    *("onecycle_anneal_strategy", "onecycle_three_phase"),
)
NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)
PLAN_ROWS = 9
Factor = Callable[[Moment, Config], float]


def build_optimizer(
    model: nn.Module,
    lr: float,
    momentum: float,
    weight_decay: float,
    kind: str = "sgd",
    *,
    head_lr_scale: float = 1.0,
    nesterov: bool = True,
    norm_weight_decay: float = 0.0,
    bias_weight_decay: float = 0.0,
) -> Optimizer:
    """SGD; or AdamW, or timm's LAMB (You et al. 2020), with `momentum` as their first beta.

    Tensors of rank 1 have weight decays of their own: by default none (He et al. 2018, Bag of Tricks, section 3.1). The
    classifier, the last linear layer, learns at `head_lr_scale` times the rate of the rest; groups store that factor as
    `lr_scale`. Raises UsageError without timm.
    """
    norms = [module for module in model.modules() if isinstance(module, NORMS)]
    of_norms = {id(parameter) for norm in norms for parameter in norm.parameters()}
    heads = [module for module in model.modules() if isinstance(module, nn.Linear)]
    head = {id(parameter) for module in heads[-1:] for parameter in module.parameters()}
    named: dict[tuple[float, float], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        scale = head_lr_scale if id(parameter) in head else 1.0
        of_rank_1 = norm_weight_decay if id(parameter) in of_norms else bias_weight_decay
        named.setdefault((scale, weight_decay if parameter.ndim > 1 else of_rank_1), []).append((name, parameter))
    groups = [{"params": params, "lr_scale": scale, "weight_decay": decay} for (scale, decay), params in named.items()]
    if kind == "adamw":
        return AdamW(groups, lr=lr, betas=(momentum, 0.999), fused=True)
    if kind == "lamb":
        return _lamb(groups, lr, momentum)
    optimizer = SGD(groups, lr=lr, momentum=momentum, nesterov=nesterov and momentum > 0, fused=True)
    for parameter in model.parameters():  # otherwise a first step that is skipped leaves them uninitialised
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter, requires_grad=False)
    return optimizer


def _lamb(groups: list[dict[str, Any]], lr: float, momentum: float) -> Optimizer:
    try:
        from timm.optim import Lamb
    except ImportError as error:
        raise UsageError("--optimizer lamb is timm's; install timm: pip install timm") from error
    optimizer: Optimizer = Lamb(groups, lr=lr, betas=(momentum, 0.999))
    for group in optimizer.param_groups:  # it would be there after the first step only
        group["step"] = torch.zeros(())
    return optimizer


def restart(optimizer: Optimizer) -> None:
    """Forget the steps taken: the state is again what `build_optimizer` left."""
    for group in optimizer.param_groups:
        if "step" in group:
            group["step"] = torch.zeros(())
    if isinstance(optimizer, SGD):
        for state in optimizer.state.values():
            state["momentum_buffer"].zero_()
    else:
        optimizer.state.clear()


def momentum_of(group: Mapping[str, Any]) -> float:
    """The momentum of a parameter group; for Adam, its first beta."""
    return float(group["betas"][0] if "betas" in group else group["momentum"])


def default_lr(config: Config) -> tuple[float, str]:
    """The learning rate by scaling with the batch, and its derivation and source in words.

    SGD's is proportional to the batch (Goyal et al. 2017) and keeps rate / (1 - momentum); that of AdamW and LAMB grows
    with its square root (Krizhevsky 2014).
    """
    if config.optimizer in ADAPTIVE_LR:
        base, batch, source = ADAPTIVE_LR[config.optimizer]
        lr = base * math.sqrt(config.batch_size / batch)
        return lr, f"{lr:.4g} = {base:g} x sqrt({config.batch_size} / {batch}) ({source})"
    preset = DATASETS[config.dataset].preset
    base, source = preset.highest_constant_lr, preset.constant_lr_source
    if config.scheduler == "onecycle":
        base, source = preset.lr, preset.lr_source
        if config.onecycle_fixed_momentum and config.momentum < 1:
            base *= (1 - config.momentum) / (1 - PEAK_MOMENTUM)
            source += f", and {config.momentum:g} now"
    lr = base * config.batch_size / LINEAR_SCALING_BATCH
    return lr, f"{lr:.4g} = {base:.4g} x {config.batch_size} / {LINEAR_SCALING_BATCH} ({source})"


def build_schedule(optimizer: Optimizer, config: Config, lr: float, steps_per_epoch: int, step: int = 0) -> LRScheduler:
    """The schedule of the whole run, positioned at `step`, the number of optimiser steps already taken.

    `lr` is OneCycle's peak and the other schedules' starting rate. Each schedule is a function of the step alone, so
    none of it is saved: one built at step k equals, bit for bit, one that was stepped k times. PyTorch expects a
    schedule that starts later to find the groups initialised by one that started at 0, so it is then built twice.
    """
    total, schedule = config.epochs * steps_per_epoch, SCHEDULES[config.scheduler]
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]

    def build(last_epoch: int) -> LRScheduler:
        if schedule.build is not None:
            made: LRScheduler = schedule.build(optimizer, config, lr, total, last_epoch)
            return made
        factor = partial(_factor, config=config, lr=lr, steps_per_epoch=steps_per_epoch)
        return LambdaLR(optimizer, factor, last_epoch)

    whole = build(-1)
    return build(min(step, total - 1) - 1) if step else whole


def _factor(done: int, config: Config, lr: float, steps_per_epoch: int) -> float:
    """The factor of the learning rate `lr` after `done` steps, under the schedules that have one."""
    warmup, total = round(config.warmup_epochs * steps_per_epoch), config.epochs * steps_per_epoch
    unit = steps_per_epoch if config.schedule_per == "epoch" else 1
    done = done // unit * unit
    if done < warmup:
        start = config.warmup_start
        return (done + unit) / warmup if start is None else start + (1 - start) * done / warmup
    moment = Moment(done, total, 0 if config.warmup_overlaps else warmup, steps_per_epoch, config.min_lr / lr)
    schedule = SCHEDULES[config.scheduler]
    assert schedule.factor is not None
    with naming("--scheduler", config.scheduler):
        return _finite(schedule.factor(moment, config))


def _finite(factor: float) -> float:
    """The factor as a number. Raises ValueError for one that no rate may have."""
    if not 0 <= float(factor) < math.inf:
        raise ValueError(f"{factor} is no factor of a learning rate")
    return float(factor)


def _factor_schedule(name: str) -> Callable[[Factor], Factor]:
    """Defines a built-in schedule by its factor of the learning rate."""

    def define(function: Factor) -> Factor:
        SCHEDULES.define(name)(Schedule(function))
        return function

    return define


@_factor_schedule("cosine")
def _cosine(moment: Moment, config: Config) -> float:
    return moment.above_least(0.5 * (1 + math.cos(math.pi * moment.share)))


@_factor_schedule("linear")
def _linear(moment: Moment, config: Config) -> float:
    return moment.above_least(1 - moment.share)


@_factor_schedule("step")
def _step(moment: Moment, config: Config) -> float:
    ends = [int(epoch) * moment.steps_per_epoch for epoch in (config.milestones or "").split(",") if epoch]
    passed = sum(moment.step >= end for end in ends)
    return config.gamma ** (passed if ends else moment.step // (config.step_size * moment.steps_per_epoch))


@_factor_schedule("trapezoid")
def _trapezoid(moment: Moment, config: Config) -> float:
    begin = cooldown_start(config, moment.steps_per_epoch)
    return moment.above_least(1 - max(0.0, (moment.step - begin) / (moment.total - begin)))


def cooldown_start(config: Config, steps_per_epoch: int) -> int:
    """The step at which a trapezoid's rate starts to fall (Zhai et al. 2022; Haegele et al. 2024)."""
    total = config.epochs * steps_per_epoch
    return total - max(1, round(config.cooldown * total))


def _one_cycle(optimizer: Optimizer, config: Config, lr: float, total: int, last_epoch: int) -> OneCycleLR:
    """PyTorch's. A rising part of a single step, by whose length less one it would divide, is the peak, as is a run of
    a single step: the first of two.
    """
    pct_start = config.pct_start if total > 1 else 0.5
    if pct_start * max(2, total) == 1:
        pct_start *= 1 - 1e-12
    return OneCycleLR(
        optimizer,
        max_lr=[lr * group["lr_scale"] for group in optimizer.param_groups],
        total_steps=max(2, total),
        pct_start=pct_start,
        anneal_strategy=config.onecycle_anneal_strategy,  # type: ignore[arg-type]
        cycle_momentum=not config.onecycle_fixed_momentum,
        base_momentum=config.onecycle_base_momentum,
        max_momentum=config.onecycle_max_momentum,
        div_factor=config.onecycle_div_factor,
        final_div_factor=config.onecycle_final_div_factor,
        three_phase=config.onecycle_three_phase and total > 1,
        last_epoch=last_epoch,
    )


SCHEDULES.define("onecycle")(Schedule(build=_one_cycle))


def schedule_at(config: Config, lr: float, steps_per_epoch: int, step: int) -> tuple[float, float]:
    """Learning rate and momentum of the step after the first `step` ones."""
    optimizer = build_optimizer(nn.BatchNorm1d(1), lr, config.momentum, 0.0)
    build_schedule(optimizer, config, lr, steps_per_epoch, step)
    return optimizer.param_groups[0]["lr"], momentum_of(optimizer.param_groups[0])


def describe_schedule(config: Config, total: int) -> str:
    """One line: the schedule, its number of steps, and the momentum."""
    text = f"{config.scheduler}, {total:,} steps"
    if config.scheduler == "onecycle" and not config.onecycle_fixed_momentum:
        low, high = config.onecycle_base_momentum, config.onecycle_max_momentum
        return f"{text}; momentum cycles {high:g} -> {low:g} -> {high:g}, so --momentum is not used"
    return f"{text}; momentum {config.momentum:g}"


def compare_plans(
    saved: Mapping[str, Any], saved_lr: float, config: Config, lr: float, steps_per_epoch: int, step: int
) -> list[str]:
    """A table of the learning rate from `step` on, under the saved settings and under `config`; empty if they agree."""
    before = dataclasses.replace(config, **{name: saved[name] for name in PLAN if name in saved})
    if before == config and saved_lr == lr:
        return []

    def rate(plan: Config, peak: float, at: int) -> str:
        if at >= plan.epochs * steps_per_epoch:
            return "-"
        return f"{schedule_at(plan, peak, steps_per_epoch, at)[0]:.3g}"

    last = max(before.epochs, config.epochs) * steps_per_epoch - 1
    lines = ["replanned the learning rate:", f"  {'epoch':>7} {'before':>10} {'now':>10}"]
    for at in sorted({step + (last - step) * row // (PLAN_ROWS - 1) for row in range(PLAN_ROWS)}):
        lines.append(f"  {at / steps_per_epoch:7.2f} {rate(before, saved_lr, at):>10} {rate(config, lr, at):>10}")
    return lines


def build_scaler(device: torch.device, dtype: torch.dtype | None) -> torch.amp.GradScaler:
    """A gradient scaler, disabled unless the dtype is float16."""
    return torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
