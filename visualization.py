"""Pictures of a run: its curves, its schedule, its first training images, and the finder's curve."""

import csv
import io
import json
import textwrap
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from config import Config
from errors import complain, printable
from stream.files import write_durably
from stream.loader import Batch
from training.optim import describe_schedule, schedule_at

warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)  # a name is drawn with boxes then

DPI = 110
SCHEDULE_POINTS = 500
CURVE_POINTS = 2000


def plot_curves(run_dir: Path) -> Path:
    """Plot loss, accuracy, and learning rate with momentum against the step, from the run's logs.

    For a long run, only CURVE_POINTS steps, or up to twice as many, are plotted.
    """
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines[:: max(1, len(lines) // CURVE_POINTS)]]
    with open(run_dir / "results.csv", newline="") as file:
        epochs = [{name: float(value or "nan") for name, value in row.items()} for row in csv.DictReader(file)]
    at = [row["step"] for row in epochs]
    figure = Figure(figsize=(15, 4.2), layout="constrained")
    loss, top1, lr = figure.subplots(1, 3)
    step = [row["step"] for row in steps]
    loss.plot(step, [row["loss"] for row in steps], color="C0", alpha=0.3, linewidth=0.8, label="train, each step")
    loss.plot(at, [row["train_loss"] for row in epochs], "C0o-", markersize=3, label="train")
    loss.plot(at, [row["val_loss"] for row in epochs], "C1o-", markersize=3, label="validation")
    loss.set(title="Loss", xlabel="step", ylim=(0, 1.5 * max(row["train_loss"] for row in epochs)))
    top1.plot(at, [100 * row["train_top1"] for row in epochs], "C0o-", markersize=3, label="train")
    top1.plot(at, [100 * row["val_top1"] for row in epochs], "C1o-", markersize=3, label="validation")
    if "ema_top1" in epochs[0]:
        top1.plot(at, [100 * row["ema_top1"] for row in epochs], "C4s-", markersize=3, label="validation, average")
    top1.set(title=f"Top-1 accuracy, last {100 * epochs[-1]['val_top1']:.2f} %", xlabel="step", ylabel="%")
    lr.plot(step, [row["lr"] for row in steps], "C2")
    lr.set(title="Learning rate and momentum", xlabel="step", ylim=(0, None))
    momentum = lr.twinx()
    momentum.plot(step, [row["momentum"] for row in steps], "C3--")
    lr.set_ylabel("learning rate", color="C2")
    momentum.set_ylabel("momentum (dashed)", color="C3")
    for axes in (loss, top1):
        axes.legend()
        axes.grid(alpha=0.3)
    return save_picture(figure, run_dir / "plots" / "curves.png")


class RunPictures:
    """Draws the pictures of a run into its folder, the curves in a background thread. Warns once if drawing fails."""

    def __init__(self, run_dir: Path, classes: Sequence[str]) -> None:
        self._run_dir = run_dir
        self._classes = classes
        self._thread = ThreadPoolExecutor(1, "curves")
        self._drawing: Future[None] | None = None
        self._behind = False
        self._warned = False

    def samples(self, batch: Batch) -> None:
        """Draw the images of the first batch."""
        path = self._run_dir / "plots" / "samples.png"
        self._try(lambda: plot_samples(batch.images.cpu().numpy(), batch.labels.tolist(), self._classes, path))

    def curves(self) -> None:
        """Draw the logs as they are now; while an earlier picture is still being drawn, leave that to `close`."""
        self._behind = self._drawing is not None and not self._drawing.done()
        if not self._behind:
            self._drawing = self._thread.submit(self._try, lambda: plot_curves(self._run_dir))

    def close(self) -> None:
        """Wait until the curves are drawn up to the last epoch."""
        if self._behind:
            self._thread.submit(self._try, lambda: plot_curves(self._run_dir))
        self._thread.shutdown()

    def _try(self, draw: Callable[[], object]) -> None:
        self._warned |= not drawn(draw, self._run_dir / "plots", quiet=self._warned)


def drawn(draw: Callable[[], object], folder: Path, quiet: bool = False) -> bool:
    """Whether a picture could be drawn; if not, one line warns of it, unless `quiet`, and all else goes on."""
    try:
        draw()
    except Exception as error:
        if not quiet:
            complain(f"warning: a picture in {folder} cannot be drawn ({printable(str(error))[:200]}); the run goes on")
        return False
    return True


def plot_schedule(config: Config, lr: float, steps_per_epoch: int, path: Path) -> Path:
    """Plot the planned learning rate and momentum over the whole run."""
    total = config.epochs * steps_per_epoch
    steps = np.unique(np.linspace(0, total - 1, SCHEDULE_POINTS).astype(int)).tolist()
    rates, momenta = zip(*(schedule_at(config, lr, steps_per_epoch, step) for step in steps), strict=True)
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, rates, "C2")
    axes.set(title=describe_schedule(config, total), xlabel="step", ylim=(0, 1.05 * max(rates)))
    axes.set_ylabel("learning rate", color="C2")
    axes.grid(alpha=0.3)
    to_epochs = lambda steps: np.asarray(steps) / steps_per_epoch
    to_steps = lambda epochs: np.asarray(epochs) * steps_per_epoch
    epochs = axes.secondary_xaxis("top", (to_epochs, to_steps))
    epochs.set_xlabel("epoch")
    momentum = axes.twinx()
    momentum.plot(steps, momenta, "C3--")
    momentum.set_ylabel("momentum (dashed)", color="C3")
    return save_picture(figure, path)


def plot_samples(images: np.ndarray, labels: Sequence[int], classes: Sequence[str], path: Path) -> Path:
    """Draw up to 32 uint8 images (N, H, W, 3) as the model sees them, with their class names."""
    count = min(32, len(images))
    columns = min(8, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(1.5 * columns, 1.7 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for axes, image, label in zip(grid.flat, images[:count], labels, strict=False):
        axes.imshow(image)
        name = printable(classes[label].split(",")[0])[:18]
        axes.set_title(name, fontsize=8, parse_math=False)
    return save_picture(figure, path)


def plot_lr_finder(
    lr: Sequence[float],
    loss: Sequence[float],
    smoothed: Sequence[float],
    suggestions: Mapping[str, float | None],
    stopped: str,
    path: Path,
) -> Path:
    """Plot a range test on a logarithmic axis, with each method's suggestion, and where and why the sweeps ended."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    axes.plot(lr, loss, color="C0", alpha=0.3, label="loss")
    axes.plot(lr, smoothed, color="C0", label="smoothed loss")
    for number, (name, value) in enumerate(suggestions.items(), 1):
        if value is not None:
            axes.axvline(value, color=f"C{number}", linestyle="--", label=f"{name}: {value:.3g}")
    if smoothed:
        axes.axvline(lr[-1], color="k", linewidth=0.8, label="end of the sweeps")
        low, high = min(loss), max(smoothed[: max(1, len(smoothed) // 2)])
        axes.set_ylim(low - 0.1 * (high - low) - 1e-3, high + 0.5 * (high - low) + 1e-3)
    axes.set_xscale("log")
    title = textwrap.fill(f"Learning rate range test: {stopped}", 72)
    axes.set(title=title, xlabel="learning rate", ylabel="loss")
    axes.grid(alpha=0.3)
    axes.legend()
    return save_picture(figure, path)


def save_picture(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=DPI)
    write_durably(path, image.getvalue())
    return path
