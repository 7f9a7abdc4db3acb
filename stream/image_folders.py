"""Image folders: which files are images, of which class, and what is passed over."""

import csv
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from errors import DataError
from stream.clutter import is_clutter
from stream.files import read_small
from stream.folders import class_name, layout_of
from stream.formats import IMAGE_SUFFIXES, SIGNATURE_BYTES, is_image
from stream.local import LocalDataset, from_files

KINDS_TOLD = 6
TRAIN = "train"  # the split that is taken for the whole of a folder without splits
BOXES_BEHIND = re.compile(r"(?<=^n\d{8})( \d+)+.*")
Sample = tuple[Path, str]


def open_image_folder(
    folder: Path, split: str, others: Sequence[str], labels: Path | None, whole: bool
) -> tuple[LocalDataset, LocalDataset | None]:
    """The images to train on in folder/`split`, and those for validation in the first of `others` that is there.

    Each split has a folder a class; with a file of `labels` the one for validation may be flat, see `read_labels`. With
    `whole`, only the first is opened, and the classes may lie in `folder` itself. Raises DataError.
    """
    try:
        return _open_splits(folder, split, others, labels, whole)
    except OSError as error:
        raise DataError(
            f"{error.filename} cannot be read ({error.strerror}); mend it, or give another --data_dir"
        ) from error


def _open_splits(
    folder: Path, split: str, others: Sequence[str], labels: Path | None, whole: bool
) -> tuple[LocalDataset, LocalDataset | None]:
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; give --data_dir one with a folder a class, or with train/ and val/")
    if not _class_folders(folder / split):
        if not _class_folders(folder):
            raise DataError(
                f"{folder} has no class folders; --data_dir needs a folder a class, or train/ and val/ of such"
            )
        if not whole or split != TRAIN or not is_unsplit(folder, split):
            raise DataError(
                f"{folder / split} is not a folder of class folders; --data_dir needs train/ and val/ with a folder a "
                "class, or with --val_share 0.1, which holds out a part for validation, a folder a class; "
                "--train_split and --val_split name other splits"
            )
        return _open(folder), None
    if whole:
        return _open(folder / split), None
    val = next((folder / name for name in others if (folder / name).is_dir()), None)
    if val is None:
        raise DataError(
            f"{folder} has no folder {' or '.join(others)}; hold out a part of {split} with --val_share 0.1, name "
            "another with --val_split, or give another --data_dir"
        )
    return _open(folder / split), _open(val) if labels is None else _open_flat(val, labels)


def open_to_evaluate(folder: Path, splits: Sequence[str], labels: Path | None) -> LocalDataset:
    """The images in the first of the `splits` of a folder, or in its own class folders if it has no splits.

    Raises DataError.
    """
    try:
        part = next((folder / name for name in splits if (folder / name).is_dir()), None)
        if part is None:
            _require_classes(folder, splits)
        found = _open(part or folder) if labels is None else _open_flat(part or folder, labels)
    except OSError as error:
        raise DataError(
            f"{error.filename} cannot be read ({error.strerror}); mend it, or give another --data_dir"
        ) from error
    found.root = folder
    return found


def _require_classes(folder: Path, splits: Sequence[str]) -> None:
    """Raise DataError where the folders in a folder are splits, or there is none."""
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; give --data_dir one with a folder a class")
    inner = [f"{part.name}/{sub.name}/" for part in _class_folders(folder) for sub in _class_folders(part)]
    layout = layout_of([*inner, *(f"{part.name}/" for part in _class_folders(folder))])
    if splits and inner and layout.split_level == 0:
        raise DataError(f"{folder} has no folder {' or '.join(splits)}; name the one to evaluate with --val_split")


def is_unsplit(folder: Path, split: str) -> bool:
    """Whether a folder has class folders, and neither a folder for the split nor one for another."""
    parts, named = _class_folders(folder), folder / split
    if not parts or _class_folders(named) or (named.is_dir() and not any(images_in(named, Counter()))):
        return False
    inner = [f"{part.name}/{sub.name}/" for part in parts for sub in _class_folders(part)]
    return not inner or layout_of([*inner, *(f"{part.name}/" for part in parts)]).split_level != 0


def _class_folders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(part for part in folder.iterdir() if part.is_dir() and not is_clutter(f"{part.name}/"))


def _open(folder: Path) -> LocalDataset:
    """A folder with a folder for each class; those without an image are no classes. Raises DataError."""
    passed_over = Counter[str]()
    found: dict[str, list[Path]] = {}
    for part in _class_folders(folder):
        found.setdefault(class_name(part.name), []).extend(images_in(part, passed_over))
    beside = sum(path.suffix.lower() in IMAGE_SUFFIXES and not path.is_dir() for path in folder.iterdir())
    empty = [name for name, paths in found.items() if not paths]
    classes = sorted(name for name, paths in found.items() if paths)
    if not classes:
        fix = "give their labels with --val_labels FILE" if beside else "put a folder of images for each class there"
        raise DataError(f"{folder} has {'images but ' if beside else ''}no images in class folders; {fix}")
    samples = [(path, name) for name in classes for path in found[name]]
    notes = [f"{folder} has no images in {_listed(empty)}: no class"] if empty else []
    if beside:
        notes.append(f"{beside:,} images in {folder} lie beside the class folders and are left out")
    return from_files(samples, folder, classes, [*notes, *left_out(folder, passed_over)])


def images_in(folder: Path, passed_over: Counter[str], above: frozenset[str] = frozenset()) -> Iterator[Path]:
    """The images in a folder and its subfolders, sorted; of what is no image the kind is counted."""
    real = os.path.realpath(folder)
    if real in above:  # a link that leads back
        return
    names: list[str] = []
    folders: list[str] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            is_folder = entry.is_dir()
            if not is_clutter(f"{entry.name}/" if is_folder else entry.name):
                (folders if is_folder else names).append(entry.name)
    for name in sorted(names):
        path = folder / name
        suffix = path.suffix.lower()
        if suffix in IMAGE_SUFFIXES or _looks_like_image(path):
            yield path
        else:
            passed_over[suffix or "without suffix"] += 1
    for name in sorted(folders):
        yield from images_in(folder / name, passed_over, above | {real})


def _looks_like_image(path: Path) -> bool:
    """Whether a file without a usual suffix begins as an image does."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            return is_image(file.read(SIGNATURE_BYTES))
    except OSError:
        return False


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:KINDS_TOLD])
    return f"{len(names)} folders ({shown}{', ...' if len(names) > KINDS_TOLD else ''})" if len(names) > 1 else shown


def left_out(folder: Path, passed_over: Counter[str]) -> list[str]:
    if not passed_over:
        return []
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in passed_over.most_common(KINDS_TOLD))
    more = ", ..." if len(passed_over) > KINDS_TOLD else ""
    return [f"{passed_over.total():,} files in {folder} are no images and left out: {kinds}{more}"]


def _open_flat(folder: Path, file: Path) -> LocalDataset:
    """A folder of images whose labels are told by a file. Raises DataError."""
    passed_over = Counter[str]()
    paths = list(images_in(folder, passed_over))
    twice = [name for name, count in Counter(path.name for path in paths).items() if count > 1]
    if twice:
        raise DataError(f"{folder} has several images called {twice[0]}, and --val_labels goes by names; rename them")
    told = read_labels(file, [path.name for path in paths])
    samples = [(path, told[path.name]) for path in paths if path.name in told]
    if not samples:
        raise DataError(f"{file} tells the label of no image in {folder}; give the file of these images")
    notes = left_out(folder, passed_over)
    if len(samples) < len(paths):
        notes.append(f"{len(paths) - len(samples):,} images in {folder} have no label in {file} and are left out")
    return from_files(samples, folder, notes=notes)


def read_labels(file: Path, names: Sequence[str]) -> dict[str, str]:
    """The class name of each image, by the name of its file, as a file tells them. Raises DataError.

    It is a table of two columns with a comma or a tab between, file name (with or without suffix) and class, which may
    have boxes behind it as in ImageNet's LOC_val_solution.csv; or a class a line, in the order of the sorted names.
    Lines of numbers are those of ILSVRC2012_validation_ground_truth.txt, which needs the meta.mat that comes with it.
    """
    try:
        lines = read_small(file).decode("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"--val_labels {file} cannot be read as text ({error}); give a CSV file or a label a line"
        ) from error
    lines = [line for line in lines if line.strip()]
    try:
        table = list(csv.reader(lines, delimiter="\t" if any("\t" in line for line in lines) else ","))
    except csv.Error as error:
        raise DataError(f"--val_labels {file} is no table ({error}); give a CSV file or a label a line") from error
    if table and all(len(row) >= 2 for row in table):
        return _of_table(file, table, names)
    if len(lines) != len(names):
        raise DataError(
            f"--val_labels {file} has {len(lines):,} lines for {len(names):,} images; it needs a label a line, in the "
            "order of the file names, or a table of file name and class"
        )
    labels = [row[0].strip() if len(row) == 1 else line.strip() for row, line in zip(table, lines, strict=False)]
    if len(table) < len(lines) or not all(labels):
        raise DataError(f"--val_labels {file} has a quote that does not end, or an empty label; mend it")
    if all(label.isdecimal() for label in labels):
        synsets = _synsets(file.parent / "meta.mat")
        labels = [synsets.get(int(label), label) for label in labels]
    return dict(zip(sorted(names), labels, strict=True))


def _of_table(file: Path, table: list[list[str]], names: Sequence[str]) -> dict[str, str]:
    """The class name of each image that a table tells. Raises DataError where it tells two, or does not tell which."""
    found: dict[str, list[str]] = {}
    for name in names:
        for key in {name, Path(name).stem}:
            found.setdefault(key, []).append(name)
    told: dict[str, str] = {}
    for row in table:
        label, fitting = BOXES_BEHIND.sub("", row[1].strip()), found.get(Path(row[0].strip()).name, [])
        if len(fitting) > 1:
            raise DataError(f"--val_labels {file} tells of {row[0]}, which may be {' or '.join(fitting)}; add suffixes")
        if fitting and label and told.setdefault(fitting[0], label) != label:
            raise DataError(
                f"--val_labels {file} tells two classes of {row[0]}, {told[fitting[0]]} and {label}; mend it"
            )
    return told


def _synsets(path: Path) -> dict[int, str]:
    """The WordNet id of each class by its number in ILSVRC's development kit, which is not the sorted order."""
    import scipy.io

    try:
        synsets = scipy.io.loadmat(path, squeeze_me=True)["synsets"]
        return {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets}
    except (OSError, LookupError, TypeError, ValueError, NotImplementedError) as error:
        raise DataError(
            f"numbers as labels are ILSVRC's, whose meta.mat tells their names, but {path} does not ({error}); put the "
            "one of the development kit there, or tell names"
        ) from error
