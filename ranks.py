"""What a launcher such as torchrun told this process: which of how many it is. Nothing large is imported."""

import os

from errors import UsageError

MEETING = ("RANK", "MASTER_ADDR", "MASTER_PORT")  # what ranks need to find each other, beside WORLD_SIZE


def told_rank() -> int:
    """This process's rank by its environment, 0 without a launcher. Raises UsageError."""
    return _number("RANK", 0)


def told_world() -> int:
    """The number of processes by the environment, 1 without a launcher. Raises UsageError."""
    return _number("WORLD_SIZE", 1)


def local_world() -> int:
    """The number of processes on this machine by the environment, 1 without a launcher. Raises UsageError."""
    return _number("LOCAL_WORLD_SIZE", 1)


def require_whole() -> None:
    """Refuse an environment that a launcher, or a script in its place, has set by half, with UsageError."""
    rank, world = told_rank(), told_world()
    _number("LOCAL_RANK", 0)
    local_world()
    missing = [name for name in MEETING if not os.environ.get(name)] if world > 1 else []
    if missing:
        raise UsageError(
            f"WORLD_SIZE={world} is set without {', '.join(missing)}; start the ranks with torchrun, or unset "
            "WORLD_SIZE for a single process"
        )
    if rank >= world:
        told = f"WORLD_SIZE={world}" if os.environ.get("WORLD_SIZE") else "no WORLD_SIZE"
        raise UsageError(
            f"RANK={rank} is set with {told}; start the ranks with torchrun, or unset RANK for a single process"
        )


def _number(name: str, least: int) -> int:
    """The number in a variable, or `least` where it is unset or empty."""
    text = os.environ.get(name) or str(least)
    if not text.isdecimal() or int(text) < least:
        raise UsageError(
            f"{name}={text} is not a number from {least} on; start the ranks with torchrun, or unset {name}"
        )
    return int(text)
