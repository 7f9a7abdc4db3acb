"""ReaL: several labels for each of ImageNet's validation images (Beyer et al. 2020, Are we done with ImageNet?)."""

import json
import re
from pathlib import Path

import numpy as np

from errors import DataError
from results.class_map import imagenet_numbers
from stream.files import read_small
from stream.source import ImageDataset

NUMBERED = re.compile(r"ILSVRC2012_val_(\d{8})")
IMAGES = 50_000


def read_real_labels(file: Path, dataset: ImageDataset, classes: list[str] | None, count: int) -> np.ndarray:
    """The model's classes (int64, images x most) that each image may be taken for, filled up with -1.

    `file` is JSON: a list of the labels, 0 to 999, of each of ILSVRC2012_val_00000001 to _00050000. Raises DataError.
    """
    try:
        told = json.loads(read_small(file))
        if len(told) != IMAGES or not all(0 <= label < 1000 for labels in told for label in labels):
            raise ValueError(f"it is no list of {IMAGES:,} lists of labels")
        most = max(map(len, told))
        table = np.array([[*labels, *[-1] * (most - len(labels))] for labels in told], np.int64)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise DataError(f"{file} cannot be read as ReaL labels ({error}); give their real.json") from error
    known = imagenet_numbers(classes) if classes else np.arange(1000) if count == 1000 else None
    if known is None:
        raise DataError("ReaL labels are for ImageNet's classes, which this model has not; leave out --real_labels")
    places = np.full(1001, -1, np.int64)
    places[known] = np.arange(len(known))
    found = [NUMBERED.search(name) for name in dataset.names(np.arange(len(dataset)))]
    numbers = [int(match[1]) - 1 if match else IMAGES for match in found]
    if not all(0 <= number < IMAGES for number in numbers):
        raise DataError(
            "ReaL labels go by names such as ILSVRC2012_val_00000001.JPEG, which not all of these images have; give "
            "ImageNet's validation images as files"
        )
    return np.sort(places[table[numbers]], axis=1)[:, ::-1].copy()
