"""Encoded images -> transformed uint8 arrays."""

import copy
import math
import os
import random
import threading
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
from PIL import Image

from stream.formats import UnreadableImage
from stream.pictures import EncodedImage, Picture, decode
from stream.seeds import Use, seeded

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
import albumentations as A

MOST_LONG = 32  # side over side: no photograph, nor most panoramas
LEAST_VARIANCE = 0.1  # square pixels: sizes that shrink by less than 1.26 are not worth a blur
PILLOW = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
LEAST_SIGMA = 0.1  # pixels: a blur without effect

Transform = Callable[[EncodedImage, tuple[int, ...], bool], np.ndarray]
"""`transform(image, seed, sound) -> image`; of an image that is `sound`, no more need be decoded than is used."""


class AlbumentationsAdapter:
    """An albumentations pipeline as `transform(image, seed) -> image`, uint8 (H, W, 3). Raises UnreadableImage.

    `seed` is (seed of the run, epoch, sample id). `sound` tells that the image has been read before without complaint.

    The result depends on the image and the seed alone, whatever the thread and the order of calls: each thread has its
    own copy of the pipeline, and all steps draw from one generator (albumentations' own `set_random_seed` gives every
    step the same numbers, so a flip would depend on the crop before it).
    """

    def __init__(self, *steps: A.BasicTransform) -> None:
        self._pipeline = A.Compose(steps)
        self._threads = threading.local()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), tuple(self._pipeline.transforms)

    def __call__(self, image: EncodedImage, seed: tuple[int, ...], sound: bool = False) -> np.ndarray:
        result: np.ndarray = self._seeded(seed)(image=decode(image))["image"]
        return result

    def _seeded(self, seed: tuple[int, ...]) -> A.Compose:
        """This thread's pipeline, seeded."""
        if not hasattr(self._threads, "pipeline"):
            self._threads.pipeline = copy.deepcopy(self._pipeline)
        generator = np.random.Generator(np.random.PCG64(seeded(seed[0], Use.CROP, *seed[1:])))
        python_generator = random.Random(int(generator.integers(2**63)))
        self._threads.pipeline.set_random_state(generator, python_generator)
        return self._threads.pipeline


class SquareOfStrip(A.ImageOnlyTransform):  # type: ignore[misc]
    """Cuts a square, uint8 (H, W, 3), from an image MOST_LONG times as long as wide or more; leaves others alone.

    For steps that scale the short side to a given size, which would make millions of pixels of such an image.
    """

    def __init__(self, *, at_random: bool) -> None:
        super().__init__(p=1)
        self.at_random = at_random

    def apply(self, img: np.ndarray, **params: Any) -> np.ndarray:
        short, long = sorted(img.shape[:2])
        if long < MOST_LONG * short:
            return img
        start = self.py_random.randint(0, long - short) if self.at_random else (long - short) // 2
        piece = slice(start, start + short)
        return img[piece] if img.shape[0] == long else img[:, piece]

    def get_transform_init_args_names(self) -> tuple[str, ...]:
        return ("at_random",)


def resize(image: np.ndarray, height: int, width: int, interpolation: str = "fast") -> np.ndarray:
    """Resize an image, uint8 (H, W, 3), with bilinear interpolation after a blur that prevents aliasing.

    The antialiased bilinear filter of Pillow and torchvision, `bilinear` here, is a triangle that reaches `scale` old
    pixels to either side and has a variance of scale^2 / 6. This one has the same variance at a fraction of the cost:
    means over squares of `factor` pixels, a blur over three pixels, and plain bilinear interpolation, each applied only
    as far as needed. `bicubic` is Pillow's too.
    """
    if interpolation != "fast":
        return np.asarray(Image.fromarray(image).resize((width, height), PILLOW[interpolation]))
    factors, sigmas = zip(*(_filters(image.shape[axis] / new) for axis, new in enumerate((height, width))), strict=True)
    if max(factors) > 1:
        rows, columns = (image.shape[axis] // factor for axis, factor in enumerate(factors))
        whole = image[: rows * factors[0], : columns * factors[1]]
        image = cv2.resize(whole, (columns, rows), interpolation=cv2.INTER_AREA)
    if max(sigmas) > LEAST_SIGMA:
        image = cv2.GaussianBlur(image, (3, 3), sigmas[1], sigmaY=sigmas[0])
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)


def _filters(scale: float) -> tuple[int, float]:
    """How many pixels to average first, and the standard deviation of the blur: LEAST_SIGMA for (nearly) none."""
    factor = max(1, math.ceil(scale / 2))
    variance = (scale**2 / 6 - (factor**2 - 1) / 12) / factor**2 - 1 / 6
    if variance < LEAST_VARIANCE:
        return factor, LEAST_SIGMA
    outer = variance / 2  # of the three weights, which cv2 takes from a Gaussian
    return factor, math.sqrt(-0.5 / math.log(outer / (1 - 2 * outer)))


class ResizedCentre(A.ImageOnlyTransform):  # type: ignore[misc]
    """Resizes the short side to `short` pixels and cuts a square of `size` from the middle, as torchvision does."""

    def __init__(self, short: int, size: int, interpolation: str) -> None:
        super().__init__(p=1)
        self.short, self.size, self.interpolation = short, size, interpolation

    def apply(self, img: np.ndarray, **params: Any) -> np.ndarray:
        least = min(img.shape[:2])
        height, width = (int(self.short * side / least) for side in img.shape[:2])
        top, left = (round((side - self.size) / 2.0) for side in (height, width))
        return resize(img, height, width, self.interpolation)[top : top + self.size, left : left + self.size]

    def get_transform_init_args_names(self) -> tuple[str, ...]:
        return "short", "size", "interpolation"


class RandomResizedCropAdapter(AlbumentationsAdapter):
    """One A.RandomResizedCrop that decodes only the cropped part of a JPEG and resizes without aliasing."""

    def __init__(self, crop: A.RandomResizedCrop, interpolation: str = "fast") -> None:
        super().__init__(crop)
        self._interpolation = interpolation

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (*self._pipeline.transforms, self._interpolation)

    def __call__(self, image: EncodedImage, seed: tuple[int, ...], sound: bool = False) -> np.ndarray:
        picture = Picture(image)
        (crop,) = self._seeded(seed).transforms
        left, top, right, bottom = crop.get_params_dependent_on_data({"shape": picture.shape}, {})["crop_coords"]
        height, width = crop.size
        return resize(picture.region(left, top, right, bottom, sound), height, width, self._interpolation)


def decode_into(
    row: np.ndarray, image: EncodedImage, transform: Transform, seed: tuple[int, ...], sound: bool = False
) -> UnreadableImage | None:
    """Fill `row` and return None, or return the reason why the image cannot be read."""
    try:
        row[:] = transform(image, seed, sound)
    except UnreadableImage as error:
        return UnreadableImage(*error.args)  # without the traceback, which holds on to the decoder's memory
    return None
