"""Sets that are neither parquet files nor tar shards: Arrow files, tables of paths, folders and zips of images.

They are on this machine before the first image is read, and read image by image.
"""

import os
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from errors import DataError
from stream.data_files import READABLE, is_table
from stream.explain import one_line_errors
from stream.files import read_small
from stream.folders import is_image, layout_of, suffix_of
from stream.hub import Listing, open_files
from stream.image_table import ImageTable
from stream.labels import distinct
from stream.ranges import LARGEST_IMAGE
from stream.retry import Network
from stream.tables import open_tables

EXAMPLES = 3


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
    return open_tables(source, listing, files, columns, downloaded)


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
