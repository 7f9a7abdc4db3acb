"""JPEG images and regions of them, decoded with libjpeg-turbo 3, which decodes only as much of a file as a region needs
and tells whether its data are sound.

The library is the system's where that has version 3.1, else that of the wheel `turbojpeg`, of which nothing else is
used, or any version 3 of the system; without it everything works, but more slowly. It is handed only what nearly all
JPEGs are, as fewer have tried the rest. https://libjpeg-turbo.org/Documentation/Documentation
"""

import contextlib
import ctypes
import functools
import importlib.metadata
import re
import threading
from collections.abc import Iterator
from ctypes.util import find_library

import numpy as np

MARGIN = 2  # pixels around a region that smooth upsampling of the colours uses
BLOCK = {0: 8, 1: 16, 2: 16, 3: 8, 4: 8, 5: 32, 6: 8}  # width in pixels of the unit of decoding, by TJSAMP
SHARES = {0: (1, 1), 1: (2, 1), 2: (2, 2), 4: (1, 2), 5: (4, 1)}  # of the width and height, for colours, by TJSAMP
DECOMPRESS, SUBSAMPLING, WIDTH, HEIGHT, COLOURS = 1, 4, 5, 6, 8  # TJINIT, four of TJPARAM
YCBCR = 1  # TJCS
WHOLE = (0, 0, 0, 0)
RGB, CMYK = 0, 11  # TJPF
CHANNELS = {RGB: 3, CMYK: 4}
ASSUMED = {RGB: b"\1", CMYK: b"\2"}  # for an Adobe transform that libjpeg does not know
FATAL = 1  # TJERR
END_OF_IMAGE = b"\xff\xd9"

SYSTEMS = ("libturbojpeg.so.0", "libturbojpeg.0.dylib")
SINCE_3_1 = "tj3SetICCProfile"  # a function that older versions lack

FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # markers of a frame's header
HUFFMAN = {0xC0, 0xC1, 0xC2}  # baseline, extended, progressive; the others are lossless, hierarchical or arithmetic
MARKER = re.compile(rb"\xff+([^\x00\xff])")
START_OF_SCAN = 0xDA
BARE = {0x01, *range(0xD0, 0xD9)}  # markers that no length follows
EXTRANEOUS = re.compile(r"Corrupt JPEG data: (\d+) extraneous bytes before marker 0x([0-9a-f]{2})$")
MOST_ODDITIES = 16

Encoded = bytes | memoryview | np.ndarray


class DamagedJPEG(Exception):
    """The data are corrupt, and the pixels that they decode to are wrong; the message is libjpeg's."""


class _Region(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("x", "y", "w", "h")]


@functools.cache
def _library() -> ctypes.CDLL | None:
    for path, needed in _candidates():
        with contextlib.suppress(OSError, AttributeError):  # missing, or of another version
            library = ctypes.CDLL(path)
            getattr(library, needed)
            library.tj3Init.restype = ctypes.c_void_p
            data = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
            library.tj3Get.argtypes = (ctypes.c_void_p, ctypes.c_int)
            library.tj3DecompressHeader.argtypes = data
            library.tj3SetCroppingRegion.argtypes = (ctypes.c_void_p, _Region)
            library.tj3Decompress8.argtypes = (*data, ctypes.c_void_p, ctypes.c_int, ctypes.c_int)
            library.tj3DecompressToYUVPlanes8.argtypes = (*data, ctypes.c_void_p, ctypes.c_void_p)
            for function in (library.tj3GetErrorCode, library.tj3GetErrorStr, library.tj3Destroy):
                function.argtypes = (ctypes.c_void_p,)
            library.tj3GetErrorStr.restype = ctypes.c_char_p
            return library
    return None


def _candidates() -> Iterator[tuple[str, str]]:
    """Files of the library, the best first, and a function that each must have."""
    yield from ((name, SINCE_3_1) for name in SYSTEMS)
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        files = importlib.metadata.files("turbojpeg") or []
        yield from ((str(file.locate()), "tj3Init") for file in files if file.name.startswith("libturbojpeg"))
    if path := find_library("turbojpeg"):
        yield path, "tj3Init"


class _Own(threading.local):
    """A decompressor for each thread."""

    def __init__(self) -> None:
        self.handle: int | None = None
        self.renew()

    def renew(self) -> None:
        """Start anew, as is needed after any error: the same decompressor may repeat it for every later image."""
        library = _library()
        if library is not None:
            library.tj3Destroy(self.handle)
            self.handle = library.tj3Init(DECOMPRESS)

    def failure(self) -> tuple[bool, str]:
        """Of the call that has just failed: whether it was given up, and the message. What was set is forgotten."""
        library = _library()
        assert library is not None
        found = (
            library.tj3GetErrorCode(self.handle) == FATAL,
            library.tj3GetErrorStr(self.handle).decode("ascii", "replace"),
        )
        self.renew()
        return found


_own = _Own()


def can_decode_regions() -> bool:
    """Whether libjpeg-turbo 3 was found."""
    return _library() is not None and _own.handle is not None


def library_path() -> str | None:
    """The file of the library that decodes, None without it."""
    library = _library()
    return None if library is None else str(library._name)


def is_usual(encoded: Encoded) -> bool:
    """Whether it is a baseline or progressive JPEG of 8 bits with Huffman codes, by the header of its first frame."""
    data, position = memoryview(encoded), 2  # type: ignore[arg-type]  # an array is a buffer too
    while found := MARKER.search(data, position):
        marker, body = found[1][0], found.end() + 2
        if marker in FRAMES or marker == START_OF_SCAN:
            return marker in HUFFMAN and bytes(data[body : body + 1]) == b"\x08"
        position = found.end() + (0 if marker in BARE else int.from_bytes(data[found.end() : body]))
    return False


def decode_region(encoded: Encoded, left: int, top: int, right: int, bottom: int) -> np.ndarray | None:
    """A region of an RGB or greyscale JPEG, uint8 RGB (H, W, 3), with the same pixels as in the decoded whole image.

    None if the file is unusual, truncated or damaged in a part that the region needs; `decode_whole` then tells.
    """
    library, handle = _library(), _own.handle
    if library is None or (source := _begin(library, encoded)) is None:
        return None
    block = BLOCK.get(library.tj3Get(handle, SUBSAMPLING))
    width, height = library.tj3Get(handle, WIDTH), library.tj3Get(handle, HEIGHT)
    if block is None:
        return None
    x, y = max(0, left - MARGIN) // block * block, max(0, top - MARGIN)
    region = _Region(x, y, min(width, right + MARGIN) - x, min(height, bottom + MARGIN) - y)
    pixels = np.empty((region.h, region.w, 3), np.uint8)
    if library.tj3SetCroppingRegion(handle, region) or library.tj3Decompress8(
        *source, pixels.ctypes.data, pixels.strides[0], RGB
    ):
        _own.renew()
        return None
    return pixels[top - y : bottom - y, left - x : right - x]


def decode_planes(encoded: Encoded) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """A colour JPEG as it holds it, uint8: brightness (H, W), and blue and red, halved in either way or not at all.

    None if the file is of other colours, unusual, truncated or damaged; `decode_whole` then tells.
    """
    library, handle = _library(), _own.handle
    if library is None or (source := _begin(library, encoded)) is None:
        return None
    shares = SHARES.get(library.tj3Get(handle, SUBSAMPLING))
    if shares is None or library.tj3Get(handle, COLOURS) != YCBCR:
        return None
    width, height = library.tj3Get(handle, WIDTH), library.tj3Get(handle, HEIGHT)
    columns, rows = (-(-side // share) for side, share in zip((width, height), shares, strict=True))
    luma = np.empty((rows * shares[1], columns * shares[0]), np.uint8)
    blue, red = np.empty((2, rows, columns), np.uint8)
    places = (ctypes.c_void_p * 3)(*(plane.ctypes.data for plane in (luma, blue, red)))
    library.tj3SetCroppingRegion(handle, _Region(*WHOLE))
    if library.tj3DecompressToYUVPlanes8(*source, places, None):
        _own.renew()
        return None
    return luma[:height, :width], blue, red


def _begin(library: ctypes.CDLL, encoded: Encoded) -> tuple[int | None, int, int] | None:
    """Have this thread's decompressor read the header; returns what names it and the file, None for an unusual one."""
    if bytes(encoded[-2:]) != END_OF_IMAGE or not is_usual(encoded):
        return None
    data = np.frombuffer(encoded, np.uint8)
    source = (_own.handle, data.ctypes.data, data.nbytes)
    if library.tj3DecompressHeader(*source):
        _own.renew()
        return None
    return source


def size(encoded: Encoded) -> tuple[int, int] | None:
    """Width and height from the header; None if it cannot be read, or without the library."""
    library = _library()
    if library is None:
        return None
    data = np.frombuffer(encoded, np.uint8)
    source, given_up = (data.ctypes.data, data.nbytes), False
    if library.tj3DecompressHeader(_own.handle, *source):
        given_up, _ = _own.failure()
        library.tj3DecompressHeader(_own.handle, *source)  # by a new one, which knows no size of an earlier image
    width, height = (library.tj3Get(_own.handle, side) for side in (WIDTH, HEIGHT))
    if given_up or width < 1 or height < 1:
        _own.renew()
        return None
    return width, height


def decode_whole(encoded: Encoded, pixel_format: int = RGB) -> np.ndarray | None:
    """A whole JPEG, uint8 (H, W, 3) for RGB and (H, W, 4) for CMYK. Raises DamagedJPEG.

    None without the library, or if the file is unusual or needs another decoder.

    libjpeg warns of twelve things. Of bytes between the segments of the header or padding after the data of a scan, an
    unknown JFIF revision and an unknown Adobe transform, the pixels are right all the same, and such files are common.
    The others are damage: bad codes, data that end too early, markers that are missing, too many data. Since only the
    first warning of a file can be asked for, a harmless one is mended and the file decoded again.
    """
    library = _library()
    if library is None or not is_usual(encoded):
        return None
    data = np.frombuffer(encoded, np.uint8)
    for _ in range(MOST_ODDITIES):
        found, handle = size(data), _own.handle
        if found is None:
            return None
        width, height = found
        pixels = np.empty((height, width, CHANNELS[pixel_format]), np.uint8)
        library.tj3SetCroppingRegion(handle, _Region(*WHOLE))
        source = (handle, data.ctypes.data, data.nbytes)
        if not library.tj3Decompress8(*source, pixels.ctypes.data, pixels.strides[0], pixel_format):
            return pixels
        given_up, message = _own.failure()
        if given_up:
            return None
        mended = _mended(data.tobytes(), message, ASSUMED[pixel_format])
        if mended is None:
            raise DamagedJPEG(message)
        data = np.frombuffer(mended, np.uint8)
    raise DamagedJPEG(f"more than {MOST_ODDITIES} oddities, the last: {message}")


def _mended(encoded: bytes, message: str, transform: bytes) -> bytes | None:
    """The file without the oddity of which `message` warns, or None if that is damage."""
    oddity = EXTRANEOUS.match(message)
    position = 2
    while found := MARKER.search(encoded, position):
        marker, body = found[1][0], found.end() + 2
        if oddity and found.start() > position:
            return encoded[:position] + encoded[found.start() :]
        if "JFIF revision" in message and encoded[body : body + 5] == b"JFIF\0":
            return encoded[: body + 5] + b"\1" + encoded[body + 6 :]
        if "Adobe color transform" in message and encoded[body : body + 5] == b"Adobe":
            return encoded[: body + 11] + transform + encoded[body + 12 :]
        if marker == START_OF_SCAN:
            break
        position = found.end() + (0 if marker in BARE else int.from_bytes(encoded[found.end() : body]))
    return _without_padding(encoded, position, int(oddity[1]), int(oddity[2], 16)) if oddity else None


def _without_padding(encoded: bytes, start: int, count: int, marker: int) -> bytes | None:
    """The file without `count` bytes of padding before a marker, or None if there is no such place after `start`.

    Padding is one byte over and over. Where a flipped bit has made the decoder lose its place, other bytes are left
    over: even one or two of them mean that much of the picture is wrong.
    """
    for found in MARKER.finditer(encoded, start):
        end = found.start()
        first = encoded[end - count : end - count + 1]
        alike = encoded[end - 1 : end] == first and encoded[end - count : end] == first * count
        if found[1][0] == marker and alike and (count > 1 or first == b"\0"):
            return encoded[: end - count] + encoded[end:]
    return None
