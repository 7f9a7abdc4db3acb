"""An evaluation as pictures: confusions, calibration, the best and worst classes, the hardest images.

Colours are viridis's and those of Okabe and Ito (2008), which colour-blind eyes tell apart.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from pages.names import short
from results.figures import BINS, ClassFigures, confusions, reliability
from results.report import Evaluation, hardest
from visualization import BLUE, GREY, ORANGE, blank, drawn, save_picture

COLOURS = matplotlib.colormaps["viridis"].with_extremes(bad=(0, 0, 0, 0))  # nothing where there is no image
MOST_NAMED = 40  # classes whose names fit at the axes
MOST_COUNTED = 15  # classes whose counts fit into the cells
MOST_CELLS = 500  # in a side of the picture of confusions
SHOWN = 20  # of the best and of the worst classes
HARDEST = 24


def draw_all(found: Evaluation, folder: Path, read: Callable[[np.ndarray], np.ndarray]) -> None:
    """Draw the pictures into a folder; one that cannot be drawn is warned of.

    `read` returns the images, uint8 (N, H, W, 3), of ids (int64).
    """
    for name, draw in (
        ("confusion", lambda: draw_confusion(found)),
        ("reliability", lambda: draw_reliability(found)),
        ("classes", lambda: draw_classes(found)),
        ("hardest", lambda: draw_hardest(found, read)),
    ):
        path = folder / f"{name}.png"
        drawn(lambda draw=draw, path=path: save_picture(draw(), path), folder)  # type: ignore[misc]


def draw_confusion(found: Evaluation) -> Figure:
    """The confusion matrix; of many classes without names and counts, but with the most confused pairs beside it."""
    shown = [c.number for c in found.figures.classes if c.images] or [0]
    answered = {*shown, *np.unique(found.scores.predictions).tolist()}
    numbers = [c.number for c in found.figures.classes if c.number in answered]
    names, count = [short(found.names[number], 18) for number in numbers], len(numbers)
    is_named = count <= MOST_NAMED
    side = 4.2 + 0.22 * count if is_named else 11.0
    figure = blank(side + (1.2 if is_named else 4.2), side)
    axes: Axes
    if is_named:
        axes = figure.subplots()
    else:
        axes, beside = figure.subplots(1, 2, width_ratios=(11, 2.6))
        _list_pairs(beside, found)
    cells = min(count, MOST_CELLS)
    place = {number: at * cells // count for at, number in enumerate(numbers)}
    matrix = np.zeros((cells, cells))
    for label, prediction, images in confusions(found.scores):
        matrix[place[label], place[prediction]] += images
    image = axes.imshow(
        np.ma.masked_equal(matrix, 0), cmap=COLOURS, norm=LogNorm(1, max(2, matrix.max())), interpolation="nearest"
    )
    axes.set_facecolor("#f2f2f2")
    bar = figure.colorbar(image, ax=axes, label="images (logarithmic; grey: none)", shrink=0.8, format="%g")
    bar.minorformatter = LogFormatter()  # without powers of ten
    per_cell = "" if cells == count else f", {count / cells:.3g} a cell"
    axes.set_xlabel(f"predicted class{'' if is_named else f' (all {count:,}, in their order{per_cell})'}")
    axes.set_ylabel("true class")
    axes.set_title(f"Confusion matrix: {_title(found)}", parse_math=False)
    if not is_named:
        axes.set(xticks=[], yticks=[])
        return figure
    axes.set_xticks(range(count), names, rotation=90, parse_math=False)
    axes.set_yticks(range(count), names, parse_math=False)
    if count <= MOST_COUNTED:
        dark = np.sqrt(max(2, matrix.max()))
        for (row, column), cell in np.ndenumerate(matrix):
            if cell:
                colour = "black" if cell > dark else "white"
                axes.text(column, row, f"{cell:,.0f}", ha="center", va="center", fontsize=8, color=colour)
    return figure


def _list_pairs(axes: Axes, found: Evaluation) -> None:
    axes.axis("off")
    axes.set_title("most confused", loc="left")
    names = found.names
    for row, (label, prediction, images) in enumerate(found.figures.confused):
        text = f"{short(names[label], 26)}\n    taken for {short(names[prediction], 26)}: {images:,}"
        axes.text(0, 0.98 - 0.09 * row, text, va="top", fontsize=9, transform=axes.transAxes, parse_math=False)


def _title(found: Evaluation) -> str:
    return f"{found.figures.top1:.2%} of {found.figures.images:,} images right"


def draw_reliability(found: Evaluation) -> Figure:
    """How often the model is right where it says a probability, and how many images each range has."""
    scores = found.scores
    counts, said, was = reliability(scores.probabilities, scores.labels == scores.predictions)
    totals = counts[:BINS].astype(float)
    sums = [(counts * values)[:BINS] for values in (said, was)]
    totals[-1] += counts[BINS]  # a probability of 1 is drawn with the last range
    sums = [values + np.eye(BINS)[-1] * counts[BINS] * of[BINS] for values, of in zip(sums, (said, was), strict=True)]
    there = totals > 0
    confidence, share = (values[there] / totals[there] for values in sums)
    figure = blank(6.2, 6.8)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    edges = np.linspace(0, 1, BINS + 1)
    above.bar(edges[:-1][there], share, 1 / BINS, align="edge", color=BLUE, edgecolor="white", label="share right")
    above.plot(confidence, share, "o", color=ORANGE, markersize=5, label="at the mean probability")
    above.plot((0, 1), (0, 1), "--", color="black", linewidth=1, label="calibrated")
    above.set(xlim=(0, 1), ylim=(0, 1.02), ylabel="share of images right")
    above.set_title(f"Reliability: expected calibration error {found.figures.ece:.2%}")
    figure.legend(*above.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    above.grid(alpha=0.3)
    below.bar(edges[:-1], totals, 1 / BINS, align="edge", color=GREY, edgecolor="white")
    below.set(xlabel="probability of the predicted class", ylabel="images")
    if totals.max() > 100 * max(1.0, float(np.median(totals))):
        below.set_yscale("log", nonpositive="clip")
    below.grid(alpha=0.3)
    return figure


def draw_classes(found: Evaluation) -> Figure:
    """The accuracy of each class or, of many, of the worst and the best, with how many images they have."""
    ordered = found.figures.with_images
    if len(ordered) <= 2 * SHOWN:
        groups = [(f"All {len(ordered)} classes", ordered)]
    else:
        groups = [(f"The {SHOWN} worst of {len(ordered):,} classes", ordered[:SHOWN])]
        groups.append((f"The {SHOWN} best", ordered[-SHOWN:]))
    rows = max(len(classes) for _, classes in groups)
    figure = blank(7.2 * len(groups), 1.4 + 0.27 * max(4, rows))
    for axes, (title, classes) in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups, strict=True):
        _bars(axes, title, classes)
    return figure


def _bars(axes: Axes, title: str, classes: Sequence[ClassFigures]) -> None:
    shares = [100 * (c.recall or 0.0) for c in classes]
    axes.barh(range(len(classes)), shares, color=BLUE)
    for row, (c, share) in enumerate(zip(classes, shares, strict=True)):
        axes.text(share + 1, row, f"{share:.1f} % of {c.images:,}", va="center", fontsize=8)
    names = [short(c.name, 28) for c in classes]
    axes.set_yticks(range(len(classes)), names, fontsize=9, parse_math=False)
    axes.set(title=title, xlabel="top-1 accuracy, %", xlim=(0, 125), ylim=(len(classes) - 0.5, -0.5))
    axes.set_xticks(range(0, 101, 20))
    axes.spines[["top", "right"]].set_visible(False)


def draw_hardest(found: Evaluation, read: Callable[[np.ndarray], np.ndarray]) -> Figure:
    """The images with the highest loss, each with its class, what it was taken for, and how surely."""
    places = hardest(found.scores, HARDEST)
    scores, columns = found.scores, 6
    images = read(scores.ids[places])
    rows = -(-len(places) // columns)
    figure = blank(13.5, 0.5 + 2.75 * rows)
    figure.suptitle("The images with the highest loss: true class, prediction and its probability (blue: right)")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for axes, place, image in zip(grid.flat, places.tolist(), images, strict=False):
        label, prediction = int(scores.labels[place]), int(scores.predictions[place])
        axes.imshow(image, interpolation="nearest" if len(image) < 64 else "antialiased")
        colour = BLUE if label == prediction else ORANGE
        told = f"{short(found.names[label], 24)}\n→ {short(found.names[prediction], 17)} "
        told += f"({scores.probabilities[place]:.0%})"
        axes.set_title(told, fontsize=9, color=colour, parse_math=False)
    return figure
