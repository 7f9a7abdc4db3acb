"""Images as uncompressed planes of brightness and of halved colours, 4:2:0 as in JPEG: quick to read in part.

An image is a header (MAGIC, then height and width, 4 bytes each, little endian) and the planes Y (H, W), Cb and Cr
((H + 1) // 2, (W + 1) // 2), uint8 rows one after the other, in JPEG's full range (ITU-T T.871).
"""

import struct

import cv2
import numpy as np

from stream.formats import LARGEST_PIXELS, UnreadableImage

MAGIC = b"\x93Y420 1\n"
HEADER = struct.Struct("<8sII")
MARGIN = 1  # pixels of halved colours around a region, which bilinear interpolation uses


def encode(luma: np.ndarray, blue: np.ndarray, red: np.ndarray) -> bytes:
    """Header and planes of uint8 Y (H, W), Cb and Cr ((H + 1) // 2, (W + 1) // 2)."""
    return b"".join((HEADER.pack(MAGIC, *luma.shape), *(np.ascontiguousarray(p).data for p in (luma, blue, red))))


def split(image: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """uint8 RGB (H, W, 3) -> Y, Cb and Cr. A colour is the mean of four pixels, at odd edges of repeated ones."""
    luma, red, blue = cv2.split(cv2.cvtColor(image, cv2.COLOR_RGB2YCrCb))
    return luma, _halved(blue), _halved(red)


def _halved(plane: np.ndarray) -> np.ndarray:
    height, width = plane.shape
    even = cv2.copyMakeBorder(plane, 0, height % 2, 0, width % 2, cv2.BORDER_REPLICATE)
    return cv2.resize(even, (even.shape[1] // 2, even.shape[0] // 2), interpolation=cv2.INTER_AREA)


class Planes:
    """An image that `encode` made, of which any region can be had. Raises UnreadableImage for what is none."""

    def __init__(self, encoded: bytes | memoryview) -> None:
        data = np.frombuffer(encoded, np.uint8)
        _, height, width = HEADER.unpack_from(encoded) if len(data) >= HEADER.size else (b"", 0, 0)
        rows, columns = (height + 1) // 2, (width + 1) // 2
        whole, part = height * width, rows * columns
        if not 0 < whole <= LARGEST_PIXELS or len(data) != HEADER.size + whole + 2 * part:
            raise UnreadableImage("its planes are cut short, or of another size than told")
        luma, blue, red = np.split(data[HEADER.size :], [whole, whole + part])
        self.shape = (height, width, 3)
        self._luma = luma.reshape(height, width)
        self._colours = [plane.reshape(rows, columns) for plane in (red, blue)]

    def region(self, left: int, top: int, right: int, bottom: int) -> np.ndarray:
        """RGB (bottom - top, right - left, 3), uint8, the same pixels as in the whole image."""
        x, y = max(0, left // 2 - MARGIN), max(0, top // 2 - MARGIN)
        parts = [plane[y : (bottom + 1) // 2 + MARGIN, x : (right + 1) // 2 + MARGIN] for plane in self._colours]
        size = (2 * parts[0].shape[1], 2 * parts[0].shape[0])
        rows, columns = slice(top - 2 * y, bottom - 2 * y), slice(left - 2 * x, right - 2 * x)
        colours = (cv2.resize(part, size, interpolation=cv2.INTER_LINEAR)[rows, columns] for part in parts)
        own = map(np.ascontiguousarray, (self._luma[top:bottom, left:right], *colours))  # which merge is quicker with
        return cv2.cvtColor(cv2.merge([*own]), cv2.COLOR_YCrCb2RGB)


def is_planes(encoded: bytes | memoryview) -> bool:
    """Whether these bytes begin as `encode` makes them."""
    return bytes(encoded[: len(MAGIC)]) == MAGIC
