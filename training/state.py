"""What the next step depends on: everything that a snapshot must hold, taken out of a run and put back."""

import math
import random
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

import distributed
from errors import UsageError
from stream.seeds import Use, seeded
from training.snapshot import Snapshot

OPTIMIZER_STATE = {SGD: ("momentum_buffer",), AdamW: ("step", "exp_avg", "exp_avg_sq")}


@dataclass
class Progress:
    """How far a run has come, in completed epochs and optimiser steps, and the sums of the epoch in progress.

    `lr` is the learning rate that the schedule was built with, `last_lr` and `last_loss` those of the last step.
    `bad_steps` counts the steps in a row, up to the last, whose loss was not finite or that the scaler skipped.
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

    def add(self, loss: float, correct: int, skipped: bool) -> None:
        """Count one step's loss, its correct images of all ranks, and whether the scaler skipped it."""
        finite = math.isfinite(loss)
        self.skipped_steps += skipped
        self.bad_steps = 0 if finite and not skipped else self.bad_steps + 1
        self.last_loss = loss
        if finite:
            self.loss_sum += loss
            self.losses += 1
        self.correct += correct

    def end_epoch(self, top1: float) -> None:
        """Count the epoch as completed, with this validation accuracy."""
        self.best_top1 = max(self.best_top1, top1)
        self.epoch += 1
        self.loss_sum, self.losses, self.correct, self.train_seconds = 0.0, 0, 0, 0.0


def capture(
    model: nn.Module, optimizer: Optimizer, scaler: torch.amp.GradScaler, progress: Progress
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors by their names in a snapshot, and the rest as JSON values. All ranks must call this together."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        tensors |= {f"optimizer.{name}.{key}": value for key, value in state.items() if value is not None}
    for name, tensor in rng_state().items():
        ranks = distributed.gather_columns(tensor.numpy()[None])[0]
        tensors[f"rng.{name}"] = torch.from_numpy(ranks.reshape(distributed.world_size(), -1))
    return tensors, asdict(progress) | {"scaler": scaler.state_dict(), "ranks": distributed.world_size()}


def all_finite(model: nn.Module) -> bool:
    """Whether every weight and statistic of a model is a finite number."""
    floats = [tensor for tensor in model.state_dict().values() if tensor.is_floating_point()]
    extremes = [extreme for tensor in floats for extreme in torch.aminmax(tensor)]  # NaN is both; no copies are made
    return bool(torch.stack(extremes).isfinite().all())


def restore(snapshot: Snapshot, model: nn.Module, optimizer: Optimizer, scaler: torch.amp.GradScaler) -> Progress:
    """Put back what `capture` took, and return where it stood. Raises UsageError for another model.

    Of random number generators each rank takes its own; ranks that are new take those of others.
    """
    parts: dict[str, dict[str, torch.Tensor]] = {"model": {}, "optimizer": {}, "rng": {}}
    for name, tensor in snapshot.tensors.items():
        part, _, rest = name.partition(".")
        if part not in parts:
            raise UsageError(f"{snapshot.path} holds {name}, which is no part of a run")
        parts[part][rest] = tensor
    try:
        model.load_state_dict(parts["model"])
    except RuntimeError as error:
        raise UsageError(f"{snapshot.path} holds another model than the one asked for") from error
    for name, parameter in model.named_parameters():
        for key in OPTIMIZER_STATE[type(optimizer)]:  # an --override may have changed the optimiser: it starts anew
            saved = parts["optimizer"].get(f"{name}.{key}")
            if saved is not None:
                like = parameter.detach().new_empty(()) if key == "step" else parameter.detach()
                optimizer.state[parameter][key] = torch.empty_like(like).copy_(saved)
    if snapshot.state["scaler"]:  # empty without fp16, which an --override may have changed
        scaler.load_state_dict(snapshot.state["scaler"])
    set_rng_state({name: ranks[distributed.rank() % len(ranks)].clone() for name, ranks in parts["rng"].items()})
    return Progress(**{name: snapshot.state[name] for name in Progress.__dataclass_fields__})


def seed_everything(seed: int) -> None:
    """Seed this process's generators, each rank's differently."""
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
    """Put back what `rng_state` gave; a GPU's state is left out where there is none."""
    torch.set_rng_state(state["torch"])
    has_python_gauss, python_gauss = state["python_gauss"].tolist()
    random.setstate((3, tuple(state["python"].tolist()), python_gauss if has_python_gauss else None))
    *keys, position, has_gauss = state["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, np.uint32), position, has_gauss, float(state["numpy_gauss"])))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
