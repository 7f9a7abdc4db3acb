"""A model source: a trained model, named in the same way wherever one is asked for.

It is a run folder, a snapshot, a folder that export.py wrote, a transformers or timm folder or Hub id, or a weight file
of torchvision or timm. No pickle is run: .pth files are read with `weights_only`.
"""

import argparse
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from beforehand import BEST, SIDECAR, require_source, step_files
from checks import without_idle
from config import Config, resolve, resume
from errors import DataError, SnapshotError, UsageError
from flags import channels
from model_resnet50 import CIFAR_STEM_UP_TO, build_model, head_of, load_weights, read_transformers_resnet
from stream.files import read_small
from stream.retry import Network, patiently
from training import snapshot as snapshots
from training.preprocessing import PREPROCESSING, RESAMPLE, of_pretrained_cfg, of_processor, published
from training.weight_files import read_weights, resnet_of

OPTIONS = ("drop_path", "blurpool", "zero_init_gamma")
MOST_PIXELS = 4096  # a side of what a model is evaluated on


@dataclass(frozen=True)
class Source:
    """Weights by name, and what belongs to them.

    `model` is what --model takes. `settings` are those flags that the images need to suit the weights, PREPROCESSING
    and those of `options`. `config` and `state` are the run's, of a snapshot. `told` says where the weights are from,
    `averaged` whether they are a run's average.
    """

    told: str
    model: str
    weights: dict[str, torch.Tensor]
    classes: list[str] | None
    settings: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    config: Config | None = None
    state: Mapping[str, Any] = field(default_factory=dict)
    run: Path | None = None
    averaged: bool = False

    def build(self) -> nn.Module:
        """The model with these weights, on the CPU, for evaluation. Raises UsageError, DataError."""
        model = build_model(self.count, self.settings["image_size"], self.model, self.options)
        load_weights(model, self.weights, self.told)
        return model.eval()

    def require_stem(self, image_size: int) -> None:
        """Refuse a size of images that the stem of these weights, if they are a ResNet's, is not for."""
        stem = self.weights.get("conv1.weight")
        if stem is None or resnet_of(self.weights) is None:
            return
        if stem.shape[-1] > 3 and image_size <= CIFAR_STEM_UP_TO:
            raise UsageError(
                f"--use_pretrained brings a stem for images of more than {CIFAR_STEM_UP_TO} pixels; give a larger "
                f"--image_size than {image_size}, such as 224"
            )
        if stem.shape[-1] == 3 and image_size > CIFAR_STEM_UP_TO:
            raise UsageError(
                f"--use_pretrained brings a stem for images of up to {CIFAR_STEM_UP_TO} pixels; give a smaller "
                f"--image_size than {image_size}, such as 32"
            )

    def flags(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The flags that a training from these weights takes over, but for those `given`.

        The size is that of evaluation, and is left to the dataset where one is given for training.
        """
        own = {name: value for name, value in self.settings.items() if name != "image_size" and value is not None}
        if "image_size" in given:
            del own["eval_size"]
        elif self.settings["image_size"] <= CIFAR_STEM_UP_TO:
            own["image_size"] = self.settings["image_size"]
        if self.options.get("blurpool"):
            own["blurpool"] = True
        return own | dict(given) | {"model": self.model}

    @cached_property
    def count(self) -> int:
        """The number of classes. Raises UsageError."""
        if self.classes is not None:
            return len(self.classes)
        with torch.device("meta"):
            head = head_of(build_model(2, self.settings["image_size"], self.model, self.options))
        weight = self.weights.get(f"{head}.weight", torch.zeros(()))
        if not (weight.ndim and weight.numel()):
            raise UsageError(f"the weights in {self.told} have no {head}, as --model {self.model} has; name another")
        return len(weight)


def open_source(text: str, which: str | None = None, model: str = "auto", patience: float = 1800.0) -> Source:
    """Read a model source. `which` chooses from a run or snapshot: best, last, ema or the number of a step.

    `best`, the default, is the best snapshot, else the newest, and of it the average of the weights if the run kept
    one. `model` names that of a bare weight file; `auto` tells ResNets by their weights. `patience`, in seconds, is for
    the Hub. Raises UsageError, DataError, SnapshotError.
    """
    require_source(text)
    path = Path(text).expanduser()
    if path.is_dir():
        source = _of_folder(path, which)
    elif path.is_file():
        source = _of_file(path, which, model)
    else:
        source = _of_folder(_fetched(text, patience), None, text)
    if which is not None and source.config is None and which != "ema":
        raise UsageError(f"--which {which} chooses from the snapshots of a run, and {text} is none; leave it out")
    if model not in ("auto", source.model):
        raise UsageError(f"{text} holds a {source.model}; leave out --model {model}")
    return source


def resolve_with_weights(given: Mapping[str, Any]) -> tuple[Config, Source | None]:
    """The settings of a new run, and what --use_pretrained names, whose preprocessing it takes. Raises UserError."""
    config = resolve(given)
    if config.use_pretrained is None:
        return config, None
    source = open_source(config.use_pretrained, model=config.model, patience=60 * config.network_patience)
    return resolve(source.flags(without_idle(config, given))), source


def _fetched(hub_id: str, patience: float) -> Path:
    """The folder with a Hub model's configuration and safetensors, waiting for the Hub aloud.

    Xet's client tells no bytes, so only patience ends it.
    """
    from huggingface_hub import snapshot_download

    from stream.explain import one_line_errors

    network = Network(stall_timeout=patience, patience=patience)
    wanted = ["*.json", "*.safetensors"]
    with one_line_errors(hub_id):
        return Path(patiently(lambda: snapshot_download(hub_id, allow_patterns=wanted), network, hub_id, at_start=True))


def _of_folder(folder: Path, which: str | None, told: str | None = None) -> Source:
    told = told or str(folder)
    if (folder / "snapshots").is_dir():
        return _of_run(folder, which)
    if (folder / SIDECAR).is_file():
        return _of_export(folder, told)
    config = _json(folder / "config.json")
    if "architecture" in config:
        return _of_timm(folder, config, told)
    if config.get("model_type") == "timm_wrapper" or "model_type" not in config:
        raise DataError(f"{told} holds no weights that can be read here; give a run, or a transformers or timm folder")
    name, weights, names = read_transformers_resnet(str(folder))
    settings = of_processor(_json(folder / "preprocessor_config.json"))
    return Source(told, name, weights, _listed(names, len(names)), settings)


def _json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty without a file. Raises DataError."""
    try:
        found = json.loads(read_small(path))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read ({error}); fetch it again") from error
    return found if isinstance(found, dict) else {}


def _of_run(folder: Path, which: str | None) -> Source:
    best = folder / "snapshots" / BEST
    if which in (None, "best") and best.exists():
        return _of_snapshot(snapshots.read(best), which)
    if which is not None and which.isdecimal():
        path = folder / "snapshots" / f"step-{int(which):09d}.safetensors"
        if not path.exists():
            kept = ", ".join(str(int(file.stem[5:])) for file in step_files(folder / "snapshots"))
            raise SnapshotError(f"{folder} has no snapshot of step {int(which)}; it has those of {kept or 'none'}")
        return _of_snapshot(snapshots.read(path), which)
    return _of_snapshot(snapshots.find(folder)[0], which)


def _of_snapshot(found: snapshots.Snapshot, which: str | None) -> Source:
    if which not in (None, "best", "last", "ema") and not which.isdecimal():
        raise UsageError(f"--which {which} is not best, last, ema or the number of a step")
    config = resume(found.state.get("config"), {}, to_train=False)
    averaged = any(name.startswith("ema.") for name in found.tensors)
    if which == "ema" and not averaged:
        raise UsageError(
            f"{found.path} holds no average of the weights, which --ema_decay keeps; leave out --which ema"
        )
    part = "ema." if averaged and which in (None, "best", "ema") else "model."
    weights = {name.removeprefix(part): tensor for name, tensor in found.tensors.items() if name.startswith(part)}
    state, classes = found.state, found.state.get("classes")
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise SnapshotError(f"{found.path} does not name its classes; give another")
    told = f"{found.path}: step {state.get('step')}{', the average of its weights' if part == 'ema.' else ''}"
    settings = {name: getattr(config, name) for name in PREPROCESSING}
    if config.is_small:
        settings["eval_crop_pct"], settings["eval_interpolation"] = 1.0, "bilinear"  # what ResidentLoader does
    options = {name: getattr(config, name) for name in OPTIONS}
    model = config.model
    if model == "auto":
        model = resnet_of(weights) or model
    run = found.path.parent.parent if found.path.parent.name == "snapshots" else None
    return Source(told, model, weights, classes, settings, options, config, state, run, part == "ema.")


def _of_export(folder: Path, told: str) -> Source:
    kept = _json(folder / SIDECAR)
    if not (folder / "model.safetensors").is_file():
        raise DataError(f"{told} holds a program and no weights; give the run, or one of its exports with weights")
    try:
        model, classes = str(kept["model"]), [str(name) for name in kept["classes"]]
        options = {name: kept["options"][name] for name in OPTIONS}
        settings = _checked({name: kept["settings"][name] for name in PREPROCESSING})
        is_resnet = kept["layout"] == "transformers" and _json(folder / "config.json").get("model_type") == "resnet"
    except (LookupError, TypeError, ValueError, argparse.ArgumentTypeError) as error:
        raise DataError(f"{folder / SIDECAR} is not what export.py writes; export the model again") from error
    if is_resnet:
        _, weights, _ = read_transformers_resnet(str(folder))
    else:
        weights = read_weights(folder / "model.safetensors")
    return Source(told, model, weights, classes, settings, options)


def _checked(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of preprocessing from a file, of the types that flags have. Raises TypeError, ValueError."""
    sizes, share = [settings[name] for name in ("image_size", "eval_size")], settings["eval_crop_pct"]
    if not all(type(size) is int and 0 < size <= MOST_PIXELS for size in sizes):
        raise ValueError(sizes)
    if share is not None and not 0 < float(share) <= 1:
        raise ValueError(share)
    if settings["eval_interpolation"] not in ("fast", *RESAMPLE.values()):
        raise ValueError(settings["eval_interpolation"])
    for name in ("mean", "std"):
        if settings[name] is not None:
            channels(settings[name])
    return settings


def _of_timm(folder: Path, config: dict[str, Any], told: str) -> Source:
    """A folder as timm saves it: config.json with `architecture` and `pretrained_cfg`."""
    told_cfg = config.get("pretrained_cfg")
    cfg: dict[str, Any] = told_cfg if isinstance(told_cfg, dict) else {}
    path = folder / "model.safetensors"
    if not path.is_file():
        raise DataError(f"{told} has no model.safetensors; give another model")
    weights, name = read_weights(path), str(config["architecture"])
    names = config.get("label_names") or cfg.get("label_names") or {}
    numbered = dict(enumerate(names)) if isinstance(names, list) else {}
    settings = of_pretrained_cfg(cfg)
    own = resnet_of(weights) if re.fullmatch("resnet(18|34|50|101|152)", name) else None
    head = weights.get(f"{cfg.get('classifier', 'fc')}.weight")
    return Source(
        told, own or f"timm:{name}", weights, None if head is None else _listed(numbered, len(head)), settings
    )


def _listed(names: Mapping[int, str], count: int) -> list[str] | None:
    """Class names by number, if they name every class; transformers' LABEL_0 names none."""
    listed = [names.get(number, "") for number in range(count)]
    told = all(listed) and any(name != f"LABEL_{number}" for number, name in enumerate(listed))
    return listed if told else None


def _of_file(path: Path, which: str | None, model: str) -> Source:
    if path.suffix == ".safetensors" and snapshots.is_snapshot(path):
        return _of_snapshot(snapshots.read(path), which)
    weights = read_weights(path, averaged=which == "ema")
    name = resnet_of(weights) if model == "auto" else model
    if name is None:
        raise UsageError(f"{path} does not tell its model; name it with --model, such as timm:convnext_tiny")
    settings, classes = published(path, name)
    stem = weights.get("conv1.weight")
    if stem is not None and stem.ndim == 4 and stem.shape[-1] == 3 and resnet_of(weights):
        settings |= {"image_size": 32, "eval_size": 32, "eval_crop_pct": 1.0}
    head = weights.get("fc.weight")
    if head is not None and classes is not None and len(head) != len(classes):
        classes = None
    return Source(str(path), name, weights, classes, settings)
