"""The defaults of each dataset, and what a small set makes of them."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

LINEAR_SCALING_BATCH = 256
CONSTANT_SHARE = 0.25  # of OneCycle's peak, for the schedules that start at their highest rate
FEWEST_STEPS = 8  # in an epoch
SMALLEST_BATCH = 4  # images of a rank, that BatchNorm has something to average
WANTED_STEPS = 2000  # of a run on a small set
MOST_EPOCHS = 200
SMALL_SET = 100_000  # images


@dataclass(frozen=True)
class Preset:
    """A dataset's defaults. `lr` is the peak rate for a batch of 256 under OneCycle."""

    image_size: int
    batch_size: int
    epochs: int
    weight_decay: float
    lr: float
    streams: int = 8


RESIDENT = frozenset({"digits", "cifar10", "cifar100", "mnist", "fashion_mnist"})  # they fit any device's memory
IMAGENET = Preset(image_size=224, batch_size=256, epochs=90, weight_decay=5e-5, lr=0.4)
CIFAR = Preset(image_size=32, batch_size=128, epochs=30, weight_decay=5e-4, lr=0.2)
PRESETS = {
    "imagenet1k": IMAGENET,
    "cifar10": CIFAR,
    "cifar100": CIFAR,
    "fashion_mnist": replace(CIFAR, image_size=28),
    "mnist": replace(CIFAR, image_size=28, epochs=10),
    "digits": Preset(image_size=8, batch_size=64, epochs=10, weight_decay=5e-4, lr=0.12),
    "imagefolder": IMAGENET,
    "hf": IMAGENET,
}


def streams_for(batch: int, ranks: int, most: int) -> int:
    """The largest number of streams up to `most` that divides a batch and that the ranks can share; `most` if none."""
    fitting = [streams for streams in range(1, most + 1) if batch % streams == 0 and streams % ranks == 0]
    return max(fitting, default=most)


def fit_to(
    preset: Preset, images: int, derived: Collection[str], settings: Mapping[str, Any], ranks: int
) -> tuple[dict[str, int], list[str]]:
    """The `derived` ones of batch_size, streams and epochs, so that they suit this number of training images.

    Also a line for each that is not as in the `settings`.
    """
    batch, streams, epochs = (settings[name] for name in ("batch_size", "streams", "epochs"))
    if "batch_size" in derived and images < preset.batch_size * FEWEST_STEPS:
        unit = ranks if "streams" in derived else streams
        batch = _batch_for(images, preset.batch_size, unit, SMALLEST_BATCH * ranks)
    if "streams" in derived:
        streams = streams_for(batch, ranks, preset.streams)
    steps = images // batch
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
        if value != settings[name]
    ]


def _batch_for(images: int, most: int, unit: int, least: int) -> int:
    """The largest `unit` times a power of two of which FEWEST_STEPS fit into the images, within these bounds."""
    batch = unit
    while 2 * batch <= most and (batch < least or 2 * batch * FEWEST_STEPS <= images):
        batch *= 2
    return batch
