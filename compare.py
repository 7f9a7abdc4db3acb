"""Runs side by side: the settings that differ and the results, as a table, and as a page with the curves of all."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from config import Config
from errors import UsageError, printable
from pages.history import History, read_history
from pages.markup import Markup, page, table, tag
from pages.svg import STYLES, Line, chart
from stream.files import write_durably
from units import as_rate, duration

NAME = "compare.html"
TIME_UNITS = (("hours", 3600), ("minutes", 60), ("seconds", 1))
FEWEST_UNITS = 3  # of the longest run, for a unit of the time axis
NO_SETTINGS = frozenset({"run_dir", "resume_from", "override", "num_workers", "compare"})


def compare(folders: Sequence[str]) -> None:
    """Print the tables, and write compare.html to the working directory. Raises UsageError."""
    if len(folders) < 2:
        raise UsageError("--compare needs two runs or more; name their folders")
    try:
        runs = [read_history(Path(folder)) for folder in folders]
    except (ValueError, LookupError, TypeError) as error:
        raise UsageError(f"the logs of a run cannot be read ({printable(str(error))[:100]}); leave it out") from error
    letters = [_letter(number) for number in range(len(runs))]
    differing = settings(runs) or [("no setting differs", [""] * len(runs))]
    parts = [("run", [printable(folder) for folder in folders]), *differing, *results(runs)]
    print(*_columns(letters, parts), sep="\n")
    try:
        write_durably(Path(NAME), _page(runs, letters, folders))
    except OSError as error:
        raise UsageError(f"{NAME} cannot be written here ({error.strerror}); go to another folder") from error
    print(f"wrote     {NAME}: the same, with the curves")


def _letter(number: int) -> str:
    """A, B, ... Z, AA, AB ..."""
    return (_letter(number // 26 - 1) if number >= 26 else "") + chr(ord("A") + number % 26)


def settings(runs: Sequence[History]) -> list[tuple[str, list[str]]]:
    """The settings in which the runs differ, each with its values."""
    names = [name for name in Config.__dataclass_fields__ if name not in NO_SETTINGS]
    values = ((name, [_told(run, name) for run in runs]) for name in names)
    return [(name, told) for name, told in values if len(set(told)) > 1]


def _told(run: History, name: str) -> str:
    """A setting as it was trained with: of the rate and the model what they came to, where that is known."""
    value = run.resolved.get(name) if name in ("lr", "model") else None
    value = run.config.get(name) if value is None else value
    return "none" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def results(runs: Sequence[History]) -> list[tuple[str, list[str]]]:
    """The results of the runs, each with its values; a run without a finished epoch has none."""
    rows: list[tuple[str, list[str]]] = []
    for run in runs:
        best, last = run.best, run.epochs[-1] if run.epochs else None
        told = {
            "best top-1": f"{best[run.judged]:.2%}" if best else "",
            "best epoch": f"{best['epoch']:.0f}" if best else "",
            "last top-1": f"{last[run.judged]:.2%}" if last else "",
            "last val loss": f"{last['val_loss']:.4f}" if last else "",
            "last train loss": f"{last['train_loss']:.4f}" if last else "",
            "epochs done": f"{len(run.epochs)} of {run.config['epochs']}",
            "images/s": as_rate(run.images_per_s) if last else "",
            "time": duration(sum(row["seconds"] for row in run.epochs)) if last else "",
        }
        rows = rows or [(name, []) for name in told]
        for (_, values), value in zip(rows, told.values(), strict=True):
            values.append(value or "none yet")
    return rows


def _columns(letters: Sequence[str], parts: Sequence[tuple[str, list[str]]]) -> list[str]:
    """The lines of the table, below a line for each run's folder."""
    (_, folders), *rows = parts
    wide = max(len(name) for name, _ in rows) + 2
    widths = [max(len(values[at]) for _, values in rows) + 2 for at in range(len(letters))]
    table = [("", letters), *rows]
    lines = [f"run {letter}     {folder}" for letter, folder in zip(letters, folders, strict=True)]
    for name, values in table:
        cells = (f"{value:>{width}}" for value, width in zip(values, widths, strict=True))
        lines.append(f"{name:<{wide}}{''.join(cells)}")
    return lines


def _page(runs: Sequence[History], letters: Sequence[str], folders: Sequence[str]) -> bytes:
    head = ["", *letters]
    named = table(["", "folder"], zip(letters, folders, strict=True))
    differing = settings(runs)
    told: Markup = (
        table(head, ([name, *values] for name, values in differing)) if differing else tag("p", "No setting differs.")
    )
    found = table(head, ([name, *values] for name, values in results(runs)))
    charts = [
        _overlay("Top-1 accuracy in validation (star: best)", runs, letters, "%"),
        _overlay("Loss in validation", runs, letters, "cross-entropy", "val_loss"),
        _overlay("Loss in training", runs, letters, "of the run's own kind", "train_loss"),
        _overlay("Top-1 accuracy in training", runs, letters, "%", "train_top1"),
        _overlay("Learning rate at the end of each epoch", runs, letters, "rate", "lr"),
        _overlay("Speed", runs, letters, "images/s", "images_per_s"),
        _overlay("Top-1 accuracy against time", runs, letters, "%", against_time=True),
    ]
    sections: list[tuple[str, list[Any]]] = [
        ("Runs", [named]),
        ("Results", [found]),
        ("Settings that differ", [told]),
        ("Curves", [tag("div", *charts, class_="charts")]),
    ]
    return page(f"{len(runs)} runs", ", ".join(Path(folder).name for folder in folders), sections)


def _overlay(
    title: str, runs: Sequence[History], letters: Sequence[str], unit: str, column: str = "", against_time: bool = False
) -> Markup:
    """A column of all runs, of accuracy where none is named, against the epoch or the time in training."""
    longest = max(sum(row["seconds"] for row in run.epochs) for run in runs)
    time_unit, size = next(found for found in TIME_UNITS if longest >= FEWEST_UNITS * found[1] or found[1] == 1)
    lines = []
    for number, (run, letter) in enumerate(zip(runs, letters, strict=True)):
        name = column or run.judged
        percent = 100 if "top1" in name else 1
        at, passed = [], 0.0
        for row in run.epochs:
            passed += row["seconds"] / size
            at.append(passed if against_time else row["epoch"])
        best = run.best if not column else None
        star = (at[run.epochs.index(best)], percent * best[name]) if best else None
        values = [percent * row[name] for row in run.epochs]
        lines.append(Line(f"{letter} {run.folder.name}", at, values, number % STYLES, best=star))
    return chart(title, lines, time_unit if against_time else "epoch", unit, logarithmic="loss" in column)
