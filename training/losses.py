"""Losses of classification, for labels and for mixed targets, and the weights of classes in them."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from errors import UsageError
from stream.files import read_small


class BinaryCrossEntropy(nn.Module):
    """Each class as a yes or no of its own (Wightman et al. 2021, ResNet strikes back; numbers of timm's module).

    Smoothing gives every class `smoothing` / C and the targets the rest; then, with a `threshold`, targets above it
    become 1 and the others 0. Targets that are already distributions are smoothed too, as timm's Mixup does it. The
    loss is the mean over classes and samples, with `sum_classes` the mean over samples of the sum over classes.
    """

    weight: torch.Tensor | None

    def __init__(
        self, smoothing: float, threshold: float | None, weight: torch.Tensor | None, sum_classes: bool
    ) -> None:
        super().__init__()
        self.smoothing = smoothing
        self.threshold = threshold
        self.sum_classes = sum_classes
        self.register_buffer("weight", weight)

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        classes = logits.shape[1]
        if target.ndim == 1:
            precision = torch.promote_types(logits.dtype, torch.float32)
            target = torch.zeros(logits.shape, dtype=precision, device=logits.device).scatter_(1, target[:, None], 1.0)
        target = target * (1.0 - self.smoothing) + self.smoothing / classes
        if self.threshold is not None:
            target = target.gt(self.threshold).to(target.dtype)
        loss = F.binary_cross_entropy_with_logits(logits, target, self.weight)
        return loss * classes if self.sum_classes else loss


def build_loss(
    kind: str,
    classes: int,
    label_smoothing: float = 0.0,
    bce_threshold: float | None = None,
    class_weights: torch.Tensor | None = None,
    sum_classes: bool = False,
) -> nn.Module:
    """A loss of logits (N, C) and labels int64 (N,) or targets float32 (N, C); a 0-d tensor, the mean over samples.

    `ce` is nn.CrossEntropyLoss, whose mean over labels is weighted by `class_weights` (C,), and over targets is not;
    `bce` is `BinaryCrossEntropy`, to which `bce_threshold` and `sum_classes` belong. Raises ValueError for another
    kind, and for weights that are not `classes` numbers.
    """
    if class_weights is not None and class_weights.shape != (classes,):
        raise ValueError(f"{classes} classes need as many weights, not {tuple(class_weights.shape)}")
    if kind == "ce":
        return nn.CrossEntropyLoss(class_weights, label_smoothing=label_smoothing)
    if kind == "bce":
        return BinaryCrossEntropy(label_smoothing, bce_threshold, class_weights, sum_classes)
    raise ValueError(f"{kind!r} is no loss; there are ce and bce")


def class_weights(source: str, labels: np.ndarray | None, classes: int) -> torch.Tensor:
    """The weight of each class, float32 (classes,): `balanced`, or as a file tells them, a number a line.

    Balanced weights are N / (classes x images of the class), as scikit-learn's; a class without images has none. Raises
    UsageError.
    """
    if source == "balanced":
        if labels is None:
            raise UsageError("--class_weights balanced needs labels that can be read without the images; give a file")
        counts = np.bincount(labels, minlength=classes)
        return torch.from_numpy(np.where(counts, len(labels) / (classes * np.maximum(counts, 1)), 0.0)).float()
    try:
        weights = torch.tensor([float(line) for line in read_small(Path(source)).decode().split()])
    except (OSError, ValueError) as error:
        raise UsageError(f"--class_weights {source} cannot be read ({error}); give a number a line") from error
    if weights.shape != (classes,) or not bool((weights.isfinite() & (weights >= 0)).all()) or not weights.any():
        raise UsageError(
            f"--class_weights {source} has {len(weights)} numbers for {classes} classes; give each one, none negative"
        )
    return weights
