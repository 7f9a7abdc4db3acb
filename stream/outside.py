"""Images that lie outside their parquet file: the file tells their paths in the same repository or folder."""

import re
from dataclasses import dataclass
from pathlib import PureWindowsPath
from typing import Any

import pyarrow as pa

from errors import DataError
from stream.ranges import Files
from stream.retry import in_threads

THREADS = 8  # that read the images of a block; several blocks are read at once
USUAL_BYTES = 110_000  # what an image outside is taken to have: the mean of ImageNet's
LONGEST_TOLD = 200  # characters of a path in a message
FIX = (
    "name images by their paths from the top of the dataset, or embed them in the parquet files, as push_to_hub of "
    "`datasets` does"
)


@dataclass(frozen=True)
class ImageLeaves:
    """The numbers of the stored columns of a parquet file that hold encoded images and paths; None if there is none."""

    data: int | None
    paths: int | None


def find_leaves(schema: Any, column: str) -> ImageLeaves:
    """Where the files of this parquet schema keep the images of `column`.

    It is a struct of `bytes` and `path`, of which one may lack, or a plain column: of binary, the encoded images, or of
    text, their paths.
    """
    kinds = {
        leaf.path: (number, leaf.logical_type.type == "STRING")
        for number, leaf in enumerate(schema.column(number) for number in range(len(schema.names)))
        if leaf.physical_type == "BYTE_ARRAY"
    }
    if column in kinds:
        number, is_text = kinds[column]
        return ImageLeaves(None, number) if is_text else ImageLeaves(number, None)
    data, paths = (kinds.get(f"{column}.{field}", (None,))[0] for field in ("bytes", "path"))
    return ImageLeaves(data, paths)


def part(column: Any, field: str, leaves: ImageLeaves) -> Any:
    """The `bytes` or the `path` of each row of an image column as it was read, or None if that was not read."""
    if not pa.types.is_struct(column.type):
        return column if (leaves.data is None) == (field == "path") else None
    return next((values for of, values in zip(column.type, column.flatten(), strict=True) if of.name == field), None)


def as_binary(images: Any) -> Any:
    """Encoded images as binary or large_binary."""
    return images if images.type in (pa.binary(), pa.large_binary()) else images.cast(pa.large_binary())


class OutsideImages:
    """The images of a column of parquet files that lie in files of their own."""

    def __init__(self, source: str, files: Files, column: str) -> None:
        self._files = files
        self._column = column
        self._own = re.compile(rf"hf://datasets/{re.escape(source)}(@[^/]+)?/")

    def fill_in(self, number: int, data: pa.ChunkedArray | None, paths: pa.ChunkedArray) -> pa.ChunkedArray:
        """The encoded images of a block of file `number`, large_binary: `data` where it is not null, else read by path.

        A path counts from the top of the dataset, or else from the folder of the parquet file; the one that fits the
        first image is tried first for all. A revision in a path is ignored: all is read at the commit in use. An image
        without a path is null, one whose file is missing is empty. Raises DataError for a path that leads out of the
        dataset, and if there is no file for any of several.
        """
        images: list[bytes | None] = [None] * len(paths) if data is None else data.to_pylist()
        wanted = {row: path for row, path in enumerate(paths.to_pylist()) if images[row] is None and path}
        found = self._read_all(number, list(wanted.values()))
        if len(found) > 1 and not any(found):
            one = _shortened(next(iter(wanted.values())))
            raise DataError(
                f"{self._files.names[number]} has no image that can be read: column {self._column} tells only paths, "
                f"such as {one}, where no file is; {FIX}"
            )
        for row, image in zip(wanted, found, strict=True):
            images[row] = image
        return pa.chunked_array([pa.array(images, pa.large_binary())])

    def read(self, number: int, path: str) -> bytes:
        """The image at this path of file `number`, empty if there is none. Raises DataError as `fill_in` does."""
        return self._read(number, path, self._places(number, path))[0]

    def _read_all(self, number: int, paths: list[str]) -> list[bytes]:
        places = [self._places(number, path) for path in paths]
        if not places:
            return []
        first, place = self._read(number, paths[0], places[0])
        if place and place != places[0][0]:
            places = [list(reversed(part)) for part in places]
        rest = in_threads(
            lambda index: self._read(number, paths[index], places[index])[0], range(1, len(paths)), THREADS
        )
        return [first, *rest]

    def _read(self, number: int, path: str, places: list[str]) -> tuple[bytes, str | None]:
        """What is at the first of these places where there is something, and the place; nothing and None elsewhere."""
        for place in places:
            try:
                data = self._files.read_path(place)
            except ValueError as error:
                raise self._refusal(number, path) from error
            if data is not None:
                return data, place
        return b"", None

    def _places(self, number: int, path: str) -> list[str]:
        """Where the image of this path may lie, from the top of the dataset. Raises DataError if that is outside."""
        own = self._own.match(path)
        inside = path[own.end() :] if own else path
        parts = [part for part in inside.split("/") if part not in ("", ".")]
        leads_out = inside.startswith("/") or PureWindowsPath(inside).is_absolute() or ".." in parts
        if leads_out or any(text in inside for text in ("://", "\\", "\0")):
            raise self._refusal(number, path)
        name = self._files.names[number].removeprefix(self._files.root)
        folder = "" if own or name.startswith("/") else name.rpartition("/")[0]
        places = [[*parts], [*folder.split("/"), *parts]] if folder else [[*parts]]
        return ["/".join(place) for place in places] if parts else []

    def _refusal(self, number: int, path: str) -> DataError:
        return DataError(
            f"{self._files.names[number]} names an image outside the dataset: column {self._column} has the path "
            f"{_shortened(path)}; {FIX}"
        )


def _shortened(path: str) -> str:
    return repr(path if len(path) <= LONGEST_TOLD else f"{path[:LONGEST_TOLD]}...")
