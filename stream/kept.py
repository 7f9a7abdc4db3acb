"""What a cache keeps of an image: a smaller one, which costs less to decode."""

import cv2

from stream import planes
from stream.images import UnreadableImage, decode

JPEG_QUALITY = 90  # as in FFCV's recipe for ImageNet


def reduce(encoded: bytes, short_side: int, as_planes: bool = False) -> bytes:
    """An image with its short side reduced to `short_side` pixels, as JPEG or as planes.

    Unreadable ones are returned unchanged, and so are smaller ones, unless as planes.
    """
    try:
        image = decode(encoded)
    except UnreadableImage:
        return encoded
    scale = short_side / min(image.shape[:2])
    if scale >= 1 and not as_planes:
        return encoded
    if scale < 1:
        size = (round(image.shape[1] * scale), round(image.shape[0] * scale))
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    if as_planes:
        return planes.encode(image)
    bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    return bytes(cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1])
