"""Automatic augmentation of whole batches: TrivialAugmentWide, and RandAugment as torchvision and as timm have it."""

from dataclasses import dataclass
from functools import cache, cached_property
from typing import ClassVar, Protocol

import numpy as np
import torch

from stream.augment import MEAN_COLOUR, below, sample_bits, unit
from stream.operations import NOTHING, Choice, Operation, apply, timm_operations, torchvision_operations
from stream.policies import BINS, read_policy
from stream.seeds import Use

LEVELS = 10.0  # timm's magnitudes are tenths of the range of an operation


class Policy(Protocol):
    """Chooses operations `layers` times, each time from `draws` random 32-bit numbers a sample."""

    @property
    def draws(self) -> int: ...

    @property
    def layers(self) -> int: ...

    @property
    def operations(self) -> dict[str, Operation | None]: ...

    def choose(self, bits: np.ndarray, height: int, width: int) -> Choice:
        """The choice that `bits`, int64 (N, draws), make for images of this size."""


@dataclass(frozen=True)
class AutoAugment:
    """Random operations on uint8 images (N, H, W, 3), each a function of (seed, epoch, sample id); see `parse`."""

    seed: int
    policy: Policy

    @classmethod
    def parse(cls, policy: str, seed: int, interpolation: str | None = None) -> "AutoAugment":
        """`ta_wide`, `ra` or `ra-n2-m9` as in torchvision; `rand-m7-n2-mstd0.5-inc1` (p and mmax too) as in timm.

        Sources: Müller and Hutter 2021, TrivialAugment; Cubuk et al. 2020, RandAugment; Wightman et al. 2021, ResNet
        strikes back. `interpolation` is nearest (torchvision's default) or bilinear. timm's is always bicubic, filling
        with ImageNet's mean colour, as its create_transform does for a bicubic training interpolation; without one it
        takes bilinear or bicubic at random. Raises ValueError.
        """
        return cls(seed, _policy(policy, interpolation))

    def __call__(self, images: torch.Tensor, ids: torch.Tensor, epoch: int) -> torch.Tensor:
        """`images` on any device, their `ids` (int64) on the host; returns new memory."""
        out = images.clone()
        operations = list(self.policy.operations.values())
        for choice in self.choose(ids.numpy(), epoch, *images.shape[1:3]):
            apply(out, choice, operations)
        return out

    def choose(self, ids: np.ndarray, epoch: int, height: int, width: int) -> list[Choice]:
        """The choices for samples, one a layer."""
        draws, layers = self.policy.draws, self.policy.layers
        bits = sample_bits(self.seed, Use.AUTO_AUGMENT, epoch, ids, draws * layers)
        return [self.policy.choose(part, height, width) for part in np.split(bits, layers, axis=1)]


@dataclass(frozen=True)
class TrivialAugmentWide:
    """One operation for each sample, with any of 31 magnitudes."""

    interpolation: str
    layers: ClassVar[int] = 1
    draws: ClassVar[int] = 3  # operation, magnitude, sign

    @cached_property
    def operations(self) -> dict[str, Operation | None]:
        return torchvision_operations(self.interpolation)

    def choose(self, bits: np.ndarray, height: int, width: int) -> Choice:
        tables, signed = torchvision_magnitudes(0.99, 32.0, 32.0, 135.0, 6)
        operations = below(bits[:, 0], len(tables))
        magnitudes = tables[operations, below(bits[:, 1], BINS)]
        return Choice(operations, np.where(signed[operations] & (bits[:, 2] >> 31 == 1), -magnitudes, magnitudes))


@dataclass(frozen=True)
class RandAugment:
    """`layers` operations for each sample, of one magnitude of 31."""

    interpolation: str
    layers: int
    magnitude: int
    draws: ClassVar[int] = 2  # operation, sign

    @cached_property
    def operations(self) -> dict[str, Operation | None]:
        return torchvision_operations(self.interpolation)

    def choose(self, bits: np.ndarray, height: int, width: int) -> Choice:
        tables, signed = torchvision_magnitudes(0.3, 150.0 / 331.0 * width, 150.0 / 331.0 * height, 30.0, 4, colour=0.9)
        operations = below(bits[:, 0], len(tables))
        magnitudes = tables[operations, self.magnitude]
        return Choice(operations, np.where(signed[operations] & (bits[:, 1] >> 31 == 1), -magnitudes, magnitudes))


@cache
def torchvision_magnitudes(
    shear: float, shift_x: float, shift_y: float, turn: float, bits: int, colour: float = 0.99
) -> tuple[np.ndarray, np.ndarray]:
    """The magnitudes of torchvision's operations, float64 (14, BINS), and which of these have a sign, bool (14,).

    The ends of their ranges are given; colours are changed by up to `colour`.
    """
    ends = [0, shear, shear, shift_x, shift_y, turn, *[colour] * 4]
    tables = [torch.linspace(0.0, end, BINS) for end in ends]
    tables += [8 - (torch.arange(BINS) / ((BINS - 1) / bits)).round(), torch.linspace(255.0, 0.0, BINS)]
    tables += [torch.zeros(BINS)] * 2
    return torch.stack(tables).double().numpy(), np.array([False] + [True] * 9 + [False] * 4)


@dataclass(frozen=True)
class TimmRandAugment:
    """`layers` operations for each sample, each done with `probability`, of a `magnitude` with normal noise.

    The noise has the deviation `noise`; an infinite one draws the magnitude evenly from 0 on. What comes out is kept
    within 0..`most`. With `increasing`, operations do more the greater the magnitude.
    """

    layers: int
    magnitude: int
    noise: float
    most: int
    probability: float
    increasing: bool
    draws: ClassVar[int] = 5  # operation, whether it is done, two for the magnitude, sign

    @cached_property
    def operations(self) -> dict[str, Operation | None]:
        return dict(timm_operations(MEAN_COLOUR))

    def choose(self, bits: np.ndarray, height: int, width: int) -> Choice:
        units = unit(bits)
        operations = below(bits[:, 0], len(self.operations))
        levels = np.full(len(bits), float(self.magnitude))
        if self.noise == np.inf:
            levels *= units[:, 2]
        elif self.noise:
            levels += self.noise * np.sqrt(-2 * np.log(1 - units[:, 2])) * np.cos(2 * np.pi * units[:, 3])
        magnitudes = np.zeros(len(bits))
        found = timm_magnitudes(levels.clip(0, self.most), np.where(bits[:, 4] >> 31, -1, 1), self.increasing)
        for place, name in enumerate(self.operations):
            chosen = operations == place
            magnitudes[chosen] = found.get(name, magnitudes)[chosen]
        return Choice(np.where(units[:, 1] < self.probability, operations, NOTHING), magnitudes)


def timm_magnitudes(levels: np.ndarray, signs: np.ndarray, increasing: bool) -> dict[str, np.ndarray]:
    """What timm makes of levels (N,) for each operation that has a magnitude."""
    parts = levels / LEVELS
    factors = np.maximum(0.1, 1.0 + signs * (parts * 0.9)) if increasing else parts * 1.8 + 0.1
    bits, threshold = np.trunc(parts * 4), np.minimum(256, np.trunc(parts * 256))
    found = dict.fromkeys(("Color", "Contrast", "Brightness", "Sharpness"), factors)
    found |= dict.fromkeys(("ShearX", "ShearY"), signs * (parts * 0.3))
    found |= dict.fromkeys(("TranslateXRel", "TranslateYRel"), signs * (parts * 0.45))
    return found | {
        "Rotate": signs * (parts * 30.0),
        "Posterize": 4 - bits if increasing else bits,
        "Solarize": 256 - threshold if increasing else threshold,
        "SolarizeAdd": np.minimum(128, np.trunc(parts * 110)),
    }


def _policy(text: str, interpolation: str | None) -> Policy:
    name, given = read_policy(text)
    if interpolation not in ([None, "bicubic"] if name == "rand" else [None, "nearest", "bilinear"]):
        raise ValueError(f"{name} has no {interpolation} interpolation; rand has bicubic, the others nearest, bilinear")
    if name == "rand":
        noise = given.get("mstd", 0.0)
        return TimmRandAugment(
            layers=int(given.get("n", 2)),
            magnitude=int(given.get("m", LEVELS)),
            noise=noise if noise <= 100 else np.inf,
            most=int(given.get("mmax", 0) or LEVELS),
            probability=given.get("p", 0.5),
            increasing=bool(given.get("inc", 0)),
        )
    if name == "ra":
        return RandAugment(interpolation or "nearest", int(given.get("n", 2)), int(given.get("m", 9)))
    return TrivialAugmentWide(interpolation or "nearest")
