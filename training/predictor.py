"""A model as what comes after a step sees it: images in, logits out."""

from dataclasses import dataclass

import torch
from torch import nn

from config import Config
from flags import channel_values
from stream.augment import IMAGENET_MEAN, IMAGENET_STD, Normalize


def normalize_of(config: Config) -> Normalize:
    """The normalisation that a run's images get."""
    mean = channel_values(config.mean) if config.mean else IMAGENET_MEAN
    return Normalize(mean, channel_values(config.std) if config.std else IMAGENET_STD)


def amp_dtype_of(config: Config, device: torch.device) -> torch.dtype | None:
    """The dtype of mixed precision, None without it."""
    if not config.amp:
        return None
    if config.amp_dtype == "auto":
        has_bf16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_bf16 else torch.float16
    return {"bf16": torch.bfloat16, "fp16": torch.float16}[config.amp_dtype]


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
    torch.set_float32_matmul_precision("high")  # TF32, which cuDNN's convolutions use anyway
    model = model.to(device).to(memory_format=torch.channels_last)
    normalize = normalize_of(config).to(device)
    if config.compile:
        model.compile()
        normalize.compile()
    return Predictor(
        model=model,
        normalize=normalize,
        device=device,
        amp_dtype=amp_dtype_of(config, device),
        mirrored=config.tta == "flip",
    )
