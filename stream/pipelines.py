"""What is done to each image, as a function and numbers: built where images are decoded.

So a training process, which hands it to decoding processes, need not import albumentations and what that needs.
"""

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from stream.images import EncodedImage, Transform

if TYPE_CHECKING:
    import albumentations as A


class Pipeline:
    """`build(*arguments)`, a transform (see `stream.images`), which is built when this is unpickled or first called."""

    def __init__(self, build: Callable[..., Transform], *arguments: Any) -> None:
        self._how = build, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self._how

    def __call__(self, image: EncodedImage, seed: tuple[int, ...], sound: bool = False) -> np.ndarray:
        return self._built(image, seed, sound)

    @cached_property
    def _built(self) -> Transform:
        build, arguments = self._how
        return build(*arguments)


def resized_crop(size: int, interpolation: str) -> Transform:
    """A random part of an image, 8 to 100 % of its area, resized to a square of `size` pixels."""
    import albumentations as A

    from stream.transforms import RandomResizedCropAdapter

    crop = A.RandomResizedCrop((size, size), scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3))
    return RandomResizedCropAdapter(crop, interpolation)


def fixed_crop(short: int, size: int) -> Transform:
    """The short side resized to `short` pixels, and a random square of `size` cut out."""
    import albumentations as A

    from stream.transforms import AlbumentationsAdapter, SquareOfStrip

    return AlbumentationsAdapter(SquareOfStrip(at_random=True), _short_side(short), A.RandomCrop(size, size))


def centre_crop(short: int, size: int, interpolation: str) -> Transform:
    """The short side resized to `short` pixels, with antialiasing, and a square of `size` cut from the middle."""
    import albumentations as A

    from stream.transforms import AlbumentationsAdapter, ResizedCentre, SquareOfStrip

    strip = SquareOfStrip(at_random=False)
    if interpolation == "fast":
        return AlbumentationsAdapter(strip, _short_side(short), A.CenterCrop(size, size))
    return AlbumentationsAdapter(strip, ResizedCentre(short, size, interpolation))


def _short_side(short: int) -> "A.SmallestMaxSize":
    import albumentations as A

    return A.SmallestMaxSize(short, interpolation=cv2.INTER_LINEAR, area_for_downscale="image")
