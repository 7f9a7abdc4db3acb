"""Boxes are those of torchvision's RandomErasing for the same numbers, and drawn as it draws them."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torchvision.transforms import RandomErasing
from waiting import nothing_waits

from stream.augment import IMAGENET_MEAN, MEAN_COLOUR, Normalize, sample_bits
from stream.erasing import DRAWS, TRIES, boxes, erase
from stream.seeds import Use

MANY = 100_000


def fed(bits: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Makes torch draw from these numbers of one sample, in the order in which RandomErasing asks for them."""
    tries = iter(np.stack([bits[1 : 1 + TRIES], bits[1 + TRIES : 1 + 2 * TRIES]], axis=1).flatten() / 2**32)
    places = iter(bits[-2:].tolist())

    def uniform(tensor: torch.Tensor, least: Any, most: Any) -> torch.Tensor:
        return tensor.fill_(float(least) + (float(most) - float(least)) * next(tries))

    monkeypatch.setattr(torch.Tensor, "uniform_", uniform)
    monkeypatch.setattr(torch, "rand", lambda count: torch.tensor([bits[0] / 2**32]))
    monkeypatch.setattr(torch, "randint", lambda least, most, size: torch.tensor([next(places) * most >> 32]))
    yield


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (224, 224), (8, 60)])
@pytest.mark.parametrize("p", [0.1, 1.0])
def test_a_batch_is_torchvisions_with_the_same_draws(
    size: tuple[int, int], p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = np.arange(200) * 7
    found = boxes(3, 5, ids, *size, p)
    assert found.shape == (200, 4)
    assert found.dtype == np.int64
    batch = torch.rand((200, 3, *size), generator=torch.Generator().manual_seed(0)) + 1
    with nothing_waits():
        erased = erase(batch, found)
    theirs = RandomErasing(p)
    torch.set_default_dtype(torch.float64)  # theirs draws in float32 by default, which could round a side differently
    try:
        for image, ours, bits in zip(batch, erased, sample_bits(3, Use.ERASING, 5, ids, DRAWS), strict=True):
            for _ in fed(bits, monkeypatch):
                assert torch.equal(theirs(image), ours)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("size", [(176, 176), (20, 90)])
def test_areas_ratios_and_places_are_distributed_as_torchvisions(size: tuple[int, int]) -> None:
    height, width = size
    found = boxes(0, 0, np.arange(MANY), height, width, 1.0)
    theirs: Any = RandomErasing()
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    drawn = np.array([theirs.get_params(image, theirs.scale, theirs.ratio, [0.0])[:4] for _ in range(20_000)])
    whole = (drawn[:, 2] == height) & (drawn[:, 3] == width)
    drawn[whole] = 0
    tall, wide = found[:, 2] - found[:, 0], found[:, 3] - found[:, 1]
    empty = tall == 0
    assert (
        stats.chi2_contingency([np.bincount(empty, minlength=2) + 1, np.bincount(whole, minlength=2) + 1]).pvalue
        > 0.001
    )
    rows = drawn[~whole]
    for ours, reference in (
        (tall * wide, rows[:, 2] * rows[:, 3]),
        (tall / np.maximum(wide, 1), rows[:, 2] / np.maximum(rows[:, 3], 1)),
        (found[:, 0], rows[:, 0]),
        (found[:, 1], rows[:, 1]),
    ):
        assert stats.ks_2samp(ours[~empty], reference).pvalue > 0.001


def test_a_share_p_of_the_samples_is_erased_whatever_the_batch() -> None:
    ids = np.arange(MANY)
    found = boxes(2, 1, ids, 64, 64, 0.1)
    share = (found != 0).any(axis=1).mean()
    assert abs(share - 0.1) < 4 * np.sqrt(0.09 / MANY)
    assert not boxes(2, 1, ids[:500], 64, 64, 0.0).any()
    assert np.array_equal(boxes(2, 1, ids[500:510], 64, 64, 0.1), found[500:510])
    for other in (boxes(3, 1, ids, 64, 64, 0.1), boxes(2, 2, ids, 64, 64, 0.1)):
        assert (other != found).any()
    always = boxes(2, 1, ids[:500], 64, 64, 1.0)
    assert (always[:, :2] >= 0).all()
    assert (always[:, 2:] <= 64).all()
    assert (always[:, 2:] > always[:, :2]).all()


def test_uint8_and_normalised_images_are_erased_in_the_same_boxes() -> None:
    batch = torch.randint(0, 255, (50, 20, 30, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    before, found = batch.clone(), boxes(0, 0, np.arange(50), 20, 30, 0.8)
    normalize = Normalize()
    with nothing_waits():
        coloured = erase(batch, found, MEAN_COLOUR)
        zeros = erase(normalize(batch), found)
        painted = erase(normalize(batch), found, (1.0, 2.0, 3.0))
    assert torch.equal(batch, before)
    assert torch.equal(painted[:, 1], torch.where(zeros[:, 1] == 0, 2.0, zeros[:, 1]))
    assert (coloured.dtype, coloured.shape) == (torch.uint8, batch.shape)
    assert zeros.is_contiguous(memory_format=torch.channels_last)
    for image, original, zeroed, (top, left, bottom, right) in zip(coloured, batch, zeros, found, strict=True):
        expected, normalised = original.clone(), normalize(original[None])[0].clone()
        expected[top:bottom, left:right] = torch.tensor(MEAN_COLOUR, dtype=torch.uint8)
        normalised[:, top:bottom, left:right] = 0
        assert torch.equal(image, expected)
        assert torch.equal(zeroed, normalised)
    distance = np.abs(np.array(MEAN_COLOUR) - 255 * np.array(IMAGENET_MEAN))
    assert distance.max() <= 0.5


def test_a_change_of_what_is_drawn_is_found_out() -> None:
    found = boxes(0, 1, np.array([0, 1, 2**33]), 224, 224, 1.0)
    assert found.tolist() == [
        [86, 70, 182, 199],
        [33, 50, 132, 214],
        [93, 87, 192, 169],
    ]
