"""What the next step depends on: everything that a snapshot must hold, captured from a run and restored."""

import math
import random
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

import distributed
from config import Config
from errors import SnapshotError, UsageError
from stream.seeds import Use, seeded
from training.predictor import DTYPES
from training.snapshot import Snapshot

OPTIMIZER_STATE = {
    "SGD": ("momentum_buffer",),
    "AdamW": ("step", "exp_avg", "exp_avg_sq"),
    "Lamb": ("exp_avg", "exp_avg_sq"),
}


@dataclass
class Progress:
    """The progress of a run in completed epochs and optimiser steps, and the sums of the current epoch.

    `lr` is the learning rate that the schedule was built with, `last_lr` and `last_loss` are those of the last step.
    `bad_steps` counts the latest consecutive steps whose loss was not finite or that the scaler skipped. `best_top1` is
    that of best.safetensors and is forgotten with the file; `stale_epochs` counts the epochs since `highest_top1`.
    """

    epoch: int = 0
    step: int = 0
    lr: float = 0.0
    last_lr: float = 0.0
    last_loss: float = 0.0
    loss_sum: float = 0.0
    losses: int = 0
    correct: int = 0
    train_seconds: float = 0.0
    skipped_steps: int = 0
    bad_steps: int = 0
    best_top1: float = -1.0
    highest_top1: float = -1.0
    stale_epochs: int = 0

    def add(self, loss: float, correct: int, skipped: bool) -> None:
        """Count one step: its loss, its correct images on all ranks, and whether the scaler skipped it."""
        finite = math.isfinite(loss)
        self.skipped_steps += skipped
        self.bad_steps = 0 if finite and not skipped else self.bad_steps + 1
        self.last_loss = loss
        if finite:
            self.loss_sum += loss
            self.losses += 1
        self.correct += correct

    def end_epoch(self, top1: float) -> None:
        """Count the epoch, with this validation accuracy, as completed."""
        self.best_top1 = max(self.best_top1, top1)
        self.stale_epochs = 0 if top1 > self.highest_top1 else self.stale_epochs + 1
        self.highest_top1 = max(self.highest_top1, top1)
        self.epoch += 1
        self.loss_sum, self.losses, self.correct, self.train_seconds = 0.0, 0, 0, 0.0

    def why_over(self, config: Config) -> str:
        """Why nothing is left to do; empty while there is."""
        if self.epoch >= config.epochs:
            longer = "--extend_epochs N" if config.scheduler == "trapezoid" else "--override epochs=N"
            done = "the epoch is" if config.epochs == 1 else f"all {config.epochs} epochs are"
            return f"{done} done; {longer} trains longer"
        if 0 < config.early_stop <= self.stale_epochs:
            better = f"no better {'ema' if config.ema_decay else 'val'}_top1 than {self.highest_top1:.2%}"
            return f"{better} in {self.stale_epochs} epochs; a larger --early_stop goes on, --early_stop 0 to the end"
        return ""


def capture(
    model: nn.Module,
    optimizer: Optimizer,
    scaler: torch.amp.GradScaler,
    progress: Progress,
    average: nn.Module | None = None,
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The state as tensors, by their names in a snapshot, and JSON values. All ranks must call this together.

    `average` is the averaged model, if there is one.
    """
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    tensors |= {f"ema.{name}": tensor for name, tensor in average.state_dict().items()} if average else {}
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        tensors |= {f"optimizer.{name}.{key}": value for key, value in state.items() if value is not None}
    if "step" in optimizer.param_groups[0]:  # LAMB counts there
        tensors["optimizer.step"] = optimizer.param_groups[0]["step"]
    for name, tensor in rng_state().items():
        ranks = distributed.gather_columns(tensor.numpy()[None])[0]
        tensors[f"rng.{name}"] = torch.from_numpy(ranks.reshape(distributed.world_size(), -1))
    return tensors, asdict(progress) | {"scaler": scaler.state_dict(), "ranks": distributed.world_size()}


def snapshot_bytes(model: nn.Module, optimizer: Optimizer, average: nn.Module | None = None) -> int:
    """About the bytes of a snapshot, known before the first step, after which only the optimiser has all its state."""
    weights = sum(tensor.nbytes for tensor in model.state_dict().values())
    moments = [name for name in OPTIMIZER_STATE[type(optimizer).__name__] if name != "step"]
    trained = sum(parameter.nbytes for parameter in model.parameters())
    return weights * (2 if average else 1) + trained * len(moments)


def all_finite(model: nn.Module) -> bool:
    """Whether every weight and BatchNorm statistic of a model is finite."""
    floats = [tensor for tensor in model.state_dict().values() if tensor.is_floating_point()]
    extremes = [extreme for tensor in floats for extreme in torch.aminmax(tensor)]  # NaN is both; no copies are made
    return bool(torch.stack(extremes).isfinite().all())


def restore(
    snapshot: Snapshot,
    model: nn.Module,
    optimizer: Optimizer,
    scaler: torch.amp.GradScaler,
    average: nn.Module | None = None,
) -> Progress:
    """Restore what `capture` saved, and return its progress. Raises UsageError for another model.

    An average that was not saved starts from the model's weights.
    Each rank restores its own random number generators; additional ranks reuse those of others.
    """
    parts: dict[str, dict[str, torch.Tensor]] = {"model": {}, "ema": {}, "optimizer": {}, "rng": {}}
    for name, tensor in snapshot.tensors.items():
        part, _, rest = name.partition(".")
        if part not in parts:
            raise UsageError(f"{snapshot.path} holds {name}, which is no part of a run")
        parts[part][rest] = tensor
    try:
        model.load_state_dict(parts["model"])
        if average is not None:
            average.load_state_dict(parts["ema"] or parts["model"])
    except RuntimeError as error:
        raise UsageError(f"{snapshot.path} holds another model than the one asked for") from error
    for name, parameter in model.named_parameters():
        for key in OPTIMIZER_STATE[
            type(optimizer).__name__
        ]:  # an --override may have changed the optimiser: it starts afresh
            saved = parts["optimizer"].get(f"{name}.{key}")
            if saved is not None:
                like = parameter.detach().new_empty(()) if key == "step" else parameter.detach()
                optimizer.state[parameter][key] = torch.empty_like(like).copy_(saved)
    for group in optimizer.param_groups:
        if "step" in group and "step" in parts["optimizer"]:
            group["step"].copy_(parts["optimizer"]["step"])
    if snapshot.state["scaler"]:  # empty without fp16, which an --override may have changed
        scaler.load_state_dict(snapshot.state["scaler"])
    set_rng_state({name: ranks[distributed.rank() % len(ranks)].clone() for name, ranks in parts["rng"].items()})
    return Progress(**{name: snapshot.state[name] for name in Progress.__dataclass_fields__})


def began_with(snapshot: Snapshot | None, config: Config) -> dict[str, Any]:
    """What `Training.kept` told of the run that is resumed, but for what an --override changed since.

    Raises SnapshotError.
    """
    if snapshot is None:
        return {}
    weights = snapshot.state.get("class_weights") or []
    is_list = isinstance(weights, list) and all(isinstance(weight, float) for weight in weights)
    if not is_list or snapshot.state.get("precision") not in DTYPES:
        raise SnapshotError(f"{snapshot.path} does not tell how its run began; give another")
    saved, decides = snapshot.state, {"precision": ("amp", "amp_dtype"), "class_weights": ("class_weights",)}
    same = {name for name, value in vars(config).items() if saved["config"].get(name) == value}
    return {fact: saved.get(fact) for fact, flags in decides.items() if same.issuperset(flags)}


def seed_everything(seed: int) -> None:
    """Seed this process's random number generators, differently on each rank."""
    words = seeded(seed, Use.RANK, distributed.rank()).generate_state(3)
    torch.manual_seed(int(words[0]))
    random.seed(int(words[1]))
    np.random.seed(words[2])


def rng_state() -> dict[str, torch.Tensor]:
    """The state of this process's random number generators (Python's, numpy's, torch's, the GPU's) as 1-d tensors."""
    _, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    _, python, python_gauss = random.getstate()
    state = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(python),
        "python_gauss": torch.tensor([python_gauss is not None, python_gauss or 0.0], dtype=torch.float64),
        "numpy": torch.tensor([*map(int, keys), position, has_gauss]),
        "numpy_gauss": torch.tensor([gauss], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, torch.Tensor]) -> None:
    """Restore what `rng_state` returned; a GPU's state is ignored where there is no GPU."""
    torch.set_rng_state(state["torch"])
    has_python_gauss, python_gauss = state["python_gauss"].tolist()
    random.setstate((3, tuple(state["python"].tolist()), python_gauss if has_python_gauss else None))
    *keys, position, has_gauss = state["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, np.uint32), position, has_gauss, float(state["numpy_gauss"])))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
