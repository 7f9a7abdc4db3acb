"""Mixed images and targets are those of torchvision and timm for the same numbers, and pairs stay in their stream."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torchvision.transforms import v2
from waiting import nothing_waits

from training.mixing import Mix, Mixing, cut_mix, partners

CLASSES = 11
SIZES = [(32, 32), (33, 47), (7, 8)]


class Fixed:
    """In place of a distribution."""

    def __init__(self, value: float) -> None:
        self.value = value

    def sample(self, shape: tuple[()]) -> float:
        return self.value


def batch(height: int, width: int, count: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(height * width)
    labels = torch.tensor([1, 1, 4, 9, 10, 0])[:count]
    return torch.randn((count, 3, height, width), generator=generator), labels


def mixed(mix: Mix, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    with nothing_waits():
        others = partners(images, len(labels)), partners(labels, len(labels))
        return mix.apply(images, others[0]), mix.targets(labels, others[1], CLASSES)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("share", [0.0, 1e-7, 0.1, 1 / 3, 0.5, 0.9, 1.0])
def test_mixup_is_torchvisions_to_the_last_digit(size: tuple[int, int], share: float) -> None:
    theirs: Any = v2.MixUp(num_classes=CLASSES)
    theirs._dist = Fixed(share)
    images, labels = batch(*size)
    expected = theirs(images.clone(), labels)
    for found, wanted in zip(mixed(Mix(share), images, labels), expected, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("share", [0.0, 0.2, 1 / 3, 0.77, 0.999, 1.0])
@pytest.mark.parametrize("place", [(0.0, 0.0), (0.5, 0.3), (0.99, 0.99), (0.0, 0.99)])
def test_cutmix_and_its_corrected_share_are_torchvisions_to_the_last_digit(
    size: tuple[int, int], share: float, place: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    height, width = size
    column, row = int(place[0] * width), int(place[1] * height)
    theirs: Any = v2.CutMix(num_classes=CLASSES)
    theirs._dist = Fixed(share)
    drawn = iter([column, row])
    monkeypatch.setattr(torch, "randint", lambda limit, size: torch.tensor([next(drawn)]))
    images, labels = batch(height, width)
    expected = theirs(images.clone(), labels)
    for found, wanted in zip(mixed(cut_mix(share, column, row, height, width), images, labels), expected, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_targets_are_timms(smoothing: float) -> None:
    from timm.data.mixup import mixup_target

    labels = torch.tensor([3, 3, 10, 0, 7, 1])
    for share in (0.0, 0.25, 1 / 3, 1.0):
        found = Mix(share).targets(labels, labels.flip(0), CLASSES) * (1 - smoothing) + smoothing / CLASSES
        wanted = mixup_target(labels, CLASSES, share, smoothing)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-7)


def test_layout_type_and_input_are_kept() -> None:
    images = batch(8, 8)[0].contiguous(memory_format=torch.channels_last)
    before, pairs = images.clone(), partners(torch.arange(6), 3)
    for mix in (Mix(0.3), cut_mix(0.3, 2, 2, 8, 8)):
        out = mix.apply(images, images[pairs])
        assert out.is_contiguous(memory_format=torch.channels_last)
        assert out.dtype == torch.float32
        assert torch.equal(images, before)


def test_pairs_are_the_same_on_any_number_of_ranks() -> None:
    whole = partners(torch.arange(24), 3)
    assert partners(torch.arange(24), 24).tolist() == [23, *range(23)]
    assert whole[:6].tolist() == [2, 0, 1, 5, 3, 4]
    assert whole.dtype == torch.int64
    for ranks in (2, 4, 8):
        share = 24 // ranks
        parts = [partners(torch.arange(share), 3) + rank * share for rank in range(ranks)]
        assert torch.equal(torch.cat(parts), whole)


def test_one_of_the_two_is_drawn_for_a_step_each_as_often_with_its_own_beta() -> None:
    mixing = Mixing(mixup=0.2, cutmix=1.0, seed=5, group=4)
    found = [mixing.draw(step, 1000, 1000) for step in range(4000)]
    cut = np.array([mix.box is not None for mix in found])
    assert abs(cut.mean() - 0.5) < 4 * 0.5 / np.sqrt(len(cut))
    assert abs(np.corrcoef(cut[:-1], cut[1:])[0, 1]) < 4 / np.sqrt(len(cut))
    shares = np.array([mix.share for mix in found])
    assert stats.kstest(shares[~cut], stats.beta(0.2, 0.2).cdf).pvalue > 0.001


def test_boxes_have_the_shares_and_places_that_torchvision_draws() -> None:
    ours = [Mixing(0, 1.0, 3, 4).draw(step, 40, 60) for step in range(3000)]
    torch.manual_seed(0)
    theirs = [v2.CutMix(num_classes=2).make_params([torch.zeros(1, 3, 40, 60)]) for _ in range(3000)]
    assert stats.ks_2samp([mix.share for mix in ours], [found["lam_adjusted"] for found in theirs]).pvalue > 0.001
    for side in range(4):
        sides = [mix.box[side] for mix in ours if mix.box], [found["box"][side] for found in theirs]
        assert stats.ks_2samp(*sides).pvalue > 0.001


def test_a_mix_depends_on_seed_and_step_alone() -> None:
    mixing = Mixing(0.2, 1.0, 1, 4)
    assert [mixing.draw(step, 32, 32) for step in range(50)] == [mixing.draw(step, 32, 32) for step in range(50)]
    seen = {mixing.draw(step, 32, 32) for step in range(50)}
    assert len(seen) == 50
    assert len(seen & {Mixing(0.2, 1.0, 2, 4).draw(step, 32, 32) for step in range(50)}) < 3  # same boxes
    sizes = [mixing.draw(step, 64, 64) for step in range(50)]
    assert [mix.box is None for mix in sizes] == [mixing.draw(step, 32, 32).box is None for step in range(50)]


def test_either_can_be_left_out_and_not_both() -> None:
    assert all(Mixing(0.2, 0, 0, 4).draw(step, 8, 8).box is None for step in range(50))
    assert all(Mixing(0, 1.0, 0, 4).draw(step, 8, 8).box for step in range(50))
    for mixup, cutmix in ((0, 0), (-1, 1), (1, -0.1)):
        with pytest.raises(ValueError, match="positive alpha"):
            Mixing(mixup, cutmix, 0, 4)


def test_a_release_of_numpy_that_changes_the_mixes_is_found_out() -> None:
    shares = [Mixing(0.2, 0, 0, 4).draw(step, 224, 224).share for step in range(3)]
    assert shares == pytest.approx([0.6070203014507705, 0.7166077230269637, 0.9999989653051776], rel=1e-9)
    boxes = [Mixing(0, 1.0, 0, 4).draw(step, 224, 224).box for step in range(2)]
    assert boxes == [(0, 0, 106, 78), (0, 56, 87, 206)]
