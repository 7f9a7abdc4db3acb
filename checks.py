"""Settings that do not fit together, or not the number of ranks, or have no effect: which, and what to do."""

from collections import ChainMap
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from choices import BUILT_IN_SCHEDULES, DATASETS
from errors import UsageError
from flags import size_points
from hints import inverse

Rule = tuple[object, str]


class Need(NamedTuple):
    """What a flag needs to have an effect: in words, and whether settings have it."""

    told: str
    is_met: Callable[[Any], object]

    def __and__(self, other: "Need") -> "Need":
        return Need(f"{self.told} and {other.told}", lambda settings: self.is_met(settings) and other.is_met(settings))


def scheduled(*names: str) -> Need:
    """One of these schedules, or one that an extension registers, which may read any flag."""
    told = f"--scheduler {' or '.join(names)}"
    return Need(told, lambda s: s.scheduler in names or s.scheduler not in BUILT_IN_SCHEDULES)


def takes(flag: str) -> Need:
    """A dataset that takes the flag."""
    takers = [name for name in DATASETS.names() if flag in DATASETS[name].takes]
    return Need(f"--dataset {' or '.join(takers)}", lambda s: flag in DATASETS[s.dataset].takes)


def _is_remote(settings: Any) -> bool:
    is_folder = settings.dataset_name is not None and Path(settings.dataset_name).is_dir()
    return DATASETS[settings.dataset].on_hub and not settings.dummy_data and not is_folder


ONE_CYCLE = scheduled("onecycle")
OTHER_SCHEDULE = scheduled("cosine", "linear", "step", "trapezoid")
STREAMED = Need("a dataset that is streamed, imagenet1k or hf", lambda s: DATASETS[s.dataset].on_hub)
REMOTE = Need("a dataset of the Hub", _is_remote)
FILES = Need("a dataset of image files, not one that is kept in memory", lambda s: not DATASETS[s.dataset].in_memory)
RESIZED = Need("--crop resized", lambda s: s.crop == "resized")
OWN_MODEL = Need("a model of this program's own", lambda s: ":" not in s.model)
DROPS_PATHS = Need("a model of this program's own or timm's", lambda s: not s.model.startswith("torchvision:"))
NEW_WEIGHTS = Need("new weights, so no --use_pretrained", lambda s: s.use_pretrained is None)
AVERAGE = Need("--ema_decay", lambda s: s.ema_decay)
MIXED_PRECISION = Need("--amp", lambda s: s.amp)
BINARY = Need("--loss bce", lambda s: s.loss == "bce")
SGD = Need("--optimizer sgd", lambda s: s.optimizer == "sgd")
FIXED_MOMENTUM = Need(
    "--onecycle_fixed_momentum or another --scheduler",
    lambda s: s.scheduler != "onecycle" or s.onecycle_fixed_momentum,
)
CYCLED_MOMENTUM = ONE_CYCLE & Need("no --onecycle_fixed_momentum", lambda s: not s.onecycle_fixed_momentum)
WARM_UP = OTHER_SCHEDULE & Need("--warmup_epochs", lambda s: s.warmup_epochs)
OWN_RISE = ONE_CYCLE & Need("no --warmup_epochs", lambda s: not s.warmup_epochs)
EVERY_STEP_SIZE = scheduled("step") & Need("no --milestones", lambda s: not s.milestones)
FINDER = Need("--find_lr or --lr auto", lambda s: s.find_lr or s.lr == "auto")


def idle(settings: Any, given: Mapping[str, Any]) -> dict[str, str]:
    """What the `given` ones of these settings lack, by name, where they have no effect; a default needs none."""
    needs = {item.name: item.metadata["needs"] for item in fields(settings) if item.name in given}
    usual = {item.name: item.default for item in fields(settings)}
    return {
        name: need.told
        for name, need in needs.items()
        if need is not None and given[name] != usual[name] and not need.is_met(settings)
    }


def typed(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """The flags of the command line, without a recipe's."""
    return given.maps[0] if isinstance(given, ChainMap) else given


def without_idle(settings: Any, given: Mapping[str, Any]) -> Mapping[str, Any]:
    """The given flags without what a recipe sets that has no effect with these settings."""
    gone = idle(settings, given).keys() - typed(given).keys()
    return {name: value for name, value in given.items() if name not in gone} if gone else given


def require_effect(settings: Any, given: Mapping[str, Any], saved: Mapping[str, Any] | None = None) -> list[str]:
    """A line for each given flag that has no effect with these settings; what is as `saved` needs none.

    Raises UsageError for a flag that would change the result if it had one, unless a recipe sets it.
    """
    new = {name: value for name, value in given.items() if saved is None or value != saved.get(name)}
    fixed = {item.name for item in fields(settings) if item.metadata["on_resume"] == "fixed"}
    lines = []
    for name, lacking in idle(settings, new).items():
        value = new[name]
        told = f"--{name if value is True else inverse(name)}" if isinstance(value, bool) else f"--{name} {value}"
        if name in fixed and name in typed(given):
            raise UsageError(f"{told} has no effect: it needs {lacking}; give that, or leave this out")
        lines.append(
            f"note      {told}{'' if name in typed(given) else ' of the recipe'} has no effect: it needs {lacking}"
        )
    return lines


def require_consistency(settings: Any) -> None:
    """Refuse settings that contradict each other, with UsageError."""
    lower = settings.batch_size // settings.streams * settings.streams
    nearest = " or ".join(str(batch) for batch in (lower, lower + settings.streams) if batch)
    dataset = DATASETS[settings.dataset]
    missing = next((name for name in dataset.needs if not getattr(settings, name)), "")
    # fmt: off
    _refuse_if(
        (settings.warmup_epochs >= settings.epochs, f"--warmup_epochs {settings.warmup_epochs:g} leaves nothing of --epochs {settings.epochs}; use less"),
        (settings.lr_end <= settings.lr_start, f"--lr_end {settings.lr_end:g} must be greater than --lr_start {settings.lr_start:g}"),
        (settings.lr is not None and settings.lr_from, "--lr and --lr_from both name a learning rate; give one of them"),
        (settings.freeze_backbone >= settings.epochs, f"--freeze_backbone {settings.freeze_backbone} leaves none of --epochs {settings.epochs} for the rest of the model; freeze it for fewer, or train for more"),
        (missing, f"--dataset {settings.dataset} needs --{missing}: {dataset.needs.get(missing)}"),
        ("dataset_name" not in dataset.takes and (settings.dataset_name or settings.dataset_config), f"--dataset_name and --dataset_config go with --dataset hf, not with --dataset {settings.dataset}"),
        (settings.data_dir and "data_dir" not in dataset.takes, f"--dataset {settings.dataset} takes no --data_dir; leave one of them out{', or name the folder with --dataset_name' if 'dataset_name' in dataset.takes else ''}"),
        (settings.dummy_data and "dummy_data" not in dataset.takes, "--dummy_data goes with --dataset imagenet1k"),
        (not settings.cache_dir and (settings.cache_limit_gb or settings.cache_short_side or settings.fill_cache), "--cache_limit_gb, --cache_short_side, --cache_format and --fill_cache need --cache_dir, the folder to keep images in"),
        (settings.cache_format == "original" and settings.cache_short_side, "--cache_format original keeps images as they are; leave out --cache_short_side, on a resume with --override cache_short_side=none"),
        (settings.fill_cache and not (dataset.on_hub and not settings.dummy_data and not settings.no_streaming), "--fill_cache is for what is streamed from the Hub; leave it out"),
        (settings.fill_cache and (settings.dry_run or settings.find_lr or settings.doctor), "--fill_cache stops once the dataset is kept; leave out --dry_run, --find_lr and --doctor"),
        (settings.val_share and (settings.val_split or settings.val_labels), "--val_share holds out a part of the training split; leave out --val_split and --val_labels"),
        (settings.progressive_size and size_points(settings.progressive_size)[-1][0] != settings.image_size, f"--progressive_size {settings.progressive_size} ends at another size than --image_size {settings.image_size}; leave that out, or end it there: {settings.image_size}:0"),
        (settings.loss == "bce" and settings.class_weights, "--class_weights are for --loss ce; leave them out"),
        (settings.dry_run and (settings.evaluate or settings.find_lr or settings.doctor), "--dry_run rehearses training; leave out --evaluate, --find_lr and --doctor"),
        (settings.doctor and (settings.evaluate or settings.find_lr or settings.resume_from), "--doctor looks at the machine alone; leave out --evaluate, --find_lr and --resume_from"),
        (settings.quiet and settings.verbose, "--quiet and --verbose ask for opposite things; give one of them"),
        (settings.val_labels and "val_labels" not in dataset.takes, f"--val_labels goes with --dataset imagefolder, not with --dataset {settings.dataset}"),
        (settings.batch_size % settings.streams, f"--batch_size {settings.batch_size} is not divisible by --streams {settings.streams}; use {nearest}, or other --streams"),
    )
    # fmt: on


def require_even_shares(settings: Any, world: int) -> None:
    """Refuse a number of ranks that cannot share a batch evenly, with UsageError."""
    share = settings.batch_size // world
    # fmt: off
    _refuse_if(
        (settings.batch_size % world, f"--batch_size {settings.batch_size} is not divisible by {world} ranks; give a multiple of {world}, or use other ranks"),
        (settings.streams % world, f"--streams {settings.streams} is not divisible by {world} ranks; give --streams a multiple of {world}"),
        (share % settings.accumulate_steps, f"a rank's share of {share} images is not divisible by --accumulate_steps {settings.accumulate_steps}; change this or --batch_size"),
        (share // settings.accumulate_steps < 2, "BatchNorm needs two images in a pass; use a larger --batch_size or fewer --accumulate_steps"),
        ((settings.mixup or settings.cutmix) and settings.batch_size // settings.streams < 2, f"--mixup and --cutmix mix the images of a stream, and of {settings.streams} streams a batch of {settings.batch_size} has 1 each; use fewer --streams or a larger --batch_size"),
    )
    # fmt: on


def _refuse_if(*rules: Rule) -> None:
    for wrong, message in rules:
        if wrong:
            raise UsageError(message)
