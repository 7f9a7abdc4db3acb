"""Sets that are neither parquet files nor tar shards: Arrow files, tables of paths, folders and zips of images.

They are on this machine before the first image is read, and read image by image.
"""

import os
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash
from datasets import ClassLabel, Features
from datasets.exceptions import DatasetGenerationError

from errors import DataError
from stream.columns import LABEL_NAME, find_image_column, find_label_column, label_feature
from stream.data_files import READABLE, is_table
from stream.explain import one_line_errors
from stream.files import read_small
from stream.folders import is_image, layout_of, suffix_of
from stream.hub import DOWNLOADS, Listing, open_files
from stream.labels import Naming, consecutive, distinct, require_classes, unwrapped
from stream.outside import OutsideImages
from stream.picks import places
from stream.ranges import LARGEST_IMAGE, Files
from stream.retry import Network, first_line, in_threads

FILES_READ = 256  # for the fingerprint
LARGEST_TABLE = 2**31  # bytes of a file that is read into memory
EXAMPLES = 3


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
        """The same samples, whose labels count the classes in this order; it has all of their names."""
        labels = places(classes, self.classes)[self._labels]
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

    def fingerprint(self) -> str:
        """A digest of the labels, and of FILES_READ evenly spread images."""
        digest = xxhash.xxh3_128(self.all_labels().astype("<i8").tobytes())
        for number in range(0, len(self), -(-len(self) // FILES_READ)):
            digest.update(bytes(self.read(number)[0]))
        return digest.hexdigest()

    should_stop: Callable[[], bool] = staticmethod(lambda: False)

    def reader(self, ids: np.ndarray) -> "ImageTable":
        return self

    def read(self, sample_id: int) -> tuple[bytes | memoryview, int]:
        row = int(self._rows[sample_id])
        return self._read_image(row), int(self._labels[row])

    def release(self, ids: np.ndarray) -> None:
        pass

    def close(self) -> None:
        pass


def open_other(
    source: str,
    listing: Listing,
    split: list[str],
    columns: tuple[str | None, str | None],
    network: Network,
) -> ImageTable:
    """The first of these splits that there is, downloaded first if it is on the Hub. Raises DataError, UsageError."""
    every = [name for names in listing.splits.values() for name in names]
    tables = list(filter(is_table, every))
    images = [name for name in every if is_image(name) or suffix_of(name) == "zip"]
    if not every:
        first_split(source, split, {})
    if not tables and not images:
        kinds = ", ".join(sorted({f".{suffix_of(name)}" for name in every}))
        raise DataError(f"the files of {source} are {kinds}, such as {every[0]}, which cannot be read; {READABLE}")
    downloaded = [f"{source} was downloaded whole before it is read"] if listing.commit else []
    if not tables:
        found = _images(source, listing, network)
        if not found:
            raise DataError(f"the zips of {source}, such as {images[0]}, have no images in them; {READABLE}")
        return _from_folders(source, found, split, listing, network, downloaded)
    names = listing.splits[first_split(source, split, listing.splits)]
    files = open_files(source, listing, [name for name in names if name in tables], False, network)
    if len(files.names) < len(names):
        open_files(source, listing, names, False, network)
    return _from_tables(source, listing, files, columns, downloaded)


def first_split(source: str, wanted: list[str], splits: dict[str, Any]) -> str:
    """The first of the wanted splits that is not empty. Raises DataError."""
    for name in wanted:
        if splits.get(name):
            return name
    there = [name for name, files in splits.items() if files]
    raise DataError(
        f"{source} has no split {' or '.join(wanted)}, only {', '.join(there) or 'none'}; name one with --train_split "
        "or --val_split, or hold out a part with --val_share 0.1"
    )


# ---- folders and zips ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Image:
    """The path of an image from the top of the dataset, the file to open and what reads it, and the split it is in."""

    path: str
    file: str
    split: str
    read: Callable[[], bytes] | None = None  # out of a zip


def _images(source: str, listing: Listing, network: Network) -> list[Image]:
    """The images of all splits, sorted by path; those in zips too, which are downloaded for that."""
    root = "" if listing.commit else os.path.join(os.path.realpath(source), "")
    found = []
    for split, names in listing.splits.items():
        found += [Image(name.removeprefix(root), name, split) for name in names if is_image(name)]
        zips = [name for name in names if suffix_of(name) == "zip"]
        files = open_files(source, listing, zips, False, network).names if zips else []
        for name, file in zip(zips, files, strict=True):
            with one_line_errors(source, name):
                told = name.removeprefix(root)
                found += [Image(f"{told}/{path}", file, split, read) for path, read in _members(Path(file))]
    return sorted(found, key=lambda image: image.path)


def _reader(path: Path) -> Callable[[], bytes]:
    def read() -> bytes:
        try:
            return read_small(path, most=LARGEST_IMAGE)
        except OSError:
            return b""  # no image: counted and replaced like any other

    return read


def _members(path: Path) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """The images in a zip."""
    archive = zipfile.ZipFile(path)
    for member in archive.infolist():

        def read(member: zipfile.ZipInfo = member) -> bytes:
            try:
                return archive.read(member) if member.file_size <= LARGEST_IMAGE else b""
            except (OSError, RuntimeError, ValueError, NotImplementedError, zipfile.BadZipFile):
                return b""

        if is_image(member.filename):
            yield member.filename, read


def _from_folders(
    source: str, images: Sequence[Image], wanted: list[str], listing: Listing, network: Network, notes: list[str]
) -> ImageTable:
    """The images of the first wanted split, which folders tell unless the listing tells several."""
    layout = layout_of([image.path for image in images])
    by_folder = layout.split_level is not None and sum(map(bool, listing.splits.values())) == 1
    splits: dict[str, list[Image]] = {}
    outside = []
    for image in images:
        split = layout.split_of(image.path) if by_folder else image.split
        if split is None:
            outside.append(image.path)
        else:
            splits.setdefault(split, []).append(image)
    chosen = splits[first_split(source, wanted, splits)]
    classes = [layout.class_of(image.path) for image in chosen]
    found = [(image, name) for image, name in zip(chosen, classes, strict=True) if name is not None]
    if not found or not any(layout.class_of(image.path) not in (None, found[0][1]) for image in images):
        raise DataError(
            f"the files of {source} are .{suffix_of(chosen[0].path)} images without labels, such as {chosen[0].path}; "
            f"put them in a folder for each class and use --dataset imagefolder --data_dir {source}"
        )
    outside += [image.path for image, name in zip(chosen, classes, strict=True) if name is None]
    if outside:
        some = ", ".join(outside[:EXAMPLES])
        notes = [*notes, f"{len(outside):,} images in no class's folder were passed over ({some})"]
    naming = distinct({name for _, name in found}, "the folders")
    numbers = {name: number for number, name in enumerate(naming.names)}
    labels = np.array([numbers[name] for _, name in found], np.int64)
    readers = _readers(source, [image for image, _ in found], listing, network)
    notes = [*notes, f"{naming.note}, as {found[0][1]} in {found[0][0].path}"]
    return ImageTable(
        naming.names, labels, lambda row: readers[row](), lambda row: found[row][0].path, notes, listing.commit
    )


def _readers(source: str, images: Sequence[Image], listing: Listing, network: Network) -> list[Callable[[], bytes]]:
    """What reads each image; those on the Hub that are not in zips are downloaded for that."""
    alone = [image.file for image in images if image.read is None]
    files = open_files(source, listing, alone, False, network).names if alone else []
    paths = dict(zip(alone, files, strict=True))
    return [image.read or _reader(Path(paths[image.file])) for image in images]


# ---- tables ----------------------------------------------------------------------------------------------------------


def _from_tables(
    source: str, listing: Listing, files: Files, columns: tuple[str | None, str | None], notes: list[str]
) -> ImageTable:
    tables = []
    for path in files.names:
        with one_line_errors(source, path):
            tables.append(_read_table(Path(path)))
    with one_line_errors(source):
        table = pa.concat_tables(tables, promote_options="permissive")
        known = Features.from_arrow_schema(table.schema)
        if listing.features and {*listing.features} <= {*known}:
            known |= Features.from_dict(listing.features)
    image = find_image_column(known, columns[0], source)
    label = find_label_column(known, columns[1], image, source)
    with one_line_errors(source):
        naming = _name_classes(source, known, label, table, columns[1] is not None)
        labels = np.asarray(naming.numbers(unwrapped(table[label])).fill_null(-1), np.int64)
    if not len(labels) or not 0 <= labels.min() <= labels.max() < len(naming.names):
        raise DataError(f"{source} has rows without a label, or none at all, in column {label}; give another split")
    ends = np.cumsum([len(part) for part in tables])
    outside = OutsideImages(source, files, image)

    def place(row: int) -> tuple[int, int]:
        file = int(np.searchsorted(ends, row, side="right"))
        return file, row - int(ends[file] - len(tables[file]))

    def read(row: int) -> bytes | memoryview:
        value = table[image][row].as_py()
        data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, value)
        if isinstance(data, bytes):
            return data
        return outside.read(place(row)[0], path) if isinstance(path, str) else b""

    def name(row: int) -> str:
        file, number = place(row)
        return f"{files.names[file].removeprefix(files.root)} row {number}"

    if listing.commit is not None:  # what the tables name is downloaded now, and not in the midst of training

        def fetch(row: int) -> None:
            read(row)

        for _ in in_threads(fetch, range(len(table)), DOWNLOADS):
            pass
    notes = [*notes, *([naming.note] if naming.note else [])]
    return ImageTable(naming.names, labels, read, name, notes, listing.commit)


def _read_table(path: Path) -> pa.Table:
    """A table; one of Arrow is mapped from the disk."""
    suffix = suffix_of(path.name)
    if suffix != "arrow" and path.stat().st_size > LARGEST_TABLE:
        raise ValueError(f"it is larger than {LARGEST_TABLE:,} bytes, which no table of paths is")
    if suffix == "parquet":
        return pq.read_table(path)
    if suffix == "arrow":
        mapped = pa.memory_map(str(path))
        try:
            return pa.ipc.open_stream(mapped).read_all()
        except pa.ArrowInvalid:
            return pa.ipc.open_file(mapped).read_all()
    datasets.disable_progress_bars()
    kind, options = "json", dict[str, Any]()
    if suffix in ("csv", "tsv"):  # a class may be called NA or None
        separator = "\t" if suffix == "tsv" else ","
        kind, options = "csv", {"sep": separator, "keep_default_na": False, "na_values": [""]}
    try:
        return datasets.load_dataset(kind, data_files=str(path), split="train", **options).data.table
    except DatasetGenerationError as error:
        raise ValueError(f"it is no {kind} table: {first_line(error.__cause__ or error)}") from error


def _name_classes(source: str, known: Features, column: str, table: pa.Table, chosen: bool) -> Naming:
    feature, labels = label_feature(known[column]), unwrapped(table[column])
    if isinstance(feature, ClassLabel) and feature.names:
        names = list(feature.names)
        return Naming(names) if pa.types.is_integer(labels.type) else Naming(names, pa.array(names))
    values, what = labels.drop_null(), f"column {column}"
    naming = None
    if pa.types.is_integer(labels.type) and len(values):
        ends = pc.min_max(values).as_py()
        naming = consecutive(ends["min"], ends["max"], len(labels), what)
    naming = naming or distinct(values.unique().to_pylist(), what)
    if not chosen and not LABEL_NAME.search(column):
        require_classes(naming, len(labels), f"{what} of {source}", "choose another with --label_column")
    return naming
