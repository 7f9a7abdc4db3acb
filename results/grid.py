"""A picture of images with their predicted classes."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from errors import printable
from results.prediction import Prediction
from visualization import blank, save_picture

COLUMNS = 6
LONGEST = 24  # characters of a line of a caption


def plot_predictions(
    images: Sequence[np.ndarray],
    found: Sequence[Prediction],
    classes: Sequence[str],
    path: Path,
    heatmaps: Sequence[torch.Tensor] = (),
) -> Path:
    """Draw uint8 images (H, W, 3) as the model sees them, with file name, class and probability of each.

    `heatmaps` (H, W), in 0..1, are laid over them.
    """
    columns = min(COLUMNS, len(images))
    rows = -(-len(images) // columns)
    figure = blank(2.3 * columns, 2.8 * rows)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(images) :]:
        axes.axis("off")
    for number, (axes, image, one) in enumerate(zip(grid.flat, images, found, strict=False)):
        axes.imshow(image)
        axes.set(xticks=[], yticks=[])
        if heatmaps:
            axes.imshow(heatmaps[number], cmap="inferno", alpha=0.5, vmin=0, vmax=1)
        name, likeliest = Path(one.image).name, classes[one.indices[0]].split(",")[0]
        caption = f"{_short(name)}\n{_short(likeliest)}\n{100 * one.probabilities[0]:.1f} %"
        axes.set_xlabel(caption, fontsize=8, parse_math=False)
    return save_picture(figure, path)


def _short(text: str) -> str:
    """A text that fits above an image: its end gives way."""
    text = printable(text)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."
