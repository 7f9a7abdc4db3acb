"""Regions of JPEG images, decoded with libjpeg-turbo 3, which decodes only as much of a file as a region needs.

The library comes with the wheel `turbojpeg`, of which nothing else is used, or from the system; without it everything
works, but more slowly. https://libjpeg-turbo.org/Documentation/Documentation
"""

import contextlib
import ctypes
import functools
import importlib.metadata
import threading
from ctypes.util import find_library

import numpy as np

MARGIN = 2  # pixels around a region that smooth upsampling of the colours uses
BLOCK = {0: 8, 1: 16, 2: 16, 3: 8, 4: 8, 5: 32, 6: 8}  # width in pixels of the unit of decoding, by TJSAMP
DECOMPRESS, SUBSAMPLING, WIDTH, HEIGHT, RGB = 1, 4, 5, 6, 0  # TJINIT, three of TJPARAM, TJPF
END_OF_IMAGE = b"\xff\xd9"


class _Region(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("x", "y", "w", "h")]


@functools.cache
def _library() -> ctypes.CDLL | None:
    for path in _candidates():
        with contextlib.suppress(OSError, AttributeError):  # missing, or version 2
            library = ctypes.CDLL(path)
            library.tj3Init.restype = ctypes.c_void_p
            data = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
            library.tj3Get.argtypes = (ctypes.c_void_p, ctypes.c_int)
            library.tj3DecompressHeader.argtypes = data
            library.tj3SetCroppingRegion.argtypes = (ctypes.c_void_p, _Region)
            library.tj3Decompress8.argtypes = (*data, ctypes.c_void_p, ctypes.c_int, ctypes.c_int)
            return library
    return None


def _candidates() -> list[str]:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        files = importlib.metadata.files("turbojpeg") or []
        return [str(file.locate()) for file in files if file.name.startswith("libturbojpeg")]
    return [path for path in [find_library("turbojpeg")] if path]


class _Own(threading.local):
    """A decompressor for each thread."""

    def __init__(self) -> None:
        library = _library()
        self.handle = library.tj3Init(DECOMPRESS) if library else None


_own = _Own()


def can_decode_regions() -> bool:
    """Whether libjpeg-turbo 3 was found."""
    return _own.handle is not None


def decode_region(
    encoded: bytes | memoryview | np.ndarray, left: int, top: int, right: int, bottom: int
) -> np.ndarray | None:
    """A region of an RGB or greyscale JPEG, uint8 RGB (H, W, 3), with the same pixels as in the decoded whole image.

    None if the file is truncated or damaged in a part that the region needs; decoding the whole image then tells.
    """
    library, handle = _library(), _own.handle
    if library is None or bytes(encoded[-2:]) != END_OF_IMAGE:
        return None
    data = np.frombuffer(encoded, np.uint8)
    source = (handle, data.ctypes.data, data.nbytes)
    if library.tj3DecompressHeader(*source):
        return None
    block = BLOCK.get(library.tj3Get(handle, SUBSAMPLING))
    width, height = library.tj3Get(handle, WIDTH), library.tj3Get(handle, HEIGHT)
    if block is None:
        return None
    x, y = max(0, left - MARGIN) // block * block, max(0, top - MARGIN)
    region = _Region(x, y, min(width, right + MARGIN) - x, min(height, bottom + MARGIN) - y)
    pixels = np.empty((region.h, region.w, 3), np.uint8)
    if library.tj3SetCroppingRegion(handle, region):
        return None
    if library.tj3Decompress8(*source, pixels.ctypes.data, pixels.strides[0], RGB):
        return None
    return pixels[top - y : bottom - y, left - x : right - x]
