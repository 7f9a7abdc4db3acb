"""Augmentation of whole batches on the device (crop, flip and cutout, drawn for each sample), and normalisation."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
import xxhash
from torch import nn

from errors import UsageError
from stream.seeds import Use, seeded

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
MEAN_COLOUR = tuple(round(255 * channel) for channel in IMAGENET_MEAN)
GREY = round(255 * sum(IMAGENET_MEAN) / 3)
DRAWS = 5  # for a sample: flip, two for the crop, two for the cutout


class Normalize(nn.Module):
    """uint8 images (N, H, W, 3) in 0..255 -> float32 (N, 3, H, W), channels_last, as (x - mean) / std.

    `mean` and `std` are per channel, for pixels scaled to 0..1 (ImageNet's are torchvision's published ones).
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, mean: tuple[float, ...] = IMAGENET_MEAN, std: tuple[float, ...] = IMAGENET_STD) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1) * 255)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1) * 255)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return (images.permute(0, 3, 1, 2).float() - self.mean) / self.std


class BatchAugment(Protocol):
    """Changes uint8 images (N, H, W, 3) on any device, with their ids (int64) on the host; they keep their size."""

    def __call__(self, images: torch.Tensor, ids: torch.Tensor, epoch: int) -> torch.Tensor: ...


@dataclass(frozen=True)
class Chain:
    """Augmentations, one after another."""

    parts: tuple[BatchAugment, ...]

    def __call__(self, images: torch.Tensor, ids: torch.Tensor, epoch: int) -> torch.Tensor:
        for part in self.parts:
            images = part(images, ids, epoch)
        return images


@dataclass(frozen=True)
class Augment:
    """Random changes of uint8 images (N, H, W, 3) that keep their size, each a function of (seed, epoch, sample id).

    In this order: a random crop to the old size after adding `padding` black pixels on every side, a horizontal `flip`
    with probability 1/2, and a grey square of `cutout` pixels around a random centre (DeVries and Taylor 2017).
    """

    seed: int
    flip: bool = False
    padding: int = 0
    cutout: int = 0

    def __call__(self, images: torch.Tensor, ids: torch.Tensor, epoch: int) -> torch.Tensor:
        """`images` on any device, their `ids` (int64) on the host."""
        draws = send(sample_bits(self.seed, Use.BATCH, epoch, ids.numpy(), DRAWS), images.device)
        if self.padding:
            images = crop(images, self.padding, _below(draws[:, 1:3], 2 * self.padding + 1))
        if self.flip:
            images = torch.where(_below(draws[:, :1], 2).bool()[:, :, None, None], images.flip(2), images)
        if self.cutout:
            centres = torch.cat([_below(draws[:, 3 + i : 4 + i], images.shape[1 + i]) for i in range(2)], dim=1)
            images = cut_out(images, self.cutout, centres)
        return images


@dataclass(frozen=True)
class Registered:
    """An augmentation that --augment names: a function of uint8 images (N, H, W, 3) and float32 draws (N, draws).

    The draws are uniform in 0..1, less than 1, each a function of (seed, name, epoch, sample id).
    """

    seed: int
    name: str
    function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    draws: int

    def __call__(self, images: torch.Tensor, ids: torch.Tensor, epoch: int) -> torch.Tensor:
        """`images` on any device, their `ids` (int64) on the host. Raises UsageError for what is no such images."""
        words = np.frombuffer(xxhash.xxh3_128_digest(self.name.encode()), ">u4").tolist()
        bits = sample_bits(self.seed, Use.REGISTERED, epoch, ids.numpy(), self.draws, *words)
        draws = (bits >> 8).astype(np.float32) / np.float32(2**24)  # which float32 holds exactly
        changed = self.function(images, send(draws, images.device))
        if not isinstance(changed, torch.Tensor) or (changed.dtype, changed.shape) != (torch.uint8, images.shape):
            told = (
                f"{changed.dtype} {(*changed.shape,)}" if isinstance(changed, torch.Tensor) else type(changed).__name__
            )
            raise UsageError(f"--augment {self.name} returned {told}; it must return uint8 {(*images.shape,)}")
        return changed


def sample_bits(seed: int, use: Use, epoch: int, ids: np.ndarray, count: int, *numbers: int) -> np.ndarray:
    """`count` random int64 in 0..2^32 - 1 for each sample, (N, count): outputs count * id and up of one SplitMix64.

    `numbers` tell uses of one kind apart. Source: Steele, Lea and Flood 2014, Fast Splittable Pseudorandom Number
    Generators.
    """
    start = seeded(seed, use, epoch, *numbers).generate_state(1, np.uint64)
    index = ids.astype(np.uint64)[:, None] * np.uint64(count) + np.arange(1, count + 1, dtype=np.uint64)
    bits: np.ndarray = start + index * np.uint64(0x9E3779B97F4A7C15)
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((bits ^ (bits >> np.uint64(31))) >> np.uint64(32)).astype(np.int64)


def send(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """A copy on the device, for which the host does not wait."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def unit(bits: np.ndarray) -> np.ndarray:
    """Random 32-bit numbers -> float64, uniform in 0..1, less than 1."""
    return bits / 2**32


def below(bits: np.ndarray, limit: int | np.ndarray) -> np.ndarray:
    """Random 32-bit numbers -> int64, uniform in 0..limit - 1."""
    return bits * limit >> 32


def _below(bits: torch.Tensor, limit: int) -> torch.Tensor:
    """Random 32-bit numbers -> int64, uniform in 0..limit - 1."""
    return bits * limit >> 32


def crop(images: torch.Tensor, padding: int, corners: torch.Tensor) -> torch.Tensor:
    """Pad images (N, H, W, 3) with zeros on every side, then crop to (H, W) at `corners` (N, 2) in 0..2 padding."""
    count, height, width, _ = images.shape
    padded = F.pad(images, (0, 0, padding, padding, padding, padding))
    rows = corners[:, 0, None] + torch.arange(height, device=images.device)
    columns = corners[:, 1, None] + torch.arange(width, device=images.device)
    which = torch.arange(count, device=images.device)
    return padded[which[:, None, None], rows[:, :, None], columns[:, None, :]]


def cut_out(images: torch.Tensor, side: int, centres: torch.Tensor) -> torch.Tensor:
    """Images (N, H, W, 3) with a grey square of `side` pixels around `centres` (N, 2)."""
    masks = []
    for axis in range(2):
        first = centres[:, axis, None] - side // 2
        place = torch.arange(images.shape[1 + axis], device=images.device)
        masks.append((place >= first) & (place < first + side))
    mask = masks[0][:, :, None] & masks[1][:, None, :]
    return images.masked_fill(mask[..., None], GREY)
