"""What is done to each image in the decoding processes: pipelines of albumentations, whose import takes a second."""

import copy
import os
import threading
from typing import Any

import numpy as np

from stream.images import MOST_LONG, resize
from stream.pictures import EncodedImage, Picture, decode
from stream.seeds import Use, text_seeded

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
import albumentations as A


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
        pipeline, numbers = self._own(), text_seeded(seed[0], Use.CROP, *seed[1:])
        pipeline.set_random_state(np.random.default_rng(numbers.getrandbits(64)), numbers)
        result: np.ndarray = pipeline(image=decode(image))["image"]
        return result

    def _own(self) -> A.Compose:
        """This thread's pipeline."""
        if not hasattr(self._threads, "pipeline"):
            self._threads.pipeline = copy.deepcopy(self._pipeline)
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
        (crop,) = self._own().transforms
        crop.py_random = text_seeded(seed[0], Use.CROP, *seed[1:])
        left, top, right, bottom = crop.get_params_dependent_on_data({"shape": picture.shape}, {})["crop_coords"]
        height, width = crop.size
        return resize(picture.region(left, top, right, bottom, sound), height, width, self._interpolation)
