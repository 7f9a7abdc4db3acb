"""Operations on images by name: their kernels, the numbers that these need of a magnitude, and how they are applied."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from stream import image_ops, pillow_ops
from stream.augment import send

Kernel = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
NUMBERS = 6  # that a kernel gets of each image, at most
NOTHING = -1


class Operation(NamedTuple):
    """A kernel, and what makes its numbers (N, NUMBERS or fewer) of magnitudes (N,), the height and the width.

    Magnitudes are the arguments of the reference, signs included.
    """

    kernel: Kernel
    numbers: Callable[[np.ndarray, int, int], np.ndarray]


class Choice(NamedTuple):
    """Of each sample the place of its operation, or NOTHING, int64 (N,), and its magnitude, float64 (N,)."""

    operations: np.ndarray
    magnitudes: np.ndarray


def apply(images: torch.Tensor, choice: Choice, operations: Sequence[Operation | None]) -> None:
    """Changes uint8 images (N, H, W, 3), those of one kernel at once; the choice is made on the host."""
    groups: dict[Kernel, tuple[list[np.ndarray], list[np.ndarray]]] = {}
    for place, operation in enumerate(operations):
        rows = np.flatnonzero(choice.operations == place)
        if operation is None or not len(rows):
            continue
        found = operation.numbers(choice.magnitudes[rows], *images.shape[1:3])
        numbers = np.zeros((len(rows), NUMBERS))
        numbers[:, : found.shape[1]] = found
        for parts, part in zip(groups.setdefault(operation.kernel, ([], [])), (rows, numbers), strict=True):
            parts.append(part)
    if not groups:
        return
    rows_of = [np.concatenate(rows) for rows, _ in groups.values()]
    numbers_of = [np.concatenate(numbers) for _, numbers in groups.values()]
    counts = [len(rows) for rows in rows_of]
    index = torch.split(send(np.concatenate(rows_of), images.device), counts)
    sent = torch.split(send(np.concatenate(numbers_of), images.device), counts)
    for kernel, where, with_numbers in zip(groups, index, sent, strict=True):
        images.index_copy_(0, where, kernel(images.index_select(0, where), with_numbers))


def torchvision_operations(interpolation: str) -> dict[str, Operation | None]:
    """Those of torchvision.transforms.autoaugment, in its order; None does nothing."""
    resample = partial(image_ops.affine, interpolation=interpolation)
    return {
        "Identity": None,
        "ShearX": Operation(resample, _shear_x),
        "ShearY": Operation(resample, _shear_y),
        "TranslateX": Operation(resample, lambda m, height, width: _matrices(m, shift_x=-np.trunc(m))),
        "TranslateY": Operation(resample, lambda m, height, width: _matrices(m, shift_y=-np.trunc(m))),
        "Rotate": Operation(resample, _rotate),
        "Brightness": Operation(image_ops.brightness, _shares),
        "Color": Operation(image_ops.saturation, _shares),
        "Contrast": Operation(image_ops.contrast, _shares),
        "Sharpness": Operation(image_ops.sharpness, _shares),
        "Posterize": Operation(image_ops.posterize, _mask),
        "Solarize": Operation(image_ops.solarize, _as_it_is),
        "AutoContrast": Operation(image_ops.autocontrast, _as_it_is),
        "Equalize": Operation(image_ops.equalize, _as_it_is),
    }


def timm_operations(fill: tuple[int, ...]) -> dict[str, Operation]:
    """Those of timm's rand_augment_transform on Pillow's images, in its order, resampled by cubic curves."""
    along_x, along_y, turned = (partial(pillow_ops.affine, fill=fill, axes=axes) for axes in ("x", "y", "xy"))
    return {
        "AutoContrast": Operation(pillow_ops.autocontrast, _as_it_is),
        "Equalize": Operation(image_ops.equalize, _as_it_is),
        "Invert": Operation(image_ops.invert, _as_it_is),
        "Rotate": Operation(turned, _rotate_pixels),
        "Posterize": Operation(image_ops.posterize, _mask),
        "Solarize": Operation(image_ops.solarize, _as_it_is),
        "SolarizeAdd": Operation(pillow_ops.solarize_add, _as_it_is),
        "Color": Operation(pillow_ops.colour, _as_it_is),
        "Contrast": Operation(pillow_ops.contrast, _as_it_is),
        "Brightness": Operation(pillow_ops.brightness, _as_it_is),
        "Sharpness": Operation(pillow_ops.sharpness, _as_it_is),
        "ShearX": Operation(along_x, lambda m, height, width: _matrices(m, x_of_y=m)),
        "ShearY": Operation(along_y, lambda m, height, width: _matrices(m, y_of_x=m)),
        "TranslateXRel": Operation(along_x, lambda m, height, width: _matrices(m, shift_x=m * width)),
        "TranslateYRel": Operation(along_y, lambda m, height, width: _matrices(m, shift_y=m * height)),
    }


def jitter_operations() -> dict[str, Operation]:
    """Those of torchvision.transforms.ColorJitter, in its order; magnitudes are the change of a factor, and of hue."""
    return {
        "brightness": Operation(image_ops.brightness, _shares),
        "contrast": Operation(image_ops.contrast, _shares),
        "saturation": Operation(image_ops.saturation, _shares),
        "hue": Operation(image_ops.hue, _as_it_is),
    }


def _as_it_is(magnitudes: np.ndarray, height: int, width: int) -> np.ndarray:
    return magnitudes[:, None]


def _shares(magnitudes: np.ndarray, height: int, width: int) -> np.ndarray:
    factors = 1.0 + magnitudes
    return np.stack([factors, 1.0 - factors], axis=1)


def _mask(magnitudes: np.ndarray, height: int, width: int) -> np.ndarray:
    """Of bits to keep. With none, black, as Pillow did before it came to refuse that."""
    return 256 - 2.0 ** (8 - np.clip(magnitudes, 0, 8)[:, None])


def _matrices(
    magnitudes: np.ndarray,
    x_of_y: np.ndarray | float = 0,
    shift_x: np.ndarray | float = 0,
    y_of_x: np.ndarray | float = 0,
    shift_y: np.ndarray | float = 0,
) -> np.ndarray:
    """From a place in the result to its source, as rows (x, y, 1) -> x and (x, y, 1) -> y one after the other."""
    matrices = np.tile([1.0, 0, 0, 0, 1, 0], (len(magnitudes), 1))
    matrices[:, 1], matrices[:, 2], matrices[:, 3], matrices[:, 5] = x_of_y, shift_x, y_of_x, shift_y
    return matrices


def _shear_x(magnitudes: np.ndarray, height: int, width: int) -> np.ndarray:
    """Around the corner, as all of these with the rounding of torchvision's matrices."""
    slope = np.tan(np.radians(np.degrees(np.arctan(magnitudes))))
    return _matrices(magnitudes, x_of_y=slope, shift_x=(width * 0.5 + slope * (height * 0.5)) - width * 0.5)


def _shear_y(magnitudes: np.ndarray, height: int, width: int) -> np.ndarray:
    angle = np.radians(np.degrees(np.arctan(magnitudes)))
    slope = np.sin(angle) / np.cos(angle)
    return _matrices(magnitudes, y_of_x=slope, shift_y=(slope * (width * 0.5) + height * 0.5) - height * 0.5)


def _rotate(magnitudes: np.ndarray, height: int, width: int) -> np.ndarray:
    angle = np.radians(magnitudes)
    zero = np.zeros(len(angle))
    return np.stack([np.cos(angle), -np.sin(angle), zero, np.sin(angle), np.cos(angle), zero], axis=1)


def _rotate_pixels(magnitudes: np.ndarray, height: int, width: int) -> np.ndarray:
    """Around the centre, with the rounding of Pillow's matrices."""
    matrices = []
    for degrees in magnitudes.tolist():
        angle = -math.radians(degrees % 360.0)
        cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
        x, y = width / 2, height / 2
        matrices.append([cos, sin, cos * -x + sin * -y + x, -sin, cos, -sin * -x + cos * -y + y])
    return np.array(matrices)
