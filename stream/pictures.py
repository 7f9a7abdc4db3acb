"""Encoded images -> pixels, by one rule whichever library decodes them."""

import contextlib
import functools
from collections.abc import Callable, Iterator

import cv2
import numpy as np
from PIL import ExifTags, Image, ImageOps

from stream import jpeg
from stream.formats import UnreadableImage, open_header
from stream.planes import Planes, is_planes, split

cv2.setNumThreads(0)

EncodedImage = bytes | memoryview | np.ndarray

LONGEST_REASON = 200  # characters

TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.transpose(1, 0, 2),
    6: lambda pixels: pixels.transpose(1, 0, 2)[:, ::-1],
    7: lambda pixels: pixels.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda pixels: pixels.transpose(1, 0, 2)[::-1],
}
"""What each EXIF orientation asks for."""

PLAIN = ("RGB", "L")

FLOAT_RANGES = (1, 255, 65535)
"""What the floats of an image may run to from 0."""

PNG_EXTRAS = (b"eXIf", b"acTL", b"XML:com.adobe.xmp", b"Raw profile type exif")
"""An orientation or an animation: of these, cv2 does not all that Pillow does."""


class Picture:
    """An image, decoded on demand: at first only the header is read. Raises UnreadableImage, also on later access.

    `pixels` equal `ImageOps.exif_transpose(Image.open(file)).convert("RGB")`: the first frame, turned as EXIF or XMP
    say, without alpha. The exceptions are wide grey, which that would cut off at 255, and orientations that are corrupt
    and so ignored. Of 16 bits the upper 8 are kept, as of the colours of 16 bits. Integers beyond 16 bits are scaled
    from their least to 0 and their most to 255, floats by the first of FLOAT_RANGES that holds them, or else likewise;
    those that are not finite are black.

    libjpeg-turbo or cv2 decode JPEG, cv2 plain PNG, and Pillow the rest; where one fails, the other is asked. A JPEG
    whose data libjpeg-turbo finds corrupt is unreadable, wherever in it the damage lies. Planes are what a cache keeps.
    """

    def __init__(self, image: EncodedImage) -> None:
        self._image = image
        self._in_regions = False
        self._planes = None
        if isinstance(image, np.ndarray):
            return
        if is_planes(image):
            self._planes = Planes(image)
            return
        with _reasons():
            self._header = header = open_header(image)
            self._is_jpeg = header is not None and header.format in ("JPEG", "MPO")
            if header is not None and self._is_jpeg and header.mode in PLAIN:
                self._orientation = _orientation(header)
                self._in_regions = self._orientation not in TURNS and jpeg.can_decode_regions()

    @property
    def shape(self) -> tuple[int, ...]:
        """(H, W, 3)."""
        if self._planes is not None:
            return self._planes.shape
        if self._in_regions and self._header is not None:
            return self._header.height, self._header.width, 3
        return self.pixels.shape

    @functools.cached_property
    def pixels(self) -> np.ndarray:
        """uint8 RGB (H, W, 3)."""
        image = self._image
        if isinstance(image, np.ndarray):
            return image
        if self._planes is not None:
            return self._planes.region(0, 0, self.shape[1], self.shape[0])
        with _reasons():
            return self._decoded(image)

    def region(self, left: int, top: int, right: int, bottom: int, sound: bool = False) -> np.ndarray:
        """`pixels[top:bottom, left:right]`; of a JPEG only these columns are decoded, down to its last row.

        Of one that is known to be `sound`, only down to `bottom`: what lies below tells no more than that.
        """
        if self._planes is not None:
            return self._planes.region(left, top, right, bottom)
        if self._in_regions:
            last = bottom if sound else self.shape[0]
            decoded = jpeg.decode_region(self._image, left, top, right, last)
            if decoded is not None:
                return decoded[: bottom - top]
        return self.pixels[top:bottom, left:right]

    def planes(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Y (H, W), Cb and Cr, uint8: of most JPEGs as they hold them, of all others ((H + 1) // 2, (W + 1) // 2)."""
        return (jpeg.decode_planes(self._image) if self._in_regions else None) or split(self.pixels)

    def _decoded(self, image: bytes | memoryview) -> np.ndarray:
        header = self._header
        if header is None:
            pixels = _by_cv2(image)
            if pixels is None:
                raise ValueError("neither Pillow nor cv2 decodes it")
            return pixels
        if self._is_jpeg:
            pixels = self._jpeg(image, header)
        else:
            plain = (
                header.format == "PNG"
                and header.mode in PLAIN
                and not any(extra in bytes(image) for extra in PNG_EXTRAS)
            )
            pixels = _by_cv2(image) if plain else None
        return _by_pillow(image, header) if pixels is None else pixels

    def _jpeg(self, image: bytes | memoryview, header: Image.Image) -> np.ndarray | None:
        """The pixels by libjpeg-turbo or cv2; None if Pillow must decode. Raises DamagedJPEG."""
        if header.mode not in PLAIN:
            jpeg.decode_whole(image, jpeg.CMYK)  # for its verdict alone
            return None
        pixels = jpeg.decode_whole(image)
        if pixels is None:
            pixels = _by_cv2(image, cv2.IMREAD_IGNORE_ORIENTATION)
        if pixels is None or self._orientation not in TURNS:
            return pixels
        return np.ascontiguousarray(TURNS[self._orientation](pixels))


def decode(image: EncodedImage) -> np.ndarray:
    """An encoded image -> uint8 RGB (H, W, 3). Raises UnreadableImage."""
    return Picture(image).pixels


@contextlib.contextmanager
def _reasons() -> Iterator[None]:
    """Whatever a decoder raises becomes UnreadableImage: what others' code may raise is on no list."""
    try:
        yield
    except UnreadableImage:
        raise
    except Exception as error:
        text = " ".join(str(error).encode("utf-8", "backslashreplace").decode().split())
        reason = f"{type(error).__name__}: {text}" if text else type(error).__name__
        raise UnreadableImage(reason[:LONGEST_REASON]) from error


def _orientation(header: Image.Image) -> int:
    """The EXIF orientation of a JPEG: 1 unless it says otherwise in a way that can be read."""
    if not header.info.keys() & {"exif", "xmp"}:
        return 1
    try:
        return header.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:
        return 1


def _by_cv2(image: bytes | memoryview, flags: int = 0) -> np.ndarray | None:
    """uint8 RGB (H, W, 3); None if cv2 cannot decode the image."""
    try:
        pixels = cv2.imdecode(np.frombuffer(image, np.uint8), cv2.IMREAD_COLOR_RGB | flags)
    except cv2.error:
        return None
    return pixels if pixels is not None and pixels.ndim == 3 and pixels.dtype == np.uint8 else None


def _by_pillow(image: bytes | memoryview, header: Image.Image) -> np.ndarray:
    """uint8 RGB (H, W, 3), by cv2 if Pillow fails."""
    try:
        header.load()
    except Exception:
        pixels = None if header.format == "TIFF" else _by_cv2(image)  # which takes any part of a TIFF for the whole
        if pixels is None:
            raise
        return pixels
    with contextlib.suppress(Exception):  # a corrupt orientation
        ImageOps.exif_transpose(header, in_place=True)
    if header.mode.startswith("I;16") or header.mode in ("I", "F"):
        return np.repeat(_narrowed(np.asarray(header), header.mode)[..., None], 3, axis=2)
    return np.asarray(header.convert("RGB"))


def _narrowed(values: np.ndarray, mode: str) -> np.ndarray:
    """Grey (H, W) of 16 bits, of 32 bits or of floats -> uint8 (H, W)."""
    finite = np.isfinite(values)
    if not finite.any():
        return np.zeros(values.shape, np.uint8)
    low, high = float(values[finite].min()), float(values[finite].max())
    if mode != "F" and low >= 0 and high <= 65535:
        return (values >> 8).astype(np.uint8)
    if mode == "F" and low >= 0 and high <= FLOAT_RANGES[-1]:
        low, high = 0, next(most for most in FLOAT_RANGES if high <= most)
    scaled = (np.where(finite, values, low).astype(np.float64) - low) / ((high - low) or 1) * 255
    return np.where(finite, scaled.round(), 0).astype(np.uint8)
