"""Lives of a training run, each in a process of its own, some of them ended by SIGKILL inside the saving of a snapshot.

Processes are forked from one that has imported everything, and the model is the first half of a ResNet, so that lives
are short; it ends in dropout, so that random numbers matter.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import nn
from unrendered import save_without_pixels

import main
from training import step

PLACES = ("written", "before rename", "after rename", "pruning")
_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["preflight", "run_lr_finder", "sklearn.datasets", "torch._dynamo", "train"])


def start(*arguments: object, log: Path, place: str = "", time: int = 1) -> ForkServerProcess:
    """A process that runs main.py and prints to `log`; with a `place` it dies there the `time`-th time."""
    process = _server.Process(target=_live, args=([str(argument) for argument in arguments], log, place, time))
    process.start()
    return process


def _live(argv: list[str], log: Path, place: str, time: int) -> None:
    torch.set_num_threads(1)
    step.build_model = small_with_dropout(step.build_model)
    Figure.savefig = save_without_pixels  # type: ignore[assignment, method-assign]
    if place:
        die_inside(place, time)
    with open(log, "w") as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        status = main.main(argv)
    sys.exit(status)


def die_inside(place: str, time: int) -> None:
    """Have this process killed by SIGKILL the `time`-th time that it comes to a place."""
    left = time

    def strike() -> None:
        nonlocal left
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(call: Callable[..., Any], of_snapshot: Callable[..., bool], after: bool) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            mine = of_snapshot(*arguments)
            if mine and not after:
                strike()
            result = call(*arguments, **options)
            if mine and after:
                strike()
            return result

        return wrapped

    if place == "written":
        os.fsync = around(os.fsync, lambda file: "step-" in os.readlink(f"/proc/self/fd/{file}"), after=False)
    elif place == "pruning":
        Path.unlink = around(Path.unlink, lambda path: path.suffix == ".safetensors", after=False)  # type: ignore[method-assign]
    else:
        os.replace = around(os.replace, lambda old, new: "step-" in str(new), after=place == "after rename")


def small_with_dropout(build: Callable[..., Any]) -> Callable[..., Any]:
    def built(*arguments: Any) -> Any:
        model = build(*arguments)
        model.layer3, model.layer4 = nn.Identity(), nn.Identity()
        model.avgpool = nn.Sequential(model.avgpool, nn.Dropout(0.1))
        model.fc = nn.Linear(2 * model.conv1.out_channels, model.fc.out_features)
        return model

    return built
