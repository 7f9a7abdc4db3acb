"""The preprocessing that published weights ask for, as settings of this program.

The size, the share of the short side that is kept, the interpolation, mean and deviation: without them weights score
less than they publish.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

PREPROCESSING = ("image_size", "eval_size", "eval_crop_pct", "eval_interpolation", "mean", "std")
RESAMPLE = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers
FOREIGN = {"eval_size": 224, "eval_crop_pct": 0.875, "eval_interpolation": "bilinear"}  # torchvision's first weights


def of_pretrained_cfg(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a pretrained_cfg of timm tells: those that its figures were measured with."""
    size = (cfg.get("test_input_size") or cfg.get("input_size") or (3, 224, 224))[-1]
    share = cfg.get("test_crop_pct") or cfg.get("crop_pct") or FOREIGN["eval_crop_pct"]
    kind = cfg.get("interpolation")
    kind = kind if kind in RESAMPLE.values() else "bicubic"
    settings = {"image_size": int(size), "eval_size": int(size), "eval_crop_pct": share, "eval_interpolation": kind}
    return settings | {name: _channels(cfg.get(name)) for name in ("mean", "std")}


def of_processor(found: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a preprocessor_config.json of transformers tells."""
    size, crop = found.get("size"), found.get("crop_size")
    edge = size.get("shortest_edge") or size.get("height") if isinstance(size, dict) else size
    short = int(edge or 224)
    cut = (crop.get("height") if isinstance(crop, dict) else crop) if found.get("do_center_crop") else None
    share = found.get("crop_pct")
    if cut is None and share and short < 384:  # ConvNext's and microsoft/resnet-50's way of telling it
        cut, pct = short, share
    else:
        cut = int(cut or short)
        pct = share_of(cut, short)
    kind = RESAMPLE.get(found.get("resample", 2), "bilinear")
    settings = {"image_size": cut, "eval_size": cut, "eval_crop_pct": pct, "eval_interpolation": kind}
    return settings | {name: _channels(found.get(f"image_{name}")) for name in ("mean", "std")}


def share_of(size: int, short: int) -> float:
    """The --eval_crop_pct under which the short side becomes `short` pixels, of which `size` are cut."""
    share = size / short
    return share if int(size / share) == short else size / (short + 0.5)


def _channels(values: Any) -> str | None:
    """Three numbers as --mean takes them; None for none."""
    if not isinstance(values, list | tuple) or len(values) != 3:
        return None
    return ",".join(f"{float(value):g}" for value in values)


def published(path: Path, name: str) -> tuple[dict[str, Any], list[str] | None]:
    """The settings of a file that torchvision or timm publishes under this name, with its classes if they are told."""
    from torchvision import models

    short = name.removeprefix("torchvision:")
    if short in models.list_models(module=models):
        for weights in models.get_model_weights(short):
            if weights.url.rpartition("/")[2] == path.name:
                preset = weights.transforms()
                size, edge = preset.crop_size[0], preset.resize_size[0]
                settings = {"image_size": size, "eval_size": size, "eval_crop_pct": share_of(size, edge)}
                settings["eval_interpolation"] = preset.interpolation.value
                settings |= {key: _channels([*getattr(preset, key)]) for key in ("mean", "std")}
                return settings, [*weights.meta["categories"]]
    if name.startswith("timm:"):
        from timm.models import get_pretrained_cfg

        cfg = get_pretrained_cfg(name.removeprefix("timm:"))
        if cfg is not None:
            return of_pretrained_cfg(cfg.to_dict()), None
    return {"image_size": FOREIGN["eval_size"], **FOREIGN, "mean": None, "std": None}, None
