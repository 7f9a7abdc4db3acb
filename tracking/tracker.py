"""What a tracker is, and whether it can be used on this machine."""

import importlib.util
import shlex
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from choices import TRACKERS
from errors import UsageError
from machine import program


class Tracker:
    """Takes the numbers and pictures of a run. A subclass that `choices.tracker` registers is a choice.

    Every method is called by one thread, which is the tracker's own. It may take its time, raise or hang: training does
    not notice. Libraries are imported in `start`, not at the top of a file.
    """

    needs: tuple[str, ...] = ()  # modules that must be there
    packages: tuple[str, ...] = ()  # what they are installed from, the tracker's own package first
    rewinds = False  # whether `start` removes what the run holds of later steps, which are then logged again

    def start(self, config: dict[str, Any], run_dir: Path, run_id: str | None, step: int) -> str | None:
        """Begin the run in `run_dir`, or go on with the one that was called `run_id`, and return its id, if it has one.

        `config` are the settings, and what they came to. Up to `step` all numbers have been logged before.
        """
        return None

    def last_step(self, scalar: str) -> int | None:
        """The last step at which the run that goes on has this scalar, 0 without any; None where nobody can tell."""
        return None

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Log the finite numbers of a step: `step/...` as in metrics.jsonl, or `epoch/...` as in results.csv."""

    def picture(self, step: int, name: str, path: Path) -> None:
        """Log a PNG file."""

    def flush(self) -> None:
        """Called when nothing more waits to be logged."""

    def finish(self, report: Path | None, complete: bool) -> None:
        """End the run, which is `complete` unless it was stopped; `report` is an HTML file, if there is one."""

    @classmethod
    def view(cls, run_dir: Path) -> str:
        """How to look at the run: a command, or where it is."""
        return ""

    @classmethod
    def mode(cls) -> str:
        """How it would work now, if there is something to tell."""
        return ""


def tool(*words: str) -> str:
    """A command line that starts a program of a tracker's package as this process was started."""
    return shlex.join([*program(words[0]), *words[1:]])


def require_packages(names: list[str]) -> None:
    """Refuse trackers whose packages are missing, with UsageError. Nothing is imported."""
    for name in names:
        if not has_packages(name):
            raise UsageError(f"--track {name} needs a package; pip install {' '.join(TRACKERS[name].packages)}")


def has_packages(name: str) -> bool:
    """Whether the packages of a tracker are here; a folder that happens to have the name of one is none."""
    found = map(importlib.util.find_spec, TRACKERS[name].needs)
    return all(spec is not None and spec.origin is not None for spec in found)


def describe(name: str) -> tuple[bool, str]:
    """Whether a tracker can be used here, and its version and mode, or what mends it."""
    kind = TRACKERS[name]
    if not has_packages(name):
        return False, f"{name} is not here: pip install {' '.join(kind.packages)}"
    versions = []
    for package in dict.fromkeys((*kind.needs[:1], *kind.packages[:1])):
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return True, "; ".join(filter(None, (versions[0] if versions else name, kind.mode())))
