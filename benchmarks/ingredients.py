"""What each ingredient of the recipes gives or takes on Fashion-MNIST, with equal budgets and several seeds.

    uv run python benchmarks/ingredients.py --data_dir /usr/share/datasets/fashion-mnist     # the table in RESULTS.md

A ResNet of 16 to 64 channels is trained on a fair sample for a few epochs, once without any ingredient and once with
each, from the same weights and in the same order for each seed. That is far from the hundreds of epochs for which the
published recipes need their regularisation, so a loss here does not speak against them.
"""

import argparse
import contextlib
import io
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import main as program
from benchmarks.common import installed_versions, last_epoch, record
from model_resnet50 import BasicBlock, conv1x1
from training import step

INGREDIENTS: dict[str, tuple[str, ...]] = {
    "none": (),
    "label smoothing 0.1": ("--label_smoothing", "0.1"),
    "random erasing 0.5": ("--random_erasing", "0.5"),
    "mixup 0.2": ("--mixup", "0.2"),
    "cutmix 1": ("--cutmix", "1"),
    "TrivialAugmentWide": ("--auto_augment", "ta_wide"),
    "repeats 2": ("--repeats", "2"),
    "average of weights 0.99": ("--ema_decay", "0.99"),
    "binary cross-entropy": ("--loss", "bce"),
    "stochastic depth 0.1": ("--drop_path", "0.1"),
    "mirrored evaluation": ("--tta", "flip"),
}


class Narrow(nn.Module):
    """float (N, 3, H, W) -> logits (N, classes): a stem and three residual blocks of 16, 32 and 64 channels."""

    def __init__(self, classes: int, drop_path: float) -> None:
        super().__init__()
        self.name = "narrow ResNet"
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        blocks = [BasicBlock(16, 16, 1, None)]
        for inputs in (16, 32):
            shortcut = nn.Sequential(conv1x1(inputs, 2 * inputs, 2), nn.BatchNorm2d(2 * inputs))
            blocks.append(BasicBlock(inputs, 2 * inputs, 2, shortcut))
        if drop_path:
            from torchvision.ops import StochasticDepth

            for number, block in enumerate(blocks):
                block.drop_path = StochasticDepth(drop_path * number / 2, "row")
        self.blocks, self.fc = nn.Sequential(*blocks), nn.Linear(64, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.blocks(self.bn1(self.conv1(x)).relu()).mean((2, 3)))


def narrow(classes: int, size: int, name: str, options: dict[str, Any]) -> Narrow:
    """In place of `build_model`."""
    return Narrow(classes, options["drop_path"])


def top1(folder: Path, flags: Sequence[str]) -> float:
    """The accuracy after the last epoch, in %: that of the average where there is one."""
    with contextlib.redirect_stdout(io.StringIO()):
        assert program.main([*flags, "--run_dir", str(folder)]) == 0
    last = last_epoch(folder)
    return 100 * float(last.get("ema_top1") or last["val_top1"])


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--data_dir", required=True)
    flags.add_argument("--images", type=int, default=10_000)
    flags.add_argument("--epochs", type=int, default=6)
    flags.add_argument("--seeds", type=int, default=3)
    given = flags.parse_args()
    step.build_model = narrow  # type: ignore[assignment]
    common: tuple[Any, ...] = ("--dataset", "fashion_mnist", "--data_dir", given.data_dir, "--epochs", given.epochs)
    common = (*common, "--max_samples", given.images, "--keep_snapshots", 1)
    rows = ["| ingredient | top-1 of each seed, % | mean | against none, of each seed |", "| --- | --- | --- | --- |"]
    plain: list[float] = []
    with tempfile.TemporaryDirectory() as name:
        for ingredient, extra in INGREDIENTS.items():
            found = [
                top1(Path(name) / f"{ingredient} {seed}", [*map(str, common), *extra, "--seed", str(seed)])
                for seed in range(given.seeds)
            ]
            plain = plain or found
            gains = ", ".join(f"{ours - theirs:+.2f}" for ours, theirs in zip(found, plain, strict=True))
            rows.append(f"| {ingredient} | {', '.join(f'{one:.2f}' for one in found)} | {mean(found):.2f} | {gains} |")
            print(rows[-1], flush=True)
    set_up = f"{given.images:,} training images, {given.epochs} epochs, narrow ResNet, OneCycle, default rate."
    record("Ingredients on Fashion-MNIST", set_up, "\n".join(rows), installed_versions())


if __name__ == "__main__":
    main()
