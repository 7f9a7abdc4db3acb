"""What each export format holds, which models it has a place for, and how a loaded export is asked."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from errors import UsageError
from model_resnet50 import DEPTHS
from results.places import require_precision
from training.sources import Source

FORMATS = ("transformers", "timm", "torchvision", "onnx", "torch_export")
PROGRAMS = FORMATS[3:]  # with the preprocessing inside
PRECISIONS = ("fp32", "fp16", "int8")


@dataclass(frozen=True)
class Loaded:
    """An export as its own library loads it, as functions.

    `logits` takes normalised images, float32 (N, 3, size, size), to logits (N, classes); `inputs` makes such an image
    (3, size, size) of a picture in RGB, by the library's own preprocessing. A program has `probabilities` instead:
    uint8 (H, W, 3) to probabilities float32 (classes).
    """

    logits: Callable[[torch.Tensor], torch.Tensor] | None = None
    inputs: Callable[[Image.Image], torch.Tensor] | None = None
    probabilities: Callable[[np.ndarray], np.ndarray] | None = None


@dataclass(frozen=True)
class Order:
    """What is to be exported: a source in a format and precision to a folder, with what its card says of it."""

    source: Source
    format: str
    out: Path
    precision: str = "fp32"
    license: str | None = None
    hub_id: str | None = None


def resnet_name(source: Source) -> str | None:
    """The ResNet that a source is, ours or a library's of the same computation; None for another model."""
    name = source.model.rpartition(":")[2]
    return name if name in DEPTHS else None


def has_cifar_stem(source: Source) -> bool:
    """Whether a ResNet has the stem for small images."""
    return resnet_name(source) is not None and source.weights["conv1.weight"].shape[-1] == 3


def require_place(source: Source, format: str, precision: str) -> None:
    """Refuse a model that the format has no place for, or a precision. Raises UsageError."""
    require_precision(format, precision)
    if format in PROGRAMS:
        return
    others = " or ".join(PROGRAMS)
    if source.options.get("blurpool"):
        raise UsageError(f"{format} has no model with --blurpool's blurs; export to {others}")
    if resnet_name(source) == "resnet20" and (has_cifar_stem(source) or format != "transformers"):
        places = PROGRAMS if has_cifar_stem(source) else ("transformers", *PROGRAMS)
        raise UsageError(f"{format} has no such resnet20; export to {' or '.join(places)}")
    if has_cifar_stem(source) and format != "torchvision":
        raise UsageError(f"{format} has no ResNet with a stem for small images; export to torchvision, {others}")
    library = source.model.partition(":")[0]
    homes = {"timm": ("timm", "transformers"), "torchvision": ("torchvision",)}.get(library, ())
    if resnet_name(source) is None and format not in homes:
        raise UsageError(f"{format} has no {source.model}; export to {', '.join((*homes, ''))}{others}")


def short_side(source: Source) -> int:
    """The pixels that the short side of an image is resized to before the middle of it is cut."""
    from preprocess import RESIZE_RATIO

    size, share = source.settings["eval_size"], source.settings["eval_crop_pct"]
    return int(size / share) if share else round(size * RESIZE_RATIO)


def filter_of(source: Source) -> str:
    """The nearest filter that libraries have: bilinear or bicubic."""
    kind: str = source.settings["eval_interpolation"]
    return "bilinear" if kind == "fast" else kind


def channels_of(source: Source) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel, of pixels in 0..1."""
    from flags import channel_values
    from stream.augment import IMAGENET_MEAN, IMAGENET_STD

    mean, std = source.settings["mean"], source.settings["std"]
    return [*(channel_values(mean) if mean else IMAGENET_MEAN)], [*(channel_values(std) if std else IMAGENET_STD)]


def class_names(source: Source, count: int) -> list[str]:
    """The names of the classes, or their numbers where nobody told names."""
    return source.classes or [f"LABEL_{number}" for number in range(count)]
