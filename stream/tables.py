"""Tables of images: Arrow files, and csv and json files of the paths of images."""

import contextlib
import csv
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import ClassLabel, Features
from datasets.exceptions import DatasetGenerationError

from errors import DataError
from stream.columns import LABEL_NAME, find_image_column, find_label_column, label_feature
from stream.explain import one_line_errors
from stream.folders import suffix_of
from stream.hub import DOWNLOADS, Listing
from stream.image_table import ImageTable
from stream.labels import NUMBER, Naming, consecutive, distinct, no_class, require_classes, unwrapped
from stream.outside import OutsideImages
from stream.ranges import Files
from stream.retry import first_line, in_threads

LARGEST_TABLE = 2**31  # bytes of a file that is read into memory
SEPARATORS = {"csv": ",", "tsv": "\t"}


def open_tables(
    source: str, listing: Listing, files: Files, columns: tuple[str | None, str | None], notes: list[str]
) -> ImageTable:
    tables = []
    for path in files.names:
        with one_line_errors(source, path):
            tables.append(_read_table(Path(path)))
    with one_line_errors(source):
        table = pa.concat_tables(tables, promote_options="permissive")
        if any(suffix_of(path) in SEPARATORS for path in files.names):
            table = _typed(table, columns)
        table = _whole(table, columns[1])
        known = Features.from_arrow_schema(table.schema)
        if listing.features and {*listing.features} <= {*known}:
            known |= Features.from_dict(listing.features)
    image = find_image_column(known, columns[0], source)
    label = find_label_column(known, columns[1], image, source)
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

    with one_line_errors(source):
        stored = unwrapped(table[label])
        if len(stored) == stored.null_count:
            raise DataError(f"{source} has no labels in column {label}; give another split")
        for row in _no_labels(stored):
            raise no_class(name(row), stored[row].as_py())
        naming = _name_classes(source, known, label, stored, columns[1] is not None)
        labels = np.asarray(naming.numbers(stored), np.int64)
    for row in np.flatnonzero(labels >= len(naming.names))[:1].tolist():
        raise no_class(name(row), int(labels[row]))
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
    if suffix in SEPARATORS:  # as text, since a class may be called 007, 1.0, true or NA
        return _read_text(path, SEPARATORS[suffix])
    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset("json", data_files=str(path), split="train").data.table
    except DatasetGenerationError as error:
        raise ValueError(f"it is no json table: {first_line(error.__cause__ or error)}") from error


def _read_text(path: Path, separator: str) -> pa.Table:
    """A table of text, null where a field is empty; a column without a name, as of pandas' index, is left out."""
    with open(path, newline="", encoding="utf-8-sig") as file:
        rows = csv.reader(file, delimiter=separator, strict=True)
        names = next(rows, [])
        columns: list[list[str | None]] = [[] for _ in names]
        if len({*names} - {""}) < len([name for name in names if name]):
            raise ValueError("it has two columns of one name")
        for row in filter(None, rows):
            if any(row[len(names) :]):
                raise ValueError(f"its line {rows.line_num} has {len(row)} fields, and the first {len(names)}")
            for column, field in zip(columns, row + [""] * (len(names) - len(row)), strict=False):
                column.append(field or None)
    return pa.table({name: pa.array(column, pa.string()) for name, column in zip(names, columns, strict=True) if name})


def _typed(table: pa.Table, wanted: tuple[str | None, str | None]) -> pa.Table:
    """A table of text with the columns of whole numbers as such, and other numbers too if they are no labels."""
    for place, name in enumerate(table.column_names):
        values = table[name].drop_null()
        if name == wanted[0]:
            continue
        if len(values) and pc.all(pc.match_substring_regex(values, f"^({NUMBER.pattern})$")).as_py():
            table = table.set_column(place, name, table[name].cast(pa.int64()))
        elif name != wanted[1] and not LABEL_NAME.search(name):
            with contextlib.suppress(pa.ArrowInvalid):
                table = table.set_column(place, name, table[name].cast(pa.float64()))
    return table


def _whole(table: pa.Table, wanted: str | None) -> pa.Table:
    """A table with numbers such as 1.0, as json may write labels, as whole ones where they may be labels."""
    for place, field in enumerate(table.schema):
        if pa.types.is_floating(field.type) and (field.name == wanted or LABEL_NAME.search(field.name)):
            with contextlib.suppress(pa.ArrowInvalid):
                table = table.set_column(place, field.name, table[field.name].cast(pa.int64()))
    return table


def _no_labels(labels: Any) -> list[int]:
    """The first row that has no label, or a number that is not that of any class, if there is one."""
    wrong = pc.is_null(labels)
    if pa.types.is_signed_integer(labels.type):
        wrong = pc.or_(wrong, pc.fill_null(pc.less(labels, 0), False))
    elif pa.types.is_uint64(labels.type):
        wrong = pc.or_(wrong, pc.fill_null(pc.greater(labels, pa.scalar(2**63 - 1, pa.uint64())), False))
    row = pc.index(wrong, True).as_py()
    return [] if row < 0 else [row]


def _name_classes(source: str, known: Features, column: str, labels: Any, chosen: bool) -> Naming:
    feature = label_feature(known[column])
    if isinstance(feature, ClassLabel) and feature.names:
        names = list(feature.names)
        return Naming(names) if pa.types.is_integer(labels.type) else Naming(names, pa.array(names))
    what = f"column {column}"
    naming = None
    if pa.types.is_integer(labels.type):
        ends = pc.min_max(labels).as_py()
        naming = consecutive(ends["min"], ends["max"], len(labels), what)
    naming = naming or distinct(labels.unique().to_pylist(), what)
    if not chosen and not LABEL_NAME.search(column):
        require_classes(naming, len(labels), f"{what} of {source}", "choose another with --label_column")
    return naming
