"""Which files of a dataset hold its data: what `datasets` finds, or what it does not look for."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets.data_files import DataFilesList, EmptyDatasetError, get_data_patterns

from stream.clutter import is_clutter
from stream.files import read_small
from stream.folders import IMAGES, is_image, layout_of, split_of, suffix_of

TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
TABLES = ("csv", "tsv", "jsonl", "ndjson", "json")
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # tables of the images beside them
KINDS = (("parquet",), ("tar", "tgz", "tbz2", "txz"), ("arrow",), TABLES, (*IMAGES, "zip"))
READABLE = (
    "give parquet files, tar shards, Arrow files, a table (csv, jsonl) of paths and labels, or images in a folder for "
    "each class"
)
Splits = dict[str, list[str]]


def is_tar(name: str) -> bool:
    return name.lower().endswith(TARS)


def in_blocks(splits: Splits) -> bool:
    """Whether the files are parquet files or tar shards, which are read in blocks."""
    names = [name for names in splits.values() for name in names]
    return any(is_tar(name) or (suffix_of(name) == "parquet" and not _is_metadata(name)) for name in names)


def _is_metadata(name: str) -> bool:
    return name.rpartition("/")[2] in METADATA


def is_table(name: str) -> bool:
    return suffix_of(name) in ("arrow", *TABLES) or _is_metadata(name)


def chosen_files(base: str, found: Mapping[Any, Sequence[Any]], freely: bool) -> Splits:
    """The files of each split below `base`, of those that `datasets` found there; or, `freely`, others.

    That is if these are no data, or images that neither folders nor a table beside them label: another table may.
    """
    splits = {str(split): [str(path) for path in paths] for split, paths in found.items()}
    splits = {split: [path for path in paths if not is_clutter(_below(base, path))] for split, paths in splits.items()}
    names = [name for names in splits.values() for name in names]
    if not freely or not any(found.values()):
        return splits
    if not names:
        return search(base) or splits
    if all(suffix_of(name) in KINDS[-1] for name in names):
        return _labelled(base, _regrouped(base, splits))
    return splits


def _regrouped(base: str, splits: Splits) -> Splits:
    """All images and zips below `base` as one split, of which their folders tell more, instead of `splits`.

    `datasets` goes by words in the names of folders, and classes may be called so. Only what the set's card tells is
    kept, and what the names of the files themselves tell of each where no folder is called as a split.
    """
    seen = {suffix_of(name) for names in splits.values() for name in names}
    default = _matching(base, get_data_patterns(base), KINDS[-1])
    if any(
        {*names} != {name for name in default.get(split, ()) if suffix_of(name) in seen}
        for split, names in splits.items()
    ):
        return splits
    every = _every_image(base)
    by_folder = any(split_of(folder) for name in every["train"] for folder in _below(base, name).split("/")[:-1])
    complete = sorted(name for names in default.values() for name in names) == sorted(every["train"])
    return default if complete and not by_folder else every


def _labelled(base: str, splits: Splits) -> Splits:
    """A table where there is one and the folders of the images tell no classes."""
    names = [_below(base, name) for names in splits.values() for name in names]
    if all(map(is_image, names)):
        layout = layout_of(names)
        if len({layout.class_of(name) for name in names} - {None}) < 2:
            return search(base, (TABLES,)) or splits
    return splits


def _below(base: str, path: str) -> str:
    return path.removeprefix(base).lstrip("/")


def suffixes_below(base: str) -> str:
    """The suffixes of the files below `base`, in words; nothing if there are no files."""
    try:
        names = {
            name
            for patterns in get_data_patterns(base).values()
            for name in DataFilesList.from_patterns(patterns, base)
        }
    except EmptyDatasetError:
        return ""
    return ", ".join(sorted({f".{suffix_of(name)}" for name in names if suffix_of(name)}))


def search(base: str, kinds: Sequence[Sequence[str]] = KINDS) -> Splits:
    """The files of the first of these kinds that there is, in the splits that their names tell."""
    try:
        patterns = get_data_patterns(base)
    except EmptyDatasetError:
        return _every_image(base) if KINDS[-1] in kinds else {}
    for kind in kinds:
        splits = _matching(base, patterns, kind)
        if any(splits.values()):
            return _regrouped(base, splits) if kind == KINDS[-1] else splits
    return {}


def _every_image(base: str) -> Splits:
    """All images and zips below `base` as one split; of a folder here, those behind links to folders too."""
    if base.startswith("hf://"):
        return _matching(base, {"train": ["**"]}, KINDS[-1])
    names = sorted(path for path in _files_below(base) if suffix_of(path) in KINDS[-1])
    return {"train": [path for path in names if not is_clutter(_below(base, path))]}


def _files_below(folder: str, above: frozenset[str] = frozenset()) -> Iterator[str]:
    real = os.path.realpath(folder)
    if real in above:  # a link that leads back
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                yield from _files_below(entry.path, above | {real})
            else:
                yield entry.path


def _matching(base: str, patterns: Mapping[Any, list[str]], kind: Sequence[str]) -> Splits:
    """The files below `base` with these suffixes, in the splits of these patterns."""
    suffixes = [f".{suffix}" for name in kind for suffix in (name, name.upper())]
    splits: Splits = {}
    for split, names in patterns.items():
        files = map(str, DataFilesList.from_patterns(names, base, suffixes))
        splits[str(split)] = list(dict.fromkeys(path for path in files if not is_clutter(_below(base, path))))
    return splits


def search_mixed(base: str) -> Splits:
    """The files of data where those of one split are mostly of another kind than those of the next."""
    return search(base, KINDS[:3]) or chosen_files(base, search(base, KINDS[-1:]), freely=True) or search(base)


def saved_splits(folder: Path) -> Splits:
    """The Arrow files of a folder that `save_to_disk` of `datasets` wrote; nothing if it is none. Raises ValueError."""
    if (folder / "dataset_dict.json").is_file():
        names = json.loads(read_small(folder / "dataset_dict.json"))["splits"]
        return {str(name): paths for name in names for paths in _saved(folder / str(name)).values()}
    return _saved(folder)


def _saved(folder: Path) -> Splits:
    if not (folder / "state.json").is_file():
        return {}
    state = json.loads(read_small(folder / "state.json"))
    files = [os.path.basename(str(file["filename"])) for file in state["_data_files"]]
    return {str(state.get("_split") or "train"): [str(folder / name) for name in files]}
