"""The learning rate finder from Python: find a rate for digits, then see what a tenth and three times of it would do.

    uv run python examples/example_lr_finder.py       # offline, less than a minute on two cores

A model, an optimiser, a criterion and a DataLoader are all that `find_lr_advanced` needs; this repository's own parts
are used here for brevity.
"""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

from config import resolve
from lr_finder import find_lr_advanced
from preprocess import get_data_loaders
from train import evaluate
from training.optim import build_schedule
from training.signals import StopRequest
from training.step import build_training, train_step
from visualization import plot_lr_finder

CPU = torch.device("cpu")


def main() -> None:
    config = resolve({"dataset": "digits", "epochs": 2})
    data = get_data_loaders(config, CPU)
    training = build_training(config, len(data.classes), CPU)
    result = find_lr_advanced(
        training.model,
        training.optimizer,
        training.criterion,
        data.train,
        train_step=lambda images, labels: train_step(training, images, labels).loss,
    )
    picture = Path(tempfile.gettempdir()) / "lr_finder.png"
    plot_lr_finder(result, picture)
    sure, why = result.confidence
    print(f"max_lr {result.suggested_lr:.3g}, confidence {sure} ({why}); see {picture}")

    for factor in (0.1, 1.0, 3.0):
        lr = factor * result.suggested_lr
        training = build_training(config, len(data.classes), CPU)
        schedule = build_schedule(training.optimizer, config, lr, len(data.train))
        for epoch in range(config.epochs):
            training.model.train()
            data.train.set_epoch(epoch)
            for step, (images, labels, _) in enumerate(data.train, epoch * len(data.train) + 1):
                train_step(training, images, labels)
                if step < config.epochs * len(data.train):
                    schedule.step()
        accuracy = evaluate(training, data.val, StopRequest())["val_top1"]
        print(f"{config.epochs} OneCycle epochs at {lr:.3g}: {accuracy:.1%} of the validation images right")


if __name__ == "__main__":
    main()
