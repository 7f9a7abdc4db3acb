"""An evaluation from a model source to its files."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

import distributed
from checks import require_effect
from choices import DATASETS
from config import Config
from defaults import SMALL_SET
from distributed import print0
from errors import DataError, SnapshotError, UsageError
from open_data import open_validation
from preprocess import describe_change, evaluation_loader
from report import write_report
from results.charts import draw_all
from results.class_map import BY_IMAGENET, BY_NAME, ClassMap, imagenet_class_names, map_classes
from results.figures import figures_of, fit_temperature
from results.places import make_folder
from results.real_labels import read_real_labels
from results.report import FILES, Evaluation, describe, safe, write_files
from results.scores import Judge, collect
from results.settings import FLAGS, NAMES_DATA, evaluation_settings
from stream.labels import first_difference, without_images
from stream.loader import Loader
from stream.source import ImageDataset
from training.predictor import Predictor, build_predictor
from training.signals import StopRequest
from training.sources import Source, open_source
from training.step import is_out_of_memory
from visualization import drawn

CHEAP = 10_000  # images whose labels are read from the Hub to see which classes have any
T = TypeVar("T")


@dataclass(frozen=True)
class Task:
    """What is evaluated on what; `changes` tell how a run's data is not its own, None for a source that is no run."""

    source: Source
    config: Config
    dataset: ImageDataset
    names: list[str]
    judge: Judge
    how: str
    changes: list[str] | None


def evaluate(given: Mapping[str, Any]) -> None:
    """Evaluate `source` with the given flags; print the figures and write the files. Raises UserError, Interrupted."""
    patience = 60 * given.get("network_patience", 30.0)
    source = open_source(given["source"], given.get("which"), given.get("model", "auto"), patience)
    config = evaluation_settings(source, given)
    own = {name: value for name, value in given.items() if name in FLAGS}
    notes = require_effect(config, own, vars(source.config) if source.config else None)
    device = distributed.init(config.device, patience)
    distributed.require_agreement({f"--{name}": value for name, value in given.items()})
    model = source.build()
    task = _open(source, config, given)
    print0(*_describe(task), *notes, sep="\n")
    predictor = build_predictor(model, config, device)
    _require_size(predictor, config, source)
    folder = _folder(given, task)
    distributed.from_rank0(lambda: make_folder(folder))
    loader = evaluation_loader(config, device, task.dataset)
    found = _within_memory(lambda: _score(predictor, loader, task, bool(given.get("temperature"))), config)
    if distributed.rank() == 0:
        print(*describe(found), sep="\n", flush=True)
        write_files(found, task.dataset, folder)
        draw_all(found, folder, lambda ids: _read(evaluation_loader(config, device, task.dataset, ids)))
        print(f"wrote     {folder}: {FILES}", flush=True)
        run = task.source.run
        if run is not None and (run / "config.json").is_file() and drawn(lambda: write_report(run), run, "report.html"):
            print(f"wrote     {run / 'report.html'}", flush=True)


def _open(source: Source, config: Config, given: Mapping[str, Any]) -> Task:
    """Open the data and find its classes among the model's. Raises DataError, UsageError, SnapshotError."""
    may_differ = bool(given.keys() & NAMES_DATA) or bool(given.get("any_data")) or source.config is None
    revision = None if may_differ else source.state.get("revision")
    opened = open_validation(config, revision, sampled_with_training=not may_differ)
    if not len(opened):
        raise DataError(f"{config.dataset_id} has no image to evaluate on; give another")
    count = source.count
    try:
        found = map_classes(opened.classes, source.classes, count, lambda: without_images(opened))
    except DataError as error:
        if may_differ:
            raise
        raise _refused(source, first_difference(source.classes or [], opened.classes) or str(error)) from error
    dataset = opened
    if source.classes is not None and found.how == BY_NAME and opened.classes != source.classes:
        dataset = opened.with_classes(source.classes)
    changes = _changes(source, dataset) if source.config else None
    if changes and not may_differ:
        raise _refused(source, "; ".join(changes))
    names = source.classes or _names(opened, found, count)
    allowed = None if changes == [] or given.get("all_classes") else _allowed(opened, found, count, config)
    options = None
    if "real_labels" in given:
        options = read_real_labels(Path(given["real_labels"]), dataset, source.classes, count)
    numbers = found.numbers if dataset is opened else np.arange(count)
    return Task(source, config, dataset, names, Judge(numbers, allowed, options), found.how, changes)


def _refused(source: Source, why: str) -> UsageError:
    return UsageError(
        f"the data is not what {source.told} was evaluated on in training: {why}; give that again, or evaluate on this "
        "by naming it, with --dataset, --data_dir or --val_split"
    )


def _names(dataset: ImageDataset, found: ClassMap, count: int) -> list[str]:
    """Names for the classes of a model that does not name them: ImageNet's, else the data's."""
    if count == 1000 and found.how == BY_IMAGENET:
        return imagenet_class_names()
    names = [str(number) for number in range(count)]
    for name, number in zip(dataset.classes, found.numbers.tolist(), strict=True):
        names[number] = name
    return names


def _allowed(dataset: ImageDataset, found: ClassMap, count: int, config: Config) -> np.ndarray | None:
    """The model's classes that the data has, if these are some of them; None for all, and for a single one."""
    seen = found.numbers >= 0
    is_local = getattr(dataset, "revision", None) is None and len(dataset) <= SMALL_SET
    if config.max_samples is None and (is_local or len(dataset) <= CHEAP):
        labels = dataset.all_labels()
        if labels is not None:
            seen &= np.bincount(labels, minlength=len(seen)) > 0
    allowed = np.unique(found.numbers[seen])
    return allowed if 2 <= len(allowed) < count else None


def _changes(source: Source, dataset: ImageDataset) -> list[str]:
    """In words, what tells a set from the one that a run was evaluated on while it trained. Raises SnapshotError."""
    try:
        before = source.state["data"]["validation"]
        if before == {"images": len(dataset), "digest": dataset.fingerprint()}:
            return []
        return [describe_change("validation", before, dataset, source.run)]
    except (LookupError, TypeError) as error:
        raise SnapshotError(f"{source.told} does not describe its data; give another") from error


def _describe(task: Task) -> list[str]:
    source, count = task.source, len(task.names)
    lines = [
        f"source    {source.told}",
        f"images    {task.config.dataset_id}, {_split(task.config)}: {len(task.dataset):,}",
        f"classes   {count:,} of {source.model}, matched {task.how}",
        *(f"note      {note}" for note in task.dataset.notes),
        *(f"data      not the run's own: {line}" for line in task.changes or []),
    ]
    if task.judge.allowed is not None:
        lines.append(
            f"subset    only the {len(task.judge.allowed):,} of these classes that the data has can be predicted; "
            "--all_classes allows all"
        )
    return lines


def _split(config: Config) -> str:
    """Which part of the data is evaluated, in a word."""
    if config.val_share:
        return f"{config.val_share:g} held out"
    return config.val_split or "validation"


def _folder(given: Mapping[str, Any], task: Task) -> Path:
    if "out" in given:
        return Path(given["out"])
    config = task.config
    dataset = DATASETS[config.dataset]
    of_any = dataset.named_by and not dataset.evaluated_only
    data = config.dataset_id.rstrip("/") if of_any else config.dataset
    name = safe(f"{Path(data).name if os.path.isdir(data) else data}-{_split(config)}")
    if task.source.run is not None:
        return task.source.run / "evaluation" / name
    path = Path(given["source"])
    return Path("evaluation") / safe(path.stem if path.is_file() else path.name if path.is_dir() else str(path)) / name


def _require_size(predictor: Predictor, config: Config, source: Source) -> None:
    """Refuse an --eval_size that the model cannot take."""
    if config.eval_size == source.settings["eval_size"]:
        return
    image = torch.zeros((1, config.eval_size, config.eval_size, 3), dtype=torch.uint8, device=predictor.device)
    try:
        with torch.inference_mode():
            predictor.model.eval()
            predictor.logits(image)
    except (RuntimeError, AssertionError, ValueError) as error:
        why = " ".join(str(error).split())[:160]
        raise UsageError(
            f"{source.model} does not take an --eval_size of {config.eval_size} ({why}); leave it out"
        ) from error


def _score(predictor: Predictor, loader: Loader, task: Task, with_temperature: bool) -> Evaluation:
    count, stop = len(task.names), StopRequest.listening(loader)
    scores = collect(predictor, loader, stop, task.judge, count, with_temperature)
    classes = np.arange(count) if task.judge.allowed is None else task.judge.allowed
    about = {"source": task.source.told, "data": _about_data(task), "settings": _about_settings(task.config)}
    fit = None
    if scores.logits is not None and scores.logit_labels is not None:
        fit = fit_temperature(scores.logits, scores.logit_labels)
    return Evaluation(about, task.names, scores, figures_of(scores, task.names, classes), fit)


def _within_memory(run: Callable[[], T], config: Config) -> T:
    """Raises UsageError when the device runs out of memory."""
    try:
        return run()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise UsageError(
            f"a batch of {config.batch_size} images does not fit into the device's memory; give a smaller --batch_size"
        ) from error


def _about_data(task: Task) -> dict[str, Any]:
    config = task.config
    told: dict[str, Any] = {"dataset": config.dataset, "id": config.dataset_id, "split": _split(config)}
    told |= {"revision": getattr(task.dataset, "revision", None), "max_samples": config.max_samples}
    told |= {"matched": task.how, "restricted": task.judge.allowed is not None, "own": task.changes == []}
    return told | {"real_labels": task.judge.options is not None}


def _about_settings(config: Config) -> dict[str, Any]:
    """The flags that an evaluation has, without those that name its data."""
    return {name: getattr(config, name) for name in sorted(FLAGS - NAMES_DATA)}


def _read(loader: Loader) -> np.ndarray:
    return np.concatenate([batch.images.cpu().numpy() for batch in loader])
