"""Losses are those of loops of torchvision's and timm's own parts, and float32 training is torchvision's to the bit."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from huggingface_hub import constants
from torch import nn

from benchmarks.parity import PLANS, Form, Plan, compare
from model_resnet50 import ResNet34
from stream import synthetic
from training.optim import build_optimizer

SHORT = Form(model="resnet18", steps=10, epochs=5, size=36, batch=8, start="recipe")
EXACT = 1e-11


@pytest.fixture(scope="module", autouse=True)
def few_images(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Only as many images are generated as are trained on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HOME", str(tmp_path_factory.mktemp("home")))
        patch.setattr(synthetic, "IMAGES", {"train": 64, "validation": 32})
        yield


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.recipe)
def test_every_loss_of_a_recipe_is_the_references(plan: Plan) -> None:
    found = compare(plan, SHORT)
    assert found.ok
    assert found.loss < EXACT
    assert found.weight < EXACT
    assert found.average is None or found.average < EXACT
    assert (found.average is not None) == (plan.recipe == "resnet50-v2")


@pytest.mark.slow
def test_a_decay_of_norms_that_is_not_the_references_would_be_seen() -> None:
    plan = replace(PLANS[0], shorter=(*PLANS[0].shorter, "--norm_weight_decay", "0"))
    found = compare(plan, replace(SHORT, steps=2, epochs=2))
    assert found.loss > 100 * EXACT
    assert found.weight > 1000 * EXACT


def test_norms_that_start_otherwise_are_refused() -> None:
    plan = replace(PLANS[2], shorter=("--no_zero_init_gamma",))
    with pytest.raises(ValueError, match=r"bn2.weight starts with other values"):
        compare(plan, replace(SHORT, steps=6, epochs=6))


def test_float32_training_is_torchvisions_to_the_bit() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    ours: nn.Module = ResNet34(10, depth=18).to(memory_format=torch.channels_last)
    theirs = torchvision.models.resnet18(num_classes=10).to(memory_format=torch.channels_last)
    theirs.load_state_dict(ours.state_dict())
    optimizers = (
        build_optimizer(ours, 0.05, 0.9, 1e-4, nesterov=False, norm_weight_decay=1e-4, bias_weight_decay=1e-4),
        torch.optim.SGD(theirs.parameters(), 0.05, momentum=0.9, weight_decay=1e-4, fused=True),
    )
    for _ in range(30):
        images, labels = torch.randn(4, 3, 32, 32).to(memory_format=torch.channels_last), torch.randint(10, (4,))
        losses = []
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            loss = F.cross_entropy(model.train()(images), labels)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses.append(loss.item())
        assert losses[0] == losses[1]
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name
