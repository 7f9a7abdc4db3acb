"""Folders of weights as transformers, timm and torchvision load them: written, and loaded by those libraries."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from errors import UsageError
from model_resnet50 import DEPTHS, head_of, transformers_config, transformers_name
from results.formats import (
    Loaded,
    Order,
    channels_of,
    class_names,
    filter_of,
    has_cifar_stem,
    resnet_name,
    short_side,
)
from training.preprocessing import share_of

RESAMPLE = {"bilinear": 2, "bicubic": 3}  # Pillow's numbers


def write_folder(order: Order, model: nn.Module, folder: Path) -> None:
    """Write the weights and the configuration that the format's library reads. Raises UsageError without timm."""
    weights = {name: tensor.detach().contiguous().clone() for name, tensor in model.state_dict().items()}
    if order.precision == "fp16":
        weights = {name: t.half() if t.is_floating_point() else t for name, t in weights.items()}
    if order.format == "torchvision":
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    elif order.format == "transformers" and resnet_name(order.source):
        _write_transformers(order, weights, folder)
    else:
        _write_timm(order, model, weights, folder)


def load_folder(order: Order, folder: Path, classes: int) -> Loaded:
    """The folder as the format's own library loads it, with the preprocessing that the library makes of it."""
    load = {"transformers": _load_transformers, "timm": _load_timm, "torchvision": _load_torchvision}[order.format]
    return load(order, folder, classes)


def _write_transformers(order: Order, weights: dict[str, torch.Tensor], folder: Path) -> None:
    from transformers import ResNetConfig, ResNetForImageClassification
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    source, name = order.source, resnet_name(order.source)
    names = class_names(source, len(weights["fc.weight"]))
    config = ResNetConfig(
        **transformers_config(DEPTHS[str(name)]),
        id2label=dict(enumerate(names)),
        label2id={label: number for number, label in enumerate(names)},
    )
    theirs: Any = ResNetForImageClassification(config)
    if order.precision == "fp16":
        theirs = theirs.half()
    theirs.load_state_dict({transformers_name(name): tensor for name, tensor in weights.items()})
    theirs.save_pretrained(folder)
    mean, std = channels_of(source)
    size = source.settings["eval_size"]
    processor = {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": short_side(source)},
        "resample": RESAMPLE[filter_of(source)],
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": mean,
        "image_std": std,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2), encoding="utf-8")


def _load_transformers(order: Order, folder: Path, classes: int) -> Loaded:
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    model = AutoModelForImageClassification.from_pretrained(folder, dtype=torch.float32).eval()
    processor: Any = AutoImageProcessor.from_pretrained(folder)
    return Loaded(
        lambda inputs: model(pixel_values=inputs).logits,
        lambda picture: processor(picture, return_tensors="pt")["pixel_values"][0],
    )


def _write_timm(order: Order, model: nn.Module, weights: dict[str, torch.Tensor], folder: Path) -> None:
    timm = _timm()
    source = order.source
    head = head_of(model)
    names = class_names(source, len(weights[f"{head}.weight"]))
    mean, std = channels_of(source)
    size = source.settings["eval_size"]
    arguments = {k: v for k, v in getattr(model, "made_with", {}).items() if k in ("img_size",)}
    name = resnet_name(source) or source.model.removeprefix("timm:")
    with torch.device("meta"):
        theirs = timm.create_model(name, num_classes=len(names), **arguments)
    pretrained = {
        "num_classes": len(names),
        "input_size": [3, size, size],
        "fixed_input_size": "img_size" in arguments,
        "interpolation": filter_of(source),
        "crop_pct": share_of(size, short_side(source)),
        "crop_mode": "center",
        "mean": mean,
        "std": std,
        "first_conv": theirs.pretrained_cfg.get("first_conv"),
        "classifier": theirs.pretrained_cfg.get("classifier", head),
        "pool_size": None,
    }
    config = {
        "architecture": name,
        "num_classes": len(names),
        "num_features": theirs.num_features,
        "label_names": names,
        "pretrained_cfg": pretrained,
    }
    if arguments:
        config["model_args"] = arguments
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def _load_timm(order: Order, folder: Path, classes: int) -> Loaded:
    timm = _timm()
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    return Loaded(model, transform)


def _timm() -> Any:
    try:
        import timm
        import timm.data
    except ImportError as error:
        raise UsageError("this export is timm's; install timm: pip install timm") from error
    return timm


def _load_torchvision(order: Order, folder: Path, classes: int) -> Loaded:
    from safetensors.torch import load_file
    from torchvision import models
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms._presets import ImageClassification

    source = order.source
    options = getattr(source.build(), "made_with", {}) if resnet_name(source) is None else {}
    name = resnet_name(source) or source.model.removeprefix("torchvision:")
    model: Any = models.get_model(name, weights=None, **options | {"num_classes": classes})
    if has_cifar_stem(source):
        model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        model.maxpool = nn.Identity()
    model.load_state_dict(load_file(folder / "model.safetensors"))
    mean, std = channels_of(source)
    transform = ImageClassification(
        crop_size=source.settings["eval_size"],
        resize_size=short_side(source),
        mean=tuple(mean),
        std=tuple(std),
        interpolation=InterpolationMode(filter_of(source)),
        antialias=True,
    )
    return Loaded(model.eval(), transform)
