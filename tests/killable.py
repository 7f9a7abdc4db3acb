"""main.py, killed inside the saving of a snapshot: KILL_INSIDE is `PLACE:N`, the N-th time it comes to that place.

The model ends in dropout, so that random numbers matter.
"""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from torch import nn

import main
import model_resnet50

PLACES = ("written", "before rename", "after rename", "pruning")


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


def with_dropout(build: Callable[..., Any]) -> Callable[..., Any]:
    def built(*arguments: Any) -> Any:
        model = build(*arguments)
        model.avgpool = nn.Sequential(model.avgpool, nn.Dropout(0.1))
        return model

    return built


if __name__ == "__main__":
    model_resnet50.build_model = with_dropout(model_resnet50.build_model)
    if "KILL_INSIDE" in os.environ:
        where, _, which = os.environ["KILL_INSIDE"].partition(":")
        die_inside(where, int(which))
    sys.exit(main.main())
