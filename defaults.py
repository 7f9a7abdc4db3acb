"""The defaults of each dataset, and what a small set makes of them."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

LINEAR_SCALING_BATCH = 256
PEAK_MOMENTUM = 0.85  # OneCycle's, where its rate is highest
ADAPTIVE_LR = {  # of other optimisers than SGD: rate, its batch, and where both are from
    "adamw": (1e-3, 1024, "Touvron et al. 2021, DeiT"),
    "lamb": (5e-3, 2048, "Wightman et al. 2021, ResNet strikes back"),
}
CONSTANT_SHARE = 0.25  # of OneCycle's peak, for the schedules that start at their highest rate
FEWEST_STEPS = 8  # in an epoch
SMALLEST_BATCH = 4  # images of a rank, that BatchNorm has something to average
FEWEST_IN_A_PASS = 2  # images, or BatchNorm has no variance
WANTED_STEPS = 2000  # of a run on a small set
MOST_EPOCHS = 200
FEWEST_FOR_TOP5 = 6  # classes; of fewer, the five most likely say little
SMALL_SET = 100_000  # images


@dataclass(frozen=True)
class Preset:
    """A dataset's defaults. Rates are for a batch of 256: `lr` is OneCycle's peak, `constant_lr` that of the others.

    OneCycle's momentum is 0.85 at its peak; what was published at 0.9 may keep rate / (1 - momentum). Sizes are in
    pixels. `constant_lr` is a quarter of the peak where none is given.
    """

    image_size: int
    batch_size: int
    epochs: int
    lr: float
    weight_decay: float = 5e-4
    lr_source: str = "its preset"
    constant_lr: float | None = None
    constant_lr_source: str = "a quarter of OneCycle's peak"
    streams: int = 8

    @property
    def highest_constant_lr(self) -> float:
        """The rate of the schedules that start at their highest."""
        return self.lr * CONSTANT_SHARE if self.constant_lr is None else self.constant_lr


IMAGENET = Preset(
    image_size=224,
    batch_size=256,
    epochs=90,
    weight_decay=1e-4,  # ffcv-imagenet's, as there without norms
    lr=0.16,
    lr_source="ffcv-imagenet's 1.7 for 4,096 at momentum 0.9, at OneCycle's 0.85",
    constant_lr=0.1,
    constant_lr_source="Goyal et al. 2017: 0.1 for 256 at momentum 0.9",
)
CIFAR = Preset(
    image_size=32,
    batch_size=128,
    epochs=30,
    weight_decay=5e-4,  # the same two's
    lr=0.2,
    lr_source="weiaicunzai's and Random-Erasing's 0.1 for 128",
    constant_lr=0.2,
    constant_lr_source="weiaicunzai's and Random-Erasing's 0.1 for 128",
)
DIGITS = Preset(
    image_size=8,
    batch_size=64,
    epochs=10,
    weight_decay=5e-4,
    lr=0.4,  # of 0.12 to 0.8, with ResNet-20
    lr_source="measured here",
)
FASHION_MNIST = replace(CIFAR, image_size=28)
MNIST = replace(FASHION_MNIST, epochs=10)


def streams_for(batch: int, ranks: int, most: int) -> int:
    """The largest number of streams, up to `most` or the ranks, that divides a batch and that the ranks can share.

    Where the ranks cannot even share the batch, it only divides the batch.
    """
    shared = ranks if batch % ranks == 0 else 1
    return max(n for n in range(1, max(most, ranks) + 1) if batch % n == 0 and n % shared == 0)


def first_guess(preset: Preset, given: Mapping[str, Any], ranks: int) -> dict[str, int]:
    """What to go by for batch_size, streams and epochs while the set is unknown: those `given`, or what fits these.

    A warm-up that only a small set has the epochs for is not refused yet.
    """
    batch, streams = _batch_and_streams(preset, given, ranks)
    long = preset is IMAGENET and preset.epochs <= given.get("warmup_epochs", 0.0) < MOST_EPOCHS
    epochs = given.get("epochs", MOST_EPOCHS if long else preset.epochs)
    return {"batch_size": batch, "streams": streams, "epochs": epochs}


def fit_to(
    preset: Preset, images: int, derived: Collection[str], settings: Mapping[str, Any], ranks: int
) -> tuple[dict[str, int], list[str]]:
    """The `derived` ones of batch_size, streams and epochs, so that they suit this number of training images.

    They fit the other `settings`, accumulate_steps among them. Also a line for each that is not the preset's.
    """
    given = {name: value for name, value in settings.items() if name not in derived}
    batch, streams = _batch_and_streams(preset, given, ranks, images)
    epochs, steps = given.get("epochs", preset.epochs), images // batch
    if "epochs" in derived and steps and preset is IMAGENET and images < SMALL_SET:
        epochs = max(epochs, min(MOST_EPOCHS, -(-WANTED_STEPS // steps)))
    values = {"batch_size": batch, "streams": streams, "epochs": epochs}
    whys = {
        "batch_size": f"{steps} steps in an epoch of {images:,} images",
        "streams": f"as many as divide a batch of {batch}, up to {preset.streams}",
        "epochs": f"{epochs * steps:,} steps in all, as the set is small",
    }
    return values, [
        f"{name.removesuffix('_size'):<9} {value}: {whys[name]}; --{name} sets another number"
        for name, value in values.items()
        if name in derived and value != getattr(preset, name)
    ]


def _batch_and_streams(
    preset: Preset, given: Mapping[str, Any], ranks: int, images: int | None = None
) -> tuple[int, int]:
    """A batch and its streams, such as are not `given`, that streams, ranks and their passes share evenly.

    Of a small set, FEWEST_STEPS such batches make an epoch if they can.
    """
    batch, streams = given.get("batch_size"), given.get("streams")
    passes = ranks * max(1, given["accumulate_steps"])
    if batch is None and images is not None and images < preset.batch_size * FEWEST_STEPS:
        batch = _small_batch(images, preset.batch_size, math.lcm(streams or ranks, passes), passes, ranks)
    elif batch is None:
        unit = math.lcm(streams or max(1, preset.streams // ranks) * ranks, passes)
        if unit > preset.batch_size and not streams:
            unit = passes
        batch = max(preset.batch_size // unit, -(-FEWEST_IN_A_PASS * passes // unit)) * unit
    return batch, streams_for(batch, ranks, preset.streams) if streams is None else streams


def _small_batch(images: int, most: int, unit: int, passes: int, ranks: int) -> int:
    """The largest `unit` times a power of two of which FEWEST_STEPS fit into the images, up to `most`.

    More where a rank would have fewer than SMALLEST_BATCH images, if the set has that many.
    """
    batch = unit
    while batch < FEWEST_IN_A_PASS * passes:
        batch *= 2
    while 2 * batch <= min(most, images) and (batch < SMALLEST_BATCH * ranks or 2 * batch * FEWEST_STEPS <= images):
        batch *= 2
    return batch
