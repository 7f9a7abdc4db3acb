"""Mixup and cutmix: images of a step mixed with others of it, and their targets in the same shares."""

import math
from dataclasses import dataclass

import numpy as np
import torch

from stream.seeds import Use, seeded


@dataclass(frozen=True)
class Mix:
    """How a step's images are mixed: `share` of each stays; cutmix puts `box` (left, top, right, bottom) of the other.

    Numbers as in torchvision.transforms.v2.MixUp and CutMix.
    """

    share: float
    box: tuple[int, int, int, int] | None = None

    def apply(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """Float images (N, C, H, W) and their partners -> mixed images, in new memory."""
        if self.box is None:
            return other.mul(1.0 - self.share).add_(x.mul(self.share))
        left, top, right, bottom = self.box
        mixed = x.clone()
        mixed[..., top:bottom, left:right] = other[..., top:bottom, left:right]
        return mixed

    def targets(
        self, labels: torch.Tensor, other_labels: torch.Tensor, classes: int, dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        """Labels int64 (N,) of the images and of their partners -> (N, classes), each row with the sum 1."""
        others = _one_hot(other_labels, classes, dtype).mul_(1.0 - self.share)
        return others.add_(_one_hot(labels, classes, dtype).mul_(self.share))


@dataclass(frozen=True)
class Mixing:
    """Draws a `Mix` for each step: mixup (Zhang et al. 2018) or cutmix (Yun et al. 2019), each in half of the steps.

    `mixup` and `cutmix` are the alphas of Beta(alpha, alpha); 0 leaves that one out, both 0 are a ValueError. Images
    are mixed within `group` consecutive ones of a batch, see `partners`.
    """

    mixup: float
    cutmix: float
    seed: int
    group: int

    def __post_init__(self) -> None:
        if min(self.mixup, self.cutmix) < 0 or max(self.mixup, self.cutmix) == 0:
            raise ValueError("mixing needs a positive alpha for mixup or cutmix, and no negative one")

    def draw(self, step: int, height: int, width: int) -> Mix:
        """The mix of a step for images of this size: a function of (seed, step) and the size, the same on any rank."""
        random = np.random.Generator(np.random.PCG64(seeded(self.seed, Use.MIX, step)))
        coin, across, down = random.random(3)
        cut = coin < 0.5 if self.mixup and self.cutmix else self.cutmix > 0
        alpha = self.cutmix if cut else self.mixup
        share = random.beta(alpha, alpha)
        return cut_mix(share, int(across * width), int(down * height), height, width) if cut else Mix(share)


def cut_mix(share: float, column: int, row: int, height: int, width: int) -> Mix:
    """A box around a pixel that would leave `share` of an image, clipped at its edges, and the share that it leaves."""
    half = 0.5 * math.sqrt(1.0 - share)
    across, down = int(half * width), int(half * height)
    left, right = max(column - across, 0), min(column + across, width)
    top, bottom = max(row - down, 0), min(row + down, height)
    return Mix(1.0 - (right - left) * (bottom - top) / (width * height), (left, top, right, bottom))


def partners(batch: torch.Tensor, group: int) -> torch.Tensor:
    """For each image or label (N, ...) the one that it is mixed with: the one before it, for a group's first its last.

    With one stream's share of a global batch as `group`, pairs are the same on any number of ranks.
    """
    return batch.reshape(-1, group, *batch.shape[1:]).roll(1, 1).flatten(0, 1)


def _one_hot(labels: torch.Tensor, classes: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(len(labels), classes, dtype=dtype, device=labels.device).scatter_(1, labels[:, None], 1.0)
