"""What following the learning rate finder costs: regret, in points of accuracy, of each method's suggestion.

    uv run python benchmarks/lr_regret.py                # the tables in RESULTS.md, about half an hour on two cores
    uv run python benchmarks/lr_regret.py --seeds 1 --most_seeds 1    # a quick look

A cell is a small model, data and a batch size. For every seed of a cell the finder is run with 100 steps, and the model
is trained by OneCycle for the same few epochs at each rate of a grid and at each method's suggestion. Regret is the
accuracy at the rate of the grid that is best in the mean, less that at the suggestion. Seeds are added until the
standard error of the default method's regret is 0.2 points, or there are --most_seeds of them. "torch-lr-finder" is its
own sweep of 100 steps and the suggestion of its `plot`.

Then the schedules: for each length of training, OneCycle, cosine and step at the best of a few rates, on digits.
"""

import argparse
import math
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, median, stdev

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch_lr_finder
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler

from benchmarks.common import PINNED, installed_versions, record
from config import resolve
from lr_finder import DEFAULT_METHOD, METHODS, RangeTest, find_lr_advanced
from model_resnet50 import BasicBlock, conv1x1, conv3x3
from stream.augment import Normalize
from training.optim import build_optimizer, build_scaler, build_schedule
from training.step import Training, train_step

GRID = [0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0]
CPU = torch.device("cpu")
PEER = "torch-lr-finder"
LARGEST_ERROR = 0.2
LONG_SWEEPS = 3  # seeds whose finder is also given 1,000 steps
SCHEDULES = ("onecycle", "cosine", "step")
LENGTHS = (2, 3, 4, 6, 8, 12, 16, 24)
TARGETS = (97.0, 98.0, 98.5)
SCHEDULE_RATES = (0.03, 0.1, 0.3, 1.0)
SCHEDULE_SEEDS = 3

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
    step = lambda images, labels: train_step(training, images, labels).loss
    return find_lr_advanced(
        training.model, training.optimizer, training.criterion, loader, train_step=step, num_iter=num_iter
    )


def train(cell: Cell, seed: int, lr: float, scheduler: str = "onecycle", epochs: int | None = None) -> list[float]:
    """Accuracy on the validation split after each epoch, in points; that of guessing once the loss is not finite."""
    training, loader, (images, labels) = prepare(cell, seed)
    epochs = epochs or cell.epochs
    config = resolve({"scheduler": scheduler, "epochs": epochs, "step_size": max(1, epochs // 3), "lr": lr})
    schedule = build_schedule(training.optimizer, config, lr, len(loader))
    accuracies: list[float] = []
    for epoch in range(epochs):
        training.model.train()
        for number, (x, y) in enumerate(loader, 1):
            loss = train_step(training, x, y).loss
            if not math.isfinite(loss):
                return [*accuracies, *[10.0] * (epochs - epoch)]
            if epoch + 1 < epochs or number < len(loader):
                schedule.step()
        training.model.eval()
        with torch.inference_mode():
            hits = (training.model(training.normalize(images)).argmax(1) == labels).sum().item()
        accuracies.append(100 * hits / len(labels))
    return accuracies


def peers_suggestion(cell: Cell, seed: int) -> float | None:
    """What torch-lr-finder itself suggests after a sweep of 100 steps; None where it breaks or gives NaN."""
    training, loader, _ = prepare(cell, seed)
    model = nn.Sequential(training.normalize, training.model)
    finder = torch_lr_finder.LRFinder(model, training.optimizer, training.criterion)
    finder.range_test(loader, start_lr=1e-5, end_lr=10, num_iter=100)
    figure, axes = plt.subplots()
    try:
        _, lr = finder.plot(ax=axes, suggest_lr=True)
    except ValueError:
        return None
    finally:
        plt.close(figure)
    return float(lr)


@dataclass(frozen=True)
class Trial:
    """One seed of a cell: accuracies at the grid's rates, and each method's rate with the accuracy there, if any."""

    grid: list[float]
    methods: dict[str, tuple[float, float] | None]
    confidence: str
    long: float | None  # the default's suggestion after 1,000 steps


def try_out(number: int, seed: int) -> Trial:
    torch.set_num_threads(1)
    cell = CELLS[number]
    found = sweep(cell, seed)
    rates = {**found.suggestions, PEER: peers_suggestion(cell, seed)}
    sure = found.suggestions[DEFAULT_METHOD] is not None
    return Trial(
        grid=[train(cell, seed, lr)[-1] for lr in GRID],
        methods={name: (lr, train(cell, seed, lr)[-1]) if lr else None for name, lr in rates.items()},
        confidence=found.confidence[0] if sure else "none",
        long=sweep(cell, seed, 1000).suggestions[DEFAULT_METHOD] if seed < LONG_SWEEPS else None,
    )


def regrets(trials: list[Trial], method: str) -> list[float]:
    """Of each seed that has a suggestion; in points."""
    best = int(np.mean([trial.grid for trial in trials], 0).argmax())
    return [trial.grid[best] - found[1] for trial in trials if (found := trial.methods[method])]


def standard_error(values: list[float]) -> float:
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf


def measure_regret(pool: ProcessPoolExecutor, seeds: int, most: int) -> str:
    trials: list[list[Trial]] = [[] for _ in CELLS]
    unsure = list(range(len(CELLS)))
    while unsure:
        jobs = {n: [pool.submit(try_out, n, len(trials[n]) + seed) for seed in range(seeds)] for n in unsure}
        for n, futures in jobs.items():
            trials[n] += [future.result() for future in futures]
            print(f"{CELLS[n].name}: {len(trials[n])} seeds", file=sys.stderr)
        unsure = [
            n
            for n in unsure
            if len(trials[n]) < most and standard_error(regrets(trials[n], DEFAULT_METHOD)) > LARGEST_ERROR
        ]
    return "\n\n".join([regret_table(trials), stability_table(trials)])


def regret_table(trials: list[list[Trial]]) -> str:
    names = [*METHODS, PEER]
    rows = [
        f"| cell | seeds | best rate: accuracy | error of {DEFAULT_METHOD} | {' | '.join(names)} |",
        "|" + " --- |" * (4 + len(names)),
    ]
    for cell, found in zip(CELLS, trials, strict=True):
        accuracy = np.mean([trial.grid for trial in found], 0)
        best = f"{GRID[int(accuracy.argmax())]:g}: {accuracy.max():.1f} %"
        cells = []
        for name in names:
            values = regrets(found, name)
            lost = len(found) - len(values)
            cells.append((f"{mean(values):.2f}" if values else "") + (f" ({lost} without)" if lost else ""))
        error = standard_error(regrets(found, DEFAULT_METHOD))
        rows.append(f"| {cell.name} | {len(found)} | {best} | {error:.2f} | {' | '.join(cells)} |")
    summaries: list[tuple[str, Callable[[list[float]], float]]] = [("median", median), ("worst", max)]
    for title, summary in summaries:
        means = [[mean(values) for found in trials if (values := regrets(found, name))] for name in names]
        rows.append(f"| **{title}** | | | | {' | '.join(f'**{summary(column):.2f}**' for column in means)} |")
    return "\n".join(rows)


def stability_table(trials: list[list[Trial]]) -> str:
    """How the default's suggestion after 100 steps differs from that after 1,000, and what the finder said of it."""
    rows = ["| cell | after 1,000 steps / after 100, each seed | confidence after 100 |", "| --- | --- | --- |"]
    for cell, found in zip(CELLS, trials, strict=True):
        both = [(trial.methods[DEFAULT_METHOD], trial.long) for trial in found[:LONG_SWEEPS]]
        ratios = ", ".join(f"{long / short[0]:.2f}" if short and long else "none" for short, long in both)
        levels = [trial.confidence for trial in found]
        counts = ", ".join(f"{level} {levels.count(level)}" for level in dict.fromkeys(sorted(levels)))
        rows.append(f"| {cell.name} | {ratios} | {counts} |")
    return "\n".join(rows)


def final_accuracy(scheduler: str, epochs: int, lr: float, seed: int) -> float:
    torch.set_num_threads(1)
    return train(CELLS[0], seed, lr, scheduler, epochs)[-1]


def compare_schedules(pool: ProcessPoolExecutor) -> str:
    """Accuracy after trainings of several lengths, and the shortest that reaches each target."""
    jobs = {
        (scheduler, epochs, lr): [
            pool.submit(final_accuracy, scheduler, epochs, lr, seed) for seed in range(SCHEDULE_SEEDS)
        ]
        for scheduler in SCHEDULES
        for epochs in LENGTHS
        for lr in SCHEDULE_RATES
    }
    found = {key: mean(future.result() for future in futures) for key, futures in jobs.items()}
    head = [*(f"{epochs} epochs" for epochs in LENGTHS), *(f"epochs to {target:g} %" for target in TARGETS)]
    rows = ["| schedule | " + " | ".join(head) + " |", "|" + " --- |" * (1 + len(head))]
    for scheduler in SCHEDULES:
        best = {epochs: max((found[scheduler, epochs, lr], lr) for lr in SCHEDULE_RATES) for epochs in LENGTHS}
        cells = [f"{accuracy:.2f} % at {lr:g}" for accuracy, lr in best.values()]
        for target in TARGETS:
            reached = [epochs for epochs, (accuracy, _) in best.items() if accuracy >= target]
            cells.append(str(min(reached)) if reached else f"more than {LENGTHS[-1]}")
        rows.append(f"| {scheduler} | {' | '.join(cells)} |")
    return "\n".join(rows)


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--seeds", type=int, default=8, help="seeds of each cell, and of a cell that needs more")
    flags.add_argument("--most_seeds", type=int, default=40, help="seeds of a cell at most")
    given = flags.parse_args()
    os.environ.update(PINNED)
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), get_context("spawn")) as pool:
        rows = measure_regret(pool, given.seeds, given.most_seeds)
        set_up = "Regret in points of validation accuracy; seeds without a suggestion are left out."
        record("Regret of the finder's suggestions", set_up, rows, installed_versions())
        set_up = f"{CELLS[0].name}; validation accuracy at the end, {SCHEDULE_SEEDS} seeds, at the best of the rates "
        set_up += f"{', '.join(f'{lr:g}' for lr in SCHEDULE_RATES)}. Step falls tenfold after each third."
        record("Schedules at equal budgets", set_up, compare_schedules(pool), installed_versions())


if __name__ == "__main__":
    main()
