"""What flags and folders tell of a run before torch, data and model are there, so that a refusal takes a moment."""

import json
import math
import os
import re
import stat
import struct
import tempfile
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import config as configuration
import ranks
from checks import require_effect
from choices import DATASETS, dataset_named
from config import Config
from errors import DataError, SnapshotError, UsageError
from flags import listed
from stream.files import read_small
from stream.policies import read_policy

WEIGHTS_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
DATASET_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
BEST = "best.safetensors"
COOLDOWN = "cooldown.safetensors"  # before the first step of a trapezoid that is cooled
SIDECAR = "imagenet1k.json"  # beside exported weights: model, options, layout, classes, settings
HEADER_BYTES = 2**27  # at most, of a safetensors file
FOLDERS = {"imagefolder", *(name for name in DATASETS.names() if DATASETS[name].evaluated_only)}  # --data_dir's


def step_files(folder: Path) -> list[Path]:
    """The snapshots of a folder in the order of their steps, without `best`."""
    return sorted(folder.glob(f"step-{'[0-9]' * 9}.safetensors"))


def kept_apart(folder: Path) -> list[Path]:
    """The snapshots of a folder that are not named by their step."""
    return [path for path in (folder / BEST, folder / COOLDOWN) if os.path.lexists(path)]


def holds_run(folder: Path) -> bool:
    """Whether a folder has a snapshot, sound or not: a resume looks at it, and no other run may be begun there."""
    return bool(step_files(folder / "snapshots") or kept_apart(folder / "snapshots"))


def resumed(given: Mapping[str, Any]) -> Path | None:
    """The run folder or snapshot file to resume from, if any. `auto` is --run_dir once that has a snapshot."""
    if given.get("resume_from") != "auto":
        return Path(given["resume_from"]) if "resume_from" in given else None
    if "run_dir" not in given:
        raise UsageError("--resume_from auto needs --run_dir, the folder to look in")
    folder = Path(given["run_dir"])
    return folder if holds_run(folder) else None


def look(given: Mapping[str, Any]) -> list[str]:
    """Refuse a training that cannot be, and return a line for each flag that has no effect in it. Raises UserError."""
    ranks.require_whole()
    if "extend_epochs" in given and given.get("resume_from", "auto") == "auto":
        raise UsageError("--extend_epochs extends a run that there is; name it: --resume_from RUN --extend_epochs N")
    source, saved = resumed(given), None
    if source is None:
        if "override" in given:
            raise UsageError("--override goes with --resume_from and a snapshot; give the flag itself")
        config = configuration.resolve(given)
        lines = require_effect(config, given)
    else:
        if source.is_dir() and not holds_run(source):
            raise SnapshotError(f"{source} holds no run: no snapshots are in it; give the folder of one, or start anew")
        if "extend_epochs" in given:
            _require_run(source, given)
        saved = saved_settings(source)
        if saved is None:
            return []
        config = configuration.resume(saved, given)
        if config.extend_epochs:
            require_extendable(config)
        lines = require_effect(config, {**given, **configuration.overrides(given)}, saved)
    config.check_world(ranks.told_world())
    require_trainable(config)
    _require_data(config.dataset, vars(config))
    _require_files(config, saved or {})
    if config.auto_augment:
        _require_policy(config.auto_augment)
    if source is None and config.use_pretrained:
        require_source(config.use_pretrained)
    if not ranks.told_rank():
        if config.track:
            from tracking.clients import require_packages

            require_packages(listed(config.track))
        folder = config.run_dir or (source if source and source.is_dir() else "runs")
        if not config.dry_run and not config.extend_epochs:
            _require_run_dir(Path(folder), is_new=source is None and given.get("resume_from") is None)
    return lines


def look_at_source(given: Mapping[str, Any], with_data: bool = False) -> None:
    """Refuse what cannot be done with a trained model, and `with_data`, the given or its run's. Raises UserError."""
    ranks.require_whole()
    require_source(given["source"])
    source = Path(given["source"])
    saved = (saved_settings(source) if with_data and source.exists() else None) or {}
    if dataset := dataset_named(given) or saved.get("dataset"):
        _require_data(dataset, given if "dataset" in given else {**saved, **given})
    if "real_labels" in given:
        _require_file("real_labels", given["real_labels"], "give its JSON list", DataError)


def require_source(text: str) -> None:
    """Refuse what cannot be a model source. Raises UsageError, DataError."""
    path = Path(text).expanduser()
    if "://" in text:
        raise UsageError(f"{text} is a URL; give a Hub id or something on this machine")
    if path.is_dir() or path.is_file():
        return
    if path.exists():
        raise DataError(f"{text} is neither a folder nor a file; give a model")
    if not is_weights_id(text):
        raise DataError(f"there is no {text}; give a run folder, a snapshot, a folder or file of weights, or a Hub id")


def is_weights_id(text: str) -> bool:
    """Whether a model source that is not on this machine may be one of the Hub."""
    path = Path(text)
    return bool(
        WEIGHTS_ID.fullmatch(text) and not path.parent.is_dir() and path.suffix not in (".pth", ".pt", ".safetensors")
    )


def saved_settings(source: Path) -> dict[str, Any] | None:
    """The settings in a snapshot, or in the newest one of a run folder; None where only a closer look tells them.

    The file is not verified. Raises SnapshotError where there is none.
    """
    if not source.exists():
        raise SnapshotError(f"cannot read snapshot {source}: No such file or directory; give a run folder or a file")
    folder = source / "snapshots"
    files = [*kept_apart(folder), *step_files(folder)] if source.is_dir() else [source]
    try:
        if not stat.S_ISREG(files[-1].lstat().st_mode):  # opening a pipe would wait
            return None
        with open(files[-1], "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length)) if length < HEADER_BYTES else {}
        saved = json.loads(header["__metadata__"]["state"])["config"]
    except (OSError, struct.error, ValueError, LookupError, TypeError, RecursionError):
        return None
    return saved if isinstance(saved, dict) else None


def require_trainable(config: Config) -> None:
    """Refuse a dataset that is there to evaluate on, with UsageError."""
    if DATASETS[config.dataset].evaluated_only:
        raise UsageError(f"--dataset {config.dataset} is there to evaluate on, with evaluate.py; train on another")


def require_extendable(config: Config) -> None:
    """Refuse a run, with the settings of its extension, that cannot have been planned longer, with UsageError."""
    if config.scheduler != "trapezoid":
        raise UsageError(
            f"--extend_epochs goes with --scheduler trapezoid, and this run has --scheduler {config.scheduler}, whose "
            f"rate depends on the epochs from the start; --override epochs={config.epochs} goes on with another plan"
        )


def _require_run(source: Path, given: Mapping[str, Any]) -> None:
    """Refuse what --extend_epochs does not go with, with UsageError."""
    if not source.is_dir():
        raise UsageError(f"--extend_epochs extends a run, and {source} is no folder of one; give that")
    if "epochs" in configuration.overrides(given):
        raise UsageError("--extend_epochs and --override epochs=... both tell the epochs; give one of them")


def require_no_run(folder: Path) -> None:
    """Refuse a folder for a new run that holds another, with UsageError."""
    if holds_run(folder):
        raise UsageError(f"{folder} already holds a run; go on with --resume_from {folder}, or give another --run_dir")


def _require_data(dataset: str, given: Mapping[str, Any]) -> None:
    """Raises DataError where a folder that the flags name is not there."""
    folder, name = given.get("data_dir"), given.get("dataset_name")
    if folder and dataset in FOLDERS and not Path(folder).is_dir():
        raise DataError(f"{folder} is not a folder; give --data_dir one with a folder a class, or with train/ and val/")
    if name and not Path(name).is_dir() and (Path(name).exists() or not DATASET_ID.fullmatch(name)):
        raise DataError(
            f"--dataset_name {name} is no folder, and no id of the Hub, such as timm/mini-imagenet; give one of these"
        )
    if given.get("val_labels"):
        _require_file("val_labels", given["val_labels"], "give a CSV file or a label a line", DataError)


def _require_files(config: Config, saved: Mapping[str, Any]) -> None:
    """Raises UsageError where a file that the flags name cannot be read. A snapshot has what its own files held."""
    if config.class_weights not in (None, "balanced", saved.get("class_weights")):
        _require_file("class_weights", config.class_weights, "give a number a line")
    if config.lr_from not in (None, saved.get("lr_from")) and not config.find_lr:
        found = _require_file("lr_from", config.lr_from, "run run_lr_finder.py first")
        try:
            rate = json.loads(found)["suggested_lr"]
            if not isinstance(rate, float) or not 0 < rate < math.inf:
                raise ValueError("it holds no suggestion")
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise UsageError(
                f"--lr_from {config.lr_from} is not an lr_finder.json ({error}); run run_lr_finder.py first"
            ) from error
    if config.cache_dir and Path(config.cache_dir).exists() and not Path(config.cache_dir).is_dir():
        raise UsageError(f"--cache_dir {config.cache_dir} is no folder; give one")
    asks = "--optimizer lamb" if config.optimizer == "lamb" else f"--model {config.model}"
    if ("lamb" in asks or "timm:" in asks) and not find_spec("timm"):
        raise UsageError(f"{asks} is timm's; install timm: pip install timm")


def _require_file(name: str, text: str, hint: str, kind: type[UsageError] | type[DataError] = UsageError) -> bytes:
    try:
        return read_small(Path(text))
    except OSError as error:
        raise kind(f"--{name} {text} cannot be read ({error.strerror}); {hint}") from error


def _require_policy(text: str) -> None:
    try:
        read_policy(text)
    except ValueError as error:
        raise UsageError(f"--auto_augment: {error}") from error


def _require_run_dir(folder: Path, is_new: bool) -> None:
    """Raises UsageError where no run can be written. Nothing stays of the attempt."""
    if is_new:
        require_no_run(folder)
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise UsageError(f"cannot write {folder} ({error.strerror}); give another --run_dir") from error
