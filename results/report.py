"""An evaluation as text for people, and as JSON and CSV for programs."""

import csv
import io
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from defaults import FEWEST_FOR_TOP5
from pages.names import short
from results.figures import WORST, Figures, Temperature, confusions
from results.scores import Scores
from stream.files import strict_json, write_durably
from stream.source import ImageDataset
from units import as_rate

FILES = "evaluation.json, confusion.csv, predictions.csv and pictures"


@dataclass(frozen=True)
class Evaluation:
    """All that an evaluation found; `about` tells source, data and settings."""

    about: Mapping[str, Any]
    names: list[str]
    scores: Scores
    figures: Figures
    temperature: Temperature | None = None

    @property
    def images_per_s(self) -> float:
        return (self.figures.images + self.scores.unreadable) / self.scores.seconds


def safe(text: str) -> str:
    """The text as the name of a folder."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.")[:80] or "data"


def describe(found: Evaluation) -> list[str]:
    """The lines for people."""
    figures, scores, names = found.figures, found.scores, found.names
    line = f"val loss {figures.loss:.4f}  top1 {figures.top1:.2%} ({figures.correct1} of {figures.images})"
    if len(figures.classes) >= FEWEST_FOR_TOP5:
        line += f"  top5 {figures.top5:.2%} ({figures.correct5})"
    lines = [
        line,
        f"macro     precision {figures.macro_precision:.2%}  recall {figures.macro_recall:.2%}  F1 "
        f"{figures.macro_f1:.2%}, over the {len(figures.with_images):,} classes with images",
        f"ece       {figures.ece:.2%}, the expected calibration error",
    ]
    if (fit := found.temperature) is not None:
        lines.append(
            f"temper.   {fit.value:.3f} divides the logits best: on {fit.images:,} of these images loss "
            f"{fit.loss_before:.4f} -> {fit.loss_after:.4f}, ece {fit.ece_before:.2%} -> {fit.ece_after:.2%}"
        )
    if scores.unreadable:
        lines.append(f"bad       {scores.unreadable:,} images cannot be read, and do not count")
    if scores.unlabelled:
        lines.append(f"no label  {scores.unlabelled:,} images have no ReaL label, and do not count")
    for label, prediction, count in figures.confused:
        lines.append(f"confused  {short(names[label])} taken for {short(names[prediction])}: {count:,}")
    for worst in figures.with_images[:WORST]:
        if worst.recall is None or worst.recall == 1:
            break
        lines.append(f"worst     {short(worst.name)}: {worst.recall:.2%} of {worst.images:,}")
    return [*lines, f"speed     {as_rate(found.images_per_s)} images/s, the start of reading included"]


def as_json(found: Evaluation) -> dict[str, Any]:
    """What evaluation.json holds; a figure that is no number is null."""
    figures, names = found.figures, found.names
    numbers = {"top1": figures.top1, "top5": figures.top5, "loss": figures.loss}
    numbers |= {name: getattr(figures, name) for name in ("macro_precision", "macro_recall", "macro_f1", "ece")}
    numbers["images_per_s"] = found.images_per_s
    classes = [
        {"name": c.name, "images": c.images, "top1": c.recall, "precision": c.precision, "recall": c.recall, "f1": c.f1}
        for c in figures.classes
    ]
    result: dict[str, Any] = {"images": figures.images}
    result |= {name: value if math.isfinite(value) else None for name, value in numbers.items()}
    result |= {"classes": classes, **found.about}
    result["confused"] = [
        {"label": names[label], "prediction": names[prediction], "images": count}
        for label, prediction, count in figures.confused
    ]
    result |= {"unreadable": found.scores.unreadable, "unlabelled": found.scores.unlabelled}
    if found.temperature is not None:
        result["temperature"] = asdict(found.temperature)
    return result


def write_files(found: Evaluation, dataset: ImageDataset, folder: Path) -> None:
    """Write evaluation.json, confusion.csv (the pairs that occur) and predictions.csv. Raises OSError."""
    scores, names = found.scores, found.names
    table = _csv(
        ("label", "prediction", "images"),
        ((names[label], names[prediction], count) for label, prediction, count in confusions(scores)),
    )
    write_durably(folder / "confusion.csv", table)
    columns = (scores.labels.tolist(), scores.predictions.tolist(), scores.probabilities.tolist())
    rows = (
        (image, names[label], names[prediction], f"{probability:.6f}")
        for image, label, prediction, probability in zip(dataset.names(scores.ids), *columns, strict=True)
    )
    write_durably(folder / "predictions.csv", _csv(("image", "label", "prediction", "probability"), rows))
    text = strict_json(as_json(found), indent=1, ensure_ascii=False)
    write_durably(folder / "evaluation.json", text.encode(errors="backslashreplace"))


def _csv(columns: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
    writer.writerow(columns)
    writer.writerows(rows)
    return text.getvalue().encode(errors="backslashreplace")


def hardest(scores: Scores, count: int) -> np.ndarray:
    """The places in `scores` of the images with the highest loss, the hardest first."""
    return np.argsort(-scores.losses, kind="stable")[:count]
