"""The settings, launches, epochs and steps of a run, read back from the logs in its folder.

A log that is not there yet is empty; one that cannot be understood raises ValueError, LookupError or TypeError.
"""

import csv
import io
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from math import nan
from pathlib import Path
from typing import Any

from choices import DATASETS
from config import Config
from errors import UsageError
from flags import FROM_PRESET
from stream.files import read_small

STEP_POINTS = 600
CHUNK = 2**20  # bytes
LARGEST_HEADER = 2**26  # bytes
CHOSEN_BY_THE_MACHINE = frozenset({"num_workers", "data_dir", "cache_dir"})  # no choice of how to train


@dataclass(frozen=True)
class History:
    """What a run's folder tells; `snapshot` is what its newest readable one holds beside tensors, if any.

    `resolved` is what its settings came to.
    """

    folder: Path
    config: dict[str, Any]
    launches: list[dict[str, Any]]
    epochs: list[dict[str, float]]
    snapshot: dict[str, Any]
    resolved: dict[str, Any]

    @property
    def judged(self) -> str:
        """The column by which epochs are judged: the average's accuracy where there is an average."""
        return "ema_top1" if self.epochs and "ema_top1" in self.epochs[0] else "val_top1"

    @property
    def best(self) -> dict[str, float] | None:
        """The first epoch with the highest accuracy in validation."""
        return best_of(self.epochs, self.judged)

    @property
    def steps_per_epoch(self) -> float:
        return self.epochs[-1]["step"] / self.epochs[-1]["epoch"] if self.epochs else 0.0

    def column(self, name: str) -> list[float]:
        """What results.csv holds under this name."""
        return [row[name] for row in self.epochs]

    def percent(self, name: str) -> list[float]:
        """The same of a fraction, in percent."""
        return [100 * row[name] for row in self.epochs]

    def training_seconds(self) -> list[float]:
        """The seconds of each epoch spent in training; the rest of its `seconds` went to the evaluation."""
        images = self.steps_per_epoch * self.config["batch_size"]
        return [images / row["images_per_s"] for row in self.epochs]

    @property
    def images_per_s(self) -> float:
        """Images a second in training, of all epochs."""
        seconds = self.training_seconds()
        return self.steps_per_epoch * self.config["batch_size"] * len(seconds) / sum(seconds)


def read_history(folder: Path) -> History:
    """Raises UsageError when the folder holds no run."""
    try:
        told = json.loads(read_small(folder / "config.json"))
        config, launches = dict(told["config"]), list(told["launches"])
        resolved = dict(told.get("resolved", {}))
        config["batch_size"], config["epochs"], config["dataset"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise UsageError(f"{folder} is not the folder of a run: it has no config.json of one; name another") from error
    return History(folder, config, launches, read_epochs(folder), _newest_state(folder), resolved)


def read_epochs(folder: Path) -> list[dict[str, float]]:
    """The rows of results.csv, as numbers; what a row lacks is nan."""
    path = folder / "results.csv"
    if not os.path.lexists(path):
        return []
    rows = csv.DictReader(read_small(path).decode().splitlines())
    return [{name: float(value or "nan") for name, value in row.items()} for row in rows]


def read_rows(path: Path) -> list[list[str]]:
    """The rows of a CSV file below its head; a field may hold line ends."""
    return list(csv.reader(io.StringIO(read_small(path).decode(), newline="")))[1:]


def read_steps(folder: Path, most: int = STEP_POINTS) -> list[dict[str, Any]]:
    """Some `most` of the rows of metrics.jsonl, evenly spread over the file, of which only these are read.

    What is not finite is null there, and nan here.
    """
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return []
    rows: dict[int, dict[str, Any]] = {}
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        for number in range(most):
            place = size * number // most
            file.seek(max(0, place - 1))
            if place:
                file.readline()
            start = file.tell()
            line = file.readline()
            if start not in rows and line.endswith(b"\n"):
                rows[start] = {name: nan if value is None else value for name, value in json.loads(line).items()}
    return list(rows.values())


def count_skipped(folder: Path) -> int:
    """The steps that the gradient scaler skipped."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return 0
    count = 0
    with open(path, "rb") as file:
        while lines := file.read(CHUNK) + file.readline():
            count += lines.count(b'"skipped": true')
    return count


def best_of(epochs: list[dict[str, float]], column: str) -> dict[str, float] | None:
    return max(
        (row for row in epochs if row[column] == row[column]),
        key=lambda row: (row[column], -row["epoch"]),
        default=None,
    )


def changed_settings(config: Mapping[str, Any]) -> list[tuple[str, Any, Any, str]]:
    """Name, value, default and description of each setting that is not what its dataset has by default."""
    name = config["dataset"]
    preset = DATASETS[name].preset if name in DATASETS else None
    changed = []
    for item in fields(Config):
        default = item.default
        if item.name == "eval_size":
            default = config["image_size"]
        elif default is FROM_PRESET:  # unknown where the dataset's extension is gone
            default = getattr(preset, item.name, config.get(item.name))
        value = config.get(item.name, default)
        is_choice = item.metadata["on_resume"] != "forgotten" and item.name not in CHOSEN_BY_THE_MACHINE
        if (is_choice and _plain(value) != _plain(default)) or item.name == "dataset":
            changed.append((item.name, value, default, item.metadata["help"]))
    return changed


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def snapshot_files(folder: Path) -> list[Path]:
    """The snapshots of a run, the oldest first and the best last."""
    return sorted(folder.glob("snapshots/*.safetensors"), key=lambda path: (path.stem == "best", path.name))


def _newest_state(folder: Path) -> dict[str, Any]:
    for path in sorted(folder.glob("snapshots/step-*.safetensors"), reverse=True):
        try:
            with open(path, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length)) if length < LARGEST_HEADER else {}
            return dict(json.loads(header["__metadata__"]["state"]))
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            continue
    return {}
