"""Losses and their gradients are torch's and timm's, for labels and for mixed targets."""

from typing import Any

import pytest
import torch
from torch import nn
from waiting import nothing_waits

from training.losses import build_loss
from training.mixing import Mix

CLASSES = 13
LABELS = torch.tensor([0, 12, 5, 5, 3, 7, 1, 9])
WEIGHTS = torch.linspace(0.3, 2.0, CLASSES)


def logits() -> torch.Tensor:
    return (3 * torch.randn((len(LABELS), CLASSES), generator=torch.Generator().manual_seed(0))).requires_grad_()


def soft() -> torch.Tensor:
    return torch.softmax(torch.randn((len(LABELS), CLASSES), generator=torch.Generator().manual_seed(1)), 1)


def assert_same(ours: nn.Module, theirs: nn.Module, target: torch.Tensor, their_target: torch.Tensor) -> None:
    """Loss and gradient, but for what another order of the sums costs."""
    found = []
    for loss, aim in ((ours, target), (theirs, their_target)):
        x = logits()
        value = loss(x, aim)
        value.backward()
        assert value.shape == ()
        assert x.grad is not None
        found.append((value.detach(), x.grad))
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("target", [LABELS, soft()])
def test_ce_is_torchs(smoothing: float, weights: torch.Tensor | None, target: torch.Tensor) -> None:
    ours = build_loss("ce", CLASSES, smoothing, None, weights)
    assert_same(ours, nn.CrossEntropyLoss(weights, label_smoothing=smoothing), target, target)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("threshold", [None, 0.0, 0.2, 0.9])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("sum_classes", [False, True])
def test_bce_of_labels_is_timms(
    smoothing: float, threshold: float | None, weights: torch.Tensor | None, sum_classes: bool
) -> None:
    from timm.loss import BinaryCrossEntropy

    theirs = BinaryCrossEntropy(smoothing, threshold, weights, sum_classes=sum_classes)
    assert_same(build_loss("bce", CLASSES, smoothing, threshold, weights, sum_classes), theirs, LABELS, LABELS)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("share", [0.15, 0.5, 0.7, 1.0])
@pytest.mark.parametrize(("kind", "threshold"), [("ce", None), ("bce", None), ("bce", 0.2)])
def test_mixed_targets_cost_what_timms_mixup_and_losses_make_of_them(
    smoothing: float, share: float, kind: str, threshold: float | None
) -> None:
    from timm import loss as losses
    from timm.data.mixup import mixup_target

    theirs: Any = losses.SoftTargetCrossEntropy()
    if kind == "bce":
        theirs = losses.BinaryCrossEntropy(smoothing, threshold)
    mixed = Mix(share).targets(LABELS, LABELS.flip(0), CLASSES)
    wanted = mixup_target(LABELS, CLASSES, share, smoothing)
    assert_same(build_loss(kind, CLASSES, smoothing, threshold), theirs, mixed, wanted)


def test_labels_cost_what_their_targets_do() -> None:
    targets = torch.eye(CLASSES)[LABELS]
    for kind in ("ce", "bce"):
        loss = build_loss(kind, CLASSES, 0.1)
        assert_same(loss, loss, LABELS, targets)


def test_a_loss_has_no_state_but_its_weights_and_works_in_mixed_precision() -> None:
    for kind in ("ce", "bce"):
        loss = build_loss(kind, CLASSES, 0.1, None, WEIGHTS)
        assert set(loss.state_dict()) == {"weight"}
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(logits().bfloat16(), LABELS)
        assert value.dtype == torch.float32
        assert torch.isfinite(value)
        with nothing_waits():
            loss(logits(), LABELS).backward()


def test_what_is_no_loss_is_refused() -> None:
    with pytest.raises(ValueError, match="'mse' is no loss; there are ce and bce"):
        build_loss("mse", CLASSES)
    with pytest.raises(ValueError, match="13 classes need as many weights"):
        build_loss("ce", CLASSES, class_weights=torch.ones(3))
