"""What a loader needs of a dataset."""

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import numpy as np

from stream.images import EncodedImage
from stream.shared import InFile


class Reader(Protocol):
    """Reads the samples of one epoch, and may prefetch in the order it was opened with.

    One that waits raises Cancelled when `should_stop()` is true.
    """

    should_stop: Callable[[], bool]

    def read(self, sample_id: int) -> tuple[EncodedImage | InFile, int]:
        """One image, encoded or as uint8 (H, W, 3), and its label; blocks until it is available. Thread-safe.

        Raises UnreadableImage for one that is not there.
        """

    def release(self, ids: np.ndarray) -> None:
        """Mark these samples as used."""

    def close(self) -> None:
        """Stop fetching."""


class ImageDataset(Protocol):
    """Samples numbered 0 to len - 1; consecutive samples are stored in blocks that are read together."""

    classes: list[str]
    block_rows: np.ndarray
    notes: list[str]  # what was passed over or derived, in words

    def __len__(self) -> int: ...

    def fingerprint(self) -> str:
        """A digest that changes when ids refer to other images, as far as that shows without reading every image."""

    def all_labels(self) -> np.ndarray | None:
        """The label (int64) of each sample, None if only the images would tell. Raises DataError."""

    def name(self, sample_id: int) -> str:
        """Where a sample lies, in words that its owner can follow."""

    def names(self, sample_ids: np.ndarray) -> Iterable[str]:
        """The same of sorted samples (int64)."""

    def inventory(self) -> dict[str, tuple[int, str]]:
        """Of each file its number of samples, and what stays the same when it gets another name."""

    def take(self, ids: np.ndarray) -> "ImageDataset":
        """The samples with these sorted ids (int64)."""

    def with_classes(self, classes: Sequence[str]) -> "ImageDataset":
        """The same samples, whose labels count these classes; all that have a sample are among them."""

    def reader(self, ids: Iterable[np.ndarray]) -> Reader:
        """A reader for these samples (int64), given some at a time in the order in which they will be used."""
