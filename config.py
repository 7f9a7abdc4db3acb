"""Every flag, declared once, and parsed with argparse into one frozen, validated `Config`."""

import os
import typing
from collections.abc import Collection, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import checks
import ranks
import recipe
from choices import AUGMENTATIONS, DATASETS, MODELS, SCHEDULES, TRACKERS, dataset_named, model_choice
from defaults import first_guess, fit_to
from errors import SnapshotError, UsageError, printable
from flags import (
    DEVICES,
    FROM_PRESET,
    SIZE_STEP,
    channels,
    check_bounds,
    device_name,
    epochs_list,
    flag,
    jitter,
    learning_rate,
    listed,
    model_name,
    parser_of,
    several_of,
    size_points,
    sizes_list,
)
from registry import Registry

FEWEST_LR_STEPS = 16
SHORT_SIDE = 256  # pixels of kept images, where none is given
FITTED = frozenset({"batch_size", "streams", "epochs"})  # fitted to a small set where they are not given
COMMON = (  # what --help shows; --help_all shows every flag
    *("dataset", "dataset_name", "data_dir", "val_share", "max_samples", "image_size", "dummy_data", "cache_dir"),
    *("num_workers", "auto_augment", "mixup", "cutmix", "model", "use_pretrained", "freeze_backbone", "recipe"),
    *("epochs", "batch_size", "lr", "lr_from", "optimizer", "weight_decay", "label_smoothing", "ema_decay", "amp"),
    *("compile", "device", "seed", "scheduler", "warmup_epochs", "run_dir", "resume_from", "override", "evaluate"),
    *("save_best", "snapshot_steps", "early_stop", "dry_run", "doctor", "quiet", "verbose", "track", "compare"),
    "debug",
)
OTHER_DATA = "data=changed"  # what --override takes beside settings


@dataclass(frozen=True)
class Config:
    """The settings of one run. Construct it with `parse` or `resolve`, which fill in the dataset's defaults."""

    # fmt: off
    dataset: str = flag("data", "what to train on; imagenet_v2, _a, _r and _sketch are for evaluate.py", "digits", short="digits; hf with --dataset_name, imagefolder with --data_dir", names=DATASETS)
    dataset_name: str | None = flag("data", "with --dataset hf: a Hub id, or a local folder of parquet files", None, is_path=True)
    dataset_revision: str = flag("data", "branch, tag or commit of the Hub dataset; pinned to its commit at the start", "main", needs=checks.REMOTE)
    dataset_config: str | None = flag("data", "with --dataset hf: which configuration of the dataset, where its card tells several", None, short="its default")
    data_dir: str | None = flag("data", "imagefolder: a folder with a folder a class, or with train/ and val/ of such; cifar, mnist: where the files are or go", None, short="data", on_resume="kept", is_path=True)
    image_column: str | None = flag("data", "name of the image column", None, short="the Image feature", needs=checks.takes("image_column"))
    label_column: str | None = flag("data", "name of the label column", None, short="the ClassLabel feature", needs=checks.takes("label_column"))
    num_classes: int | None = flag("data", "classes of a WebDataset, where an index tells its lengths but not its labels", None, short="told by the data", least=2, needs=checks.takes("num_classes"))
    train_split: str = flag("data", "split to train on", "train", needs=checks.takes("train_split"))
    val_split: str | None = flag("data", "split to evaluate on", None, short="validation, val, valid or test", needs=checks.takes("val_split"))
    val_share: float | None = flag("data", "hold out this share of the training split, of each class alike, and evaluate on it", None, short="--val_split is evaluated", above=0, most=0.9)
    val_labels: str | None = flag("data", "imagefolder: a file that tells the classes of a validation folder without class folders", None, on_resume="kept", is_path=True)
    max_samples: int | None = flag("data", "use at most this many images of each split, a fair sample of its classes", None, short="all", least=1)
    image_size: int = flag("data", "height and width of a training image, pixels", FROM_PRESET, least=1)
    eval_size: int = flag("data", "height and width of an evaluation image, pixels", FROM_PRESET, short="--image_size", least=1)
    crop: str = flag("data", "training crop of ImageNet-like images: RandomResizedCrop, or Resize(256) then RandomCrop(224)", "resized", choices=("resized", "fixed"), needs=checks.FILES)
    cutout: int = flag("data", "side of the grey square that is put into each training image, pixels", 0, least=0)
    dummy_data: bool = flag("data", "imagenet1k: try everything on generated images in its schema; no token needed", False)
    cache_dir: str | None = flag("data", "keep what was streamed in this folder, for later epochs and runs", None, short="nothing is kept", on_resume="kept", is_path=True, needs=checks.STREAMED)
    cache_limit_gb: float | None = flag("data", "gigabytes to keep at most; what an epoch has used makes room", None, short="no limit", on_resume="kept", above=0)
    cache_short_side: int | None = flag("data", "reduce images to this short side, pixels, before they are kept", None, short="kept as they are; 256 for planes and jpeg", least=1)
    cache_format: str = flag("data", "how images are kept, and trained on: planes are not compressed, and cost the least to read", FROM_PRESET, short="original, or jpeg with --cache_short_side", choices=("original", "jpeg", "planes"))
    fill_cache: bool = flag("data", "keep the whole dataset in --cache_dir, then stop", False, on_resume="forgotten")
    stall_timeout: float = flag("data", "seconds in which less than 1 kB/s makes a request be repeated", 60.0, on_resume="kept", above=0, needs=checks.REMOTE)
    network_patience: float = flag("data", "minutes without progress after which the run writes a snapshot and ends", 30.0, on_resume="kept", above=0)
    no_streaming: bool = flag("data", "download the whole dataset first, then read it from disk", False, on_resume="kept", needs=checks.REMOTE)
    streams: int = flag("data", "parallel streams an epoch is cut into; ranks share them out", FROM_PRESET, least=1)
    shuffle_window: int = flag("data", "images in the rolling shuffle windows, all streams together", 8192, least=1, needs=checks.STREAMED)
    block_mb: int = flag("data", "megabytes of a parquet file fetched with one request", 32, least=1, needs=checks.STREAMED)
    max_bad_fraction: float = flag("data", "stop when more than this fraction of an epoch's images cannot be read", 0.001, on_resume="kept", least=0, most=1, needs=checks.FILES)
    num_workers: int = flag("data", "decoding processes of each rank; 0 decodes in the training thread", FROM_PRESET, on_resume="forgotten", short="the cores of this machine, shared among its processes", least=0, needs=checks.FILES)
    auto_augment: str | None = flag("augmentation", "ta_wide (TrivialAugment), ra-n2-m9 (torchvision's RandAugment) or rand-m7-n2-mstd0.5-inc1 (timm's)", None, offers=("ta_wide", "ra-n2-m9", "rand-m7-n2-mstd0.5-inc1"))
    augment: str | None = flag("augmentation", "augmentations of your own, from files in extensions/, in this order before --random_erasing", None, type=several_of(AUGMENTATIONS), metavar="NAME,...", names=AUGMENTATIONS)
    random_erasing: float = flag("augmentation", "probability that a box of a training image is erased", 0.0, least=0, most=1)
    color_jitter: str | None = flag("augmentation", "random brightness, contrast, saturation and hue: up to four shares such as 0.4,0.4,0.4,0.1", None, metavar="X,X,X,X", type=jitter)
    mixup: float = flag("augmentation", "mix images of a step, with shares from Beta(X, X)", 0.0, least=0)
    cutmix: float = flag("augmentation", "put boxes of other images of a step into each, with areas from Beta(X, X); with --mixup, one of both at random", 0.0, least=0)
    repeats: int = flag("augmentation", "times that an image is seen in an epoch, each time changed otherwise; an epoch then has as many fewer images (Hoffer et al. 2020)", 1, least=1)
    progressive_size: str | None = flag("augmentation", "training sizes in pixels at fractions of training, such as 128:0,192:0.6; linear between, in steps of 32", None, type=sizes_list, metavar="SIZE:X,...")
    train_interpolation: str = flag("augmentation", "how crops are resized: fast is nearly bilinear; bilinear and bicubic are Pillow's, antialiased", "fast", choices=("fast", "bilinear", "bicubic"), needs=checks.FILES & checks.RESIZED)
    eval_interpolation: str = flag("augmentation", "how images are resized in evaluation", "fast", choices=("fast", "bilinear", "bicubic"), needs=checks.FILES)
    eval_crop_pct: float | None = flag("augmentation", "evaluation: --eval_size over the short side that an image is resized to before its centre is cut", None, short="0.875", above=0, most=1, needs=checks.FILES)
    mean: str | None = flag("augmentation", "mean of each channel that images are normalised with, of pixels in 0..1", None, type=channels, metavar="X,X,X", short="ImageNet's, or what pretrained weights ask for")
    std: str | None = flag("augmentation", "standard deviation, likewise", None, type=channels, metavar="X,X,X", short="the same")
    tta: str | None = flag("augmentation", "evaluation: flip averages the logits of an image and its mirror image", None, choices=("flip",))
    model: str = flag("model", "a ResNet (resnet20 is for small images), or a model of torchvision or timm", "auto", short="by image size: resnet50, resnet34 for CIFAR, resnet20 for digits", type=model_name, names=MODELS)
    use_pretrained: str | None = flag("model", "start from these weights: a run, a snapshot, an exported, transformers or timm folder, a Hub id, or a .safetensors or .pth file (microsoft/resnet-50 if none is named); their preprocessing comes with them", None, nargs="?", const="microsoft/resnet-50", is_path=True)
    freeze_backbone: int = flag("model", "first epochs in which only the classifier learns", 0, least=0)
    drop_path: float = flag("model", "probability that the last block is left out, of earlier ones linearly less (stochastic depth)", 0.0, least=0, most=0.9, needs=checks.DROPS_PATHS)
    blurpool: bool = flag("model", "blur before each stride after the stem (Zhang 2019)", False, needs=checks.OWN_MODEL)
    zero_init_gamma: bool | None = flag("model", "start residual blocks as the identity", None, short="on for bottlenecks", needs=checks.OWN_MODEL & checks.NEW_WEIGHTS)

    recipe: str | None = flag("training", "settings of a published recipe: a name in recipes/, or a .toml file; flags win over it", None, on_resume="kept", is_path=True, offers=recipe.NAMES)
    epochs: int = flag("training", "passes over the training set", FROM_PRESET, least=1)
    batch_size: int = flag("training", "images in a step, all ranks together", FROM_PRESET, least=1)
    accumulate_steps: int = flag("training", "cut each rank's share of a batch into this many forward and backward passes", 1, least=1)
    lr: float | str | None = flag("training", "(peak) learning rate, or auto to run the finder first", None, type=learning_rate, metavar="X|auto", short="by linear scaling of the batch", above=0)
    lr_from: str | None = flag("training", "take the learning rate from this lr_finder.json", None, is_path=True)
    optimizer: str = flag("training", "sgd, adamw, or timm's lamb", "sgd", choices=("sgd", "adamw", "lamb"))
    nesterov: bool = flag("training", "SGD: Nesterov's momentum", True, needs=checks.SGD)
    head_lr_scale: float = flag("training", "learning rate of the classifier over that of the rest, for fine-tuning", 1.0, above=0)
    momentum: float = flag("training", "SGD momentum (AdamW and LAMB: first beta), where OneCycle does not cycle it", 0.9, least=0, most=1, needs=checks.FIXED_MOMENTUM)
    weight_decay: float = flag("training", "L2 penalty on weights (AdamW: decoupled)", FROM_PRESET, least=0)
    norm_weight_decay: float = flag("training", "the same on the parameters of norms", 0.0, least=0)
    bias_weight_decay: float = flag("training", "the same on biases", 0.0, least=0)
    loss: str = flag("training", "cross-entropy, or binary cross-entropy for each class", "ce", choices=("ce", "bce"))
    bce_threshold: float | None = flag("training", "bce: make targets above this 1 and the others 0", None, least=0, most=1, needs=checks.BINARY)
    class_weights: str | None = flag("training", "ce: weights of the classes, balanced or a file of a number a line", None, is_path=True)
    label_smoothing: float = flag("training", "share of the target spread over all classes", 0.0, least=0, most=1)
    ema_decay: float | None = flag("training", "also average the weights, with up to this decay, and evaluate the average", None, above=0, most=1)
    ema_every: int = flag("training", "steps between updates of that average", 1, least=1, needs=checks.AVERAGE)
    max_grad_norm: float | None = flag("training", "clip the gradient to this global L2 norm", None, short="no clipping", above=0)
    amp: bool = flag("training", "mixed precision", False)
    amp_dtype: str = flag("training", "bf16, or fp16 with a gradient scaler", "auto", choices=("auto", "bf16", "fp16"), short="bf16 where the device has instructions for it; a CPU without them takes float32, an older GPU fp16", needs=checks.MIXED_PRECISION)
    compile: bool | None = flag("training", "compile the model with torch.compile: about a minute at the start, seconds from the second run on, then faster steps on a GPU", None, short="on where it pays: on a GPU, for datasets of files, without --deterministic; --no_compile turns it off")
    device: str = flag("training", "cpu, cuda or mps", "auto", short="the best there is", on_resume="kept", type=device_name, metavar="NAME", offers=DEVICES)
    seed: int = flag("training", "decides weights, order and augmentation", 0, least=0)
    deterministic: bool = flag("training", "GPU kernels that give the same result each time, where PyTorch has one; it warns where not (slower)", False)

    scheduler: str = flag("schedule", "learning rate schedule, moved at every step", "onecycle", names=SCHEDULES)
    schedule_per: str = flag("schedule", "the others than onecycle change with every step, or only with every epoch", "step", choices=("step", "epoch"), needs=checks.OTHER_SCHEDULE)
    warmup_epochs: float = flag("schedule", "epochs of linear warm-up; under onecycle, of its rising part instead of --onecycle_pct_start", 0.0, least=0)
    warmup_start: float | None = flag("schedule", "the others: first rate of the warm-up over the rate that it leads to", None, short="one part of as many as it has", least=0, most=1, needs=checks.WARM_UP)
    warmup_overlaps: bool = flag("schedule", "the others: the warm-up replaces the beginning of the schedule instead of preceding it", False, needs=checks.WARM_UP)
    min_lr: float = flag("schedule", "cosine, linear, trapezoid: learning rate at the end", 0.0, least=0, needs=checks.scheduled("cosine", "linear", "trapezoid"))
    cooldown: float = flag("schedule", "trapezoid: share of the steps in which the rate falls, linearly", 0.2, above=0, most=1, needs=checks.scheduled("trapezoid"))
    step_size: int = flag("schedule", "step: epochs between decays", 30, least=1, needs=checks.EVERY_STEP_SIZE)
    milestones: str | None = flag("schedule", "step: decay after these epochs, such as 30,60, and not every --step_size", None, type=epochs_list, metavar="N,N", needs=checks.scheduled("step"))
    gamma: float = flag("schedule", "step: factor of each decay", 0.1, above=0, needs=checks.scheduled("step"))
    onecycle_pct_start: float = flag("schedule", "share of the steps spent rising", 0.3, least=0, most=1, needs=checks.OWN_RISE)
    onecycle_div_factor: float = flag("schedule", "peak over initial learning rate", 25.0, above=0, needs=checks.ONE_CYCLE)
    onecycle_final_div_factor: float = flag("schedule", "initial over final learning rate", 1e4, above=0, needs=checks.ONE_CYCLE)
    onecycle_anneal_strategy: str = flag("schedule", "shape of each part", "cos", choices=("cos", "linear"), needs=checks.ONE_CYCLE)
    onecycle_three_phase: bool = flag("schedule", "fall as steeply as it rose, then anneal", False, needs=checks.ONE_CYCLE)
    onecycle_base_momentum: float = flag("schedule", "momentum at the peak of the learning rate", 0.85, least=0, most=1, needs=checks.CYCLED_MOMENTUM)
    onecycle_max_momentum: float = flag("schedule", "momentum at both ends", 0.95, least=0, most=1, needs=checks.CYCLED_MOMENTUM)
    onecycle_fixed_momentum: bool = flag("schedule", "do not cycle the momentum: keep --momentum", False, needs=checks.ONE_CYCLE)
    plot_schedule: bool = flag("schedule", "draw learning rate and momentum over the run into plots/schedule.png before it starts", False, on_resume="forgotten")
    extend_epochs: int | None = flag("schedule", "trapezoid: with --resume_from RUN, go on from the start of its cooldown in a new folder, as if this many more epochs had been planned", None, on_resume="forgotten", least=1)

    find_lr: bool = flag("finder", "run the learning rate finder, then stop", False, on_resume="forgotten")
    lr_start: float = flag("finder", "first learning rate of the sweep", 1e-5, on_resume="kept", above=0, needs=checks.FINDER)
    lr_end: float = flag("finder", "last learning rate of the sweep", 10.0, on_resume="kept", needs=checks.FINDER)
    lr_iter: int = flag("finder", "steps in all, spent on sweeps of about 50 from the same weights", 100, on_resume="kept", least=FEWEST_LR_STEPS, needs=checks.FINDER)
    lr_step_mode: str = flag("finder", "how the rate grows", "exp", choices=("exp", "linear"), on_resume="kept", needs=checks.FINDER)
    lr_smooth_f: float = flag("finder", "weight of the newest loss in the smoothed one, in (0, 1]", 0.2, on_resume="kept", above=0, most=1, needs=checks.FINDER)
    lr_val: int = flag("finder", "judge each step by the loss on the first N validation images, in whole batches, not by the training loss", 0, on_resume="kept", least=0, needs=checks.FINDER)
    lr_diverge_th: float = flag("finder", "stop when the smoothed loss exceeds this many times its best", 5.0, on_resume="kept", above=1, needs=checks.FINDER)

    run_dir: str | None = flag("run", "folder of the run", None, on_resume="forgotten", short="runs/DATASET-TIME", is_path=True)
    resume_from: str | None = flag("run", "go on from a run folder or a snapshot file; flags not given keep their saved values. auto: from --run_dir if it has a snapshot, else start anew", None, on_resume="forgotten", is_path=True)
    override: Sequence[str] = flag("run", "on a resume, insist on changing this setting (repeatable); data=changed: on training on other data", (), action="append", metavar="NAME=VALUE", on_resume="forgotten")
    evaluate: bool = flag("run", "evaluate the snapshot of --resume_from (or --use_pretrained), then stop", False, on_resume="forgotten")
    save_best: bool = flag("run", "also keep the snapshot with the best val_top1 (with --ema_decay ema_top1) as best.safetensors", False, on_resume="kept")
    snapshot_steps: int = flag("run", "also write a snapshot every this many steps; 0: at the end of each epoch only", 0, on_resume="kept", least=0)
    keep_snapshots: int = flag("run", "newest snapshots kept", 3, on_resume="kept", least=1)
    max_bad_steps: int = flag("run", "stop after this many steps in a row without a finite loss, or skipped by the gradient scaler", 20, on_resume="kept", least=1)
    log_steps: int = flag("run", "steps between progress reports; the device is asked for numbers only then", 50, on_resume="kept", least=1)
    ledger: bool = flag("run", "write ledger.jsonl: the batch, loss and rate of every step, bit for bit", False, on_resume="kept")
    profile: int = flag("run", "write a trace of this many training steps to profile/trace.json, and print the costliest operators", 0, on_resume="forgotten", least=0)
    early_stop: int = flag("run", "end after this many epochs without a better val_top1 (with --ema_decay ema_top1); 0: never", 0, on_resume="kept", least=0)
    dry_run: bool = flag("run", "do all but train: open the data, build the model, take a few steps, print what the run would take; no run folder is written", False, on_resume="forgotten")
    doctor: bool = flag("run", "report on this machine, the Hub and what will be slow or fail here, then stop", False, on_resume="forgotten")
    quiet: bool = flag("run", "print a line an epoch, warnings, errors and the last lines only", False, on_resume="forgotten")
    verbose: bool = flag("run", "print all that there is to say: a line every --log_steps, more about streaming and time", False, on_resume="forgotten")
    track: str | None = flag("run", "also send numbers, pictures and the report to these trackers, several with commas between", None, on_resume="kept", type=several_of(TRACKERS), metavar="NAME,...", names=TRACKERS)
    compare: Sequence[str] = flag("run", "tell what sets these runs apart and what came of each, write compare.html here, and stop", (), nargs="+", metavar="RUN", on_resume="forgotten", is_path=True)
    debug: bool = flag("run", "show tracebacks", False, on_resume="forgotten")
    # fmt: on

    def __post_init__(self) -> None:
        for item in fields(self):
            check_bounds(f"--{item.name}", getattr(self, item.name), item.metadata["bounds"])
        checks.require_consistency(self)

    @property
    def expects_other_data(self) -> bool:
        """Whether an override allows other data than the snapshot's, or changes a data flag."""
        about_data = {item.name for item in fields(Config) if item.metadata["group"] == "data"}
        return any(text == OTHER_DATA or text.partition("=")[0] in about_data for text in self.override)

    @property
    def is_small(self) -> bool:
        """Whether the dataset fits into the memory of any device, and is kept there."""
        return DATASETS[self.dataset].in_memory

    @property
    def dataset_id(self) -> str:
        """The Hub id, folder or dataset name that the data comes from."""
        dataset = DATASETS[self.dataset]
        place = getattr(self, dataset.named_by) if dataset.named_by else None
        return "generated images" if self.dummy_data else place or dataset.id or self.dataset

    def size_at(self, epoch: int) -> int:
        """The height and width of training images in an epoch, counted from 0."""
        if self.progressive_size is None:
            return self.image_size
        points = [(fraction, size) for size, fraction in size_points(self.progressive_size)]
        now = epoch / self.epochs
        before = max((point for point in points if point[0] <= now), default=points[0])
        after = min((point for point in points if point[0] > now), default=before)
        slope = (after[1] - before[1]) / (after[0] - before[0]) if after > before else 0.0
        size = before[1] + slope * max(0.0, now - before[0])
        return round(size / SIZE_STEP) * SIZE_STEP

    def fixed(self) -> dict[str, Any]:
        """The flags, as `--name`, that change the result, with their values: those that a resume must not change."""
        return {f"--{name}": value for name, value in vars(self).items() if name in _names("fixed")}

    def fitted(self, images: int, derived: Collection[str], ranks: int) -> "tuple[Config, list[str]]":
        """These settings with those of the `derived` ones (batch_size, streams, epochs) that suit so many training images.

        Also a line for each that changed.
        """
        values, lines = fit_to(DATASETS[self.dataset].preset, images, derived, vars(self), ranks)
        return replace(self, **values), lines  # type: ignore[arg-type]

    @property
    def pct_start(self) -> float:
        """The share of OneCycle's steps spent rising."""
        return self.warmup_epochs / self.epochs if self.warmup_epochs else self.onecycle_pct_start

    def check_world(self, world: int) -> None:
        """Refuse a number of ranks that cannot share this batch evenly."""
        checks.require_even_shares(self, world)


def _names(*on_resume: str) -> set[str]:
    return {item.name for item in fields(Config) if item.metadata["on_resume"] in on_resume}


def parse(prog: str, description: str, argv: Sequence[str] | None, shown: str = "") -> MutableMapping[str, Any]:
    """The flags that were given, by name, and behind them those of a recipe; no others, so that a resume can tell.

    `--help` shows the COMMON ones, and those of the group `shown`. Raises UsageError.
    """
    parser = parser_of(Config, prog, description, common=COMMON, shown=shown)
    given = vars(parser.parse_args(argv))
    if "recipe" not in given:
        return given
    settings, name = recipe.load(
        given["recipe"], _names("fixed", "kept") - {"recipe"}, lambda flags: vars(parser.parse_args(flags))
    )
    return recipe.combined(settings, given | {"recipe": name})


def resolve(given: Mapping[str, Any]) -> Config:
    """A complete `Config`: the given flags, and the dataset's defaults for the rest. Raises UsageError.

    What a recipe sets that has no effect with the flags is left out.
    """
    values = dict(given)
    values.setdefault("dataset", dataset_named(values) or "digits")
    preset = DATASETS[values["dataset"]].preset
    if values.get("progressive_size"):
        values.setdefault("image_size", size_points(values["progressive_size"])[-1][0])
    for name in ("image_size", "weight_decay"):
        values.setdefault(name, getattr(preset, name))
    values.setdefault("accumulate_steps", 1)
    values.setdefault("cache_format", "jpeg" if values.get("cache_short_side") else "original")
    if values["cache_format"] != "original" and not values.get("cache_short_side"):
        values["cache_short_side"] = SHORT_SIDE
    values |= first_guess(preset, values, ranks.told_world())
    values.setdefault("eval_size", values["image_size"])
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    values.setdefault("num_workers", max(1, cores // ranks.local_world()))
    config = Config(**values)
    fitting = checks.without_idle(config, given)
    return config if len(fitting) == len(given) else resolve(fitting)


def resume(saved: Any, given: Mapping[str, Any], to_train: bool = True) -> Config:
    """The saved settings, updated by given flags that cannot change the result and by `--override`.

    Raises UsageError where the run needs something, `to_train` or to be used at all, that is not registered here, and
    with a table when a given flag would change the result without an override.
    """
    if not isinstance(saved, dict):
        raise SnapshotError("the snapshot holds no settings of this program; give another")
    kept = {name: value for name, value in saved.items() if name in _names("fixed", "kept")}
    new = {name: value for name, value in given.items() if name in _names("kept", "forgotten")}
    try:
        _require_extensions(kept | new, to_train)
        given, insisted = checks.without_idle(resolve(kept), given), overrides(given)
        _require_same(saved, given, insisted)
        if "extend_epochs" in given:
            kept["epochs"] += given["extend_epochs"]
        return resolve(kept | new | insisted)
    except (LookupError, TypeError, ValueError) as error:
        raise SnapshotError("the snapshot holds no settings of this program; give another") from error


def _require_same(saved: Mapping[str, Any], given: Mapping[str, Any], insisted: Mapping[str, Any]) -> None:
    """Raises UsageError, with a table, where a given flag would change a fixed setting and no override insists on it."""
    changed = {name: given[name] for name in _names("fixed") & given.keys() if given[name] != saved.get(name)}
    changed = {name: value for name, value in changed.items() if insisted.get(name) != value}
    if changed:
        insist = " ".join(f"--override {name}={value}" for name, value in changed.items())
        rows = [f"  --{name:<28} saved {saved.get(name)!s:<20} now {value}" for name, value in changed.items()]
        first = f"these settings differ from the snapshot's; leave them out, or insist with {insist}"
        raise UsageError("\n".join([first, *rows]))


def _require_extensions(saved: Mapping[str, Any], to_train: bool) -> None:
    """Refuse the settings of a run that name what is not registered here and needed, be it to train or not."""
    used: list[tuple[Registry[Any], Any]] = [(DATASETS, saved["dataset"]), (MODELS, model_choice(str(saved["model"])))]
    if to_train:
        used += [(SCHEDULES, saved["scheduler"])]
        used += [(AUGMENTATIONS, name) for name in listed(saved.get("augment"))]
        used += [(TRACKERS, name) for name in listed(saved.get("track"))]
    for registry, name in used:
        if name not in registry:
            without = ", or go on without with --track=" if registry is TRACKERS else ""
            raise UsageError(
                f"{registry.flag} {printable(str(name))} of this run is not known here; put the file that registers it back "
                f"into extensions/{without}"
            )


def overrides(given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that --override names, with their values. Raises UsageError."""
    return dict(_parse_override(text) for text in given.get("override", ()) if text != OTHER_DATA)


def _parse_override(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or name not in _names("fixed"):
        raise UsageError(f"--override {text} is not NAME=VALUE with the name of a setting that a snapshot fixes")
    hint = typing.get_type_hints(Config)[name]
    if value == "none" and type(None) in typing.get_args(hint):
        return name, None
    if bool in (hint, *typing.get_args(hint)):
        if value.lower() not in ("true", "false"):
            raise UsageError(f"--override {text}: {name} is either true or false")
        return name, value.lower() == "true"
    return name, parse("", "", [f"--{name}={value}"])[name]
