"""Operations on groups of images, each image with numbers of its own, that equal torchvision's.

Images are uint8 (N, H, W, 3) on any device, and so are the results, in new memory. `numbers` are float64 (N, K) on the
same device. Nothing waits for the device. Reference: torchvision.transforms.functional on tensors. Sums of grey values
are exact up to 65,793 pixels, so on the CPU all of this is equal to the last bit.
"""

import numpy as np
import torch
import torch.nn.functional as F

from stream.augment import send

GREY = (0.2989, 0.587, 0.114)
SECTORS = np.array(
    [[0, 1, 2], [3, 0, 2], [2, 0, 1], [2, 3, 0], [1, 2, 0], [0, 2, 3]]
)  # of hue: value, rising, least, falling


def column(numbers: torch.Tensor, place: int) -> torch.Tensor:
    """One number of each image, as float32 (N, 1, 1, 1)."""
    return numbers[:, place].float().view(-1, 1, 1, 1)


def to_uint8(values: torch.Tensor) -> torch.Tensor:
    """Clamped (in place) and cut off after the point."""
    return values.clamp_(0, 255).to(torch.uint8)


def blend(images: torch.Tensor, others: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """numbers[0] of float images (N, H, W, 3), which are changed, and numbers[1] of others that broadcast with them."""
    return to_uint8(images.mul_(column(numbers, 0)).add_(others * column(numbers, 1)))


def grey(images: torch.Tensor) -> torch.Tensor:
    """Float images of 0..255 -> whole grey values, float32 (N, H, W, 1)."""
    red, green, blue = torch.split(images, 1, 3)
    return (GREY[0] * red).add_(GREY[1] * green).add_(GREY[2] * blue).floor_()


def brightness(images: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Images times numbers[0]."""
    return to_uint8(images * column(numbers, 0))


def saturation(images: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """numbers[0] of the images and numbers[1] of their grey values."""
    values = images.float()
    return blend(values, grey(values), numbers)


def contrast(images: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """numbers[0] of the images and numbers[1] of their mean grey value."""
    values = images.float()
    return blend(values, grey(values).mean((1, 2), keepdim=True), numbers)


def hue(images: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Hues turned by numbers[0], of a turn, by way of HSV."""
    values = images.float() / 255.0
    red, green, blue = values.unbind(3)
    greatest, least = values.amax(3), values.amin(3)
    one = torch.ones_like(greatest)
    saturation = (greatest - least) / torch.where(greatest == least, one, greatest)
    span = torch.where(greatest == least, one, greatest - least)
    rc, gc, bc = ((greatest - channel) / span for channel in (red, green, blue))
    turn = torch.where(greatest == red, bc - gc, torch.where(greatest == green, 2.0 + rc - bc, 4.0 + gc - rc))
    sixths = (torch.fmod(turn / 6.0 + 1.0, 1.0) + numbers[:, 0].float().view(-1, 1, 1)) % 1.0 * 6.0
    sector = sixths.floor()
    part = sixths - sector
    least = (greatest * (1.0 - saturation)).clamp_(0, 1)
    falling = (greatest * (1.0 - saturation * part)).clamp_(0, 1)
    rising = (greatest * (1.0 - saturation * (1.0 - part))).clamp_(0, 1)
    kinds = send(SECTORS, images.device)[sector.long() % 6]
    return torch.stack([greatest, rising, least, falling], 3).gather(3, kinds).mul_(255.999).to(torch.uint8)


def smooth(values: torch.Tensor) -> torch.Tensor:
    """Float images of 0..255, smoothed by a kernel of 3 x 3 with a centre of 5, rounded; their edges as they are."""
    if min(values.shape[1:3]) < 3:
        return values.clone()
    rows = values[:, :-2] + values[:, 1:-1]
    rows += values[:, 2:]
    sums = rows[:, :, :-2] + rows[:, :, 1:-1]
    sums += rows[:, :, 2:]
    sums += 4 * values[:, 1:-1, 1:-1]  # a whole number, and its thirteenth never lies halfway between two
    smoothed = values.clone()
    smoothed[:, 1:-1, 1:-1] = sums.div_(13).round_()
    return smoothed


def sharpness(images: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """numbers[0] of the images and numbers[1] of them smoothed; images of less than 3 pixels a side as they are."""
    if min(images.shape[1:3]) < 3:
        return images.clone()
    values = images.float()
    return blend(values, smooth(values), numbers)


def posterize(images: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """The bits of numbers[0], a mask of 0..255."""
    return images & numbers[:, 0].to(torch.uint8).view(-1, 1, 1, 1)


def solarize(images: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Values from numbers[0] on (0..256) are inverted."""
    return torch.where(images >= numbers[:, 0].ceil().short().view(-1, 1, 1, 1), 255 - images, images)


def invert(images: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """255 less the value."""
    return 255 - images


def extremes(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The least and the greatest value of each channel, uint8 (N, 1, 1, 3)."""
    return images.amin((1, 2), keepdim=True), images.amax((1, 2), keepdim=True)


def autocontrast(images: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Each channel stretched to 0..255, unless it has one value only."""
    least, greatest = (found.float() for found in extremes(images))
    scale = 255 / (greatest - least)
    constant = least == greatest
    least, scale = least.masked_fill(constant, 0), scale.masked_fill(constant, 1)
    return to_uint8((images - least).mul_(scale))


def equalize(images: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """The histogram of each channel made even, unless all but its greatest value come less than 255 times."""
    index = table_index(images)
    count = len(images)
    ones = torch.ones((), dtype=torch.int64, device=images.device).expand(index.numel())
    histogram = torch.zeros(count * 768, dtype=torch.int64, device=images.device)
    histogram = histogram.scatter_add_(0, index.flatten(), ones).view(count, 3, 256)
    below = histogram.cumsum(2) - histogram
    greatest = extremes(images)[1].view(count, 3, 1).long()
    step = below.gather(2, greatest).div_(255, rounding_mode="floor")
    table = (below + step // 2).div_(step.clamp(min=1), rounding_mode="floor").clamp_(0, 255)
    table = torch.where(step > 0, table, torch.arange(256, device=images.device))
    return table.to(torch.uint8).flatten()[index]


def table_index(images: torch.Tensor) -> torch.Tensor:
    """Where each value finds its place in tables (N, 3, 256) that lie flat, int64 (N, H, W, 3)."""
    first = torch.arange(len(images) * 3, device=images.device).mul_(256).view(-1, 1, 1, 3)
    return images + first


def affine(images: torch.Tensor, numbers: torch.Tensor, interpolation: str) -> torch.Tensor:
    """Resampled by `nearest` or `bilinear`, black outside; numbers (N, 6) lead from a result's place to its source.

    Places are pixels from the centre of an image. Grid and rounding as in torchvision's `affine` for tensors.
    """
    height, width = images.shape[1:3]
    grid = torch.stack(
        [_sources(numbers[:, :3], height, width, width), _sources(numbers[:, 3:], height, width, height)], 3
    )
    values = F.grid_sample(images.permute(0, 3, 1, 2).float(), grid, interpolation, "zeros", align_corners=False)
    return values.round_().to(torch.uint8).permute(0, 2, 3, 1)


def _sources(row: torch.Tensor, height: int, width: int, side: int) -> torch.Tensor:
    """One row (N, 3) of the matrices at every pixel, in halves of a side, (N, H, W)."""
    across, down, shift = (row.float() / (0.5 * side)).unbind(1)
    x = torch.arange(width, device=row.device) - (0.5 * width - 0.5)
    y = torch.arange(height, device=row.device) - (0.5 * height - 0.5)
    partial = (across[:, None] * x)[:, None, :] + (down[:, None] * y)[:, :, None]
    return partial.add_(shift[:, None, None])
