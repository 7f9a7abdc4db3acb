"""Which files are images, and how large they may be: what is asked before anything is decoded."""

import contextlib
import io
import logging
import re
import struct
import warnings
from collections.abc import Callable

import cv2
from PIL import Image, features

from stream import jpeg

LARGEST_PIXELS = 89_478_485  # 256 MiB at three bytes each: Pillow's own limit, of which it only warns
SIGNATURE_BYTES = 32

REFUSED = frozenset({"BUFR", "EPS", "FITS", "GRIB", "HDF5", "MPEG", "WMF"})
"""What Pillow recognises and is not asked to decode: for some it has no decoder, for EPS it starts Ghostscript, and
what FITS unpacks has no bound."""

OPTIONAL = {"AVIF": "avif", "JPEG2000": "jpg_2000", "WEBP": "webp"}  # parts that a build of Pillow may lack
VAGUE = frozenset({"DIB", "GBR", "PPM", "XBM"})  # Pillow's tests for these take many other files for one
CV2_SUFFIXES = frozenset({".hdr"})
SIGNATURE = re.compile(rb"P[1-6Ff]\s|#\?R(ADIANCE|GBE)")  # the portable maps and Radiance's HDR

Image.MAX_IMAGE_PIXELS = LARGEST_PIXELS // 2  # Pillow refuses twice that, of images inside of icons too
warnings.filterwarnings("ignore", module=r"PIL\.")  # of odd metadata, and of large images, which are bounded here
logging.getLogger("PIL").setLevel(logging.CRITICAL)
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)


class UnreadableImage(Exception):
    """An image cannot be decoded; the message says why."""


def open_header(image: bytes | memoryview) -> Image.Image | None:
    """The image with only its header read, or None if Pillow cannot read that and cv2 may.

    Raises UnreadableImage if it is no image, of a format that is not decoded, or larger than LARGEST_PIXELS, and
    whatever Pillow raises.
    """
    try:
        header = Image.open(io.BytesIO(image))
    except Image.DecompressionBombError:
        raise
    except Exception as error:
        size = _size_for_cv2(image)
        if size is None and isinstance(error, Image.UnidentifiedImageError):
            raise UnreadableImage(f"no decoder recognises it: it begins with {bytes(image[:8])!r}") from None
        if size is None:
            raise
        _check_size(*size)
        return None
    if header.format in REFUSED:
        raise UnreadableImage(f"{header.format} files are not decoded")
    _check_size(*header.size)
    return header


def _check_size(width: int, height: int) -> None:
    if width * height > LARGEST_PIXELS:
        raise UnreadableImage(
            f"{width}x{height} are {width * height:,} pixels, and at most {LARGEST_PIXELS:,} are read"
        )


def _size_for_cv2(image: bytes | memoryview) -> tuple[int, int] | None:
    """Width and height of an image in a format that cv2 may read where Pillow does not; None for any other file."""
    for start, size in SIZES.items():
        if bytes(image[: len(start)]) == start:
            with contextlib.suppress(struct.error, ValueError):
                width, height = size(bytes(image))
                return abs(width), abs(height)
    return None


def _bmp_size(image: bytes) -> tuple[int, ...]:
    (header,) = struct.unpack_from("<I", image, 14)
    return struct.unpack_from("<HH" if header == 12 else "<ii", image, 18)


def _hdr_size(image: bytes) -> tuple[int, ...]:
    found = re.search(rb"-Y (\d+) \+X (\d+)", image[:4096])
    return (int(found[2]), int(found[1])) if found else ()


SIZES: dict[bytes, Callable[[bytes], tuple[int, ...]]] = {
    b"BM": _bmp_size,
    b"\x89PNG\r\n\x1a\n": lambda image: struct.unpack_from(">II", image, 16),
    b"\xff\xd8\xff": lambda image: jpeg.size(image) or (),
    b"#?R": _hdr_size,
}


def _decoded_formats() -> set[str]:
    """Pillow's names of the formats that it decodes here, plugins that have been imported included."""
    Image.preinit()  # first, so that JPEG and PNG are tried before rarer formats
    Image.init()
    missing = {name for name, feature in OPTIONAL.items() if not features.check(feature)}
    return {*Image.OPEN} - REFUSED - missing


_formats = _decoded_formats()
IMAGE_SUFFIXES = CV2_SUFFIXES | {suffix for suffix, name in Image.EXTENSION.items() if name in {*_formats, "MPO"}}
"""The suffixes of image files that can be read here, in lower case and with their dots."""


def is_image(start: bytes) -> bool:
    """Whether the first SIGNATURE_BYTES of a file are those of an image that can be read here.

    A few formats (TGA, PhotoCD, XBM and others) have no signature and are known by their suffixes alone.
    """
    if SIGNATURE.match(start):
        return True
    for name in _formats - VAGUE:
        accept = Image.OPEN[name][1]
        with contextlib.suppress(IndexError, struct.error):  # shorter than a signature
            if accept is not None and accept(start[:16]) is True:
                return True
    return False
