"""A model as what comes after a step sees it: images in, logits out."""

from dataclasses import dataclass

import torch
from torch import nn

import distributed
import machine
from config import Config
from errors import complain
from flags import channel_values
from stream.augment import IMAGENET_MEAN, IMAGENET_STD, Normalize
from training.compiling import keep_compiled, require_compiler

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "float32": None}


def normalize_of(config: Config) -> Normalize:
    """The normalisation that a run's images get."""
    mean = channel_values(config.mean) if config.mean else IMAGENET_MEAN
    return Normalize(mean, channel_values(config.std) if config.std else IMAGENET_STD)


def amp_dtype_of(config: Config, device: torch.device, began: str | None = None) -> torch.dtype | None:
    """The dtype of mixed precision, None for float32.

    Without an --amp_dtype it is what the device has instructions for, on a resume the one that the run `began` with, as
    `precision` names it. A line tells of what is emulated or would be another here.
    """
    if not config.amp:
        return None
    here = _fastest(device)
    chosen = DTYPES[config.amp_dtype if config.amp_dtype != "auto" else began or precision(here)]
    told = ""
    if here is None and chosen is torch.bfloat16:
        told = "bfloat16 is emulated on this CPU, several times slower than float32"
        told += "; --override amp=false goes on in that" if began else "; leave out --amp"
    elif here is None and config.amp_dtype == "auto":
        told = "--amp is without effect: bfloat16 is emulated on this CPU, several times slower than float32, which is "
        told += "used; --amp_dtype bf16 insists"
    elif began and chosen is not here and config.amp_dtype == "auto":
        told = f"this run began in {precision(chosen)} and goes on so; here it would have begun in {precision(here)}"
    if told and distributed.rank() == 0:
        complain(f"warning: {told}")
    return chosen


def _fastest(device: torch.device) -> torch.dtype | None:
    """The narrow dtype that a device has instructions for, None where it has none."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return None if device.type == "cpu" and machine.cpu_has_bf16() is False else torch.bfloat16


def precision(dtype: torch.dtype | None) -> str:
    """The name of a dtype that `amp_dtype_of` returned."""
    return next(name for name, named in DTYPES.items() if named is dtype)


@dataclass(kw_only=True)
class Predictor:
    """A model on a device, with the normalisation that its images get; `mirrored` averages over their mirror images."""

    model: nn.Module
    normalize: Normalize
    device: torch.device
    amp_dtype: torch.dtype | None = None
    mirrored: bool = False

    def autocast(self) -> torch.autocast:
        """The context of mixed precision, disabled without an `amp_dtype`."""
        return torch.autocast(self.device.type, dtype=self.amp_dtype, enabled=self.amp_dtype is not None)

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 images (N, H, W, 3) on the device -> logits (N, classes)."""
        with self.autocast():
            inputs = self.normalize(images)
            logits: torch.Tensor = self.model(inputs)
            if self.mirrored:
                logits = (logits + self.model(inputs.flip(3))) / 2
        return logits


def build_predictor(model: nn.Module, config: Config, device: torch.device) -> Predictor:
    """A trained model on its device, prepared as in training, with the normalisation and precision of the settings."""
    require_compiler(config, device)
    torch.set_float32_matmul_precision("high")  # TF32, which cuDNN's convolutions use anyway
    model = model.to(device).to(memory_format=torch.channels_last)
    normalize = normalize_of(config).to(device)
    if config.compile:
        keep_compiled()
        model.compile()
        normalize.compile()
    return Predictor(
        model=model,
        normalize=normalize,
        device=device,
        amp_dtype=amp_dtype_of(config, device),
        mirrored=config.tta == "flip",
    )
