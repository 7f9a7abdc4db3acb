"""What a cache keeps of an image: a smaller one, which costs less to decode."""

from collections.abc import Sequence
from functools import partial
from typing import TypeVar

import cv2

from errors import DataError
from stream import planes
from stream.decode_pool import DIED, WorkerDied, pack, shared_pool
from stream.images import UnreadableImage, resize
from stream.pictures import Picture

JPEG_QUALITY = 90  # as in FFCV's recipe for ImageNet
IMAGES_PER_TASK = 32  # of a decoding process, which has others to do meanwhile

Encoded = TypeVar("Encoded", bound=bytes | memoryview)


def reduce_all(
    images: Sequence[memoryview], short_side: int, as_planes: bool, processes: int
) -> list[bytes | memoryview]:
    """`reduce` of each image, by this many decoding processes or by the caller. Raises DataError."""
    conversion = partial(reduce, short_side=short_side, as_planes=as_planes)
    if not processes:
        return [*map(conversion, images)]
    packed, parts = pack(conversion), range(0, len(images), IMAGES_PER_TASK)
    try:
        pool = shared_pool(processes)
        return [made for first in parts for made in pool.convert(packed, images[first : first + IMAGES_PER_TASK])]
    except WorkerDied as error:
        raise DataError(DIED) from error


def reduce(encoded: Encoded, short_side: int, as_planes: bool = False) -> bytes | Encoded:
    """An image with its short side reduced to `short_side` pixels, as JPEG or as planes, bytes.

    Unreadable ones are returned as they are, and so are smaller ones and those too long for a JPEG, unless as planes.
    """
    try:
        picture = Picture(encoded)
        scale = min(1, short_side / min(picture.shape[:2]))
        height, width = (round(side * scale) for side in picture.shape[:2])
        if as_planes:
            return _planes(picture, height, width)
        if scale == 1:
            return encoded
        pixels = resize(picture.pixels, height, width)
    except UnreadableImage:
        return encoded
    bgr = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
    fits, made = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])  # whose sides a JPEG bounds
    return bytes(made) if fits else encoded


def _planes(picture: Picture, height: int, width: int) -> bytes:
    """The planes of this size, each resized as it is: of nearly all JPEGs, half the numbers that RGB would have."""
    sizes = [(height, width), *[((height + 1) // 2, (width + 1) // 2)] * 2]
    found = zip(picture.planes(), sizes, strict=True)
    return planes.encode(*(plane if plane.shape == size else resize(plane, *size) for plane, size in found))
