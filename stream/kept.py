"""What a cache keeps of an image: a smaller one, which costs less to decode."""

import cv2

from stream import planes
from stream.images import UnreadableImage, resize
from stream.pictures import Picture

JPEG_QUALITY = 90  # as in FFCV's recipe for ImageNet


def reduce(encoded: bytes, short_side: int, as_planes: bool = False) -> bytes:
    """An image with its short side reduced to `short_side` pixels, as JPEG or as planes.

    Unreadable ones are returned unchanged, and so are smaller ones, unless as planes.
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
    return bytes(cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1])


def _planes(picture: Picture, height: int, width: int) -> bytes:
    """The planes of this size, each resized as it is: of nearly all JPEGs, half the numbers that RGB would have."""
    sizes = [(height, width), *[((height + 1) // 2, (width + 1) // 2)] * 2]
    found = zip(picture.planes(), sizes, strict=True)
    return planes.encode(*(plane if plane.shape == size else resize(plane, *size) for plane, size in found))
