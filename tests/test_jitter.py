"""Colours change as torchvision's ColorJitter changes them, in an order of its own for each sample."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torchvision.transforms import functional
from torchvision.transforms import transforms as reference
from waiting import nothing_waits

from stream.jitter import ORDERS, ColorJitter
from stream.operations import NOTHING, jitter_operations

MANY = 100_000


def images(count: int, height: int, width: int) -> torch.Tensor:
    """Noise, every second one over a gradient, with a grey, a black, a white and a red image at the front."""
    found = np.random.default_rng(count).integers(0, 256, (count, height, width, 3))
    found[::2] = found[::2] // 8 + np.linspace(0, 220, width)[:, None]
    found[:4] = np.array([[90, 90, 90], [0, 0, 0], [255, 255, 255], [255, 0, 0]])[:, None, None]
    return torch.from_numpy(found.astype(np.uint8))


def levels_of_every_colour() -> torch.Tensor:
    """Each third level of red, green and blue with each other: uint8 (1, 86 * 86, 86, 3)."""
    return torch.cartesian_prod(*[torch.arange(0, 256, 3, dtype=torch.uint8)] * 3).view(1, 86 * 86, 86, 3)


@pytest.mark.parametrize("turn", [-0.5, -0.31, -0.1, 0.0, 0.01, 0.25, 1 / 3, 0.5])
def test_hue_is_torchvisions_for_all_colours(turn: float) -> None:
    found = levels_of_every_colour()
    ours = jitter_operations()["hue"].kernel(found, torch.tensor([[turn]], dtype=torch.float64))
    assert torch.equal(ours.permute(0, 3, 1, 2), functional.adjust_hue(found.permute(0, 3, 1, 2), turn))


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (224, 224)])
@pytest.mark.parametrize("amounts", [(0.4, 0.4, 0.4, 0.1), (1.5, 0.3, 0.0, 0.5), (0.0, 0.0, 2.0, 0.0)])
def test_a_batch_is_torchvisions_with_the_same_draws(
    amounts: tuple[float, float, float, float], size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    count = 100 if size[0] < 200 else 30
    batch, ids = images(count, *size), torch.arange(count)
    jitter = ColorJitter(4, *amounts)
    with nothing_waits():
        found = jitter(batch, ids, 1)
    choices = jitter.choose(ids.numpy(), 1)
    theirs: Any = reference.ColorJitter(*amounts)
    for row in range(count):
        factors: list[float | None] = [None] * 4
        order = [int(choice.operations[row]) for choice in choices]
        for place, choice in zip(order, choices, strict=True):
            if place != NOTHING:
                factors[place] = float(choice.magnitudes[row]) + (0.0 if place == 3 else 1.0)
        monkeypatch.setattr(reference.ColorJitter, "get_params", lambda *ranges, drawn=(order, *factors): drawn)
        assert torch.equal(found[row].permute(2, 0, 1), theirs(batch[row].permute(2, 0, 1)))


def test_orders_and_factors_are_even_and_within_torchvisions_ranges() -> None:
    amounts = (0.4, 1.7, 0.2, 0.1)
    choices = ColorJitter(9, *amounts).choose(np.arange(MANY), 3)
    orders = np.stack([choice.operations for choice in choices], axis=1)
    counts = [(orders == order).all(axis=1).sum() for order in ORDERS]
    assert len(counts) == 24
    assert sum(counts) == MANY
    assert stats.chisquare(counts).pvalue > 0.001
    theirs: Any = reference.ColorJitter(*amounts)
    for place, name in enumerate(("brightness", "contrast", "saturation", "hue")):
        least, most = getattr(theirs, name)
        found = np.concatenate([choice.magnitudes[choice.operations == place] for choice in choices])
        assert len(found) == MANY
        found += 0.0 if name == "hue" else 1.0
        assert stats.kstest(found, stats.uniform(least, most - least).cdf).pvalue > 0.001


def test_a_sample_looks_the_same_in_any_batch_and_different_in_another_epoch() -> None:
    batch, ids = images(40, 12, 16), torch.arange(40) * 3 + 5
    before, jitter = batch.clone(), ColorJitter(1, 0.4, 0.4, 0.4, 0.1)
    expected = jitter(batch, ids, 4)
    order = torch.from_numpy(np.random.default_rng(0).permutation(40))
    assert torch.equal(jitter(batch[order], ids[order], 4), expected[order])
    assert torch.equal(torch.cat([jitter(batch[row : row + 1], ids[row : row + 1], 4) for row in range(40)]), expected)
    assert torch.equal(batch, before)
    for other in (jitter(batch, ids, 5), ColorJitter(2, 0.4, 0.4, 0.4, 0.1)(batch, ids, 4)):
        assert sum(torch.equal(a, b) for a, b in zip(expected, other, strict=True)) < 4
    assert torch.equal(ColorJitter(1)(batch, ids, 4), batch)


def test_amounts_that_torchvision_refuses_are_refused() -> None:
    for amounts in ((-0.1, 0, 0, 0), (0, 0, 0, 0.6)):
        with pytest.raises(ValueError, match="at least 0, and that of hue at most"):
            ColorJitter(0, *amounts)
