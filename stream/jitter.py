"""Random changes of colour for whole batches."""

from dataclasses import dataclass
from itertools import permutations
from typing import ClassVar

import numpy as np
import torch

from stream.augment import below, sample_bits, unit
from stream.operations import NOTHING, Choice, apply, jitter_operations
from stream.seeds import Use

ORDERS = np.array(list(permutations(range(4))))


@dataclass(frozen=True)
class ColorJitter:
    """As torchvision.transforms.ColorJitter, in an order of its own for each sample; 0 leaves a colour alone.

    Factors are drawn from max(0, 1 - x)..1 + x for brightness, contrast and saturation, and from -x..x for hue (at most
    0.5). Each is a function of (seed, epoch, sample id).
    """

    seed: int
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    draws: ClassVar[int] = 5  # order, one for each factor

    def __post_init__(self) -> None:
        if min(self._most()) < 0 or self.hue > 0.5:
            raise ValueError("colour jitter is at least 0, and that of hue at most 0.5")

    def __call__(self, images: torch.Tensor, ids: torch.Tensor, epoch: int) -> torch.Tensor:
        """uint8 images (N, H, W, 3) on any device, their `ids` (int64) on the host; returns new memory."""
        out = images.clone()
        operations = list(jitter_operations().values())
        for choice in self.choose(ids.numpy(), epoch):
            apply(out, choice, operations)
        return out

    def choose(self, ids: np.ndarray, epoch: int) -> list[Choice]:
        """Of each sample the four changes in their order; a magnitude is a factor less 1, or a turn of hue."""
        bits = sample_bits(self.seed, Use.JITTER, epoch, ids, self.draws)
        most = np.array(self._most())
        least = np.maximum(-most, [-1, -1, -1, -0.5])
        changes = least + (most - least) * unit(bits[:, 1:])
        orders = ORDERS[below(bits[:, 0], len(ORDERS))]
        rows = np.arange(len(ids))
        return [Choice(np.where(most[kinds] > 0, kinds, NOTHING), changes[rows, kinds]) for kinds in orders.T]

    def _most(self) -> tuple[float, ...]:
        return self.brightness, self.contrast, self.saturation, self.hue
