"""Whole batches are cropped, flipped and cut out as drawn for each sample, whatever batch the sample comes in."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from config import resolve
from preprocess import batch_augment
from stream.augment import DRAWS, Augment, crop, cut_out, sample_bits
from stream.seeds import Use

MANY = 4000
GREY = 114  # 255 times the mean of ImageNet's mean colour, rounded


def noise(count: int, height: int = 6, width: int = 6) -> torch.Tensor:
    """Random images, none of them a mirror of itself or black anywhere."""
    return torch.from_numpy(np.random.default_rng(count).integers(1, 256, (count, height, width, 3), np.uint8))


def dots(count: int, side: int) -> torch.Tensor:
    """Black images with one white pixel, in the middle."""
    images = torch.zeros((count, side, side, 3), dtype=torch.uint8)
    images[:, side // 2, side // 2] = 255
    return images


def places_of_dots(images: torch.Tensor) -> np.ndarray:
    """Row and column of the one pixel of each image that is not black, (N, 2)."""
    image, row, column = np.nonzero(images.numpy()[..., 0])
    assert image.tolist() == list(range(len(images)))
    return np.stack([row, column], axis=1)


def numbers(count: int) -> torch.Tensor:
    return torch.arange(count, dtype=torch.int64)


def splitmix64(state: int) -> Iterator[int]:
    """The generator as Vigna publishes it in C, in unbounded integers."""
    word = 2**64
    while True:
        state = (state + 0x9E3779B97F4A7C15) % word
        bits = state
        bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) % word
        bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) % word
        yield bits ^ (bits >> 31)


def assert_uncorrelated(columns: np.ndarray) -> None:
    """No two columns of (N, K) numbers correlate by more than four standard deviations of what chance would give."""
    found = np.corrcoef(columns, rowvar=False) - np.eye(columns.shape[1])
    assert np.abs(found).max() < 4 / np.sqrt(len(columns))


# ---- random numbers --------------------------------------------------------------------------------------------------


def test_the_draws_are_those_of_one_splitmix64_an_epoch() -> None:
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [number for number, _ in zip(splitmix64(1234567), published, strict=False)][:3] == published
    for seed, epoch in ((0, 0), (7, 3), (2**40, 89)):
        start = int(np.random.SeedSequence(seed, spawn_key=(4, epoch)).generate_state(1, np.uint64)[0])
        generator = splitmix64(start)
        expected = [[next(generator) >> 32 for _ in range(DRAWS)] for _ in range(50)]
        assert sample_bits(seed, Use.BATCH, epoch, np.arange(50), DRAWS).tolist() == expected
        last = splitmix64((start + DRAWS * 2**40 * 0x9E3779B97F4A7C15) % 2**64)
        assert sample_bits(seed, Use.BATCH, epoch, np.array([2**40]), DRAWS).tolist() == [
            [next(last) >> 32 for _ in range(DRAWS)]
        ]


@pytest.mark.parametrize("count", [1, 3, 12])
def test_another_use_draws_from_a_splitmix64_of_its_own_as_many_numbers_as_it_asks_for(count: int) -> None:
    start = int(np.random.SeedSequence(7, spawn_key=(8, 3)).generate_state(1, np.uint64)[0])
    generator = splitmix64(start)
    expected = [[next(generator) >> 32 for _ in range(count)] for _ in range(20)]
    assert sample_bits(7, Use.ERASING, 3, np.arange(20), count).tolist() == expected


def test_a_release_of_numpy_that_changes_the_draws_is_found_out() -> None:
    assert sample_bits(0, Use.BATCH, 0, np.array([0, 1]), DRAWS).tolist() == [
        [4133367706, 3877654129, 1355659061, 2756730881, 1700089182],
        [660633789, 3923454966, 594716035, 1950200173, 1722258389],
    ]


def test_draws_are_even_over_32_bits_and_uncorrelated() -> None:
    bits = sample_bits(0, Use.BATCH, 0, np.arange(MANY), DRAWS)
    assert bits.shape == (MANY, DRAWS)
    assert bits.dtype == np.int64
    assert bits.min() >= 0
    assert 2**32 * 0.999 < bits.max() < 2**32
    assert bits.min() < 2**32 * 0.001
    assert_uncorrelated(bits)
    assert_uncorrelated(np.concatenate([bits[:-1], bits[1:]], axis=1))
    assert_uncorrelated(np.concatenate([bits, sample_bits(0, Use.BATCH, 1, np.arange(MANY), DRAWS)], axis=1))
    assert_uncorrelated(np.concatenate([bits, sample_bits(1, Use.BATCH, 0, np.arange(MANY), DRAWS)], axis=1))


def test_flip_crop_and_cutout_are_drawn_independently_of_each_other() -> None:
    ids = numbers(MANY)
    image = torch.zeros((MANY, 8, 8, 3), dtype=torch.uint8)
    image[:, 4, 0] = 255
    flipped = places_of_dots(Augment(3, flip=True)(image, ids, 1))[:, 1:] > 0
    shifts = places_of_dots(Augment(3, padding=2)(dots(MANY, 8), ids, 1))
    squares = places_of_dots(Augment(3, cutout=1)(torch.zeros_like(image), ids, 1))
    assert_uncorrelated(np.concatenate([flipped, shifts, squares], axis=1))


# ---- flip ------------------------------------------------------------------------------------------------------------


def test_half_of_the_images_are_mirrored_exactly_and_the_others_left_as_they_are() -> None:
    images = noise(MANY)
    out = Augment(0, flip=True)(images, numbers(MANY), 0).numpy()
    mirrored = (out == images.numpy()[:, :, ::-1]).all(axis=(1, 2, 3))
    same = (out == images.numpy()).all(axis=(1, 2, 3))
    assert (mirrored ^ same).all()
    assert abs(mirrored.mean() - 0.5) < 4 * 0.5 / np.sqrt(MANY)


def test_nothing_is_flipped_unless_asked_for() -> None:
    images = noise(200)
    assert torch.equal(Augment(0)(images, numbers(200), 0), images)


# ---- crop ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", [1, 3])
def test_a_crop_is_numpys_pad_and_slice_at_its_corner(padding: int) -> None:
    images = noise((2 * padding + 1) ** 2, 5, 7)
    corners = [(row, column) for row in range(2 * padding + 1) for column in range(2 * padding + 1)]
    out = crop(images, padding, torch.tensor(corners)).numpy()
    border = ((padding, padding), (padding, padding), (0, 0))
    for image, (row, column), cropped in zip(images.numpy(), corners, out, strict=True):
        assert np.array_equal(cropped, np.pad(image, border)[row : row + 5, column : column + 7])


@pytest.mark.parametrize("padding", [1, 4])
def test_images_are_shifted_every_way_over_a_black_border_and_evenly(padding: int) -> None:
    images = noise(MANY, 9, 9)
    out = Augment(0, padding=padding)(images, numbers(MANY), 0).numpy()
    padded = np.pad(images.numpy(), ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    ways = 2 * padding + 1
    counts = np.zeros((ways, ways))
    for row in range(ways):
        for column in range(ways):
            counts[row, column] = (out == padded[:, row : row + 9, column : column + 9]).all(axis=(1, 2, 3)).sum()
    assert counts.sum() == MANY
    expected = MANY / ways**2
    assert np.abs(counts - expected).max() < 5 * np.sqrt(expected)


# ---- cutout ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [1, 2, 3, 4, 20])
def test_a_cut_out_square_is_grey_around_its_centre_and_clipped_at_the_edges(side: int) -> None:
    centres = [(row, column) for row in range(6) for column in range(8)]
    images = noise(len(centres), 6, 8)
    out = cut_out(images, side, torch.tensor(centres)).numpy()
    for image, (row, column), found in zip(images.numpy(), centres, out, strict=True):
        expected = image.copy()
        top, left = row - side // 2, column - side // 2
        expected[max(0, top) : top + side, max(0, left) : left + side] = GREY
        assert np.array_equal(found, expected)


def test_squares_are_cut_out_around_every_pixel() -> None:
    places = places_of_dots(Augment(0, cutout=1)(torch.zeros((MANY, 5, 8, 3), dtype=torch.uint8), numbers(MANY), 0))
    counts = np.zeros((5, 8))
    np.add.at(counts, tuple(places.T), 1)
    assert np.abs(counts - MANY / 40).max() < 5 * np.sqrt(MANY / 40)


# ---- all together ----------------------------------------------------------------------------------------------------


def test_each_change_is_the_same_with_and_without_the_others() -> None:
    images, ids = noise(300, 8, 8), numbers(300)
    expected = images
    for part in ({"padding": 1}, {"flip": True}, {"cutout": 3}):
        alone: Any = part
        expected = Augment(5, **alone)(expected, ids, 2)
    assert torch.equal(Augment(5, flip=True, padding=1, cutout=3)(images, ids, 2), expected)


WHOLE = Augment(1, flip=True, padding=2, cutout=2)


def test_a_sample_looks_the_same_in_any_batch() -> None:
    images, ids = noise(60, 8, 8), numbers(60) * 37 + 11
    expected = WHOLE(images, ids, 4)
    order = torch.from_numpy(np.random.default_rng(0).permutation(60))
    assert torch.equal(WHOLE(images[order], ids[order], 4), expected[order])
    for size in (1, 7, 60):
        parts = [slice(first, first + size) for first in range(0, 60, size)]
        assert torch.equal(torch.cat([WHOLE(images[part], ids[part], 4) for part in parts]), expected)


def test_seeds_epochs_and_ids_look_different() -> None:
    images, ids = noise(1, 8, 8).expand(100, -1, -1, -1), numbers(100)
    out = WHOLE(images, ids, 0)
    others = [WHOLE(images, ids, 1), Augment(2, flip=True, padding=2, cutout=2)(images, ids, 0)]
    others += [WHOLE(images, ids + 100, 0), out.roll(1, 0)]
    for other in others:
        assert sum(torch.equal(a, b) for a, b in zip(out, other, strict=True)) < 5


def test_size_and_type_are_kept_and_the_input_is_left_alone() -> None:
    images = noise(40, 6, 9)
    before = images.clone()
    out = WHOLE(images, numbers(40), 0)
    assert (out.shape, out.dtype, out.device) == (images.shape, torch.uint8, images.device)
    assert out.is_contiguous()
    assert torch.equal(images, before)


def test_the_global_generators_are_neither_read_nor_moved() -> None:
    images, seen = noise(40, 8, 8), []
    for seed in (0, 1):
        torch.manual_seed(seed)
        np.random.seed(seed)
        before = torch.get_rng_state(), str(np.random.get_state())
        seen.append(WHOLE(images, numbers(40), 0))
        assert torch.equal(torch.get_rng_state(), before[0])
        assert str(np.random.get_state()) == before[1]
    assert torch.equal(*seen)


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        ("digits", Augment(4, flip=False, padding=1, cutout=0)),
        ("cifar10", Augment(4, flip=True, padding=4, cutout=0)),
        ("cifar100", Augment(4, flip=True, padding=4, cutout=0)),
        ("imagenet1k", Augment(4, flip=True, padding=0, cutout=0)),
    ],
)
def test_digits_are_never_flipped_and_only_small_sets_are_padded(dataset: str, expected: Augment) -> None:
    assert batch_augment(resolve({"dataset": dataset, "seed": 4})).parts == (expected,)
    cut = batch_augment(resolve({"dataset": dataset, "seed": 4, "cutout": 3}))
    assert cut.parts == (Augment(4, flip=expected.flip, padding=expected.padding, cutout=3),)
