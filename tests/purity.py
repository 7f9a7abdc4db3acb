"""Runs the finder as main.py does, in every precision and through every mishap, and tells what it left changed.

As a program, which torchrun may start, it takes a folder and the flags of the data, and writes a line for each case
into a file of the rank.
"""

import math
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import distributed
import lr_finder
import run_lr_finder
from config import Config, parse, resolve
from errors import DivergedError, Interrupted
from preprocess import get_data_loaders
from training import step
from training.signals import SIGNALS, StopRequest
from training.state import rng_state

SMALL = ("--batch_size", "16", "--num_workers", "1", "--model", "resnet18", "--lr_iter", "32", "--lr_start", "1e-4")
PRECISIONS: dict[str, tuple[str, ...]] = {
    "fp32": (),
    "bf16": ("--amp", "--amp_dtype", "bf16"),
    "fp16": ("--amp", "--amp_dtype", "fp16"),
}
EVENTS = ("none", "nan", "exception", "interrupt")
EVENT_STEP = 21


class MishapError(Exception):
    """What a step raises in the case of that name."""


def everything(training: step.Training, data: Any) -> dict[str, Any]:
    """All that a later training step can depend on."""
    optimizer, state = training.optimizer, {}
    for name, tensor in training.model.state_dict().items():
        state[f"model.{name}"] = tensor.clone()
    for name, parameter in training.model.named_parameters():
        state[f"gradient.{name}"] = parameter.grad is None
        for key, value in optimizer.state[parameter].items():
            state[f"optimizer.{name}.{key}"] = value.clone() if isinstance(value, torch.Tensor) else value
    for number, group in enumerate(optimizer.param_groups):
        state |= {f"group.{number}.{name}": value for name, value in group.items() if name != "params"}
    state |= {f"rng.{name}": tensor.clone() for name, tensor in rng_state().items()}
    state |= {f"scaler.{name}": value for name, value in training.scaler.state_dict().items()}
    state["modes"] = [module.training for module in training.model.modules()]
    state["position"] = (data.train.epoch, data.train.start, data.val.epoch, data.val.start)
    return state


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    def same(one: Any, other: Any) -> bool:
        return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other

    return [name for name in before.keys() | after.keys() if not same(before.get(name), after.get(name))]


@contextmanager
def mishap(event: str) -> Iterator[list[int]]:
    """Patches the training step so that the event comes at EVENT_STEP, on the last rank alone where one is enough."""
    steps: list[int] = []
    real = step.train_step
    last = distributed.rank() == distributed.world_size() - 1

    def eventful(*arguments: Any) -> step.StepNumbers:
        numbers = real(*arguments)
        steps.append(1)
        if len(steps) == EVENT_STEP:
            if event == "nan" and last:
                numbers = numbers._replace(loss=numbers.loss * math.nan)
            if event == "exception":
                raise MishapError
            if event == "interrupt" and last:
                os.kill(os.getpid(), signal.SIGINT)
        return numbers

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "train_step", eventful)
        patch.setattr(lr_finder, "SWEEP_STEPS", 16)
        yield steps


def run_case(config: Config, data: Any, event: str, folder: Path) -> tuple[list[str], int]:
    """What differs after the finder from before it, and how many steps it took."""
    training = step.build_training(config, len(data.classes), torch.device("cpu"))
    for batch, _ in zip(data.train, range(2), strict=False):  # so that there is momentum, and a scale that has moved
        step.train_step(training, batch.images, batch.labels)
    training.optimizer.zero_grad(set_to_none=True)
    before = everything(training, data)
    with mishap(event) as steps, suppress(MishapError, Interrupted, DivergedError):
        run_lr_finder.search(config, data, training, folder, StopRequest.listening(data.train))
    return differences(before, everything(training, data)), len(steps)


def shrink(model: Any) -> Any:
    """The stem of a ResNet, with dropout before the classifier, so that half precision on a CPU takes no minutes."""
    model.layer1 = model.layer2 = model.layer3 = model.layer4 = torch.nn.Identity()
    model.avgpool = torch.nn.Sequential(model.avgpool, torch.nn.Dropout(0.1))
    model.fc = torch.nn.Linear(model.conv1.out_channels, model.fc.out_features)
    return model


def cases_of(flags: list[str]) -> list[tuple[str, str]]:
    """Precision and event of each case: digits are trained on in every precision, a stream in one."""
    return [
        (precision, event) for precision in PRECISIONS for event in EVENTS if "digits" in flags or precision == "fp32"
    ]


def run_cases(flags: list[str], folder: Path) -> list[tuple[str, str, list[str], int]]:
    """Precision, event, differences and steps of each case, after one another on the same data."""
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    build_model = step.build_model
    step.build_model = lambda *arguments: shrink(build_model(*arguments))
    found = []
    try:
        for precision, event in cases_of(flags):
            config = resolve(parse("", "", [*flags, *SMALL, *PRECISIONS[precision]]))
            data = get_data_loaders(config, torch.device("cpu"))
            found.append((precision, event, *run_case(config, data, event, folder)))
    finally:
        step.build_model = build_model
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return found


def main() -> None:
    torch.set_num_threads(1)
    folder, *flags = sys.argv[1:]
    distributed.init("cpu")
    with open(Path(folder) / f"cases{distributed.rank()}", "w") as file:
        for precision, event, changed, steps in run_cases(flags, Path(folder)):
            file.write(f"{precision} {event} {steps} {','.join(changed) or 'pure'}\n")


if __name__ == "__main__":
    main()
