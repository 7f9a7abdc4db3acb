"""What following the learning rate finder costs: regret, in points of accuracy, of each method's suggestion.

    uv run python benchmarks/lr_regret.py            # the table in RESULTS.md, about half an hour on two cores

A cell is a small model, data and a batch size. For every seed of a cell the finder sweeps once, and the model is
trained by OneCycle for the same few epochs at each rate of a grid and at each method's suggestion. Regret is the best
grid rate's mean accuracy less the mean accuracy at the suggestions. Seeds are added until the standard error of every
method's mean is small enough, or there are too many of them.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler

from augment import Normalize
from config import resolve
from lr_finder import RangeTest, find_lr_advanced
from model_resnet50 import BasicBlock, conv1x1, conv3x3
from optim import build_optimizer, build_scaler, build_schedule
from train import Training, train_step

GRID = [0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0]
CPU = torch.device("cpu")

Split = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Cell:
    """`data()` gives images, uint8 (N, H, W, 3), and labels, of the training and of the validation split."""

    name: str
    data: Callable[[], tuple[Split, Split]]
    model: Callable[[int], nn.Module]
    batch_size: int
    epochs: int


def digits(train: int = 1200, noise: float = 0.0) -> tuple[Split, Split]:
    """scikit-learn's digits, 597 of them for validation; `noise` is the share of training labels drawn at random."""
    found = load_digits()
    rng = np.random.default_rng(0)
    order = rng.permutation(len(found.target))
    images = np.repeat((found.images[order] * 255 / 16).round().astype(np.uint8)[..., None], 3, axis=-1)
    labels = found.target[order].astype(np.int64)
    known = labels[:train].copy()
    wrong = rng.random(train) < noise
    known[wrong] = rng.integers(0, 10, wrong.sum())
    return (
        (torch.from_numpy(images[:train]), torch.from_numpy(known)),
        (torch.from_numpy(images[1200:]), torch.from_numpy(labels[1200:])),
    )


def textures(train: int = 1200, contrast: float = 0.35) -> tuple[Split, Split]:
    """Gratings of 10 orientations in noise, 10x10 pixels, 2,000 of them for validation."""
    rng = np.random.default_rng(1)
    count = train + 2000
    labels = rng.integers(0, 10, count)
    angle = (labels + rng.uniform(-0.3, 0.3, count)) * np.pi / 10
    y, x = np.mgrid[:10, :10]
    along = np.cos(angle)[:, None, None] * x + np.sin(angle)[:, None, None] * y
    wave = np.sin(along * rng.uniform(1.2, 1.8, (count, 1, 1)) + rng.uniform(0, 2 * np.pi, (count, 1, 1)))
    pixels = 127 + 100 * (contrast * wave[..., None] + rng.normal(0, 0.3, (count, 10, 10, 3)))
    images = torch.from_numpy(pixels.clip(0, 255).astype(np.uint8))
    return (images[:train], torch.from_numpy(labels[:train])), (images[train:], torch.from_numpy(labels[train:]))


def residual(size: int) -> nn.Module:
    """A ResNet of two blocks, 16 and 32 channels wide."""
    down = nn.Sequential(conv1x1(16, 32, 2), nn.BatchNorm2d(32))
    stem = (conv3x3(3, 16), nn.BatchNorm2d(16), nn.ReLU())
    blocks = (BasicBlock(16, 16, 1, None), BasicBlock(16, 32, 2, down))
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def plain(size: int) -> nn.Module:
    """Three convolutions without normalisation (He et al. 2015's initialisation)."""
    convolutions = (nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 32, 3, 2, padding=1), nn.Conv2d(32, 32, 3, padding=1))
    layers: list[nn.Module] = []
    for convolution in convolutions:
        nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
        layers += [convolution, nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def perceptron(size: int) -> nn.Module:
    """One hidden layer of 128."""
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * size * size, 128), nn.ReLU(), nn.Linear(128, 10))


CELLS = [
    Cell("digits, residual, batch 64", digits, residual, 64, 6),
    Cell("digits, residual, batch 16", digits, residual, 16, 3),
    Cell("digits, residual, batch 256", digits, residual, 256, 12),
    Cell("300 digits, residual, batch 32", partial(digits, 300), residual, 32, 12),
    Cell("digits with 20 % wrong labels, residual, batch 64", partial(digits, noise=0.2), residual, 64, 8),
    Cell("digits with 50 % wrong labels, residual, batch 64", partial(digits, noise=0.5), residual, 64, 8),
    Cell("digits, plain convolutions, batch 64", digits, plain, 64, 10),
    Cell("digits, perceptron, batch 64", digits, perceptron, 64, 6),
    Cell("textures, residual, batch 64", textures, residual, 64, 6),
    Cell("textures, residual, batch 256", textures, residual, 256, 12),
]


class Batches(Dataset[Split]):
    """A split that is asked for whole batches."""

    def __init__(self, split: Split) -> None:
        self.images, self.labels = split

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: list[int]) -> Split:
        return self.images[rows], self.labels[rows]


def batches(split: Split, size: int) -> DataLoader[Split]:
    data = Batches(split)
    return DataLoader(data, batch_size=None, sampler=BatchSampler(RandomSampler(data), size, drop_last=True))


def prepare(cell: Cell, seed: int) -> tuple[Training, DataLoader[Split], Split]:
    """A fresh model, its training batches, and the validation split."""
    torch.manual_seed(seed)
    train, val = cached(cell.data)
    model = cell.model(train[0].shape[1])
    training = Training(
        model=model,
        ddp=model,
        normalize=Normalize(),
        criterion=nn.CrossEntropyLoss(),
        optimizer=build_optimizer(model, 0.1, 0.9, 5e-4),
        scaler=build_scaler(CPU, None),
        device=CPU,
        amp_dtype=None,
        accumulate_steps=1,
        max_grad_norm=None,
    )
    return training, batches(train, cell.batch_size), val


@cache
def cached(data: Callable[[], tuple[Split, Split]]) -> tuple[Split, Split]:
    return data()


def sweep(cell: Cell, seed: int, num_iter: int = 100) -> RangeTest:
    """The finder as run_lr_finder.py runs it."""
    training, loader, _ = prepare(cell, seed)
    step = lambda images, labels: train_step(training, images, labels)[0]
    return find_lr_advanced(
        training.model, training.optimizer, training.criterion, loader, train_step=step, num_iter=num_iter
    )


def train(cell: Cell, seed: int, lr: float, scheduler: str = "onecycle", epochs: int | None = None) -> list[float]:
    """Accuracy on the validation split after each epoch, in points; that of guessing once the loss is not finite."""
    training, loader, (images, labels) = prepare(cell, seed)
    epochs = epochs or cell.epochs
    config = resolve({"scheduler": scheduler, "epochs": epochs, "step_size": max(1, epochs // 3), "lr": lr})
    schedule = build_schedule(training.optimizer, config, lr, len(loader))
    accuracies = []
    for epoch in range(epochs):
        training.model.train()
        for number, (x, y) in enumerate(loader, 1):
            loss, _ = train_step(training, x, y)
            if not math.isfinite(loss):
                return [*accuracies, *[10.0] * (epochs - epoch)]
            if epoch + 1 < epochs or number < len(loader):
                schedule.step()
        training.model.eval()
        with torch.inference_mode():
            hits = (training.model(training.normalize(images)).argmax(1) == labels).sum().item()
        accuracies.append(100 * hits / len(labels))
    return accuracies
