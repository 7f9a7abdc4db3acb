"""`build_model`, which makes what --model names, and the models of torchvision and timm among that."""

import copy
import difflib
import inspect
from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from choices import MODELS, model_choice
from errors import UsageError
from registry import naming

UNSET: Mapping[str, Any] = MappingProxyType({"drop_path": 0.0, "blurpool": False, "zero_init_gamma": None})


def build_model(
    num_classes: int, image_size: int, name: str = "auto", options: Mapping[str, Any] = MappingProxyType({})
) -> nn.Module:
    """The model called `name` among `MODELS`; `auto` is by image size ResNet-20 up to 8 pixels, -34 up to 32, else -50.

    ResNets for images of up to 32 pixels get the CIFAR stem. `torchvision:NAME` and `timm:NAME` are those libraries'
    models. The `options` are `ResNet`'s: drop_path, blurpool, zero_init_gamma. Raises UsageError for an unknown name,
    for options that a model does not take, and for a registered function that does not make such a model.
    """
    build = MODELS[model_choice(name)]
    if ":" in name:
        build = partial(build, name)
    asked = {key: value for key, value in options.items() if value != UNSET[key]}
    taken = inspect.signature(build).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values())
    for key in () if takes_all else asked.keys() - taken.keys():
        raise UsageError(f"--{key} is nothing that --model {name} takes; leave it out")
    with naming("--model", name):
        model = build(num_classes, image_size, **asked)
        if not hasattr(model, "name"):  # it is not of this program
            try_out(model, num_classes, image_size)
            model.name = name  # type: ignore[assignment]
    return model


@MODELS.define("torchvision:NAME")
@MODELS.define("timm:NAME")
def build_from_library(
    name: str,
    num_classes: int,
    image_size: int,
    *,
    drop_path: float = 0.0,
    blurpool: bool = False,
    zero_init_gamma: bool | None = None,
) -> nn.Module:
    """A model of a library, float (N, 3, image_size, image_size) -> logits (N, num_classes), newly initialised.

    Raises UsageError for an unknown name, a size or option that it does not take, and for a model that gives more than
    logits.
    """
    library, _, model_name = name.partition(":")
    if blurpool or zero_init_gamma is not None:
        raise UsageError(f"--blurpool and --zero_init_gamma are for this program's own models, not for {name}")
    if drop_path and library != "timm":
        raise UsageError(f"--drop_path is for this program's own models and timm's, not for {name}")
    options: dict[str, Any] = {"num_classes": num_classes}
    if drop_path:
        options["drop_path_rate"] = drop_path
    reason = ""
    for sizes in ({}, {"img_size" if library == "timm" else "image_size": image_size}):
        try:
            model = _create(library, model_name, options | sizes)
            try_out(model, num_classes, image_size)
        except UsageError:
            raise
        except Exception as error:
            reason = reason or " ".join(str(error).split())
            continue
        model.name = name  # type: ignore[assignment]
        model.made_with = options | sizes  # type: ignore[assignment]
        return model
    raise UsageError(f"--model {name} does not work with --image_size {image_size} ({reason[:200]}); give another")


def _create(library: str, name: str, options: dict[str, Any]) -> nn.Module:
    if library == "torchvision":
        from torchvision import models

        known = models.list_models(module=models)
        if name not in known:
            raise _unknown(library, name, known)
        made: nn.Module = models.get_model(name, weights=None, **options)
        return made
    try:
        import timm
    except ImportError as error:
        raise UsageError(f"--model timm:{name} is timm's; install timm: pip install timm") from error
    if name not in timm.list_models():
        raise _unknown(library, name, timm.list_models())
    built: nn.Module = timm.create_model(name, pretrained=False, **options)
    return built


def _unknown(library: str, name: str, known: list[str]) -> UsageError:
    near = difflib.get_close_matches(name, known, 3)
    return UsageError(
        f"{library} has no model {name}; {'did you mean ' + ' or '.join(near) if near else 'see its list'}"
    )


def try_out(model: nn.Module, num_classes: int, image_size: int) -> None:
    """Run a copy without memory on two images, as in training. Raises whatever that raises; UsageError."""
    twin = copy.deepcopy(model).to("meta").train()
    logits = twin(torch.empty(2, 3, image_size, image_size, device="meta"))
    if not isinstance(logits, torch.Tensor) or logits.shape != (2, num_classes):
        raise UsageError(f"{type(model).__name__} gives more than logits of the classes; choose another --model")
