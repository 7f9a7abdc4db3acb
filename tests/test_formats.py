"""Every image is what Pillow's rule makes of it or refused with the reason, whichever library decodes it."""

import io
import pickle
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import DdsImagePlugin, EpsImagePlugin, ExifTags, Image, ImageOps
from program import ROOT, environment
from shards import encode, photographs
from slow import out_of_memory, run_in

from stream import formats, jpeg
from stream.decode_pool import DecodingPool, Job, pack
from stream.formats import IMAGE_SUFFIXES, LARGEST_PIXELS, SIGNATURE_BYTES, UnreadableImage, is_image
from stream.images import decode_into
from stream.pictures import Picture, decode
from stream.transforms import AlbumentationsAdapter

PHOTO = Image.fromarray(photographs()[0][:60, :90, ::-1].copy())
MODES: dict[str, list[str]] = {
    "PNG": ["1", "L", "LA", "P", "RGB", "RGBA"],
    "JPEG": ["L", "RGB", "CMYK"],
    "TIFF": ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB"],
    "WEBP": ["RGB", "RGBA"],
    "AVIF": ["RGB", "RGBA"],
    "GIF": ["L", "P"],
    "BMP": ["1", "L", "P", "RGB", "RGBA"],
    "PPM": ["1", "L", "RGB"],
    "TGA": ["L", "LA", "P", "RGB", "RGBA"],
    "PCX": ["1", "L", "P", "RGB"],
    "SGI": ["L", "RGB", "RGBA"],
    "JPEG2000": ["L", "LA", "RGB", "RGBA"],
    "DDS": ["L", "LA", "RGB", "RGBA"],
    "QOI": ["RGB", "RGBA"],
    "ICO": ["RGB", "RGBA"],
    "ICNS": ["RGBA"],
    "IM": ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"],
    "MSP": ["1"],
    "XBM": ["1"],
}
TURNED = {"PNG": ["L", "P", "RGB", "RGBA"], "JPEG": ["L", "RGB", "CMYK"], "WEBP": ["RGB", "RGBA"], "TIFF": ["RGB"]}


def in_mode(mode: str) -> Image.Image:
    if mode == "LAB":
        return Image.merge("LAB", PHOTO.split())
    image = PHOTO.convert("L").convert(mode) if mode in ("1", "LA") else PHOTO.convert(mode)
    if mode in ("LA", "RGBA"):
        image.putalpha(Image.linear_gradient("L").resize(PHOTO.size))
    return image


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def by_rule(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


def cases(table: dict[str, list[str]]) -> list[tuple[str, str]]:
    return [(kind, mode) for kind, modes in table.items() for mode in modes]


@pytest.fixture(params=["libjpeg-turbo", "no library"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Either with libjpeg-turbo or as if it were missing."""
    if request.param == "no library":
        monkeypatch.setattr(jpeg, "_library", lambda: None)


def assert_is(data: bytes, expected: np.ndarray) -> None:
    """As a whole, as a region of a fresh picture, and in its shape."""
    assert np.array_equal(decode(data), expected)
    assert Picture(data).shape == expected.shape
    assert np.array_equal(Picture(data).region(3, 5, 20, 31), expected[5:31, 3:20])


def refusal(data: bytes) -> str:
    """Why it is not read, in this process and as a row of a batch, which must say the same."""
    row = np.zeros((8, 8, 3), np.uint8)
    told = decode_into(row, data, AlbumentationsAdapter(), (0, 0, 0))
    with pytest.raises(UnreadableImage) as error:
        decode(data)
    assert str(told) == str(error.value)
    assert str(pickle.loads(pickle.dumps(told))) == str(told)
    return str(told)


# ---- one rule -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(("kind", "mode"), cases(MODES))
def test_every_mode_of_every_format_is_what_pillow_makes_of_it(kind: str, mode: str) -> None:
    data = saved(in_mode(mode), kind)
    assert_is(data, by_rule(data))


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("kind", "mode"), cases(TURNED))
def test_every_mode_is_turned_as_exif_says(kind: str, mode: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    data, plain = saved(in_mode(mode), kind, exif=exif), saved(in_mode(mode), kind)
    assert_is(data, by_rule(data))
    turned = orientation > 4
    assert decode(data).shape == ((90, 60, 3) if turned else (60, 90, 3))
    assert np.array_equal(decode(data), decode(plain)) == (orientation == 1)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_picture_is_turned_as_xmp_says_where_exif_does_not(kind: str) -> None:
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    if kind == "JPEG":
        data = saved(PHOTO, kind, xmp=xmp)
    else:
        body = b"iTXtXML:com.adobe.xmp\0\0\0\0\0" + xmp
        chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
        data = saved(PHOTO, kind)
        data = data[:33] + chunk + data[33:]
    assert decode(data).shape == (90, 60, 3)
    assert_is(data, by_rule(data))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")  # pytest asks for the warnings that stream.formats silences
@pytest.mark.usefixtures("library")
def test_corrupt_exif_costs_the_orientation_and_not_the_picture() -> None:
    data = saved(PHOTO, "JPEG", exif=b"Exif\0\0MM\0*\0\0\xff\xff\xff")
    assert np.array_equal(decode(data), decode(saved(PHOTO, "JPEG")))


STEPS = np.array([[0, 255, 256, 32767, 32768, 65279, 65280, 65535]], np.uint16)
UPPER = [0, 0, 1, 127, 128, 254, 255, 255]


@pytest.mark.parametrize("kind", ["png", "pgm", "tiff", "big-endian tiff", "integers"])
def test_grey_of_16_bits_keeps_its_upper_8(kind: str) -> None:
    if kind == "integers":
        data = saved(Image.fromarray(STEPS.astype(np.int32)), "TIFF")
    elif kind == "big-endian tiff":
        data = saved(Image.frombytes("I;16B", (8, 1), STEPS.astype(">u2").tobytes()), "TIFF")
    else:
        data = bytes(cv2.imencode(f".{kind}", STEPS)[1])
    assert decode(data).tolist() == [[[value] * 3 for value in UPPER]]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 0.5, 1.0], [0, 128, 255]),
        ([0.0, 20.4, 200.0], [0, 20, 200]),
        ([0.0, 257.0, 65535.0], [0, 1, 255]),
        ([-1.0, 0.0, 1.0], [0, 128, 255]),
        ([0.0, 1e6, 2e6], [0, 128, 255]),
        ([float("nan"), 1.0, float("inf")], [0, 255, 0]),
        ([float("nan")] * 3, [0, 0, 0]),
        ([7.0, 7.0, 7.0], [7, 7, 7]),
        ([-7.0, -7.0, -7.0], [0, 0, 0]),
    ],
)
def test_floats_are_scaled_by_the_range_that_holds_them(values: list[float], expected: list[int]) -> None:
    data = saved(Image.fromarray(np.array([values], np.float32)), "TIFF")
    assert decode(data)[0, :, 0].tolist() == expected


def test_integers_beyond_16_bits_are_scaled_from_least_to_most() -> None:
    data = saved(Image.fromarray(np.array([[-(2**31), 0, 2**31 - 1]], np.int32)), "TIFF")
    assert decode(data)[0, :, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize("kind", ["TIFF", "GIF", "PNG", "WEBP", "MPO", "AVIF"])
def test_of_many_pages_or_frames_the_first_is_taken(kind: str) -> None:
    lossless = {"lossless": True} if kind == "WEBP" else {}
    data = saved(PHOTO, kind, save_all=True, append_images=[ImageOps.invert(PHOTO)], **lossless)
    assert_is(data, by_rule(data))
    assert np.abs(decode(data).astype(int) - np.asarray(PHOTO)).mean() < 20


# ---- the other decoder -----------------------------------------------------------------------------------------------


def test_what_pillow_does_not_know_is_decoded_by_cv2() -> None:
    flat = np.full((7, 9, 3), (0.2, 0.4, 0.8), np.float32)
    data = bytes(cv2.imencode(".hdr", flat)[1])
    with pytest.raises(Image.UnidentifiedImageError):
        Image.open(io.BytesIO(data))
    assert np.abs(decode(data).astype(int) - [204, 102, 51]).max() <= 1
    assert decode(data).shape == (7, 9, 3)


def test_what_pillow_fails_to_open_or_decode_is_decoded_by_cv2(monkeypatch: pytest.MonkeyPatch) -> None:
    data = saved(in_mode("P"), "BMP")
    expected = by_rule(data)

    def fail(*_: object) -> None:
        raise NotImplementedError

    for name in ("Image.open", "BmpImagePlugin.BmpImageFile.load"):
        with monkeypatch.context() as patch:
            patch.setattr(f"PIL.{name}", fail)
            assert np.array_equal(decode(data), expected)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_what_the_fast_decoders_do_not_decode_is_decoded_by_pillow(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = saved(PHOTO, kind)
    monkeypatch.setattr(jpeg, "_library", lambda: None)
    monkeypatch.setattr(cv2, "imdecode", lambda *_: None)
    assert np.array_equal(decode(data), by_rule(data))


# ---- refused with the reason -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [MemoryError, RecursionError, NotImplementedError, ZeroDivisionError, KeyError])
def test_whatever_a_decoder_raises_is_the_reason_and_not_the_end(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Own(error):  # type: ignore[misc,valid-type]
        """It cannot be pickled."""

    def fail(*_: object) -> None:
        raise Own("two\nlines" + 999 * "x")

    monkeypatch.setattr(cv2, "imdecode", lambda *_: None)
    for name in ("Image.open", "TgaImagePlugin.TgaImageFile.load"):
        with monkeypatch.context() as patch:
            patch.setattr(f"PIL.{name}", fail)
            found = refusal(saved(PHOTO, "TGA"))
        assert found.startswith("Own: ")
        assert found.endswith("x")
        assert "\n" not in found
        assert len(found.encode()) <= 200


def test_a_dds_of_an_unknown_kind_is_refused() -> None:
    data = bytearray(saved(PHOTO, "DDS"))
    struct.pack_into("<I4s", data, 80, DdsImagePlugin.DDPF.FOURCC, b"DXT9")
    assert "NotImplementedError" in refusal(bytes(data))


def test_a_process_survives_that_memory_runs_out() -> None:
    out, pool = np.zeros((2, 60, 90, 3), np.uint8), DecodingPool(1)
    data = saved(PHOTO, "TGA")
    for _ in range(2):
        told = run_in(pool, pack(out_of_memory), [Job(data, (0, 0, 0))] * 2, out)
        assert [str(one) for one in told] == ["MemoryError"] * 2
    assert run_in(pool, pack(AlbumentationsAdapter()), [Job(data, (0, 0, 0))] * 2, out) == [None, None]
    assert np.array_equal(out[1], by_rule(data))


@pytest.mark.parametrize(
    ("kind", "start"),
    [
        ("EPS", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"),
        ("WMF", b"\xd7\xcd\xc6\x9a\0\0\0\0\0\0\x90\0\x90\0\x60\0" + bytes(6) + b"\1\0\t\0" + bytes(40)),
        ("HDF5", b"\x89HDF\r\n\x1a\n" + bytes(40)),
        ("GRIB", b"GRIB\0\0\0\1" + bytes(40)),
        ("BUFR", b"BUFR" + bytes(40)),
        ("FITS", b"".join(line.ljust(80) for line in (b"SIMPLE  = T", b"BITPIX  = 8", b"NAXIS   = 0", b"END"))),
        ("%PDF-1.7", b"%PDF-1.7\n%\xe2\xe3"),
    ],
)
def test_what_is_no_picture_is_refused_by_name_and_nothing_is_started(
    kind: str, start: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(EpsImagePlugin, "Ghostscript")
    monkeypatch.delattr(subprocess, "Popen")
    assert kind in refusal(start)
    assert not is_image(start[:SIGNATURE_BYTES])


def png_header(width: int, height: int) -> bytes:
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))


def icon_of_a_large_picture() -> bytes:
    png = png_header(20_000, 20_000) + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    return b"\0\0\1\0\1\0" + struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(png), 22) + png


def bmp_header(size: int) -> bytes:
    return b"BM" + struct.pack("<IHHIIiiHHIIIIII", 54, 0, 0, 54, size, 20_000, -20_000, 1, 24, 0, 0, 0, 0, 0, 0)


LARGE: dict[str, Callable[[], bytes]] = {
    "PNG": lambda: png_header(20_000, 20_000),
    "JPEG": lambda: saved(PHOTO, "JPEG").replace(struct.pack(">HH", *PHOTO.size[::-1]), b"\x4e\x20\x4e\x20"),
    "BMP": lambda: bmp_header(40),
    "BMP for cv2": lambda: bmp_header(66),
    "GIF": lambda: saved(PHOTO, "GIF").replace(struct.pack("<HH", *PHOTO.size), b"\x20\x4e\x20\x4e"),
    "PPM": lambda: b"P6 20000 20000 255\n",
    "HDR": lambda: b"#?RADIANCE\nFORMAT=32-bit_rle_rgbe\n\n-Y 20000 +X 20000\n",
    "QOI": lambda: b"qoif" + struct.pack(">II", 20_000, 20_000) + bytes(20),
    "ICO": icon_of_a_large_picture,
}


@pytest.mark.parametrize("kind", LARGE)
def test_too_many_pixels_are_refused_by_the_header_alone(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(cv2, "imdecode")
    found = refusal(LARGE[kind]()).replace(",", "")
    assert "400000000" in found
    assert str(LARGEST_PIXELS)[:7] in found


def test_the_largest_picture_is_read_and_one_of_a_row_more_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "LARGEST_PIXELS", 60 * 90)
    assert decode(saved(PHOTO, "PNG")).shape == (60, 90, 3)
    assert refusal(saved(PHOTO.resize((90, 61)), "PNG")) == "90x61 are 5,490 pixels, and at most 5,400 are read"


def test_odd_files_say_nothing_on_the_console() -> None:
    damaged = bytearray(encode(photographs()[0]))
    damaged[9000:9100] = bytes(100)
    files = [
        saved(PHOTO, "TIFF", tiffinfo={270: "x"}).replace(b"\x0e\x01\x02\0", b"\x0e\x01\xff\0"),
        saved(PHOTO, "JPEG", exif=b"Exif\0\0MM\0*\0\0\xff\xff\xff"),
        png_header(7_000, 7_000),
        bytes(damaged),
    ]
    code = f"from stream.pictures import Picture\nfor data in {files!r}:\n"
    code += "    try: Picture(data).pixels\n    except Exception as error: print(error)\n"
    done = subprocess.run(
        [sys.executable, "-"], input=code, capture_output=True, text=True, cwd=ROOT, env=environment(), check=True
    )
    assert done.stderr == ""


# ---- which files are images ------------------------------------------------------------------------------------------


def test_suffixes_are_those_of_what_can_be_decoded() -> None:
    assert {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".tga", ".pcx", ".ico"} <= IMAGE_SUFFIXES
    assert {".sgi", ".dds", ".qoi", ".jp2", ".ppm", ".pgm", ".mpo", ".avif", ".hdr", ".jfif"} <= IMAGE_SUFFIXES
    no_images = {".txt", ".eps", ".ps", ".pdf", ".wmf", ".h5", ".grib", ".fits", ".mpg", ".palm", ".jxl", ".svg", ""}
    assert not no_images & IMAGE_SUFFIXES
    assert all(suffix == suffix.lower() and suffix[0] == "." for suffix in IMAGE_SUFFIXES)


@pytest.mark.parametrize("kind", sorted({*MODES} - {"TGA", "IM", "XBM"}))
def test_a_file_is_known_to_be_an_image_by_its_first_bytes(kind: str) -> None:
    assert is_image(saved(in_mode(MODES[kind][-1]), kind)[:SIGNATURE_BYTES])


@pytest.mark.parametrize(
    "start", [b"", b"\n", b"P", b"Python is", b"#define X 1", b"(\0\0\0and so on", b"BM"[:1], b"label,file", bytes(32)]
)
def test_other_files_are_not_taken_for_images(start: bytes) -> None:
    assert not is_image(start)
