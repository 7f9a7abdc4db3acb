"""Sets that are neither parquet files nor tar shards: Arrow files, tables of paths, folders and zips of images.

They are on this machine before the first image is read, and read image by image.
"""

import zipfile
from collections.abc import Callable, Iterator, Sequence
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
from stream.folders import class_of, is_image, split_of, suffix_of
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
        found = _images(source, listing, split, network)
        if not found:
            raise DataError(f"the zips of {source}, such as {images[0]}, have no images in them; {READABLE}")
        return _from_folders(source, found[first_split(source, split, found)], listing.commit, downloaded)
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

Image = tuple[str, Callable[[], bytes]]  # its path from the top of the dataset, and what reads it


def _images(source: str, listing: Listing, wanted: list[str], network: Network) -> dict[str, list[Image]]:
    """The images of the first wanted split, or of every split where there are zips: folders in them may tell splits."""
    looked_at = listing.splits
    if not any(suffix_of(name) == "zip" for names in looked_at.values() for name in names):
        split = first_split(source, wanted, looked_at)
        looked_at = {split: looked_at[split]}
    splits: dict[str, list[Image]] = {}
    for split, names in looked_at.items():
        used = [name for name in names if is_image(name) or suffix_of(name) == "zip"]
        files = open_files(source, listing, used, False, network) if used else None
        for path in files.names if files else ():
            told = path.removeprefix(files.root) if files else path
            if suffix_of(path) != "zip":
                splits.setdefault(split, []).append((told, _reader(Path(path))))
                continue
            with one_line_errors(source, path):
                for member, read in _members(Path(path)):
                    splits.setdefault(split_of(member) or split, []).append((f"{told}/{member}", read))
    return splits


def _reader(path: Path) -> Callable[[], bytes]:
    def read() -> bytes:
        try:
            return read_small(path, most=LARGEST_IMAGE)
        except OSError:
            return b""  # no image: counted and replaced like any other

    return read


def _members(path: Path) -> Iterator[Image]:
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


def _from_folders(source: str, images: Sequence[Image], revision: str | None, notes: list[str]) -> ImageTable:
    found = [
        (path, read, class_of(path.replace(".zip/", "/"))) for path, read in sorted(images, key=lambda image: image[0])
    ]
    used = [(path, read, name) for path, read, name in found if name is not None]
    if not used:
        example = found[0][0]
        raise DataError(
            f"the files of {source} are .{suffix_of(example)} images without labels, such as {example}; put them in a "
            f"folder for each class and use --dataset imagefolder --data_dir {source}"
        )
    naming = distinct({name for _, _, name in used}, "the folders")
    numbers = {name: number for number, name in enumerate(naming.names)}
    labels = np.array([numbers[name] for _, _, name in used], np.int64)
    if len(used) < len(found):
        some = ", ".join([path for path, _, name in found if name is None][:EXAMPLES])
        notes = [*notes, f"{len(found) - len(used):,} images in no class's folder were passed over ({some})"]
    notes = [*notes, naming.note]
    return ImageTable(naming.names, labels, lambda row: used[row][1](), lambda row: used[row][0], notes, revision)


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
