"""Resizing and cropping as products with two matrices, made of tensors only, for graphs of any image size.

The matrices are computed from the image's height and width; of the resized image only the crop is. The filters are
those of Pillow (Pillow's Resample.c) and of cv2 as albumentations calls it, which is what `eval_transform` uses.
"""

import torch
from torch import nn

from stream.images import MOST_LONG

REACH = {"bilinear": 1.0, "bicubic": 2.0}  # of a filter, in pixels of the smaller image
LEAST_COVERED = 1e-3  # of a pixel: cv2 leaves out smaller parts of one
STEPS = 2048  # to which cv2 rounds the weights of plain bilinear interpolation


class ResizedCrop(nn.Module):
    """uint8 image (H, W, 3) -> uint8 values as float32 (3, size, size): what `eval_transform` makes of it.

    The short side becomes `short` pixels, of which the middle `size` are kept. `interpolation` is fast, bilinear or
    bicubic. Of an image MOST_LONG times as long as wide or more, the middle square is taken first.
    """

    def __init__(self, short: int, size: int, interpolation: str) -> None:
        super().__init__()
        self.short, self.size, self.interpolation = short, size, interpolation

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        height, width = (torch.scalar_tensor(image.shape[axis], dtype=torch.int64) for axis in (0, 1))
        short, long = torch.minimum(height, width), torch.maximum(height, width)
        most = torch.where(long >= MOST_LONG * short, short, long)
        down, across = torch.minimum(height, most), torch.minimum(width, most)  # without the ends of a strip
        rows = _places(image.shape[0], (height - down) // 2)
        columns = _places(image.shape[1], (width - across) // 2)
        pixels = image.permute(2, 0, 1).float()
        if self.interpolation == "fast":
            return self._fast(pixels, rows, columns, down, across, short)
        vertical = self._antialiased(rows, down, self.short * down // short)
        horizontal = self._antialiased(columns, across, self.short * across // short)
        narrow = _half_up(pixels @ horizontal.T).clamp(0, 255)
        return _half_up(vertical @ narrow).clamp(0, 255)

    def _antialiased(self, places: torch.Tensor, old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """Weights float32 (size, len(places)) of a side of `old` pixels that is resized to `new`, as in Pillow."""
        first = torch.round((new - self.size).double() / 2)
        scale = old.double() / new.double()
        stretch = scale.clamp(min=1.0)
        reach = REACH[self.interpolation] * stretch
        centres = (first + torch.arange(self.size, dtype=torch.float64) + 0.5)[:, None] * scale
        inside = (places >= torch.floor(centres - reach + 0.5).clamp(min=0)) & (places >= 0)
        inside = inside & (places < torch.floor(centres + reach + 0.5)) & (places < old)
        distance = torch.abs((places - centres + 0.5) / stretch)
        weights = _triangle(distance) if self.interpolation == "bilinear" else _cubic(distance)
        weights = torch.where(inside, weights, 0.0)
        return (weights / weights.sum(1, keepdim=True)).float()

    def _fast(
        self,
        pixels: torch.Tensor,
        rows: torch.Tensor,
        columns: torch.Tensor,
        down: torch.Tensor,
        across: torch.Tensor,
        short: torch.Tensor,
    ) -> torch.Tensor:
        """As albumentations' SmallestMaxSize and CenterCrop: means over areas, or bilinear where the image grows."""
        ratio = self.short / short.double()
        new = [torch.round(side.double() * ratio) for side in (down, across)]
        mixed = self._areas(rows, down, new[0]) @ (pixels @ self._areas(columns, across, new[1]).T)
        halved = (down == 2 * new[0]) & (across == 2 * new[1])  # for which cv2 has code of its own, which rounds up
        shrunk = torch.where(halved, _half_up(mixed), torch.round(mixed))
        return torch.where(ratio < 1, shrunk, self._grown(pixels, rows, columns, (down, new[0]), (across, new[1])))

    def _areas(self, places: torch.Tensor, old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """Weights float32 (size, len(places)): the share of each old pixel in a new one."""
        scale, numbers = old.double() / new, self._numbers(new)
        start, end = numbers * scale, torch.minimum((numbers + 1) * scale, old.double())
        covered = torch.minimum(places + 1, end) - torch.maximum(places, start)
        covered = torch.where((covered > LEAST_COVERED) & (places >= 0) & (places < old), covered, 0.0)
        return (covered / covered.sum(1, keepdim=True)).float()

    def _numbers(self, new: torch.Tensor) -> torch.Tensor:
        """The places float64 (size, 1) of the middle in a side of `new` pixels."""
        return (torch.floor((new - self.size) / 2) + torch.arange(self.size, dtype=torch.float64))[:, None]

    def _grown(
        self,
        pixels: torch.Tensor,
        rows: torch.Tensor,
        columns: torch.Tensor,
        down: tuple[torch.Tensor, torch.Tensor],
        across: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        """Plain bilinear interpolation from and to sides (old, new), in cv2's integers, of which it drops bits."""
        left, right, share = self._neighbours(columns, *across)
        between = pixels @ (left * (1 - share) + right * share).float().T  # in whole parts of STEPS, exactly
        kept = torch.floor(between * (STEPS / 16))
        above, below, part = self._neighbours(rows, *down)
        ends = [(of.float() @ kept).double() * weight for of, weight in ((above, 1 - part), (below, part))]
        upper, lower = (torch.floor(end * (STEPS / 65536)) for end in ends)
        return torch.floor((upper + lower) / 4 + 0.5).float()

    def _neighbours(
        self, places: torch.Tensor, old: torch.Tensor, new: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Two selections float64 (size, len(places)) of the pixels next to each new one, and the second's (size, 1)."""
        centre = ((self._numbers(new) + 0.5) * (old.double() / new) - 0.5).clamp(min=0.0)
        centre = torch.minimum(centre, old.double() - 1)
        first = torch.floor(centre)
        second = torch.minimum(first + 1, old.double() - 1)
        share = torch.round((centre - first) * STEPS) / STEPS
        return (places == first).double(), (places == second).double(), share


def _places(side: int, before: torch.Tensor) -> torch.Tensor:
    """The places float64 (side) of pixels, counted from the one after the first `before`."""
    return torch.arange(side, dtype=torch.float64) - before


def _half_up(values: torch.Tensor) -> torch.Tensor:
    return torch.floor(values + 0.5)


def _triangle(distance: torch.Tensor) -> torch.Tensor:
    return (1 - distance).clamp(min=0.0)


def _cubic(distance: torch.Tensor) -> torch.Tensor:
    """Keys' cubic with a = -0.5, as in Pillow."""
    near = (1.5 * distance - 2.5) * distance * distance + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    return torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))
