"""Each operation, on a group of images with a magnitude each, does what its reference does to one image with one."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from products import round_each_product
from torchvision.transforms import InterpolationMode, autoaugment
from waiting import nothing_waits

from stream.augment import MEAN_COLOUR
from stream.auto_augment import torchvision_magnitudes
from stream.operations import Operation, timm_operations, torchvision_operations

SIZES = [(32, 32), (33, 47), (224, 224)]
TORCHVISION = [name for name, operation in torchvision_operations("nearest").items() if operation]
GEOMETRIC = [name for name in TORCHVISION if name.startswith(("Shear", "Translate", "Rotate"))]
BITS = list(range(1, 9))
FACTORS = np.linspace(0.1, 1.9, 37)
TIMM: dict[str, Any] = {
    "AutoContrast": [],
    "Equalize": [],
    "Invert": [],
    "Rotate": np.linspace(-30, 30, 41),
    "Posterize": BITS,
    "Solarize": range(0, 257, 8),
    "SolarizeAdd": [0, 1, 11, 55, 110, 128],
    "Color": FACTORS,
    "Contrast": FACTORS,
    "Brightness": FACTORS,
    "Sharpness": FACTORS,
    "ShearX": np.linspace(-0.3, 0.3, 41),
    "ShearY": np.linspace(-0.3, 0.3, 41),
    "TranslateXRel": np.linspace(-0.45, 0.45, 41),
    "TranslateYRel": np.linspace(-0.45, 0.45, 41),
}


def pictures(height: int, width: int) -> torch.Tensor:
    """Noise, gradients, constant channels, few values and one odd pixel, uint8 (5, H, W, 3)."""
    noise = np.random.default_rng(height * width).integers(0, 256, (height, width, 3), np.uint8)
    ramps = np.zeros_like(noise)
    ramps[..., 0] = np.linspace(0, 255, width)
    ramps[..., 1] = np.linspace(255, 10, height)[:, None]
    ramps[..., 2] = np.linspace(40, 90, height * width).reshape(height, width)
    constant = np.full_like(noise, 77)
    constant[..., 1] = 255
    odd = constant.copy()
    odd[height // 2, width // 2] = 3
    return torch.from_numpy(np.stack([noise, ramps, constant, noise // 100 * 100, odd]))


def batch(magnitudes: Any, height: int, width: int) -> tuple[torch.Tensor, np.ndarray]:
    """Every picture with every magnitude; where both sides are even, one picture for each magnitude."""
    found, values = pictures(height, width), np.asarray(magnitudes, np.float64)
    if height % 2:
        return found.repeat(len(values), 1, 1, 1), np.repeat(values, len(found))
    return found[torch.arange(max(len(values), len(found))) % len(found)], np.resize(
        values, max(len(values), len(found))
    )


def done(operation: Operation | None, images: torch.Tensor, magnitudes: np.ndarray) -> torch.Tensor:
    assert operation is not None
    before = images.clone()
    numbers = torch.from_numpy(operation.numbers(magnitudes, *images.shape[1:3])).double()
    with nothing_waits():
        found = operation.kernel(images, numbers)
    assert (found.dtype, found.shape) == (torch.uint8, images.shape)
    assert torch.equal(images, before)
    assert found.data_ptr() != images.data_ptr()
    return found


def magnitudes_of(name: str, wide: bool, height: int, width: int) -> np.ndarray:
    sides = (0.3, 150 / 331 * width, 150 / 331 * height, 30.0, 4, 0.9)
    tables, signed = (
        torchvision_magnitudes(0.99, 32.0, 32.0, 135.0, 6, 0.99) if wide else torchvision_magnitudes(*sides)
    )
    place = list(torchvision_operations("nearest")).index(name)
    return np.unique(np.concatenate([tables[place], -tables[place]]) if signed[place] else tables[place])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize(
    ("name", "interpolation"),
    [(name, "nearest") for name in TORCHVISION] + [(name, "bilinear") for name in GEOMETRIC],
)
def test_an_operation_is_torchvisions(
    name: str, interpolation: str, wide: bool, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    round_each_product(monkeypatch)
    images, magnitudes = batch(magnitudes_of(name, wide, *size), *size)
    found = done(torchvision_operations(interpolation)[name], images, magnitudes)
    mode = InterpolationMode(interpolation)
    for image, magnitude, ours in zip(images, magnitudes.tolist(), found, strict=True):
        theirs = autoaugment._apply_op(image.permute(2, 0, 1), name, magnitude, mode, None).permute(1, 2, 0)
        assert torch.equal(ours, theirs), magnitude


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", timm_operations(MEAN_COLOUR))
def test_an_operation_is_timms_on_pillows_images(name: str, size: tuple[int, int]) -> None:
    from timm.data import auto_augment

    operation: Any = auto_augment.NAME_TO_OP[name]
    images, magnitudes = batch(TIMM[name] if len(TIMM[name]) else [0.0], *size)
    found = done(timm_operations(MEAN_COLOUR)[name], images, magnitudes)
    whole = name in ("Posterize", "Solarize", "SolarizeAdd")
    for image, magnitude, ours in zip(images, magnitudes.tolist(), found, strict=True):
        arguments = [int(magnitude) if whole else magnitude] if len(TIMM[name]) else []
        picture = Image.fromarray(image.numpy())
        theirs = operation(picture, *arguments, fillcolor=MEAN_COLOUR, resample=Image.Resampling.BICUBIC)
        assert np.array_equal(ours.numpy(), np.array(theirs)), magnitude


def test_no_bits_are_black_which_pillow_refuses() -> None:
    images = pictures(8, 8)
    assert not done(timm_operations(MEAN_COLOUR)["Posterize"], images, np.zeros(len(images))).any()


@pytest.mark.parametrize("size", [(1, 1), (2, 9), (9, 2), (3, 3)])
def test_the_smallest_images_are_torchvisions_too(size: tuple[int, int]) -> None:
    for name in ("Sharpness", "Contrast", "Color", "AutoContrast", "Equalize"):
        images = pictures(*size)
        found = done(torchvision_operations("nearest")[name], images, np.full(len(images), 0.5))
        for image, ours in zip(images, found, strict=True):
            theirs = autoaugment._apply_op(image.permute(2, 0, 1), name, 0.5, InterpolationMode.NEAREST, None)
            assert torch.equal(ours, theirs.permute(1, 2, 0)), name
