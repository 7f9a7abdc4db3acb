"""Which image files are asked for, and where results go: refused before anything large is imported."""

import errno
import glob
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from beforehand import SIDECAR
from errors import DISK_ERRORS, DataError, UsageError, complain, printable
from stream.image_folders import images_in, left_out

EXPORTED = frozenset(
    {"README.md", SIDECAR, "curves.png", "config.json", "preprocessor_config.json", "model.safetensors"}
    | {"model.onnx", "model.pt2"}
)
"""Every name that an export may have in it."""


def find_images(told: Sequence[str]) -> list[Path]:
    """The image files that files, folders and patterns name, in their order; a file that is named is taken as it is.

    What is no image in a folder is told on stderr. Raises UsageError for a URL, DataError where nothing is found.
    """
    found: list[Path] = []
    for text in told:
        if "://" in text:
            raise UsageError(f"{text} is a URL, and nothing is downloaded; give files, folders or patterns")
        path = Path(text).expanduser()
        matches = [path] if path.exists() else [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
        if not matches:
            raise DataError(f"nothing is called {printable(text)} or matches it; give images, folders or patterns")
        for match in matches:
            found += _in_folder(match) if match.is_dir() else [match]
    if not found:
        raise DataError(f"there are no images in {printable(', '.join(told[:3]))}; give others")
    return found


def _in_folder(folder: Path) -> list[Path]:
    passed_over = Counter[str]()
    found = [*images_in(folder, passed_over)]
    for line in left_out(folder, passed_over):
        complain(f"note: {line}")
    return found


def make_folder(folder: Path, flag: str = "--out") -> None:
    """Make the folder of results, which `flag` names. Raises UsageError, and OSError for a disk that is full or ill."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        if error.errno in DISK_ERRORS and error.errno != errno.EROFS:
            raise
        told = f"{printable(str(folder))} cannot be written ({error.strerror}); give another folder with {flag}"
        raise UsageError(told) from error


def require_free(out: Path) -> None:
    """Refuse a folder with anything else in it than an earlier export. Raises UsageError."""
    if not os.path.lexists(out):
        return
    if not out.is_dir() or out.is_symlink():
        raise UsageError(f"--out {out} is no folder; give another")
    names = {path.name for path in out.iterdir()}
    if names and (SIDECAR not in names or names - EXPORTED):
        odd = sorted(names - EXPORTED) or sorted(names)
        raise UsageError(f"--out {out} holds something else than an export ({odd[0]}); give an empty or a new folder")


def require_precision(format: str, precision: str) -> None:
    """Refuse a precision that the format does not have. Raises UsageError."""
    if precision == "int8" and format != "onnx":
        raise UsageError(f"--precision int8 is for --to onnx, not for {format}; give fp16 or fp32")
