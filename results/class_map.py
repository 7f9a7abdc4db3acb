"""Which class of a model each class of a dataset is: by name, or by what ImageNet's 1,000 classes are called."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from errors import DataError, printable

IMAGENET = Path(__file__).with_name("imagenet_classes.tsv")
WORDNET_ID = re.compile(r"n\d{8}(?!\d)")
NUMBER = re.compile(r"\d{1,4}")
BY_NAME, BY_IMAGENET = "by name", "by what ImageNet calls them"
ALIKE = 0.98  # of 1,000 names at their places: the others are spelled in another way


@dataclass(frozen=True)
class ClassMap:
    """`numbers` (int64) has the model's class of each class of the data, -1 of one without images; `how` tells why."""

    numbers: np.ndarray
    how: str


def map_classes(
    data: Sequence[str], model: Sequence[str] | None, count: int, absent: Callable[[], Sequence[str]]
) -> ClassMap:
    """The model's class, of `count`, for each class of the data; those that `absent` names need none.

    In this order: by name; by ImageNet's WordNet ids, numbers or names; by place, for a model without names and as many
    classes. Raises DataError.
    """
    own = model or []
    if [*data] == [*own]:
        return ClassMap(np.arange(len(data)), BY_NAME)
    places = {name: number for number, name in enumerate(own)}
    by_name = np.array([places.get(name, -1) for name in data], np.int64)
    if len(places) == len(own) and (by_name >= 0).all():
        return ClassMap(by_name, BY_NAME)
    by_imagenet = _by_imagenet(data, model, count)
    if by_imagenet is not None and (by_imagenet >= 0).all():
        return ClassMap(by_imagenet, BY_IMAGENET)
    if model is None and len(data) == count:
        return ClassMap(np.arange(count), "by their order, as the model does not name its own")
    nearest = by_name if by_imagenet is None else by_imagenet
    lacking = [name for name, number in zip(data, nearest.tolist(), strict=True) if number < 0]
    if len(lacking) < len(data) and {*lacking} <= {*absent()}:
        return ClassMap(nearest, BY_NAME)
    named = f"it has {_few(model)}" if model else f"it has {count:,} classes without names"
    raise DataError(
        f"the data has the class {printable(lacking[0])}, which the model has not ({named}); give data of its classes"
    )


def _by_imagenet(data: Sequence[str], model: Sequence[str] | None, count: int) -> np.ndarray | None:
    """The model's class for each class of the data, -1 if it has none; None where they are not ImageNet's."""
    known = imagenet_numbers(model) if model else None
    if model is None or (known is None and _as_numbers(model) is not None):
        known = np.arange(count) if count == 1000 else None
    asked = imagenet_numbers(data)
    asked = _as_numbers(data) if asked is None else asked
    if known is None or asked is None:
        return None
    places = np.full(1000, -1, np.int64)
    places[known] = np.arange(len(known))
    return places[asked]


def _as_numbers(names: Sequence[str]) -> np.ndarray | None:
    """Names that are numbers below 1,000, as the folders of ImageNet-V2 are; None if one is not."""
    numbers = [int(name) if NUMBER.fullmatch(name) else 1000 for name in names]
    return np.array(numbers, np.int64) if max(numbers) < 1000 and len({*numbers}) == len(numbers) else None


def imagenet_numbers(names: Sequence[str]) -> np.ndarray | None:
    """The number (int64, below 1,000) in ImageNet-1K of each name; None unless all are its classes.

    A name is a WordNet id, what the Hub's dataset calls it (tench, Tinca tinca) or what torchvision does (tench).
    """
    known = _imagenet_names()
    found = np.array([known.get(_plain(name), -1) for name in names], np.int64)
    if len(names) == 1000 and (found == np.arange(1000)).mean() >= ALIKE:
        return np.arange(1000)  # every list of all of them has this order
    is_sound = len(found) > 0 and (found >= 0).all() and len(np.unique(found)) == len(found)
    return found if is_sound else None


def _plain(name: str) -> str:
    told = WORDNET_ID.match(name)
    return told[0] if told else name.replace("_", " ")


@cache
def _imagenet_names() -> dict[str, int]:
    rows = [line.split("\t") for line in IMAGENET.read_text(encoding="utf-8").splitlines()]
    found: dict[str, int] = {}
    for column in range(3):
        for number, row in enumerate(rows):
            found.setdefault(_plain(row[column]), number)
    return found


def imagenet_class_names() -> list[str]:
    """The short names of ImageNet's 1,000 classes, in their order."""
    return [line.split("\t")[1] for line in IMAGENET.read_text(encoding="utf-8").splitlines()]


def _few(names: Sequence[str]) -> str:
    return ", ".join(map(printable, names[:5])) + (", ..." if len(names) > 5 else "")
