"""Files of weights: .safetensors, and .pth of which only tensors are read."""

import zipfile
from pathlib import Path
from typing import Any

import torch

from errors import DataError, printable
from model_resnet50 import LAYERS

INNER = ("model_ema", "state_dict_ema", "ema_state_dict", "state_dict", "model", "model_state_dict")
AVERAGES = INNER[:3]
PREFIXES = ("module.", "_orig_mod.", "model.")
MOST_UNPACKED = 1.1  # times a file's size: torch packs nothing, so that a file that grows is made to harm
KINDS = (".safetensors", ".pth", ".pt", ".bin", ".tar")


def read_weights(path: Path, averaged: bool = False) -> dict[str, torch.Tensor]:
    """The tensors of a weight file by name, floating ones as float32, without what wraps them.

    A checkpoint is searched for its model, or with `averaged` for its averaged model; `module.` (DDP), `_orig_mod.`
    (torch.compile) and `model.` are cut off names. Raises DataError.
    """
    if path.suffix not in KINDS:
        raise DataError(f"{path} is no file of weights ({', '.join(KINDS[:-1])}); give one")
    try:
        found = _safetensors(path) if path.suffix == ".safetensors" else _torch(path)
    except DataError:
        raise
    except Exception as error:  # pickles, zips and safetensors fail in their own ways
        reason = printable(str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__)
        raise DataError(
            f"{path} cannot be read as weights ({reason[:160]}); give a file of tensors only, as safetensors are"
        ) from error
    return _plain(found, path, averaged)


def _safetensors(path: Path) -> Any:
    from safetensors.torch import load_file

    return load_file(path)


def _torch(path: Path) -> Any:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > MOST_UNPACKED * path.stat().st_size:
            raise DataError(f"{path} unpacks to {unpacked / 1e6:,.0f} MB, which weights do not; fetch it again")
    return torch.load(path, map_location="cpu", weights_only=True)


def _plain(found: Any, path: Path, averaged: bool) -> dict[str, torch.Tensor]:
    wanted = AVERAGES if averaged else (*INNER[3:], *AVERAGES)
    opened: set[int] = set()  # a pickle may hold itself
    while isinstance(found, dict) and (name := next((n for n in wanted if isinstance(found.get(n), dict)), None)):
        if id(found) in opened:
            raise DataError(f"{path} holds itself as its model; give a state_dict")
        opened.add(id(found))
        found, averaged = found[name], False
    if averaged:
        raise DataError(f"{path} holds no average of the weights; leave out --which ema")
    tensors = {str(n): t for n, t in found.items() if isinstance(t, torch.Tensor)} if isinstance(found, dict) else {}
    while prefix := next((p for p in PREFIXES if sum(name.startswith(p) for name in tensors) * 2 > len(tensors)), None):
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    tensors.pop("n_averaged", None)
    if odd := next((name for name, tensor in tensors.items() if not _is_plain(tensor)), None):
        raise DataError(
            f"{path} holds weights that are no plain numbers (see {printable(odd)}); give a dense state_dict"
        )
    if any(tensor.untyped_storage().nbytes() < tensor.nbytes for tensor in tensors.values()):
        raise DataError(f"{path} holds tensors that are larger than their data; fetch it again")
    if not tensors:
        raise DataError(f"{path} holds no weights by name; give a state_dict")
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor has real numbers in memory: neither sparse nor quantised nor complex nor without data."""
    is_dense = tensor.layout is torch.strided and tensor.device.type == "cpu"
    return is_dense and not tensor.is_quantized and not tensor.is_complex()


def resnet_of(weights: dict[str, torch.Tensor]) -> str | None:
    """The name of the ResNet whose weights these are by their names; None for another model."""
    blocks = tuple(
        len({name.split(".")[1] for name in weights if name.startswith(f"layer{stage}.")}) for stage in range(1, 5)
    )
    is_deep = "layer1.0.conv3.weight" in weights
    for depth, layers in LAYERS.items():
        if (*layers, 0)[:4] == blocks and (depth >= 50) == is_deep and "conv1.weight" in weights:
            return f"resnet{depth}"
    return None
