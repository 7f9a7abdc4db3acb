"""Where a run's numbers go: its folder with config.json, results.csv, metrics.jsonl and the ledger."""

import contextlib
import csv
import fcntl
import hashlib
import io
import json
import math
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import nn

import distributed
import output
from beforehand import require_no_run
from config import Config
from errors import UsageError, complain, printable, redact
from registry import LOADED
from stream.files import open_plain, read_small, strict_json, write_durably
from training.state import Progress

RESULT_COLUMNS = (
    *("epoch", "step", "train_loss", "train_top1", "val_loss", "val_top1", "val_top5"),
    *("lr", "images_per_s", "seconds"),
)
EMA_COLUMNS = ("ema_loss", "ema_top1", "ema_top5")

UNREADABLE_COLUMNS = ("image", "reason", "epoch")
LOGS = ("metrics.jsonl", "ledger.jsonl", "results.csv")
PAST = ("config.json", *LOGS, "unreadable.csv", "data/*", "lr_finder/*", "plots/*")  # what a longer run takes along
PACKAGES = ("torch", "torchvision", "datasets", "huggingface_hub", "albumentations", "opencv-python-headless", "numpy")


@contextlib.contextmanager
def open_run_folder(config: Config, resumed: Path | None, argv: Sequence[str]) -> Iterator[Path]:
    """Lock and yield the folder of a new run, or of the `resumed` one; records this launch in its config.json.

    A run that extends the `resumed` one is a new run, with a copy of the other's past.
    Raises UsageError when the folder cannot be written, is in use by another process, or holds another run.
    """
    extended = resumed if config.extend_epochs else None
    if extended:
        resumed, longer = None, extended.with_name(f"{extended.name}-{config.epochs}_epochs")
    told = config.run_dir or resumed or (extended and longer)
    folder = Path(distributed.from_rank0(lambda: str(told or _new_folder(config.dataset_id))))
    if resumed and folder.exists() and folder.samefile(resumed):
        folder = resumed  # by another name
    if distributed.rank():
        yield folder
        return
    if folder != resumed:
        require_no_run(folder)
    try:
        (folder / "snapshots").mkdir(parents=True, exist_ok=True)
        lock = open(folder / "lock", "a+", encoding="utf-8", opener=open_plain)  # noqa: SIM115 (closed below)
    except OSError as error:
        raise UsageError(f"cannot write {folder} ({error.strerror}); give another --run_dir") from error
    with lock:
        _claim(lock, folder)
        try:
            if extended:
                _copy_past(extended, folder)
            _note_launch(folder / "config.json", config, argv)
        except OSError as error:
            raise UsageError(f"cannot write {folder} ({error.strerror}); give another --run_dir") from error
        output.outlive(folder / "console.log")
        distributed.print0(f"run       {folder}")
        yield folder


def _new_folder(dataset: str) -> Path:
    """A new folder, named by the dataset and the time; a number tells runs of one second apart. Raises UsageError."""
    name = f"{dataset.rstrip('/').split('/')[-1]}-{time.strftime('%Y%m%d-%H%M%S')}"
    for folder in (Path("runs") / f"{name}{number}" for number in ("", *(f"-{n}" for n in range(2, 1000)))):
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise UsageError(f"cannot write {folder} ({error.strerror}); give another --run_dir") from error
        return folder
    raise UsageError(f"runs/{name} cannot be made; give a --run_dir")


def _claim(lock: IO[str], folder: Path) -> None:
    """Take the lock, which the system releases however this process ends. Raises UsageError."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.seek(0)
        raise UsageError(
            f"{folder} is at work in another process ({lock.read().strip()}); wait for it, or give another --run_dir"
        ) from error
    except OSError as error:
        complain(
            f"{folder} cannot be locked ({error.strerror}): start no other run in it; a folder on a local disk can"
        )
    lock.truncate(0)
    lock.write(f"{os.getpid()} on {platform.node()}\n")
    lock.flush()


def _copy_past(source: Path, target: Path) -> None:
    for path in (path for pattern in PAST for path in source.glob(pattern)):
        copy = target / path.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        write_durably(copy, read_small(path, most=2**32))


def _note_launch(path: Path, config: Config, argv: Sequence[str]) -> None:
    try:
        launches = json.loads(read_small(path))["launches"] if os.path.lexists(path) else []
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise UsageError(f"{path} is not a run's; move it away, or give another --run_dir") from error
    report = {"config": asdict(config), "launches": [*launches, _launch(argv)]}
    write_durably(path, strict_json(report, indent=2).encode())


def note_resolved(path: Path, model: nn.Module, facts: dict[str, Any]) -> None:
    """Add to a run's config.json what its settings came to. A disk that refuses costs only that."""
    count = sum(parameter.numel() for parameter in model.parameters())
    resolved = facts | {"model": str(getattr(model, "name", type(model).__name__)), "parameters": count}
    with contextlib.suppress(OSError, ValueError):
        report = json.loads(read_small(path))
        write_durably(path, strict_json(report | {"resolved": resolved}, indent=2).encode())


def _launch(argv: Sequence[str]) -> dict[str, Any]:
    revision = None
    if shutil.which("git"):
        describe = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
        told = subprocess.run(describe, cwd=Path(__file__).parent, capture_output=True, text=True).stdout
        revision = told.strip() or None
    return {
        "command": redact(f"{Path(sys.argv[0]).name} {shlex.join(argv)}"),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "git": revision,
        "python": sys.version.split()[0],
        "packages": {name: version(name) for name in PACKAGES},
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "ranks": distributed.world_size(),
        "extensions": LOADED,
    }


class RunLogs:
    """Logs one dict per step and one per finished epoch. `folder` is None on all ranks but 0; these write nothing."""

    def __init__(self, folder: Path | None, ledger: bool) -> None:
        self.folder = folder
        self.ledger = ledger
        self.paths = [folder / name for name in LOGS] if folder else []

    def rewind(self, step: int, epoch: int) -> None:
        """Remove log entries after this step, and epochs after this one, because a resume will log them again."""
        if self.folder is None:
            return
        for name in ("metrics.jsonl", "ledger.jsonl"):
            _keep_lines(self.folder / name, lambda line: json.loads(line)["step"] <= step)
        _keep_lines(self.folder / "results.csv", lambda line: line.startswith("epoch") or _csv_epoch(line) <= epoch)

    def seconds_logged(self) -> float:
        """The seconds of all epochs in results.csv."""
        path = self.folder / "results.csv" if self.folder else None
        if path is None or not path.exists():
            return 0.0
        seconds = 0.0
        for row in csv.DictReader(read_small(path, most=2**32).decode(errors="replace").splitlines()):
            with contextlib.suppress(ValueError, TypeError):
                seconds += float(row.get("seconds", 0.0))
        return seconds

    def log_steps(self, rows: list[dict[str, Any]]) -> None:
        """Log consecutive steps: `step, epoch, lr, momentum, loss, top1, skipped` and so on, and with a ledger `ids`.

        A number that is not finite is null, as JSON has none; a gradient norm that was not asked for is left out.
        """
        if self.folder is None or not rows:
            return
        _append(self.folder / "metrics.jsonl", (strict_json(_plain(row)) for row in rows))
        if self.ledger:
            _append(self.folder / "ledger.jsonl", (json.dumps(ledger_row(row)) for row in rows))

    def end_epoch(self, result: dict[str, Any]) -> None:
        """Write the epoch's row to results.csv."""
        if self.folder is None:
            return
        path = self.folder / "results.csv"
        with open(path, "a+", encoding="utf-8", newline="") as file:
            file.seek(0)
            header = next(csv.reader([file.readline()]), [])  # of a run to which a resume may have added an average
            columns = header or [*RESULT_COLUMNS, *(EMA_COLUMNS if "ema_top1" in result else ())]
            writer = csv.DictWriter(file, columns, extrasaction="ignore")
            if not header:
                writer.writeheader()
            writer.writerow(result)


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """One step for metrics.jsonl."""
    asked = {key: value for key, value in row.items() if key != "ids"}
    if math.isnan(asked.get("grad_norm", 0.0)):
        del asked["grad_norm"]
    return asked


def ledger_row(row: dict[str, Any]) -> dict[str, Any]:
    """One step for the ledger: ids (int64, in order) as their SHA-256, floats in hexadecimal."""
    ids = np.asarray(row["ids"], dtype="<i8")
    return {
        "step": row["step"],
        "epoch": row["epoch"],
        "ids": hashlib.sha256(ids.tobytes()).hexdigest(),
        "loss": float(row["loss"]).hex(),
        "lr": float(row["lr"]).hex(),
        "skipped": row["skipped"],
    }


class UnreadableLog:
    """unreadable.csv: a row for each image that could not be read, once an epoch. Ranks append to it together.

    Rows of epochs after the one in `progress`, which a resume logs again, and what a kill cut short are removed first.
    A disk that refuses costs only the row.
    """

    def __init__(self, path: Path, progress: Progress) -> None:
        self._path = path
        self._progress = progress
        self._known: set[tuple[str, str]] = set()
        with contextlib.suppress(OSError, ValueError, csv.Error):
            lines = read_small(path).decode().split("\n")
            rows = [row for row in csv.reader(lines[1:-1]) if len(row) == 3 and row[2].isdecimal()]
            kept = [row for row in rows if int(row[2]) <= progress.epoch + 1]
            self._known = {(row[0], row[2]) for row in kept}
            if (len(kept) < len(lines[1:-1]) or lines[-1]) and distributed.rank() == 0:
                write_durably(path, _csv([[*UNREADABLE_COLUMNS], *kept]).encode())

    def __call__(self, image: str, reason: str) -> None:
        row = [printable(image), " ".join(reason.split()), str(self._progress.epoch + 1)]
        if (row[0], row[2]) not in self._known:
            self._known.add((row[0], row[2]))
            with contextlib.suppress(OSError, ValueError):
                self._append([row])

    def _append(self, rows: list[list[str]]) -> None:
        with open(self._path, "a", encoding="utf-8", opener=open_plain) as file:
            file.write(_csv(rows if file.tell() else [[*UNREADABLE_COLUMNS], *rows]))


def _csv(rows: list[list[str]]) -> str:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


class Stopwatch:
    """Counts seconds, starting from the `already` seconds of an earlier process."""

    def __init__(self, already: float = 0.0) -> None:
        self._start = time.perf_counter() - already

    def seconds(self) -> float:
        return time.perf_counter() - self._start


def _csv_epoch(line: str) -> int:
    return int(line.partition(",")[0])


def _append(path: Path, lines: Iterable[str]) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(line + "\n" for line in lines)


def _keep_lines(path: Path, keep: Callable[[str], bool]) -> None:
    """Rewrite a log with only the lines to keep; incomplete or corrupted lines are dropped."""
    if not os.path.lexists(path):
        return
    try:
        text = read_small(path, most=2**32).decode(errors="replace")
    except OSError as error:
        raise UsageError(f"cannot read {path} ({error.strerror}); move it away, or give another --run_dir") from error
    kept = []
    for line in text.splitlines(keepends=True):
        with contextlib.suppress(ValueError, LookupError, TypeError, RecursionError):
            if line.endswith("\n") and keep(line):
                kept.append(line)
    write_durably(path, "".join(kept).encode())
