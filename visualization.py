"""Pictures of a run: its curves, its schedule, its first training images, and the finder's curve.

matplotlib, whose import takes a while, is imported when a picture is drawn.
"""

import io
import textwrap
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from config import Config
from errors import complain, printable
from pages.history import History, read_history, read_steps
from pages.names import short
from pages.svg import LOG_FROM
from report import write_report
from stream.files import write_durably
from stream.loader import Batch
from training.lr_curve import RangeTest
from training.optim import describe_schedule, schedule_at
from units import as_rate, duration

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)  # a name is drawn with boxes then

DPI = 110
SCHEDULE_POINTS = 500
CURVE_POINTS = 2000
MARKS = 30  # on a line
REST = 30.0  # times as long as drawing took, so that short epochs are not spent on drawing
SAMPLES = 32  # images of the first batch that are drawn
NAME_WIDTH = 20  # characters of a line above a small image
BLUE, ORANGE, GREEN, PURPLE = "#0072b2", "#d55e00", "#009e73", "#cc79a7"  # Okabe and Ito 2008, for all eyes
BROWN, GREY = "#7a5c00", "#999999"
TRAINING: dict[str, Any] = {"color": BLUE, "marker": "o", "linestyle": "-", "markersize": 4}
VALIDATION: dict[str, Any] = {"color": ORANGE, "marker": "s", "linestyle": "--", "markersize": 4}
AVERAGE: dict[str, Any] = {"color": GREEN, "marker": "^", "linestyle": ":", "markersize": 5}
TOP5: dict[str, Any] = {"color": PURPLE, "marker": "D", "linestyle": "-.", "markersize": 4}
STAR: dict[str, Any] = {"color": "black", "marker": "*", "linestyle": "none", "markersize": 15, "zorder": 5}
STAR["markerfacecolor"] = "#f0e442"
RULES: tuple[tuple[str, Any], ...] = (
    *((GREEN, "--"), (PURPLE, ":"), (BROWN, "-.")),
    *((GREY, (0, (8, 2, 1, 2, 1, 2))), ("black", (0, (1, 3)))),
)


def plot_curves(run_dir: Path) -> Path:
    """Plot loss, accuracy, plan, speed and time of a run against its epochs, from its logs.

    For a long run, only some CURVE_POINTS steps are plotted.
    """
    from matplotlib.ticker import MaxNLocator

    run = read_history(run_dir)
    steps, epochs, per_epoch = read_steps(run_dir, CURVE_POINTS), run.epochs, run.steps_per_epoch
    at, step = [row["epoch"] for row in epochs], [row["step"] / per_epoch for row in steps]
    figure = blank(15, 8)
    layout: Any = figure.get_layout_engine()
    layout.set(w_pad=0.12, h_pad=0.12)
    loss, top1, beside, rate, speed, time = figure.subplots(2, 3).flat
    each_step = {"color": BLUE, "alpha": 0.3, "linewidth": 0.8, "label": "training, each step"}
    loss.plot(step, [row["loss"] for row in steps], **each_step)
    shown = [("training", "train", TRAINING), ("validation", "val", VALIDATION)]
    if run.judged == "ema_top1":
        shown.append(("validation, average of the weights", "ema", AVERAGE))
    every = max(1, len(epochs) // MARKS)
    for name, column, style in shown:
        loss.plot(at, [row[f"{column}_loss"] for row in epochs], label=name, markevery=every, **style)
        top1.plot(at, [100 * row[f"{column}_top1"] for row in epochs], label=name, markevery=every, **style)
    if any(row["val_top5"] < 1 for row in epochs):
        top5 = [100 * row["val_top5"] for row in epochs]
        top1.plot(at, top5, label="validation, top-5", markevery=every, **TOP5)
    told = f"last {epochs[-1][run.judged]:.2%}"
    if (best := run.best) is not None:
        told = f"best {best[run.judged]:.2%} (epoch {best['epoch']:.0f}), {told}"
        top1.plot(best["epoch"], 100 * best[run.judged], label="best epoch", **STAR)
    _frame_losses(loss, [row[f"{column}_loss"] for row in epochs for _, column, _ in shown])
    loss.set(title=f"Loss: last {epochs[-1]['val_loss']:.4f} in validation", ylabel="cross-entropy")
    top1.set(title=f"Top-1 accuracy: {told}", ylabel="%")
    _plot_plan(rate, step, [row["lr"] for row in steps], [row["momentum"] for row in steps])
    speed.plot(at, [row["images_per_s"] for row in epochs], markevery=every, **TRAINING)
    speed.set(
        title=f"Speed: {as_rate(epochs[-1]['images_per_s'])} images/s in training", ylabel="images/s", ylim=(0, None)
    )
    _plot_time(time, run)
    for axes in (loss, top1, rate, speed, time):
        axes.set_xlabel(f"epoch (of {per_epoch:,.0f} steps)")
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.grid(alpha=0.3)
    pairs = (zip(*axes.get_legend_handles_labels(), strict=True) for axes in (top1, loss))
    handles = {label: handle for pair in pairs for handle, label in pair}
    beside.axis("off")
    beside.legend(handles.values(), handles.keys(), loc="center", title="In the two beside", fontsize=11)
    return save_picture(figure, run_dir / "plots" / "curves.png")


def _frame_losses(axes: "Axes", values: Sequence[float]) -> None:
    """Show all of these losses of epochs, on a logarithmic axis where they differ much; those of steps may leave."""
    finite = [value for value in values if np.isfinite(value)]
    if not finite:
        return
    low, high = min(finite), max(finite)
    if low > 0 and high > LOG_FROM * low:
        axes.set(yscale="log", ylim=(low / 1.3, high * 1.3))
        axes.yaxis.set_major_formatter("{x:g}")
    else:
        axes.set_ylim(0, 1.08 * high)


def _plot_plan(axes: "Axes", at: Sequence[float], rates: Sequence[float], momenta: Sequence[float]) -> None:
    """Learning rate and, on an axis of its own at the right, momentum."""
    axes.plot(at, rates, color=GREEN)
    axes.set(title="Learning rate and momentum", ylim=(0, 1.05 * max(rates)))
    axes.set_ylabel("learning rate (solid)", color=GREEN)
    momentum = axes.twinx()
    momentum.plot(at, momenta, color=PURPLE, linestyle="--")
    momentum.set_ylabel("momentum (dashed)", color=PURPLE)


def _plot_time(axes: "Axes", run: History) -> None:
    """A bar for each epoch, the evaluation above the training."""
    at, training = [row["epoch"] for row in run.epochs], run.training_seconds()
    rest = [row["seconds"] - seconds for row, seconds in zip(run.epochs, training, strict=True)]
    whole = sum(row["seconds"] for row in run.epochs)
    axes.bar(at, training, color=BLUE, label="training")
    axes.bar(at, rest, bottom=training, color=ORANGE, hatch="///", edgecolor="white", linewidth=0, label="evaluation")
    axes.set(title=f"Time of each epoch: {duration(whole)} in all", ylabel="seconds")
    axes.legend(loc="upper left", bbox_to_anchor=(0, -0.16), ncols=2, frameon=False)


class RunPictures:
    """Draws the pictures of a run into its folder and writes its report, both in a background thread after epochs.

    Warns once if a picture cannot be drawn, and once if the report cannot be written.
    """

    def __init__(
        self, run_dir: Path, classes: Sequence[str], tell: Callable[[Path, int], None] = lambda path, step: None
    ) -> None:
        """`tell` is called with each picture that was drawn, and the step of the run that it shows."""
        self._tell = tell
        self._run_dir = run_dir
        self._classes = classes
        self._thread = ThreadPoolExecutor(1, "curves")
        self._drawing: Future[None] | None = None
        self._behind, self._step, self._rest_until = False, 0, 0.0
        self._warned: set[str] = set()

    def samples(self, batch: Batch) -> None:
        """Draw the images of the first batch, in the background."""
        path = self._run_dir / "plots" / "samples.png"
        images, labels = batch.images[:SAMPLES].cpu().numpy().copy(), batch.labels[:SAMPLES].tolist()
        self._thread.submit(self._try, lambda: self._tell(plot_samples(images, labels, self._classes, path), 0))

    def curves(self, step: int) -> None:
        """Draw the logs as they are now, after so many steps.

        While an earlier picture is still being drawn, or was a moment ago, that is left to later ones and to `close`.
        """
        is_drawing = self._drawing is not None and not self._drawing.done()
        self._behind, self._step = is_drawing or time.monotonic() < self._rest_until, step
        if not self._behind:
            self._drawing = self._thread.submit(self._draw, step)

    def close(self) -> None:
        """Wait until the curves are drawn up to the last epoch."""
        if self._behind:
            self._thread.submit(self._draw, self._step)
        self._thread.shutdown()

    def report(self) -> None:
        """Write the report, about what the run's folder holds now."""
        self._try(lambda: write_report(self._run_dir), self._run_dir, "report.html")

    def _draw(self, step: int) -> None:
        start = time.monotonic()
        self._try(lambda: self._tell(plot_curves(self._run_dir), step))
        self.report()
        self._rest_until = time.monotonic() + REST * (time.monotonic() - start)

    def _try(self, draw: Callable[[], object], folder: Path | None = None, what: str = "a picture") -> None:
        if not drawn(draw, folder or self._run_dir / "plots", what, quiet=what in self._warned):
            self._warned.add(what)


def drawn(draw: Callable[[], object], folder: Path, what: str = "a picture", quiet: bool = False) -> bool:
    """Whether a picture, or `what` it is, could be made; if not, one line warns of it, unless `quiet`.

    All else goes on.
    """
    try:
        draw()
    except Exception as error:
        if not quiet:
            why = printable(str(error))[:200]
            complain(f"warning: {what} in {folder} cannot be drawn ({why}); the run goes on")
        return False
    return True


def plot_schedule(config: Config, lr: float, steps_per_epoch: int, path: Path) -> Path:
    """Plot the planned learning rate and momentum over the whole run."""
    total = config.epochs * steps_per_epoch
    steps = np.unique(np.linspace(0, total - 1, SCHEDULE_POINTS).astype(int)).tolist()
    rates, momenta = zip(*(schedule_at(config, lr, steps_per_epoch, step) for step in steps), strict=True)
    figure = blank(8, 4.2)
    axes = figure.subplots()
    _plot_plan(axes, steps, rates, momenta)
    axes.set(title="\n".join(textwrap.wrap(f"The plan: {describe_schedule(config, total)}", 80)), xlabel="step")
    axes.grid(alpha=0.3)
    to_epochs = lambda steps: np.asarray(steps) / steps_per_epoch
    to_steps = lambda epochs: np.asarray(epochs) * steps_per_epoch
    epochs = axes.secondary_xaxis("top", (to_epochs, to_steps))
    epochs.set_xlabel("epoch")
    return save_picture(figure, path)


def plot_samples(images: np.ndarray, labels: Sequence[int], classes: Sequence[str], path: Path) -> Path:
    """Draw up to SAMPLES uint8 images (N, H, W, 3) as the model sees them, with their class names."""
    count = min(SAMPLES, len(images))
    columns = min(8, count)
    rows = -(-count // columns)
    figure = blank(1.5 * columns, 1.85 * rows)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for axes, image, label in zip(grid.flat, images[:count], labels, strict=False):
        axes.imshow(image)
        name = "\n".join(textwrap.wrap(short(classes[label], 2 * NAME_WIDTH), NAME_WIDTH, break_on_hyphens=False))
        axes.set_title(name, fontsize=8, parse_math=False)
    return save_picture(figure, path)


def plot_lr_finder(found: RangeTest, path: Path) -> Path:
    """Plot a range test on a logarithmic axis, with each method's suggestion, the chosen one with a star."""
    figure = blank(11, 5.4)
    axes = figure.subplots()
    axes.plot(found.lr, found.loss, color=BLUE, alpha=0.3, label="loss")
    axes.plot(found.lr, found.smoothed_loss, color=BLUE, label="smoothed loss")
    others = [name for name in found.suggestions if name != found.method]
    for name, (colour, dashes) in zip(others, RULES, strict=False):
        if (value := found.suggestions[name]) is not None:
            axes.axvline(value, color=colour, linestyle=dashes, label=f"{name}: {value:.3g}")
    chosen = found.suggestions[found.method]
    if chosen is not None:
        axes.axvline(chosen, color=ORANGE, linewidth=2.2, label=f"{found.method}: {chosen:.3g}, the chosen one")
        axes.plot(chosen, float(np.interp(chosen, found.lr, found.smoothed_loss)), **STAR)
        sure, why = found.confidence
        title = f"Learning rate {chosen:.3g} for OneCycle, {found.constant_lr:.3g} for other schedules"
        title += "\n" + "\n".join(textwrap.wrap(f"method {found.method}, confidence {sure}: {why}", 88))
    else:
        title = "No learning rate found\n" + "\n".join(textwrap.wrap(printable(found.stopped), 100))
    if smoothed := found.smoothed_loss:
        axes.axvline(found.lr[-1], color="black", linewidth=0.8, label=f"end of {found.sweeps} sweeps")
        low, high = min(found.loss), max(smoothed[: max(1, len(smoothed) // 2)])
        axes.set_ylim(low - 0.1 * (high - low) - 1e-3, high + 0.5 * (high - low) + 1e-3)
    axes.set_xscale("log")
    axes.set_title(title, fontsize=11, parse_math=False)
    axes.set(xlabel="learning rate", ylabel="loss, mean of the sweeps")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    return save_picture(figure, path)


def blank(width: float, height: float) -> "Figure":
    """An empty figure of so many inches, on a canvas of its own: pyplot, its backends and its state are left alone."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_picture(figure: "Figure", path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=DPI)
    write_durably(path, image.getvalue())
    return path
