"""Images that are read one by one, each a block of its own."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import xxhash

from stream.labels import numbers_in

FILES_READ = 256  # for the fingerprint


class ImageTable:
    """Images that are read one by one: every sample is a block of its own.

    `read_image` and `name_of` take the number of a row; `rows` are those that are samples, all by default. `labels` are
    the places of their classes in `classes`; -1 is none.
    """

    def __init__(
        self,
        classes: list[str],
        labels: np.ndarray,
        read_image: Callable[[int], bytes | memoryview],
        name_of: Callable[[int], str],
        notes: list[str],
        revision: str | None,
        rows: np.ndarray | None = None,
    ) -> None:
        self.classes, self.notes, self.revision = classes, notes, revision
        self._labels, self._read_image, self._name_of = labels, read_image, name_of
        self._rows = np.arange(len(labels)) if rows is None else rows
        self.block_rows = np.ones(len(self._rows), np.int64)

    def __len__(self) -> int:
        return len(self._rows)

    def take(self, ids: np.ndarray) -> "ImageTable":
        """The samples of these ids, in this order."""
        taken = self._rows[ids]
        return ImageTable(self.classes, self._labels, self._read_image, self._name_of, self.notes, self.revision, taken)

    def with_classes(self, classes: Sequence[str]) -> "ImageTable":
        """The same samples, whose labels count the classes in this order; those that have a sample are among them."""
        labels = numbers_in(classes, self.classes)[self._labels]
        return ImageTable([*classes], labels, self._read_image, self._name_of, self.notes, self.revision, self._rows)

    def inventory(self) -> dict[str, tuple[int, str]]:
        """Of each image one, and the last part of its name."""
        names = [self.name(number) for number in range(len(self))]
        return {name: (1, name.rpartition("/")[2]) for name in names}

    def all_labels(self) -> np.ndarray:
        """The label of each sample (int64)."""
        return self._labels[self._rows]

    def name(self, sample_id: int) -> str:
        """The path of an image, or its file and row."""
        return self._name_of(int(self._rows[sample_id]))

    def names(self, sample_ids: np.ndarray) -> Iterator[str]:
        """The same of several images."""
        return map(self.name, sample_ids.tolist())

    def fingerprint(self) -> str:
        """A digest of the labels, and of FILES_READ evenly spread images."""
        digest = xxhash.xxh3_128(self.all_labels().astype("<i8").tobytes())
        for number in range(0, len(self), -(-len(self) // FILES_READ)):
            digest.update(bytes(self.read(number)[0]))
        return digest.hexdigest()

    should_stop: Callable[[], bool] = staticmethod(lambda: False)

    def reader(self, ids: Iterable[np.ndarray]) -> "ImageTable":
        return self

    def read(self, sample_id: int) -> tuple[bytes | memoryview, int]:
        row = int(self._rows[sample_id])
        return self._read_image(row), int(self._labels[row])

    def release(self, ids: np.ndarray) -> None:
        pass

    def close(self) -> None:
        pass
