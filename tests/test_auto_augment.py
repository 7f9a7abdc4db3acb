"""Policies draw as torchvision's and timm's do, and do with what they drew what these would."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from products import round_each_product
from scipy import stats
from torchvision.transforms import InterpolationMode, autoaugment
from waiting import nothing_waits

from stream.augment import MEAN_COLOUR
from stream.auto_augment import AutoAugment, timm_magnitudes
from stream.operations import NOTHING, Choice

RSB = "rand-m7-n2-mstd0.5-inc1"
POLICIES = ["ta_wide", "ra", "ra-n3-m30", RSB, "rand-m9-n1-p1", "rand-mstd101"]
MANY = 100_000
SIGNED = ["ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color", "Contrast", "Sharpness"]
WHOLE = {"Posterize", "Solarize", "SolarizeAdd"}
BARE = {"AutoContrast", "Equalize", "Invert"}


def images(count: int, height: int = 20, width: int = 24) -> torch.Tensor:
    """Noise over a gradient."""
    noise = np.random.default_rng(count).integers(0, 120, (count, height, width, 3))
    return torch.from_numpy((noise + np.linspace(0, 130, width)[:, None]).astype(np.uint8))


def torchvisions(image: torch.Tensor, name: str, magnitude: float, interpolation: str) -> torch.Tensor:
    mode = InterpolationMode(interpolation)
    return autoaugment._apply_op(image.permute(2, 0, 1), name, magnitude, mode, None).permute(1, 2, 0)


def timms(image: torch.Tensor, name: str, magnitude: float, interpolation: str) -> torch.Tensor:
    from timm.data import auto_augment

    operation: Any = auto_augment.NAME_TO_OP[name]
    arguments = [] if name in BARE else [int(magnitude) if name in WHOLE else magnitude]
    options = {"fillcolor": MEAN_COLOUR, "resample": Image.Resampling.BICUBIC}
    return torch.from_numpy(np.array(operation(Image.fromarray(image.numpy()), *arguments, **options)))


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (224, 224)])
@pytest.mark.parametrize(
    ("policy", "interpolation", "reference"),
    [
        ("ta_wide", "nearest", torchvisions),
        ("ta_wide", "bilinear", torchvisions),
        ("ra-n2-m9", "nearest", torchvisions),
        (RSB, "bicubic", timms),
        ("rand-m5-n2-p1-mstd101-inc1", "bicubic", timms),
    ],
)
def test_a_whole_policy_is_its_reference_with_the_same_draws(
    policy: str,
    interpolation: str,
    reference: Callable[..., torch.Tensor],
    size: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    round_each_product(monkeypatch)
    count = 200 if size[0] < 200 else 60
    batch, ids = images(count, *size), torch.arange(count)
    augment = AutoAugment.parse(policy, 3, interpolation)
    with nothing_waits():
        found = augment(batch, ids, 2)
    names = list(augment.policy.operations)
    done = 0
    for choice in augment.choose(ids.numpy(), 2, *size):
        assert choice.operations.shape == choice.magnitudes.shape == (count,)
        for row in np.flatnonzero(choice.operations != NOTHING).tolist():
            name, magnitude = names[choice.operations[row]], float(choice.magnitudes[row])
            batch[row] = reference(batch[row], name, magnitude, interpolation)
            done += 1
    assert done > count / 2
    assert torch.equal(found, batch)


def evenly(numbers: np.ndarray, kinds: int) -> bool:
    counts = np.bincount(numbers.astype(np.int64), minlength=kinds)
    assert len(counts) == kinds
    return bool(stats.chisquare(counts).pvalue > 0.001)


def drawn(policy: str, size: int = 224) -> tuple[list[str], list[Choice]]:
    augment = AutoAugment.parse(policy, 11)
    return list(augment.policy.operations), augment.choose(np.arange(MANY), 5, size, size)


def test_operations_bins_and_signs_of_ta_wide_are_even() -> None:
    names, (choice,) = drawn("ta_wide")
    theirs: Any = autoaugment.TrivialAugmentWide()
    space = theirs._augmentation_space(31)
    assert names == list(space)
    assert evenly(choice.operations, 14)
    for place, (magnitudes, signed) in enumerate(space.values()):
        found = choice.magnitudes[choice.operations == place]
        if not magnitudes.ndim:
            assert not found.any()
            continue
        allowed = magnitudes.double().numpy()
        assert set(np.abs(found)) == set(allowed)
        values, copies = np.unique(allowed, return_counts=True)
        counts = [(np.abs(found) == value).sum() for value in values]
        assert stats.chisquare(counts, copies * len(found) / 31).pvalue > 0.001
        assert evenly(found[found != 0] > 0, 2) if signed else (found >= 0).all()


def test_layers_of_ra_are_even_independent_and_of_torchvisions_magnitude() -> None:
    names, choices = drawn("ra-n2-m9", 160)
    theirs: Any = autoaugment.RandAugment()
    space = theirs._augmentation_space(31, (160, 160))
    assert names == list(space)
    for choice in choices:
        assert evenly(choice.operations, 14)
        for place, (magnitudes, signed) in enumerate(space.values()):
            found = choice.magnitudes[choice.operations == place]
            expected = float(magnitudes[9]) if magnitudes.ndim else 0.0
            assert set(found) == ({expected, -expected} if signed else {expected})
            assert not signed or evenly(found > 0, 2)
    first, second = choices
    assert evenly(first.operations * 14 + second.operations, 14**2)


def test_rand_draws_operations_evenly_does_half_of_them_and_has_normal_noise() -> None:
    names, choices = drawn(RSB)
    for choice in choices:
        done = choice.operations != NOTHING
        assert abs(done.mean() - 0.5) < 4 * 0.5 / np.sqrt(MANY)
        assert evenly(choice.operations[done], 15)
        turned = choice.magnitudes[choice.operations == names.index("Rotate")]
        assert evenly(turned > 0, 2)
        assert stats.kstest((np.abs(turned) / 3 - 7) / 0.5, "norm").pvalue > 0.001
        coloured = choice.magnitudes[choice.operations == names.index("Color")]
        assert evenly(coloured > 1, 2)
    first, second = (choice.operations for choice in choices)
    assert evenly(first + 1, 16) is False
    both = (first != NOTHING) & (second != NOTHING)
    assert evenly(first[both] * 15 + second[both], 15**2)


def test_rand_without_bounds_to_its_noise_is_even_from_zero_on() -> None:
    names, choices = drawn("rand-m8-n1-mstd101-p1")
    turned = choices[0].magnitudes[choices[0].operations == names.index("Rotate")]
    assert stats.kstest(np.abs(turned) / 24, "uniform").pvalue > 0.001
    assert (choices[0].operations != NOTHING).all()


@pytest.mark.parametrize("increasing", [True, False])
@pytest.mark.parametrize("sign", [1, -1])
def test_magnitudes_are_timms_for_every_level(increasing: bool, sign: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from timm.data import auto_augment

    to_argument: dict[str, Any] = auto_augment.LEVEL_TO_ARG
    monkeypatch.setattr(random, "random", lambda: 0.9 if sign < 0 else 0.1)
    levels = np.concatenate([np.linspace(0, 10, 331), np.arange(11)])
    found = timm_magnitudes(levels, np.full(len(levels), sign), increasing)
    for name in auto_augment.rand_augment_choices("", increasing):
        if to_argument[name] is not None:
            expected = [to_argument[name](level, {})[0] for level in levels.tolist()]
            assert found[name.removesuffix("Increasing")].tolist() == expected, name


@pytest.mark.parametrize("text", [RSB, "rand", "rand-m9-n3-p0.3", "rand-m15-mmax20-inc1", "rand-m5-mstd101"])
def test_a_policy_of_timms_is_read_as_timm_reads_it(text: str) -> None:
    from timm.data.auto_augment import rand_augment_transform

    theirs, ours = rand_augment_transform(text, {}), AutoAugment.parse(text, 0).policy
    names = [op.name.removesuffix("Increasing") for op in theirs.ops]
    assert names == list(ours.operations)
    found: Any = ours
    first = theirs.ops[0]
    assert (found.layers, found.magnitude, found.probability) == (theirs.num_layers, first.magnitude, first.prob)
    assert (found.noise, found.most) == (first.magnitude_std, first.magnitude_max or 10)
    assert found.increasing == (theirs.ops[4].name == "PosterizeIncreasing")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "ta",
        "ta_wide-m3",
        "ra-p0.5",
        "ra-n2.5",
        "rand-m7-w0",
        "rand-tweights",
        "rand-m",
        "rand-m7-m8",
        "rand-p.5.5",
        "augmix-m3",
        "original",
        "ra-n0",
        "ra-m31",
        "rand-p1.5",
    ],
)
def test_an_unknown_policy_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(
        ValueError, match=r"^'.*' is (no automatic augmentation; there are|out of bounds; n is) [^\n]+$"
    ):
        AutoAugment.parse(text, 0)


def test_an_interpolation_that_the_reference_has_not_is_refused() -> None:
    for text, interpolation in (("ta_wide", "bicubic"), (RSB, "nearest"), ("ra", "cubic")):
        with pytest.raises(ValueError, match=f"has no {interpolation} interpolation"):
            AutoAugment.parse(text, 0, interpolation)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_sample_looks_the_same_in_any_batch(policy: str) -> None:
    batch, ids = images(60), torch.arange(60) * 37 + 11
    augment = AutoAugment.parse(policy, 1)
    expected = augment(batch, ids, 4)
    order = torch.from_numpy(np.random.default_rng(0).permutation(60))
    assert torch.equal(augment(batch[order], ids[order], 4), expected[order])
    for size in (1, 7):
        parts = [slice(first, first + size) for first in range(0, 60, size)]
        assert torch.equal(torch.cat([augment(batch[part], ids[part], 4) for part in parts]), expected)


@pytest.mark.parametrize("policy", POLICIES)
def test_seeds_epochs_and_ids_look_different_and_the_input_is_left_alone(policy: str) -> None:
    batch, ids = images(1).repeat(100, 1, 1, 1), torch.arange(100)
    before = batch.clone()
    augment = AutoAugment.parse(policy, 1)
    out = augment(batch, ids, 0)
    assert (out.shape, out.dtype, out.is_contiguous()) == (batch.shape, torch.uint8, True)
    assert torch.equal(batch, before)
    for other in (augment(batch, ids, 1), AutoAugment.parse(policy, 2)(batch, ids, 0), augment(batch, ids + 100, 0)):
        assert sum(torch.equal(a, b) for a, b in zip(out, other, strict=True)) < 40


def test_policies_can_be_compared() -> None:
    assert AutoAugment.parse("ra-n2-m9", 1) == AutoAugment.parse("ra", 1)
    assert AutoAugment.parse("ra-n2-m9", 1) != AutoAugment.parse("ra-n2-m8", 1)


def test_a_change_of_what_is_drawn_is_found_out() -> None:
    for policy, expected in KNOWN.items():
        augment = AutoAugment.parse(policy, 0)
        choice = augment.choose(np.array([0, 1, 2**33]), 1, 224, 224)[-1]
        assert choice.operations.tolist() == expected[0]
        assert choice.magnitudes.tolist() == pytest.approx(expected[1], rel=1e-12)


KNOWN = {
    "ta_wide": ([5, 12, 8], [36.0, 0.0, 0.527999997138977]),
    "ra": ([3, 5, 7], [-30.45317268371582, -9.0, -0.26999998092651367]),
    "rand-m7-n2-mstd0.5-inc1": ([14, 12, 4], [-0.3003023283266323, -0.204307677803889, 2.0]),
}
