"""Settings that do not fit together, or not the number of ranks: which, and what to do."""

from typing import Any

from choices import DATASETS
from errors import UsageError
from flags import size_points

Rule = tuple[object, str]


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
        (settings.freeze_backbone >= settings.epochs, f"--freeze_backbone {settings.freeze_backbone} leaves none of --epochs {settings.epochs} for the rest of the model; use less"),
        (missing, f"--dataset {settings.dataset} needs --{missing}: {dataset.needs.get(missing)}"),
        ("dataset_name" not in dataset.takes and (settings.dataset_name or settings.dataset_config), f"--dataset_name and --dataset_config go with --dataset hf, not with --dataset {settings.dataset}"),
        (settings.data_dir and "data_dir" not in dataset.takes, f"--dataset {settings.dataset} takes no --data_dir; leave one of them out{', or name the folder with --dataset_name' if 'dataset_name' in dataset.takes else ''}"),
        (settings.dummy_data and "dummy_data" not in dataset.takes, "--dummy_data goes with --dataset imagenet1k"),
        (not settings.cache_dir and (settings.cache_limit_gb or settings.cache_short_side or settings.fill_cache), "--cache_limit_gb, --cache_short_side, --cache_format and --fill_cache need --cache_dir, the folder to keep images in"),
        (settings.cache_format == "original" and settings.cache_short_side, "--cache_format original keeps images as they are; leave out --cache_short_side"),
        (settings.fill_cache and not (dataset.on_hub and not settings.dummy_data and not settings.no_streaming), "--fill_cache is for what is streamed from the Hub; leave it out"),
        (settings.val_share and (settings.val_split or settings.val_labels), "--val_share holds out a part of the training split; leave out --val_split and --val_labels"),
        (settings.progressive_size and size_points(settings.progressive_size)[-1][0] != settings.image_size, f"--progressive_size {settings.progressive_size} ends at another size than --image_size {settings.image_size}; leave that out"),
        (settings.loss == "bce" and settings.class_weights, "--class_weights are for --loss ce; leave them out"),
        (settings.loss == "ce" and settings.bce_threshold is not None, "--bce_threshold goes with --loss bce"),
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
    )
    # fmt: on


def _refuse_if(*rules: Rule) -> None:
    for wrong, message in rules:
        if wrong:
            raise UsageError(message)
