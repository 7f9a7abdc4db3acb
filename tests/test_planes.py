"""Planes keep an image to within the rounding of its colours, and any region of them is that of the whole image."""

import albumentations as A
import cv2
import numpy as np
import pytest
from shards import photographs

from stream import planes
from stream.formats import UnreadableImage
from stream.images import decode
from stream.kept import reduce
from stream.pictures import Picture
from stream.planes import Planes
from stream.transforms import RandomResizedCropAdapter

SIZES = [(64, 80), (63, 80), (64, 81), (63, 81), (1, 1), (1, 7), (2, 3)]


def encode(image: np.ndarray) -> bytes:
    return planes.encode(*planes.split(image))


def photo(height: int, width: int) -> np.ndarray:
    return np.ascontiguousarray(photographs()[0][100 : 100 + height, 100 : 100 + width, ::-1])


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_an_image_comes_back_as_it_does_from_a_jpeg_that_loses_colours_only(height: int, width: int) -> None:
    image = photo(height, width)
    encoded = encode(image)
    assert len(encoded) == planes.HEADER.size + height * width + 2 * ((height + 1) // 2) * ((width + 1) // 2)
    options = [cv2.IMWRITE_JPEG_QUALITY, 100, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420]
    jpeg = decode(bytes(cv2.imencode(".jpg", np.ascontiguousarray(image[..., ::-1]), options)[1]))
    found = decode(encoded).astype(int)
    assert found.shape == image.shape
    assert np.abs(found - image).mean() <= np.abs(jpeg.astype(int) - image).mean() + 0.5
    assert np.abs(found @ [0.299, 0.587, 0.114] - image @ [0.299, 0.587, 0.114]).mean() < 1


@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (255, 0, 0), (0, 255, 0), (0, 0, 255), (90, 90, 90)])
def test_a_plain_colour_is_kept(colour: tuple[int, int, int]) -> None:
    image = np.full((5, 6, 3), colour, np.uint8)
    assert np.abs(decode(encode(image)).astype(int) - image).max() <= 2


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_every_region_is_a_part_of_the_whole(height: int, width: int) -> None:
    encoded = encode(photo(height, width))
    whole, rng = decode(encoded), np.random.default_rng(0)
    for _ in range(100):
        top, left = int(rng.integers(height)), int(rng.integers(width))
        bottom, right = int(rng.integers(top + 1, height + 1)), int(rng.integers(left + 1, width + 1))
        region = Picture(memoryview(encoded)).region(left, top, right, bottom)
        np.testing.assert_array_equal(region, whole[top:bottom, left:right])


def test_a_random_crop_is_that_of_the_pixels() -> None:
    encoded = encode(photo(120, 161))
    crop = RandomResizedCropAdapter(A.RandomResizedCrop((48, 48)))
    for number in range(20):
        np.testing.assert_array_equal(crop(encoded, (0, 1, number)), crop(decode(encoded), (0, 1, number)))


@pytest.mark.parametrize(
    "encoded",
    [
        planes.MAGIC,
        encode(photo(4, 4))[:-1],
        encode(photo(4, 4)) + b"\0",
        planes.HEADER.pack(planes.MAGIC, 0, 0),
        planes.HEADER.pack(planes.MAGIC, 2**32 - 1, 2**32 - 1),
        planes.HEADER.pack(planes.MAGIC, 1, 2**32 - 1) + b"\0" * 100,
    ],
    ids=["name alone", "cut short", "too long", "empty", "huge", "wide"],
)
def test_what_is_damaged_cannot_be_read(encoded: bytes) -> None:
    with pytest.raises(UnreadableImage, match="planes"):
        decode(encoded)


def test_planes_are_made_at_the_short_side_and_of_smaller_images_too() -> None:
    whole = bytes(cv2.imencode(".png", photo(90, 120))[1])
    assert Planes(reduce(whole, 45, as_planes=True)).shape == (45, 60, 3)
    assert Planes(reduce(whole, 200, as_planes=True)).shape == (90, 120, 3)
    assert reduce(b"no image", 45, as_planes=True) == b"no image"


def test_what_is_too_long_for_a_jpeg_stays_as_it_is() -> None:
    strip = bytes(cv2.imencode(".png", np.zeros((66_000, 257, 3), np.uint8))[1])
    assert reduce(strip, 256) == strip
    assert Planes(reduce(strip, 256, as_planes=True)).shape == (65_743, 256, 3)
