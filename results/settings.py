"""Which data a model is evaluated on, and how its images are prepared: the source's own, but for what is given."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from choices import DATASETS, dataset_named
from config import Config, resolve
from errors import UsageError

if TYPE_CHECKING:
    from training.sources import Source

NAMES_DATA = frozenset(
    {
        *("dataset", "dataset_name", "dataset_revision", "dataset_config", "data_dir", "image_column", "label_column"),
        *("num_classes", "train_split", "val_split", "val_share", "val_labels", "max_samples", "dummy_data"),
    }
)
FLAGS = NAMES_DATA | {
    *("eval_size", "eval_interpolation", "eval_crop_pct", "mean", "std", "tta", "num_workers", "batch_size"),
    *("cache_dir", "cache_limit_gb", "cache_short_side", "cache_format"),
    *("stall_timeout", "network_patience", "no_streaming"),
    *("block_mb", "max_bad_fraction", "amp", "amp_dtype", "compile", "device", "seed"),
}
STAYS = ("amp", "amp_dtype", "device", "tta", "seed")  # of a run, on a dataset that is named


def evaluation_settings(source: "Source", given: Mapping[str, Any]) -> Config:
    """The settings of an evaluation: a run's or, of a named --dataset, its defaults; those of the weights; the given.

    Raises UsageError.
    """
    flags = {name: value for name, value in given.items() if name in FLAGS}
    places = {"dataset_name", "data_dir"} & flags.keys()
    if places and (source.config is None or not places <= {*DATASETS[source.config.dataset].takes}):
        flags["dataset"] = dataset_named(flags)
    suited = {name: value for name, value in source.settings.items() if value is not None}
    if source.config is None or "dataset" in flags:
        if "dataset" not in flags:
            raise UsageError(f"{source.told} brings no data along; name some, such as --dataset imagenet1k")
        stays = {name: getattr(source.config, name) for name in STAYS} if source.config else {}
        return resolve(stays | suited | {"streams": 1} | flags)
    changed: dict[str, Any] = {"streams": 1, "compile": False}
    if "batch_size" in flags:
        changed["accumulate_steps"] = 1
    if flags.keys() & {"val_split", "val_labels"}:
        changed["val_share"] = None
    if "val_share" in flags:
        changed |= {"val_split": None, "val_labels": None}
    return replace(source.config, **suited | changed | flags)
