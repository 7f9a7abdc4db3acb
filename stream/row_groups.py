"""What is held of the footers of all files of a split: where row groups and their columns lie, and their statistics."""

import io
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import xxhash

from stream.cache import Bytes
from stream.footers import Footers, Told
from stream.outside import find_leaves

DATA, PATHS, LABEL = range(3)  # the stored columns that may be read: encoded images, their paths, labels
ABSENT = UNKNOWN = -1  # a column that is not there; a count that the footer does not tell
MOST = 2**63 - 1  # for a label
FORM = 1  # of what is kept; a number for each change of these types
FILE = np.dtype(
    [
        ("leaves", "<i8", 3),  # the numbers of the stored columns
        ("numbers", "?"),  # whether labels are stored as whole numbers
        ("like", "<i8"),  # the first file whose features are told by the same bytes
        ("footer", "<i8"),  # bytes
        ("groups", "<i8"),  # how many
    ]
)
GROUP = np.dtype(
    [
        ("rows", "<i8"),
        ("begin", "<i8", 3),  # of each column, its place in the file
        ("size", "<i8", 3),  # in bytes
        ("values", "<i8", 3),
        ("nulls", "<i8", 3),
        ("unpacked", "<i8"),  # bytes of the encoded images when decompressed
        ("ranged", "?"),  # whether the smallest and the largest label are told
        ("low", "<i8"),  # these, of whole numbers, and 0 of others
        ("high", "<i8"),
    ]
)


class RowGroups:
    """`files` has a FILE for each file, `groups` a GROUP for each row group of all files.

    Of each row group `outside` has at least how many images lie outside the file, and `may_lie_outside` whether the
    footer leaves it open that some do.
    """

    def __init__(self, files: np.ndarray, groups: np.ndarray) -> None:
        self.files = files
        self.groups = groups
        self.file_of = np.repeat(np.arange(len(files)), files["groups"])
        self.outside, self.may_lie_outside = _outside(files[self.file_of], groups)
        self._starts = np.cumsum(files["groups"]) - files["groups"]

    def of(self, file: int) -> slice:
        """Where the row groups of a file are among all."""
        start = int(self._starts[file])
        return slice(start, start + int(self.files["groups"][file]))

    def places(self, file: int | np.ndarray, groups: Sequence[int]) -> np.ndarray:
        """Where these row groups of a file, or each of its own file, are among all (int64)."""
        return self._starts[file] + np.array(groups, np.int64)

    def at(self, file: int, groups: Sequence[int]) -> np.ndarray:
        """The GROUP of each of these row groups of a file."""
        return self.groups[self.places(file, groups)]

    def to_bytes(self) -> bytes:
        sink = io.BytesIO()
        np.savez(sink, files=self.files, groups=self.groups)
        return sink.getvalue()


def index_name(*decides: object) -> str:
    """The name to keep the row groups under: a digest of what decides them, but for the commit."""
    return f"{xxhash.xxh3_128_hexdigest(repr((FORM, *decides)).encode(errors='surrogateescape'))}.index"


def from_bytes(data: Bytes) -> RowGroups:
    """What `to_bytes` gave. Raises ValueError for anything else."""
    with np.load(io.BytesIO(data), allow_pickle=False) as found:
        groups = RowGroups(found["files"], found["groups"])
    if groups.files.dtype != FILE or groups.groups.dtype != GROUP:
        raise ValueError("it has other columns")
    return groups


def read_row_groups(footers: Footers, image: str, label: str) -> RowGroups:
    """The row groups of all files with these columns of images and labels. Raises DataError."""
    found = list(footers.each(partial(_of_footer, image, label)))
    first: dict[bytes, int] = {}
    likes = [first.setdefault(digest, number) for number, (_, digest, _) in enumerate(found)]
    files = np.concatenate([file for file, _, _ in found])
    files["like"] = likes
    return RowGroups(files, np.concatenate([groups for _, _, groups in found]))


def _of_footer(image: str, label: str, footer: Any, told: Told, size: int) -> tuple[np.ndarray, bytes, np.ndarray]:
    """The file, whose footer has so many bytes; a digest of what tells its features; and its row groups."""
    images, labels = find_leaves(footer.schema, image), _find_label(footer.schema, label)
    leaves = [ABSENT if leaf is None else leaf for leaf in (images.data, images.paths, labels)]
    numbers = labels is not None and footer.schema.column(labels).physical_type in ("INT32", "INT64")
    groups = [footer.row_group(group) for group in range(footer.num_row_groups)]
    digest = xxhash.xxh3_128_digest(told.get(b"huggingface", b""))
    file = (leaves, numbers, 0, size, len(groups))
    return np.array([file], FILE), digest, _of_groups(groups, leaves, numbers)


def _find_label(schema: Any, name: str) -> int | None:
    """The number of the stored column of labels, which may be lists of one; None unless there is just one."""
    paths = [schema.column(number).path for number in range(len(schema.names))]
    found = [number for number, path in enumerate(paths) if path == name] or [
        number for number, path in enumerate(paths) if path.startswith(f"{name}.")
    ]
    return found[0] if len(found) == 1 else None


def _of_groups(groups: list[Any], leaves: list[int], numbers: bool) -> np.ndarray:
    """A GROUP for each of these row groups; a column at a time, which takes pyarrow's answers most quickly."""
    found = np.zeros(len(groups), GROUP)
    found["rows"] = [group.num_rows for group in groups]
    found["nulls"] = UNKNOWN
    for part, leaf in enumerate(leaves):
        if leaf == ABSENT:
            continue
        columns = [group.column(leaf) for group in groups]
        begin = [of.dictionary_page_offset if of.has_dictionary_page else of.data_page_offset for of in columns]
        found["begin"][:, part] = begin
        found["size"][:, part] = [of.total_compressed_size for of in columns]
        found["values"][:, part] = [of.num_values for of in columns]
        told = [of.statistics for of in columns]
        nulls = [of.null_count if of is not None and of.has_null_count else UNKNOWN for of in told]
        found["nulls"][:, part] = nulls
        if part == DATA:
            found["unpacked"] = [of.total_uncompressed_size for of in columns]
        elif part == LABEL:
            ranged = [of is not None and of.has_min_max for of in told]
            found["ranged"] = ranged
            if numbers:
                found["low"] = [min(of.min, MOST) if known else 0 for of, known in zip(told, ranged, strict=True)]
                found["high"] = [min(of.max, MOST) if known else 0 for of, known in zip(told, ranged, strict=True)]
    return found


def _outside(files: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each row group, at least how many images lie outside the file, those with a path and no bytes; and whether
    the footer leaves it open that some do.
    """
    rows, nulls = groups["rows"], groups["nulls"]
    has_data, has_paths = (files["leaves"][:, part] != ABSENT for part in (DATA, PATHS))
    named = rows - nulls[:, PATHS].clip(0)
    # without statistics, the footer tells that there is no byte a row
    guessed = np.where(groups["unpacked"] < rows, rows, 0)
    empty = np.where(nulls[:, DATA] == UNKNOWN, guessed, nulls[:, DATA])
    count = np.where(has_data, (named + empty - rows).clip(0), named)
    return np.where(has_paths, count, 0), has_paths & (~has_data | (nulls[:, DATA] != 0))
