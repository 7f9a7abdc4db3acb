"""The model card: what an export is, written from the run's own records.

Names of classes, data and runs come from strangers: whatever is no number is escaped, for YAML or for Markdown.
"""

import csv
import html
import io
import json
import re
from dataclasses import fields
from pathlib import Path

from beforehand import WEIGHTS_ID
from choices import DATASETS
from config import Config
from errors import printable, redact
from results.agreement import Agreement
from results.formats import (
    PROGRAMS,
    Order,
    channels_of,
    filter_of,
    has_cifar_stem,
    resnet_name,
    short_side,
)
from results.programs import OPSET
from results.snippets import snippet_of
from training.sources import Source

LIBRARIES = {"transformers": "transformers", "timm": "timm", "torchvision": "torchvision", "onnx": "onnx"}
GROUPS = ("augmentation", "model", "training", "schedule")  # of the flags that a recipe is made of
PRIVATE = {"use_pretrained", "lr_from", "class_weights", "recipe", "device"}  # paths, and what is no part of a recipe
ALWAYS = {"epochs", "batch_size", "optimizer", "momentum", "weight_decay", "scheduler", "seed"}
FIGURES = ("images", "top1", "top5", "loss", "macro_precision", "macro_recall", "macro_f1", "ece")
SHOWN = 20  # classes named in the card


def model_card(order: Order, agreement: Agreement, classes: list[str], files: list[str]) -> str:
    """The text of README.md, with YAML front matter."""
    source = order.source
    figures = _figures(source)
    title = plain(f"{source.model} on {dataset_of(source)[0]}" if source.config else source.model)
    parts = [
        _front_matter(order, figures),
        f"# {title}",
        f"An image classifier of {len(classes):,} classes, exported for {order.format} ({order.precision}) from "
        f"{plain(origin(source))}.",
        "## How to load it\n\n" + snippet_of(order, len(classes)),
        "## Preprocessing\n\n" + _preprocessing(order),
        "## Figures\n\n" + _figures_text(source, figures, "curves.png" in files),
        "## Training\n\n" + _training(source),
        f"## Classes\n\n{_classes(classes)}",
        f"## Licence\n\n{plain(order.license) if order.license else 'Not stated.'}",
        f"## Check\n\nBefore it was called done, the export was loaded again and compared with the model that was "
        f"trained, on {plain(str(agreement))}.",
    ]
    return "\n\n".join(parts) + "\n"


def plain(text: str) -> str:
    """Text as Markdown and HTML show it letter by letter, in one line and without secrets."""
    escaped = html.escape(printable(redact(text)), quote=False)
    return re.sub(r"([\\`*_{}\[\]()#|~!+:@$-])", _entity, escaped)


def _entity(found: "re.Match[str]") -> str:
    """A character that means something to Markdown, unless it stands harmlessly in names."""
    return found[1] if found[1] in "-:()+" else f"&#{ord(found[1])};"


def origin(source: Source) -> str:
    """Where a source is from, without this machine's paths."""
    place, _, rest = source.told.partition(": step")
    named = place if WEIGHTS_ID.fullmatch(place) and not Path(place).exists() else Path(place).name
    where = f"{source.run.resolve().name}/{named}" if source.run else named
    return redact(f"{where}: step{rest}" if rest else where)


def dataset_of(source: Source) -> tuple[str, str | None]:
    """The name of the data, and its Hub id if it has one."""
    config = source.config
    if config is None:
        return "data that is not told", None
    name = config.dataset_id
    dataset = DATASETS[config.dataset]
    if dataset.on_hub and not config.dummy_data and WEIGHTS_ID.fullmatch(name):
        if not Path(name).exists():
            return name, name
        return f"a folder called {Path(name).name}", None
    if dataset.named_by:
        return f"a folder called {Path(name).resolve().name}", None
    return name, None


def _front_matter(order: Order, figures: dict[str, float]) -> str:
    """YAML in which each string is written as JSON, which YAML contains."""
    name, hub_id = dataset_of(order.source)
    tags = ["image-classification", "vision", order.format, *(["resnet"] if resnet_name(order.source) else [])]
    lines = [
        f"license: {quoted(order.license)}" if order.license else "license: unknown",
        f"library_name: {LIBRARIES.get(order.format, 'pytorch')}",
        "pipeline_tag: image-classification",
        "tags:",
        *(f"- {quoted(tag)}" for tag in tags),
    ]
    if hub_id:
        lines += ["datasets:", f"- {quoted(hub_id)}"]
    if figures:
        lines += [
            "model-index:",
            f"- name: {quoted((order.hub_id or order.source.model).rpartition('/')[2])}",
            "  results:",
            "  - task:",
            "      type: image-classification",
            "    dataset:",
            f"      name: {quoted(name)}",
            f"      type: {quoted(hub_id or order.source.config.dataset if order.source.config else name)}",
            "      split: validation",
            "    metrics:",
        ]
        for metric, value in figures.items():
            kind = "accuracy" if metric.startswith("top") else metric
            lines += [f"    - type: {quoted(kind)}", f"      name: {quoted(metric)}", f"      value: {value!r}"]
    return "\n".join(["---", *lines, "---"])


def quoted(text: str) -> str:
    """A string as YAML and JSON write it, in ASCII and without secrets."""
    return json.dumps(redact(printable(text)))


def _figures(source: Source) -> dict[str, float]:
    """Top-1, top-5 and loss of these weights in the run's own validation, from the row of their step."""
    if source.run is None:
        return {}
    try:
        text = (source.run / "results.csv").read_text(encoding="utf-8")
        row = next(row for row in csv.DictReader(io.StringIO(text)) if row["step"] == str(source.state.get("step")))
        part = "ema" if source.averaged else "val"
        found = {name: row.get(f"{part}_{name}") for name in ("top1", "top5", "loss")}
        return {name: float(value) for name, value in found.items() if value}
    except (OSError, LookupError, ValueError, StopIteration):
        return {}


def _figures_text(source: Source, figures: dict[str, float], has_curves: bool) -> str:
    parts = []
    if figures:
        rows = [f"| {name} | {_figure(name, value)} |" for name, value in figures.items()]
        told = f"On the run's validation images, at step {int(source.state['step'])}:"
        parts.append("\n".join([told, "", "| figure | value |", "|---|---|", *rows]))
    for path in sorted((source.run / "evaluation").glob("*/evaluation.json")) if source.run else []:
        found = _numbers(path, source)
        if found:
            rows = [f"| {name} | {_figure(name, value)} |" for name, value in found.items()]
            told = f"As evaluate.py left it with the run, on {plain(path.parent.name)}:"
            parts.append("\n".join([told, "", "| figure | value |", "|---|---|", *rows]))
    if has_curves:
        parts.append("![loss and accuracy over the run](curves.png)")
    return "\n\n".join(parts) or "None are recorded with these weights."


def _numbers(path: Path, source: Source) -> dict[str, float]:
    """The figures of an evaluation; none of one of other weights of the run."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["source"].rpartition(": ")[2] != source.told.rpartition(": ")[2]:
            return {}
        return {name: float(found[name]) for name in FIGURES if isinstance(found.get(name), int | float)}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return {}


def _figure(name: str, value: float) -> str:
    if name in ("top1", "top5"):
        return f"{value:.2%}"
    return f"{value:,.0f}" if name == "images" else f"{value:.4g}"


def _training(source: Source) -> str:
    config = source.config
    if config is None:
        return "Not recorded with these weights."
    name, hub_id = dataset_of(source)
    data = f"[{plain(name)}](https://huggingface.co/datasets/{hub_id})" if hub_id else plain(name)
    rows = [("data", data), ("model", plain(source.model)), ("step", plain(str(source.state.get("step"))))]
    if isinstance(rate := source.state.get("lr"), int | float):
        rows.append(("peak learning rate", f"{rate:.4g}"))
    if config.recipe:
        rows.append(("recipe", plain(config.recipe.rpartition("/")[2])))
    for item in fields(Config):
        value = getattr(config, item.name)
        told = item.metadata["group"] in GROUPS and item.name not in PRIVATE | {"model", "lr"}
        if told and (item.name in ALWAYS or value != item.default) and value is not None:
            rows.append((f"`--{item.name}`", plain(str(value))))
    revision = source.state.get("revision")
    if isinstance(revision, str):
        rows.append(("revision of the data", plain(revision)))
    return "\n".join(["| setting | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def _preprocessing(order: Order) -> str:
    source = order.source
    size, short = source.settings["eval_size"], short_side(source)
    mean, std = channels_of(source)
    kind = source.settings["eval_interpolation"]
    told = (
        f"The short side is resized to {short} pixels ({filter_of(source)}, antialiased), the middle {size} x {size} "
    )
    told += f"are kept, and pixels in 0..1 are normalised with mean {mean} and deviation {std}."
    if order.format in PROGRAMS:
        how = "by areas where the image shrinks and bilinear where it grows" if kind == "fast" else filter_of(source)
        extra = f" ONNX opset {OPSET}." if order.format == "onnx" else ""
        return (
            f"All of it is inside: the program takes one image as uint8 (height, width, 3) in RGB, of any size, and "
            f"returns probabilities (classes). It resizes the short side to {short} pixels ({how}), keeps the middle "
            f"{size} x {size}, and normalises with mean {mean} and deviation {std}.{extra}"
        )
    if kind == "fast":
        told += " The figures below are from a faster resizing by areas, which differs slightly."
    if has_cifar_stem(source):
        told += " The first convolution is 3x3 with stride 1 and there is no pooling before the blocks."
    return told


def _classes(classes: list[str]) -> str:
    named = ", ".join(plain(name) for name in classes[:SHOWN])
    return named + (f", and {len(classes) - SHOWN:,} more, in imagenet1k.json." if len(classes) > SHOWN else ".")
