"""Losses of classification, for labels and for mixed targets."""

import torch
import torch.nn.functional as F
from torch import nn


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
            target = torch.zeros(logits.shape, device=logits.device).scatter_(1, target[:, None], 1.0)
        target = target * (1.0 - self.smoothing) + self.smoothing / classes
        if self.threshold is not None:
            target = target.gt(self.threshold).float()
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
