"""A run as one HTML file: what came out, what it was, what happened, and what to do next.

It needs nothing but the run's folder, loads nothing from elsewhere, and is rewritten after each epoch.
"""

import json
import shlex
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from defaults import FEWEST_FOR_TOP5
from errors import redact
from pages.history import (
    History,
    changed_settings,
    count_skipped,
    read_history,
    read_rows,
    read_steps,
    snapshot_files,
)
from pages.markup import Markup, cards, command, details, lines, page, picture, table, tag
from pages.names import short
from pages.svg import Line, chart
from stream.files import read_small, write_durably
from units import as_rate, duration

NAME = "report.html"
MOST_CELLS = 25  # classes in a table of confusions
SHOWN = 20  # unreadable images
MEASURES = ("precision", "recall", "f1")


def write_report(run_dir: Path) -> Path:
    """Write report.html into a run's folder.

    Raises UsageError for a folder of no run, OSError, and ValueError, LookupError or TypeError for a broken log.
    """
    history = read_history(run_dir)
    evaluations = [*map(_evaluation, sorted(run_dir.glob("evaluation/*/evaluation.json")))]
    sections = [
        ("Results", [_cards(history), *_curves(history)]),
        *(((f"Evaluation {name}" if len(evaluations) > 1 else "Evaluation"), part) for name, part in evaluations),
        ("Settings", _settings(history)),
        ("What happened", _events(history)),
        ("What to do next", _next(history, bool(evaluations))),
    ]
    path = run_dir / NAME
    write_durably(path, page(run_dir.resolve().name, _subtitle(history), sections))
    return path


def _subtitle(history: History) -> str:
    config, done = history.config, len(history.epochs)
    model = "" if config.get("model") in (None, "auto") else f"{config['model']} on "
    data = config.get("dataset_name") or config.get("data_dir") or config["dataset"]
    ended = "all" if done >= config["epochs"] else str(done)
    return f"{model}{data}: {ended} of {config['epochs']} epochs, as of {time.strftime('%Y-%m-%d %H:%M:%S')}"


def _cards(history: History) -> Markup:
    best = history.best
    if best is None:
        return tag("p", "No epoch is finished yet.")
    last, column = history.epochs[-1], history.judged
    pairs = [
        ("best top-1", f"{best[column]:.2%} (epoch {best['epoch']:.0f})"),
        ("last top-1", f"{last[column]:.2%}"),
        ("validation loss, last", f"{last['val_loss']:.4f}"),
        ("training loss, last", f"{last['train_loss']:.4f}"),
        ("images/s in training", as_rate(history.images_per_s)),
        ("time of all epochs", duration(sum(row["seconds"] for row in history.epochs))),
    ]
    if _has_top5(history):
        pairs.insert(2, ("last top-5", f"{last['val_top5']:.2%}"))
    return cards(pairs)


def _has_top5(history: History) -> bool:
    count = len(history.snapshot.get("classes") or ())
    return count >= FEWEST_FOR_TOP5 or (not count and any(row["val_top5"] < 1 for row in history.epochs))


def _curves(history: History) -> list[Any]:
    """The charts, and the rows that they are drawn from."""
    steps, per_epoch = read_steps(history.folder), history.steps_per_epoch
    if not steps or not per_epoch:
        return []
    at = [row["epoch"] for row in history.epochs]
    step_at = [row["step"] / per_epoch for row in steps]
    best = history.best
    star = (best["epoch"], 100 * best[history.judged]) if best else None
    averaged = history.judged == "ema_top1"
    accuracy = [
        Line("training", at, history.percent("train_top1"), 0),
        Line("validation", at, history.percent("val_top1"), 1, best=None if averaged else star),
    ]
    losses = [
        Line("training, each step", step_at, [row["loss"] for row in steps], 0, faint=True),
        Line("training", at, history.column("train_loss"), 0),
        Line("validation", at, history.column("val_loss"), 1),
    ]
    if averaged:
        accuracy.append(Line("validation, average", at, history.percent("ema_top1"), 2, best=star))
        losses.append(Line("validation, average", at, history.column("ema_loss"), 2))
    if _has_top5(history):
        accuracy.append(Line("validation, top-5", at, history.percent("val_top5"), 3))
    seconds = history.training_seconds()
    rest = [row["seconds"] - training for row, training in zip(history.epochs, seconds, strict=True)]
    momentum = Line("momentum", step_at, [row["momentum"] for row in steps], 3, plain=True)
    charts = [
        chart("Loss", losses, "epoch", "cross-entropy", logarithmic=True),
        chart("Accuracy (star: best)", accuracy, "epoch", "%"),
        chart(
            "Learning rate",
            [Line("rate", step_at, [row["lr"] for row in steps], 0, plain=True)],
            "epoch",
            "at each step",
        ),
        chart("Momentum", [momentum], "epoch", "at each step"),
        chart("Speed", [Line("in training", at, history.column("images_per_s"), 0)], "epoch", "images/s"),
        chart(
            "Time of an epoch",
            [Line("training", at, seconds, 0), Line("evaluation", at, rest, 1)],
            "epoch",
            "seconds",
        ),
    ]
    names = list(history.epochs[0])
    rows = [
        [row[name] if name in ("epoch", "step") else f"{row[name]:.5g}" for name in names] for row in history.epochs
    ]
    whole = [[int(value) if isinstance(value, float) else value for value in row] for row in rows]
    return [tag("div", *charts, class_="charts"), details("Every epoch, as in results.csv", table(names, whole))]


def _evaluation(path: Path) -> tuple[str, list[Any]]:
    """The name of an evaluation, and what its folder tells."""
    found, folder = json.loads(read_small(path)), path.parent
    told = {
        "top1": "top-1",
        "top5": "top-5",
        "loss": "loss",
        "macro_f1": "F1, mean of classes",
        "ece": "calibration error",
    }
    if len(found["classes"]) < FEWEST_FOR_TOP5:
        del told["top5"]
    shown = [(what, _figure(found[name], name == "loss")) for name, what in told.items()]
    parts: list[Any] = [
        tag(
            "p", f"{found['source']}, on {found['images']:,} images of {found['data']['id']}, {found['data']['split']}"
        ),
        cards([*shown, ("images that cannot be read", f"{found['unreadable']:,}")]),
        tag("h3", "Classes"),
        _classes(found["classes"]),
        tag("h3", "Confusion"),
        _confusion(folder, [c["name"] for c in found["classes"]]),
        _confused(found["confused"]),
    ]
    for title, name, alt in (
        ("Calibration", "reliability", "how often the model is right, by the probability that it gives"),
        ("Mistakes", "hardest", "the images with the highest loss, each with its class and prediction"),
    ):
        if drawn := picture(folder / f"{name}.png", alt):
            parts += [tag("h3", title), tag("p", f"{alt[0].upper()}{alt[1:]}.", class_="note"), drawn]
    return folder.name, parts


def _figure(value: float | None, plain: bool = False) -> str:
    return "none" if value is None else f"{value:.4f}" if plain else f"{value:.2%}"


def _classes(classes: list[dict[str, Any]]) -> Markup:
    shares = ([(_figure(c[name]), c[name]) if c[name] is not None else "" for name in MEASURES] for c in classes)
    rows = ([c["name"], c["images"], *share] for c, share in zip(classes, shares, strict=True))
    head = ["class", "images", "precision", "recall (top-1)", "F1"]
    return table(head, rows, sorts=True, filters="filter the classes")


def _confusion(folder: Path, names: list[str]) -> Markup:
    """A table of few classes, a row for each true one; of many the picture. Classes of the same name make one row."""
    names = list(dict.fromkeys(names))
    path = folder / "confusion.csv"
    if len(names) > MOST_CELLS or not path.is_file():
        return picture(folder / "confusion.png", "confusion matrix: true classes down, predictions across")
    counts: dict[tuple[str, str], int] = {}
    for label, prediction, images in read_rows(path):
        counts[label, prediction] = counts.get((label, prediction), 0) + int(images)
    totals = {name: sum(counts.get((name, other), 0) for other in names) for name in names}
    head = tag("tr", tag("th", ""), *(tag("th", short(name), scope="col") for name in names))
    rows = []
    for name in names:
        cells = [tag("th", short(name), scope="row")]
        for other in names:
            taken = counts.get((name, other), 0)
            heat = f"--h:{taken / max(1, totals[name]):.3f}"
            told = f"{name} taken for {other}: {taken} of {totals[name]}"
            kind = "right" if name == other else None
            cells.append(tag("td", taken or "", style=heat, title=told, class_=kind))
        rows.append(tag("tr", *cells))
    matrix = tag("table", tag("thead", head), tag("tbody", *rows), class_="heat")
    note = tag("p", "A row for each true class, a column for each prediction.", class_="note")
    return lines([note, tag("div", matrix, class_="scrolls", tabindex="0")])


def _confused(pairs: list[dict[str, Any]]) -> Markup:
    if not pairs:
        return tag("p", "No image is taken for another class.")
    rows = ([pair["label"], pair["prediction"], pair["images"]] for pair in pairs)
    return lines([tag("p", "Most confused:"), table(["class", "taken for", "images"], rows)])


def _settings(history: History) -> list[Any]:
    config, launch = history.config, history.launches[-1] if history.launches else {}
    data, classes = history.snapshot.get("data") or {}, history.snapshot.get("classes")
    rows = [("data", config.get("dataset_name") or config.get("data_dir") or config["dataset"])]
    if history.snapshot.get("revision"):
        rows.append(("revision", history.snapshot["revision"]))
    rows += [(f"{part} images", f"{told['images']:,}") for part, told in data.items()]
    if classes:
        rows.append(("classes", f"{len(classes):,}: {', '.join(short(name) for name in classes[:10])}"))
        if len(classes) > 10:
            rows[-1] = ("classes", f"{rows[-1][1]} ...")
    rows.append(("recipe", config.get("recipe") or "none"))
    if "lr" in history.snapshot:
        rows.append(("learning rate", f"{history.snapshot['lr']:.4g}"))
    rows += _machine(launch)
    changed = [
        (name, _plain(value), _plain(default), about) for name, value, default, about in changed_settings(config)
    ]
    return [
        table(["", "of this run"], rows),
        tag("h3", "Settings that differ from the defaults"),
        table(["setting", "value", "default", "what it is"], changed),
        details("All settings", table(["setting", "value"], [(name, _plain(config[name])) for name in config])),
        *([tag("h3", "First training images"), samples] if (samples := _samples(history.folder)) else []),
        *([tag("h3", "Learning rate finder"), finder] if (finder := _finder(history.folder)) else []),
    ]


def _samples(folder: Path) -> Markup:
    return picture(folder / "plots" / "samples.png", "images of the first batch, as the model sees them")


def _finder(folder: Path) -> Markup:
    return picture(folder / "lr_finder" / "lr_finder.png", "loss against the learning rate, with the suggestions")


def _machine(launch: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Of the last launch."""
    if not launch:
        return []
    packages = ", ".join(f"{name} {number}" for name, number in launch["packages"].items())
    gpu = f"{launch['gpu']}, CUDA {launch['cuda']}" if launch.get("gpu") else "none"
    rows = [("GPU", gpu), ("processes", str(launch["ranks"])), ("Python", launch["python"]), ("packages", packages)]
    return [*rows, ("revision of the program", launch.get("git") or "unknown")]


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return "none" if value in (None, [], ()) else f"{value:g}" if isinstance(value, float) else str(value)


def _events(history: History) -> list[Any]:
    folder = history.folder
    launches = [
        (number, launch["time"], tag("code", launch["command"])) for number, launch in enumerate(history.launches, 1)
    ]
    files = [
        (path.name, (f"{path.stat().st_size / 1e6:,.1f} MB", path.stat().st_size), _written(path))
        for path in snapshot_files(folder)
    ]
    skipped = count_skipped(folder)
    parts: list[Any] = [
        tag("h3", f"Launches: {len(launches)}"),
        tag("p", "The first started the run; each other one resumed it.") if len(launches) > 1 else "",
        table(["", "time", "command"], launches),
        tag("h3", f"Snapshots: {len(files)}"),
        table(["file", "size", "written"], files) if files else tag("p", "None is written yet."),
        tag("h3", "Where time went"),
        _time(history),
        tag("h3", f"Steps that were skipped: {skipped:,}"),
        tag("p", "By the gradient scaler of mixed precision, which tries smaller scales; a few are usual.")
        if skipped
        else tag("p", "No step."),
    ]
    return parts + _unreadable(folder)


def _written(path: Path) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(path.stat().st_mtime))


def _time(history: History) -> Markup:
    whole, training = sum(row["seconds"] for row in history.epochs), sum(history.training_seconds())
    if not whole:
        return tag("p", "No epoch is finished yet.")
    rows = [("training", training), ("evaluation", whole - training), ("all epochs", whole)]
    shown = [
        (name, (duration(seconds), seconds), (f"{seconds / whole:.1%}", seconds / whole)) for name, seconds in rows
    ]
    return table(["", "time", "share"], shown)


def _unreadable(folder: Path) -> list[Any]:
    path = folder / "unreadable.csv"
    rows = read_rows(path) if path.is_file() else []
    parts: list[Any] = [tag("h3", f"Images that could not be read: {len({row[0] for row in rows}):,}")]
    if not rows:
        return [*parts, tag("p", "No image.")]
    left = f"; the first {SHOWN} rows of unreadable.csv:" if len(rows) > SHOWN else ":"
    told = tag("p", f"Each was replaced by the next one that could be read{left}")
    return [*parts, told, table(["image", "reason", "epoch"], rows[:SHOWN])]


def _next(history: History, evaluated: bool) -> list[Any]:
    """The commands that come next."""
    run, config = shlex.quote(redact(str(history.folder))), history.config
    unfinished = len(history.epochs) < config["epochs"]
    parts = []
    if unfinished:
        parts.append(command(f"python main.py --resume_from {run}", "Go on with it:"))
    if config.get("scheduler") == "trapezoid":
        told = "Train longer, as if it had been planned so:"
        parts.append(
            command(f"python main.py --resume_from {run} --extend_epochs {max(1, config['epochs'] // 10)}", told)
        )
    elif not unfinished:
        dataset = f"--dataset {shlex.quote(config['dataset'])}"
        for name in ("dataset_name", "data_dir"):
            dataset += f" --{name} {shlex.quote(config[name])}" if config.get(name) else ""
        told = "Start a new run from its weights (--extend_epochs is for --scheduler trapezoid):"
        parts.append(command(f"python main.py {dataset} --use_pretrained {run}", told))
    told = (
        "Evaluate it again:" if evaluated else "Evaluate it, which adds classes, confusions and mistakes to this page:"
    )
    parts += [
        command(f"python evaluate.py {run}", told),
        command(f"python predict.py {run} photo.jpg", "Tell the classes of images:"),
        command(f"python export.py {run} --to onnx --out exported", "Hand it to another library:"),
        command(f"python main.py --compare {run} runs/OTHER", "Compare it with another run:"),
    ]
    return parts
