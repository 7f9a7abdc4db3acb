"""Operations on groups of images, each image with numbers of its own, that equal Pillow's.

As in `stream/image_ops.py`: uint8 (N, H, W, 3) and float64 (N, K) on one device, results in new memory, no waiting.
Reference: Pillow's ImageEnhance, ImageOps and `Image.transform`, as timm.data.auto_augment uses them.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from stream.augment import send
from stream.image_ops import column, extremes, smooth, table_index, to_uint8


def blend(others: torch.Tensor, images: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """From others, which broadcast with float images (N, H, W, 3), numbers[0] of the way to them and past them."""
    return to_uint8((images - others).mul_(column(numbers, 0)).add_(others))


def grey(images: torch.Tensor) -> torch.Tensor:
    """Grey values int32 (N, H, W, 1), in fixed point."""
    red, green, blue = torch.split(images.int(), 1, 3)
    return (19595 * red).add_(38470 * green).add_(7471 * blue).add_(1 << 15) >> 16


def brightness(images: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Images times numbers[0]."""
    return to_uint8(images * column(numbers, 0))


def colour(images: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """`blend` from the grey values."""
    return blend(grey(images), images.float(), numbers)


def contrast(images: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """`blend` from the mean grey value, rounded."""
    pixels = images.shape[1] * images.shape[2]
    mean = grey(images).sum((1, 2), keepdim=True).mul_(2).add_(pixels).div_(2 * pixels, rounding_mode="floor")
    return blend(mean, images.float(), numbers)


def sharpness(images: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """`blend` from the smoothed images."""
    values = images.float()
    return blend(smooth(values), values, numbers)


def solarize_add(images: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """numbers[0] more, up to 255, where the value is below 128."""
    more = images + numbers[:, 0].short().view(-1, 1, 1, 1)
    return torch.where(images < 128, more.clamp_(max=255).to(torch.uint8), images)


def autocontrast(images: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Each channel stretched to 0..255 by a table in float64, unless it has one value only."""
    least, greatest = (found.view(-1, 3, 1).double() for found in extremes(images))
    span = (greatest - least).clamp_(min=1)
    scale = torch.full_like(span, 255).div_(span)  # 255 / span would multiply by the reciprocal
    levels = torch.arange(256, device=images.device)
    table = torch.where(least < greatest, levels * scale - least * scale, levels)
    return to_uint8(table).flatten()[table_index(images)]


def affine(images: torch.Tensor, numbers: torch.Tensor, fill: tuple[int, ...], axes: str = "xy") -> torch.Tensor:
    """Resampled by cubic curves (a = -1), `fill` outside; numbers (N, 6) lead from a place to its source, in pixels.

    `axes` (x, y or xy) says where sources lie between pixels: on another axis they must have their place's number. In
    float64, as Pillow does it, because values are cut off after the point.
    """
    count, height, width, _ = images.shape
    x = torch.arange(width, device=images.device).double() + 0.5
    y = torch.arange(height, device=images.device).double()[:, None] + 0.5
    a, b, c, d, e, f = numbers.view(count, 6, 1, 1).unbind(1)
    column, row = a * x + b * y + c, d * x + e * y + f
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    columns, across = _taps(column, width) if "x" in axes else (column.long()[:, None], None)
    rows, down = _taps(row, height) if "y" in axes else (row.long()[:, None], None)
    packed = F.pad(images, (0, 1)).view(torch.int32).view(count, -1)  # a pixel is one number, so that it is found once
    lines = []
    for line in torch.split(rows, 1, 1):
        pixels = packed.gather(1, (line * width + columns).view(count, -1)).view(torch.uint8)
        lines.append(_cubic(pixels.view(count, -1, height, width, 4)[..., :3].double().unbind(1), across))
    values = to_uint8(_cubic(lines, down))
    return torch.where(inside[..., None], values, send(np.array(fill, np.uint8), images.device))


def _taps(place: torch.Tensor, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The four pixels around each place, within the image, int64 (N, 4, H, W); how far it is from the second."""
    place = place - 0.5
    first = place.floor()
    taps = torch.arange(-1, 3, device=place.device).view(4, 1, 1)
    return (first.long()[:, None] + taps).clamp_(0, side - 1), (place - first)[..., None]


def _cubic(values: Sequence[torch.Tensor], distance: torch.Tensor | None) -> torch.Tensor:
    """The cubic curve through four values, at a distance of 0..1 from the second; without one, the only value."""
    if distance is None:
        return values[0]
    before, here, after, beyond = values
    first = after - before
    second = (before - here).mul_(2).add_(after).sub_(beyond)
    third = (here - before).sub_(after).add_(beyond)
    return third.mul_(distance).add_(second).mul_(distance).add_(first).mul_(distance).add_(here)
