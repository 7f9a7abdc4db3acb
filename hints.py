"""What a user may have meant by a flag that is unknown, or by a value that is none."""

import difflib
import re
from collections.abc import Collection

OTHER_NAMES = {  # of the same flags in other trainers
    **dict.fromkeys(("learning_rate", "max_lr", "base_lr"), "lr"),
    **dict.fromkeys(("arch", "model_name", "net", "backbone"), "model"),
    **dict.fromkeys(("wd", "l2"), "weight_decay"),
    **dict.fromkeys(("bs", "b", "batch", "train_batch_size"), "batch_size"),
    **dict.fromkeys(("workers", "j", "num_threads"), "num_workers"),
    **dict.fromkeys(("output_dir", "out_dir", "output", "out", "save_dir", "logdir", "log_dir"), "run_dir"),
    **dict.fromkeys(("data", "data_path", "root", "train_dir"), "data_dir"),
    **dict.fromkeys(("opt", "optim"), "optimizer"),
    **dict.fromkeys(("sched", "lr_scheduler"), "scheduler"),
    **dict.fromkeys(("clip_grad", "clip_grad_norm", "grad_clip"), "max_grad_norm"),
    **dict.fromkeys(("fp16", "mixed_precision", "use_amp"), "amp"),
    **dict.fromkeys(("checkpoint", "ckpt"), "resume_from"),
    **dict.fromkeys(("gpu", "accelerator"), "device"),
    **dict.fromkeys(("pretrained", "weights"), "use_pretrained"),
    **dict.fromkeys(("smoothing",), "label_smoothing"),
    **dict.fromkeys(("grad_accum", "gradient_accumulation_steps"), "accumulate_steps"),
}
YES, NO = ("true", "yes", "on", "1"), ("false", "no", "off", "0", "none")
DASHES = "-\N{HYPHEN}\N{NON-BREAKING HYPHEN}\N{EN DASH}\N{EM DASH}\N{MINUS SIGN}"


def inverse(name: str) -> str:
    """The name of the flag that turns off what the flag `name` turns on."""
    return name.removeprefix("no_") if name.startswith("no_") else f"no_{name}"


def nearest_flag(told: str, flags: Collection[str]) -> str:
    """The flag of `flags`, which begin with dashes, that was meant by something unknown; nothing if none is near."""
    name = told.partition("=")[0].lstrip(DASHES)
    name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()
    name = re.sub(f"[{DASHES}]", "_", name)
    prefix, base = ("no_", name.removeprefix("no_")) if name.startswith("no_") else ("", name)
    for known in (name, f"{prefix}{OTHER_NAMES.get(base, base)}"):
        if f"--{known}" in flags:
            return f"--{known}"
    begun = [flag for flag in flags if name and flag.startswith(f"--{name}")]
    near = difflib.get_close_matches(f"--{name}", flags, 1, 0.7)
    return min(near or begun, key=len, default="")


def nearest_number(told: str, whole: bool) -> str:
    """A number as Python writes it that was meant by text such as 0,1 or 1e3; nothing if none was."""
    text = told.strip().replace(" ", "").replace("'", "")
    try:
        if not whole:
            return f"{float(text.replace(',', '.')):g}"
        number = float(re.sub(r"[,.](?=\d{3}(\D|$))", "", text))
        return str(int(number)) if number == int(number) else ""
    except (ValueError, OverflowError):
        return ""


def without_value(flag: str, value: str, flags: Collection[str]) -> str:
    """What to give instead of a value for a flag that takes none."""
    off = f"--{inverse(flag.lstrip('-'))}"
    if value.lower() in YES:
        return f"{flag} alone turns it on"
    return f"{off} turns it off" if off in flags else "leave it out to turn it off"
