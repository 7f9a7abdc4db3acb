"""How labels as they are stored, numbers or names, become the numbers of classes."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from errors import DataError
from stream.source import ImageDataset

MANY = 50  # distinct texts: so many in fewer than twice as many rows are captions or names of files rather than classes


CLASSES_TOLD = "classes are the "  # in the note of a naming
NUMBER = re.compile("0|-?[1-9][0-9]{0,17}")  # the text of a whole number; 007 and 1.0 are names


@dataclass(frozen=True)
class Naming:
    """The names of classes, and how labels are stored.

    `stored` has the stored value of each class, null for one that is not stored here. Without it a label is stored as
    the number of its class plus `first`. `note` tells the user what was derived, if anything was.
    """

    names: list[str]
    stored: pa.Array | None = None
    first: int = 0
    note: str = ""

    @property
    def is_plain(self) -> bool:
        """Whether the stored numbers are those of the classes."""
        return self.stored is None and not self.first

    def numbers(self, labels: Any) -> Any:
        """The classes (int64) of labels as `unwrapped` gives them; null stays null. Raises ValueError for others."""
        if self.stored is None:
            numbers = labels.cast(pa.int64())
            return pc.subtract(numbers, self.first) if self.first else numbers
        found = pc.index_in(labels.cast(self.stored.type), self.stored, skip_nulls=True)
        if found.null_count > labels.null_count:
            unknown = labels.filter(pc.and_(pc.is_null(found), pc.is_valid(labels)))
            raise ValueError(f"it has the label {unknown[0].as_py()!r}, which is none of its {len(self.names)} classes")
        return found.cast(pa.int64())


def unwrapped(column: Any) -> Any:
    """A column of labels (Array or ChunkedArray) without what wraps them: lists of one, codes of categories.

    Truth values become text. Raises ValueError for lists of none or several.
    """
    kind = column.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        lengths = pc.list_value_length(column)
        if pc.any(pc.not_equal(lengths, 1)).as_py():
            raise ValueError(f"a row has {lengths.filter(pc.not_equal(lengths, 1))[0]} labels, and one is needed")
        return unwrapped(pc.list_element(column, 0))
    if pa.types.is_dictionary(kind):
        return unwrapped(column.cast(kind.value_type))
    if pa.types.is_boolean(kind):
        return pc.if_else(column, "True", "False")
    return column


def no_class(where: str, label: int | str | None) -> DataError:
    """The error for a label that is none."""
    return DataError(
        f"{where} has the label {label}, which is no class: a split without labels, such as the Hub's test split, is "
        "of no use here; give another split"
    )


def check_range(where: str, *labels: Any) -> None:
    """Raise DataError for numbers that are not those of any class."""
    for label in labels:
        if isinstance(label, int) and not 0 <= label < 2**63:
            raise no_class(where, label)


def consecutive(low: int, high: int, rows: int, what: str) -> Naming | None:
    """Classes for whole numbers from `low` to `high` in so many rows, if they count from 0 or from 1; else None."""
    if low == 0 and high < rows:
        names = [str(number) for number in range(high + 1)]
        return Naming(names, note=f"{CLASSES_TOLD}numbers 0 to {high} of {what}")
    if low == 1 and high <= rows:
        names = [str(number) for number in range(1, high + 1)]
        return Naming(names, first=1, note=f"labels count from 1: {CLASSES_TOLD}numbers 1 to {high} of {what}")
    return None


def distinct(values: Iterable[int | str], what: str) -> Naming:
    """A class for each of these values, sorted: as numbers if all are, or are texts of, whole numbers."""
    found = set(values)
    if any(isinstance(value, str) for value in found):
        found = {str(value) for value in found}
    numeric = all(re.fullmatch("-?[0-9]+", str(value)) for value in found)
    order: list[Any] = sorted(found, key=lambda value: (int(value), str(value)) if numeric else value)
    kind = "strings" if any(isinstance(value, str) for value in found) else "numbers"
    note = f"{CLASSES_TOLD}{len(order):,} distinct {kind} of {what}"
    return Naming([str(value) for value in order], pa.array(order), note=note)


def without_images(dataset: ImageDataset) -> list[str]:
    """The classes of which a set has no image; none where its labels cannot be read without its images."""
    labels = dataset.all_labels()
    if labels is None:
        return []
    there = np.bincount(labels, minlength=len(dataset.classes))
    return [name for name, count in zip(dataset.classes, there.tolist(), strict=True) if not count]


def require_classes(naming: Naming, rows: int, what: str, fix: str) -> None:
    """Raise DataError for texts so many and so different that they are no classes."""
    if len(naming.names) > max(MANY, rows // 2):
        raise DataError(
            f"{what} has {len(naming.names):,} distinct texts in {rows:,} rows, which are no classes; {fix}"
        )


def first_difference(classes: Sequence[str], others: Sequence[str], renamed: bool = False) -> str | None:
    """Where two lists of class names first differ, in words, or None if they agree.

    If classes may be `renamed`, only a name that both lists have under different numbers counts as a difference.
    """

    def moved(name: str | None) -> bool:
        places = ({number for number, other in enumerate(names) if other == name} for names in (classes, others))
        return name in others and set.isdisjoint(*places)

    for number, (ours, theirs) in enumerate(zip_longest(classes, others)):
        if ours != theirs and (moved(ours) or not renamed):
            return f"class {number} is {ours or 'none'} there and {theirs or 'none'} here"
    return None


def numbers_in(classes: Sequence[str], names: Sequence[str]) -> np.ndarray:
    """The number (int64) in `classes` of each name, -1 for one that is not there."""
    found = {name: number for number, name in enumerate(classes)}
    return np.array([found.get(name, -1) for name in names], np.int64)


def reordered(classes: Sequence[str], others: Sequence[str]) -> Naming | None:
    """`classes` for labels that are stored as numbers of the class names `others`; None if that leaves one in doubt."""
    if list(classes) == list(others):
        return Naming(list(classes))
    places = {name: number for number, name in enumerate(others)}
    if len(places) < len(others) or len(set(classes)) < len(classes) or not places.keys() <= set(classes):
        return None
    if list(classes[: len(others)]) == list(others):
        return Naming(list(classes))
    return Naming(list(classes), pa.array([places.get(name) for name in classes], pa.int64()))
