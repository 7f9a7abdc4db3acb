"""The label column of parquet files: which classes it tells of, and which labels it has."""

from typing import Any
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, Features

from errors import DataError
from stream.chunks import Chunks
from stream.columns import LABEL_NAME, TEXT, kind_of, label_feature
from stream.explain import one_line_errors
from stream.footers import FOOTER_THREADS
from stream.labels import (
    Naming,
    check_range,
    consecutive,
    distinct,
    first_difference,
    no_class,
    reordered,
    require_classes,
    unwrapped,
)
from stream.retry import in_threads
from stream.row_groups import ABSENT, LABEL


def features_of(footer: Any) -> Features:
    """The types of a parquet file's columns; a column of categories has the type of these."""
    schema = footer.schema.to_arrow_schema()
    for number, field in enumerate(schema):
        if pa.types.is_dictionary(field.type):
            schema = schema.set(number, field.with_type(field.type.value_type))
    return Features.from_arrow_schema(schema)


class LabelColumn:
    """The column of labels in the files of a split. Raises DataError for a file that lacks it.

    `chosen` tells whether the user named it.
    """

    namings: list[Naming]  # how the labels of each file are stored, all with the same names of classes

    def __init__(self, source: str, chunks: Chunks, name: str, chosen: bool) -> None:
        self._source = source
        self._chunks = chunks
        self._name = name
        self._chosen = chosen
        self._held: dict[int, Any] = {}
        self._index = chunks.row_groups
        lacking = self._index.files["leaves"][:, LABEL] == ABSENT
        if lacking.any():
            raise DataError(f"{chunks.files.names[lacking.argmax()]} has no column {name}; mend or remove the file")

    def name_classes(self, known: Features, from_card: bool) -> None:
        """Find out the classes: from the set's features, which its card or first file tells, or else from the labels.

        Raises DataError if a file has a class that is not among them, or if there is no label.
        """
        self._check_footers()
        feature = label_feature(known[self._name])
        if isinstance(feature, ClassLabel) and feature.names:
            self.namings = self._compared(list(feature.names), from_card)
            return
        naming = self._counted() or self._collected()
        self.namings = [naming] * len(self._index.files)

    def stored(self, file: int) -> Any:
        """The labels of a file as they are stored, unwrapped. They are read and kept apart from the images."""
        chunks, name = self._chunks, self._chunks.files.names[file]
        groups = np.flatnonzero(self._index.groups["rows"][self._index.of(file)]).tolist()

        def make() -> memoryview:
            column = chunks.read(file, groups, [LABEL])[self._name]
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, pa.schema([("label", column.type)])) as writer:
                writer.write_table(pa.table({"label": column}))
            return memoryview(sink.getvalue())

        if file not in self._held:
            with one_line_errors(self._source, name):
                if groups:
                    kept = chunks.keep(f"{name}.{quote(self._name, safe='')}.labels", make)
                    self._held[file] = unwrapped(pa.ipc.open_stream(bytes(kept)).read_all()["label"])  # no open file
                else:
                    self._held[file] = pa.chunked_array([], pa.int64())
        return self._held[file]

    def _check_footers(self) -> None:
        """Refuse the labels of no class that the footers tell of: numbers below 0, and none at all beside others."""
        groups = self._index.groups
        wrong = groups["ranged"] & ((groups["low"] < 0) | (groups["nulls"][:, LABEL] > 0))
        if wrong.any():
            group = int(wrong.argmax())
            name = self._chunks.files.names[self._index.file_of[group]]
            check_range(name, int(groups["low"][group]))
            raise no_class(name, None)

    def _counted(self) -> Naming | None:
        """Classes for whole numbers that count from 0 or 1, if the footers tell that these do."""
        groups = self._index.groups[self._index.groups["rows"] > 0]
        if not self._index.files["numbers"].all() or not groups["ranged"].all() or not len(groups):
            return None
        low, high, rows = groups["low"].min(), groups["high"].max(), groups["values"][:, LABEL].sum()
        return consecutive(int(low), int(high), int(rows), f"column {self._name}")

    def _collected(self) -> Naming:
        """Classes for the distinct labels of all files. Raises DataError for one that is no class."""
        what = f"column {self._name}"
        parts = list(in_threads(self.stored, range(len(self._index.files)), FOOTER_THREADS))
        values = [pc.unique(part).to_pylist() for part in parts]
        found = {value for part in values for value in part if value is not None}
        rows = int(self._index.groups["rows"].sum())
        if rows and not found:
            raise DataError(f"{self._source} has no labels in {what}, as the Hub's test splits; give another split")
        for name, part in zip(self._chunks.files.names, values, strict=True):
            check_range(name, *part)
            if None in part:
                raise no_class(name, None)
        naming = distinct(found, what)
        if not self._chosen and not LABEL_NAME.search(self._name):
            require_classes(naming, rows, f"{what} of {self._source}", "choose another with --label_column")
        return naming

    def _compared(self, classes: list[str], from_card: bool) -> list[Naming]:
        """How each file numbers the classes: as in `classes`, or in its own metadata's order.

        Only the dataset's card may rename classes.
        """
        likes = self._index.files["like"].tolist()  # in most sets, all are like the first
        told = {file: self._naming_of(file, classes, from_card) for file in sorted({*likes})}
        return [told[file] for file in likes]

    def _naming_of(self, file: int, classes: list[str], from_card: bool) -> Naming:
        name = self._chunks.files.names[file]
        with one_line_errors(self._source, name):
            feature = label_feature(features_of(self._chunks.footers[file]).get(self._name))
        if not isinstance(feature, ClassLabel):
            return Naming(classes, pa.array(classes) if kind_of(feature) in TEXT else None)
        naming = reordered(classes, feature.names)
        if naming is not None:
            return naming
        problem = first_difference(classes, feature.names, renamed=from_card)
        if problem is None:
            return Naming(classes)
        unknown = next((other for other in feature.names if other not in classes), None)
        if unknown is not None and not from_card:
            problem = f"its class {unknown} is not there"
        where = "the dataset's card" if from_card else self._chunks.files.names[0]
        raise DataError(f"{name} has other classes than {where}: {problem}; make them the same")
