"""Encoded images -> transformed uint8 arrays."""

import contextlib
import copy
import functools
import io
import os
import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

import cv2
import numpy as np
from PIL import Image

from jpeg import can_decode_regions, decode_region

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
import albumentations as A

cv2.setNumThreads(0)

DECODE_ERRORS = (ValueError, OSError, SyntaxError, cv2.error, Image.DecompressionBombError)

EncodedImage = bytes | memoryview | np.ndarray
Transform = Callable[[EncodedImage, tuple[int, ...]], np.ndarray]


class UnreadableImage(Exception):
    """It cannot be decoded; says why."""


class Picture:
    """An image of which, if it is encoded, only the header has been read. Raises UnreadableImage, also when it is used.

    cv2 decodes what it reads well, RGB and greyscale of 8 or 16 bits, turned as EXIF says; Pillow the rest (CMYK,
    palettes, alpha).
    """

    def __init__(self, image: EncodedImage) -> None:
        self._image = image
        self._in_regions = False
        if isinstance(image, np.ndarray):
            return
        with _reasons(), Image.open(io.BytesIO(image)) as header:
            self._mode, self._size = header.mode, header.size
            plain = header.format == "JPEG" and header.mode in ("RGB", "L") and "exif" not in header.info
            self._in_regions = plain and can_decode_regions()

    @property
    def shape(self) -> tuple[int, ...]:
        """(H, W, 3)."""
        return (self._size[1], self._size[0], 3) if self._in_regions else self.pixels.shape

    @functools.cached_property
    def pixels(self) -> np.ndarray:
        """uint8 RGB (H, W, 3)."""
        image = self._image
        if isinstance(image, np.ndarray):
            return image
        with _reasons():
            if self._mode not in ("RGB", "L", "I;16"):
                with Image.open(io.BytesIO(image)) as whole:
                    return np.asarray(whole.convert("RGB"))
            decoded = cv2.imdecode(np.frombuffer(image, np.uint8), cv2.IMREAD_COLOR_RGB)
            if decoded is None:
                raise ValueError("not a whole image")
            return decoded

    def region(self, left: int, top: int, right: int, bottom: int) -> np.ndarray:
        """`pixels[top:bottom, left:right]`, for which no more of a JPEG is decoded than that takes."""
        if self._in_regions:
            decoded = decode_region(self._image, left, top, right, bottom)
            if decoded is not None:
                return decoded
        return self.pixels[top:bottom, left:right]


def decode(image: EncodedImage) -> np.ndarray:
    """An encoded image -> uint8 RGB (H, W, 3). Raises UnreadableImage."""
    return Picture(image).pixels


@contextlib.contextmanager
def _reasons() -> Iterator[None]:
    try:
        yield
    except DECODE_ERRORS as error:
        raise UnreadableImage(f"{type(error).__name__}: {error}") from error


class AlbumentationsAdapter:
    """An albumentations pipeline as `transform(image, seed) -> image`, uint8 (H, W, 3). Raises UnreadableImage.

    The result depends on the image and the seed alone, in whatever thread or order it is called: each thread has a
    copy of the pipeline, and all steps draw from one generator (albumentations' own `set_random_seed` gives every
    step the same numbers, so that a flip would depend on the crop before it).
    """

    def __init__(self, *steps: A.BasicTransform) -> None:
        self._pipeline = A.Compose(steps)
        self._threads = threading.local()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), tuple(self._pipeline.transforms)

    def __call__(self, image: EncodedImage, seed: tuple[int, ...]) -> np.ndarray:
        result: np.ndarray = self._seeded(seed)(image=decode(image))["image"]
        return result

    def _seeded(self, seed: tuple[int, ...]) -> A.Compose:
        """This thread's pipeline, about to draw what belongs to the seed."""
        if not hasattr(self._threads, "pipeline"):
            self._threads.pipeline = copy.deepcopy(self._pipeline)
        generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed)))
        python_generator = random.Random(int(generator.integers(2**63)))
        self._threads.pipeline.set_random_state(generator, python_generator)
        return self._threads.pipeline


class RandomResizedCropAdapter(AlbumentationsAdapter):
    """One A.RandomResizedCrop, for which no more of a JPEG is decoded than the crop takes."""

    def __init__(self, crop: A.RandomResizedCrop) -> None:
        super().__init__(crop)

    def __call__(self, image: EncodedImage, seed: tuple[int, ...]) -> np.ndarray:
        picture = Picture(image)
        (crop,) = self._seeded(seed).transforms
        coordinates = crop.get_params_dependent_on_data({"shape": picture.shape}, {})["crop_coords"]
        region = picture.region(*coordinates)
        result: np.ndarray = crop.apply(region, crop_coords=(0, 0, region.shape[1], region.shape[0]))
        return result


def decode_into(
    row: np.ndarray, image: EncodedImage, transform: Transform, seed: tuple[int, ...]
) -> UnreadableImage | None:
    """Fills `row` and returns None, or returns why the image cannot be read."""
    try:
        row[:] = transform(image, seed)
    except UnreadableImage as error:
        return error
    return None
