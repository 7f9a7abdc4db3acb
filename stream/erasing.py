"""Random erasing of boxes for whole batches."""

from dataclasses import dataclass

import numpy as np
import torch

from stream.augment import MEAN_COLOUR, below, sample_bits, send, unit
from stream.seeds import Use

SCALE = (0.02, 0.33)  # of an image's area
RATIO = (0.3, 3.3)  # of height to width
TRIES = 10
DRAWS = 1 + 2 * TRIES + 2  # whether, areas and ratios, a place


@dataclass(frozen=True)
class RandomErasing:
    """Erases a box of each image with `probability`: ImageNet's mean colour, to half a level what zeros are after it is
    normalised.
    """

    seed: int
    probability: float

    def __call__(self, images: torch.Tensor, ids: torch.Tensor, epoch: int) -> torch.Tensor:
        """uint8 images (N, H, W, 3) on any device, their `ids` (int64) on the host; returns new memory."""
        height, width = images.shape[1:3]
        found = boxes(self.seed, epoch, ids.numpy(), height, width, self.probability)
        return erase(images, found, MEAN_COLOUR)


def boxes(seed: int, epoch: int, ids: np.ndarray, height: int, width: int, p: float) -> np.ndarray:
    """What to erase of samples: top, left, bottom and right, int64 (N, 4); an empty box with probability 1 - p.

    As torchvision.transforms.RandomErasing draws them (Zhong et al. 2020): area and ratio anew until a box fits, ten
    times at most, or the sample is left alone. A function of (seed, epoch, sample id) and the size.
    """
    bits = sample_bits(seed, Use.ERASING, epoch, ids, DRAWS)
    units = unit(bits)
    areas = height * width * (SCALE[0] + (SCALE[1] - SCALE[0]) * units[:, 1 : 1 + TRIES])
    least, greatest = np.log(RATIO)
    ratios = np.exp(least + (greatest - least) * units[:, 1 + TRIES : 1 + 2 * TRIES])
    heights = np.rint(np.sqrt(areas * ratios)).astype(np.int64)
    widths = np.rint(np.sqrt(areas / ratios)).astype(np.int64)
    fits = (heights < height) & (widths < width)
    first = fits.argmax(axis=1)[:, None]
    tall, wide = (np.take_along_axis(sides, first, axis=1)[:, 0] for sides in (heights, widths))
    top, left = below(bits[:, -2], height - tall + 1), below(bits[:, -1], width - wide + 1)
    done = (units[:, 0] < p) & fits.any(axis=1)
    return np.where(done[:, None], np.stack([top, left, top + tall, left + wide], axis=1), 0)


def erase(images: torch.Tensor, boxes: np.ndarray, value: float | tuple[float, ...] = 0.0) -> torch.Tensor:
    """Images with `value`, one for all channels or one for each, in their boxes (N, 4); new memory, same layout.

    uint8 images are (N, H, W, 3), others (N, 3, H, W). Zeros in normalised images are what torchvision's recipes put
    there; `MEAN_COLOUR` in uint8 images comes within half a level of it.
    """
    channels_last = images.dtype == torch.uint8
    height, width = images.shape[1:3] if channels_last else images.shape[2:]
    top, left, bottom, right = send(boxes, images.device).view(-1, 4, 1, 1).unbind(1)
    rows = torch.arange(height, device=images.device)[:, None]
    columns = torch.arange(width, device=images.device)
    mask = (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)
    mask = mask[..., None] if channels_last else mask[:, None]
    if isinstance(value, tuple):
        colour = send(np.array(value), images.device).to(images.dtype)
        colour = colour if channels_last else colour.view(3, 1, 1)
    else:
        colour = images.new_full((), value)
    return torch.where(mask, colour, images, out=torch.empty_like(images))  # otherwise the mask decides on the layout
