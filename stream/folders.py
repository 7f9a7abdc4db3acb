"""What the paths of images tell: which split and which class they belong to."""

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass

from errors import DataError
from stream.clutter import is_clutter
from stream.formats import IMAGE_SUFFIXES

USUAL = ("jpg", "jpeg", "png", "webp", "jpe", "jfif", "bmp", "gif", "tif", "tiff", "ppm", "avif", "jp2", "tga")
IMAGES = (*USUAL, *sorted({suffix[1:] for suffix in IMAGE_SUFFIXES} - {*USUAL}))
"""The suffixes of images; of several images of one sample, the one whose suffix comes first here is used."""

SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
SPLIT_WORD = re.compile(
    rf"(?:^|[-._ ])({'|'.join(word for words in SPLITS.values() for word in words)})(?=$|[-._ 0-9])", re.IGNORECASE
)
Folders = tuple[str, ...]


def suffix_of(name: str) -> str:
    """What follows the last dot of a file's name, in lower case; nothing if there is none."""
    base = name.rpartition("/")[2]
    return base.rpartition(".")[2].lower() if "." in base else ""


def is_image(path: str) -> bool:
    return suffix_of(path) in IMAGES and not is_clutter(path)


def class_name(folder: str) -> str:
    """A folder's name as that of a class: accents composed, which macOS does not do, and bytes written out that are not
    UTF-8.
    """
    return unicodedata.normalize("NFC", folder.encode(errors="backslashreplace").decode())


def split_of(folder: str) -> str | None:
    """The split that a folder is called by, as a whole or, as train2017 and my_val, in one word."""
    found = SPLIT_WORD.search(folder)
    return next((split for split, words in SPLITS.items() if found and found[1].lower() in words), None)


@dataclass(frozen=True)
class Layout:
    """Which levels of folders, from the top, tell the splits (None: none does) and the classes of a set's images."""

    split_level: int | None
    class_level: int

    def split_of(self, path: str) -> str | None:
        """The split of an image; None where no split is told, or this image is in none."""
        folders = _folders(path)
        if self.split_level is None or len(folders) <= self.split_level:
            return None
        return split_of(_stem(folders[self.split_level]))

    def class_of(self, path: str) -> str | None:
        """The class of an image; None for one that lies in no class's folder. Raises DataError."""
        folders = _folders(path)
        if len(folders) <= self.class_level or (self.split_level is not None and self.split_of(path) is None):
            return None
        return class_name(_stem(folders[self.class_level]))


def layout_of(paths: Iterable[str]) -> Layout:
    """Where the paths of images, of all splits together, tell split and class. Zips count as folders.

    Classes are the first folders behind those that all images share and those of the splits, whatever they are called:
    train/cat/siamese/1.jpg is a cat. A folder that images lie in directly is passed by only if it is or holds a split.
    Splits may lie in the classes, too, as in cat/train/1.jpg.
    Raises DataError where a folder may be a split or a class.
    """
    every = {_folders(path) for path in paths}
    level, split_level = 0, None
    while any(len(folders) > level + 1 for folders in every):
        deep = {folders for folders in every if len(folders) > level}
        if split_level is None and _tells_splits(deep, level):
            every = {folders for folders in deep if split_of(_stem(folders[level]))}
            split_level = level
        elif not (_is_shared(deep, level, split_level) or _are_parts(deep, level)):
            break
        level += 1
    if split_level is None and _are_splits(every, level):
        return Layout(level, level + 1)
    if split_level is None and _are_splits(every, level + 1) and all(len(folders) > level + 1 for folders in every):
        return Layout(level + 1, level)
    return Layout(split_level, level)


def _folders(path: str) -> Folders:
    return tuple(part for part in path.split("/")[:-1] if part not in ("", "."))


def _stem(folder: str) -> str:
    return folder[:-4] if suffix_of(folder) == "zip" else folder


def _is_split(folder: str) -> bool:
    """Whether a folder is called by a split as a whole."""
    return any(_stem(folder).lower() in words for words in SPLITS.values())


def _are_splits(every: set[Folders], level: int) -> bool:
    """Whether images lie in folders of splits alone, so that none tells a class."""
    names = {folders[level] for folders in every if len(folders) > level}
    return bool(names) and all(map(_is_split, names)) and "train" in map(split_of, map(_stem, names))


def _tells_splits(deep: set[Folders], level: int) -> bool:
    """Whether the folders of a level are splits, with folders in them: all of them, or some of at least two splits."""
    names = {folders[level] for folders in deep}
    inner = {folders[level] for folders in deep if len(folders) > level + 1 and split_of(_stem(folders[level]))}
    if not inner:
        return False
    if all(split_of(_stem(name)) for name in names):
        below = {folders for folders in deep if len(folders) > level + 1}
        return len(names) > 1 or not _tells_splits(below, level + 1)
    kinds = {split_of(_stem(name)) for name in filter(_is_split, names)}
    direct = {folders[level] for folders in deep if len(folders) == level + 1}
    if kinds == {"train"} and inner - direct:
        other = next(name for name in sorted(names) if not _is_split(name))
        raise DataError(f"beside the folder train lies {other}, so train may be a split or a class; move one of them")
    return "train" in kinds and len(kinds) > 1


def _is_shared(deep: set[Folders], level: int, split_level: int | None) -> bool:
    """Whether all images lie in one folder of this level, or in one called as their split is, and in a further one."""
    if split_level is not None:
        labelled = {folders[split_level] for folders in deep if len(folders) > level + 1}
        deep = {folders for folders in deep if folders[split_level] in labelled}
        names = {folders[level] for folders in deep if folders[level] != folders[split_level]}
        names |= {""} if any(folders[level] == folders[split_level] for folders in deep) else set()
    else:
        names = {folders[level] for folders in deep}
    further = {folders for folders in deep if len(folders) > level + 1}
    return len(names) == 1 and (further == deep or (split_level is None and _tells_splits(further, level + 1)))


def _are_parts(deep: set[Folders], level: int) -> bool:
    """Whether this level is zips with folders in them that differ, so that their own names tell nothing."""
    if any(suffix_of(folders[level]) != "zip" or len(folders) == level + 1 for folders in deep):
        return False
    return len({folders[level + 1] for folders in deep}) > 1
