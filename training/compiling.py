"""What of a run is compiled by torch.compile, where, and where it is kept."""

import contextlib
import logging
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

import machine
from config import Config
from distributed import print0
from errors import UsageError, complain

COMPILES = "which compiles the model: about a minute, seconds from the second run on"
WITHOUT_COMPILE = "or give --no_compile, which is --override compile=false where a run is resumed"
MOST_COMPILED = 64  # sizes of images and sets of frozen parameters, for each of which a run compiles anew
FAILS = "WON'T CONVERT "


def wants_compile(config: Config, device: str) -> bool:
    """Whether a training is to be compiled on a type of device: as --compile says, else where it pays.

    That is on a GPU, but not in the short runs of small sets, nor where kernels are to give the same result each time.
    """
    if config.compile is not None:
        return config.compile
    return device == "cuda" and not config.is_small and not config.deterministic


def require_compiler(config: Config, device: torch.device) -> None:
    """Refuse a given --compile that cannot work here."""
    if config.compile and (missing := machine.missing_for_compile(device.type)):
        raise UsageError(f"--compile cannot be used here: {missing}; {WITHOUT_COMPILE}")


def can_compile(config: Config, device: torch.device) -> bool:
    """Whether a training is compiled here; a line tells what it lacks. Raises UsageError where --compile was given."""
    require_compiler(config, device)
    if not wants_compile(config, device.type):
        return False
    missing = machine.missing_for_compile(device.type)
    if missing:
        print0(f"note      the model is not compiled, so that steps are slower: {missing}")
    return missing is None


def compile_for_training(config: Config, *modules: nn.Module, **options: Any) -> None:
    """Have modules compiled when they are called, for each size of images; one that fails by default stays as it is."""
    keep_compiled()
    torch._dynamo.config.suppress_errors = config.compile is None
    torch._dynamo.config.recompile_limit = MOST_COMPILED
    logging.getLogger("torch._dynamo.convert_frame").addFilter(_tell_failure_shortly)
    for module in modules:
        module.compile(dynamic=False, **options)


def _tell_failure_shortly(record: logging.LogRecord) -> bool:
    """Whether torch shall print this: that something stays as it is is told in a line, not with two tracebacks."""
    what = str(record.msg).partition("\n")[0]
    if not what.startswith(FAILS):
        return True
    told = what.removeprefix(FAILS).strip()
    complain(f"warning: torch.compile fails on {told}, which is trained without; --compile ends the run and tells why")
    return False


def keep_compiled() -> None:
    """Have torch.compile keep what it makes in the user's cache folder, and not in one that a reboot empties.

    A folder that the user names in TORCHINDUCTOR_CACHE_DIR stays; torch's own does where the cache cannot be written.
    """
    with contextlib.suppress(OSError, RuntimeError):  # no home, or none to write to
        folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "imagenet1k" / "inductor"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))
