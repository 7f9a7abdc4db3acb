"""A region of a JPEG has the very pixels of the whole, and what is not sound is left to whoever decodes the whole."""

import ctypes.util
import io
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
from PIL import Image
from shards import photographs

from config import resolve
from preprocess import train_transform
from stream import images as pictures
from stream import jpeg
from stream.images import Picture, decode

needs_library = pytest.mark.skipif(not jpeg.can_decode_regions(), reason="there is no libjpeg-turbo 3 here")
SUBSAMPLING = {
    "4:4:4": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444,
    "4:2:2": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_422,
    "4:2:0": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420,
    "4:4:0": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_440,
    "4:1:1": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_411,
}
OPTIONS = {
    "baseline": [],
    "progressive": [cv2.IMWRITE_JPEG_PROGRESSIVE, 1],
    "restarts": [cv2.IMWRITE_JPEG_RST_INTERVAL, 3],
}
SIZES = [(375, 500), (97, 61), (33, 17), (7, 250)]


def encode(image: np.ndarray, *options: int) -> bytes:
    return bytes(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 90, *options])[1])


def part_of_a_photograph(height: int, width: int) -> np.ndarray:
    return np.ascontiguousarray(photographs()[1][40 : 40 + height, 60 : 60 + width])


def regions(height: int, width: int, count: int = 25) -> list[tuple[int, int, int, int]]:
    """Random ones, those of a pixel in the corners, and the whole: left, top, right, bottom."""
    rng = np.random.default_rng(0)
    found = [(0, 0, width, height), (0, 0, 1, 1), (width - 1, height - 1, width, height), (width - 1, 0, width, 1)]
    for _ in range(count):
        left, right = sorted(rng.choice(width + 1, 2, replace=False))
        top, bottom = sorted(rng.choice(height + 1, 2, replace=False))
        found.append((int(left), int(top), int(right), int(bottom)))
    return found


def assert_regions_are_the_wholes(data: bytes) -> None:
    whole = decode(data)
    for left, top, right, bottom in regions(*whole.shape[:2]):
        found = jpeg.decode_region(data, left, top, right, bottom)
        assert found is not None
        assert np.array_equal(found, whole[top:bottom, left:right]), (left, top, right, bottom)


@needs_library
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("sampling", SUBSAMPLING)
def test_a_region_has_the_pixels_of_the_whole(sampling: str, options: str, size: tuple[int, int]) -> None:
    chosen = [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, SUBSAMPLING[sampling], *OPTIONS[options]]
    assert_regions_are_the_wholes(encode(part_of_a_photograph(*size), *chosen))


@needs_library
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_a_region_of_a_grey_image_too(size: tuple[int, int], progressive: bool) -> None:
    file = io.BytesIO()
    Image.fromarray(part_of_a_photograph(*size)).convert("L").save(file, "JPEG", progressive=progressive)
    assert_regions_are_the_wholes(file.getvalue())


@needs_library
def test_a_region_of_an_rgb_jpeg_too() -> None:
    file = io.BytesIO()
    Image.fromarray(part_of_a_photograph(97, 61)).save(file, "JPEG", keep_rgb=True)
    assert_regions_are_the_wholes(file.getvalue())


def test_no_library_changes_nothing_but_the_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    transform, data = train_transform(resolve({"dataset": "imagenet1k"})), encode(part_of_a_photograph(375, 500))
    expected = [transform(data, (0, 0, number)) for number in range(20)]
    monkeypatch.setattr(pictures, "can_decode_regions", lambda: False)
    assert all(np.array_equal(transform(data, (0, 0, number)), one) for number, one in enumerate(expected))


@pytest.mark.parametrize("wheel", ["missing", "another"])
def test_a_library_that_is_missing_or_another_is_not_used(wheel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"missing": "/nowhere/libturbojpeg.so", "another": ctypes.util.find_library("c")}[wheel]
    monkeypatch.setattr(jpeg, "_candidates", lambda: [found])
    assert jpeg._library.__wrapped__() is None


@needs_library
def test_a_crop_of_a_jpeg_needs_no_decoding_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    transform, data = train_transform(resolve({"dataset": "imagenet1k"})), encode(part_of_a_photograph(375, 500))
    monkeypatch.delattr(cv2, "imdecode")
    assert transform(data, (0, 0, 0)).shape == (224, 224, 3)


@needs_library
@pytest.mark.parametrize("damage", ["cut short", "no end", "bad data"])
def test_what_is_not_sound_is_left_to_the_decoding_of_the_whole(damage: str) -> None:
    data = encode(part_of_a_photograph(375, 500))
    middle = len(data) // 2
    damaged = {
        "cut short": data[:middle],
        "no end": data + b"\0",
        "bad data": data[: middle - 200] + b"\xff\xd8\xff\xc0" * 50 + data[middle:],
    }[damage]
    assert jpeg.decode_region(damaged, 100, 100, 400, 370) is None
    assert jpeg.decode_region(data, 100, 100, 400, 370) is not None


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_an_image_that_exif_turns_is_cropped_after_it_is_turned(orientation: int) -> None:
    image, exif, file = Image.fromarray(part_of_a_photograph(60, 90)), Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    image.save(file, "JPEG", exif=exif)
    picture = Picture(file.getvalue())
    assert picture.shape == ((90, 60, 3) if orientation == 6 else (60, 90, 3))
    assert np.array_equal(picture.region(10, 20, 50, 55), decode(file.getvalue())[20:55, 10:50])


def test_threads_do_not_disturb_each_other() -> None:
    transform = train_transform(resolve({"dataset": "imagenet1k", "image_size": 64}))
    jobs = [(encode(part_of_a_photograph(*size)), (0, 0, number)) for number in range(30) for size in SIZES]
    expected = [transform(*job) for job in jobs]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda job: transform(*job), jobs))
    assert all(np.array_equal(one, other) for one, other in zip(found, expected, strict=True))
