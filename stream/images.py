"""Encoded images -> resized and transformed uint8 arrays."""

import math
from collections.abc import Callable

import cv2
import numpy as np
from PIL import Image

from stream.formats import UnreadableImage
from stream.pictures import EncodedImage as EncodedImage
from stream.pictures import decode as decode

MOST_LONG = 32  # side over side: no photograph, nor most panoramas
LEAST_VARIANCE = 0.1  # square pixels: sizes that shrink by less than 1.26 are not worth a blur
PILLOW = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
LEAST_SIGMA = 0.1  # pixels: a blur without effect

Transform = Callable[[EncodedImage, tuple[int, ...], bool], np.ndarray]
"""`transform(image, seed, sound) -> image`; of an image that is `sound`, no more need be decoded than is used."""


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


def decode_into(
    row: np.ndarray, image: EncodedImage, transform: Transform, seed: tuple[int, ...], sound: bool = False
) -> UnreadableImage | None:
    """Fill `row` and return None, or return the reason why the image cannot be read."""
    try:
        row[:] = transform(image, seed, sound)
    except UnreadableImage as error:
        return UnreadableImage(*error.args)  # without the traceback, which holds on to the decoder's memory
    return None
