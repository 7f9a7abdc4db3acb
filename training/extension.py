"""A run planned longer after all: from the snapshot kept where its cooldown begins, before which the plans agree."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import config as configuration
from beforehand import COOLDOWN, require_extendable
from config import Config
from errors import UsageError
from training.optim import cooldown_start
from training.snapshot import Snapshot, find, read

DEPENDS_ON_LENGTH = ("progressive_size",)  # before the cooldown too: it is given in shares of the epochs


def extend(given: Mapping[str, Any]) -> tuple[Config, Snapshot]:
    """The settings of a run planned `extend_epochs` longer than it was, and the snapshot to go on from.

    Raises UsageError for what cannot be extended, SnapshotError for a snapshot that is damaged.
    """
    source = Path(given["resume_from"])
    path = source / "snapshots" / COOLDOWN
    snapshot = read(path) if path.exists() else find(source)[0]
    config = configuration.resume(snapshot.state.get("config"), given)
    require_extendable(config)
    for name in DEPENDS_ON_LENGTH:
        if snapshot.state["config"].get(name):
            raise UsageError(f"--{name} made the run's past depend on its epochs; start a new run with more of them")
    if snapshot.path != path:
        raise UsageError(_why_there_is_none(source, snapshot, config))
    return config, snapshot


def _why_there_is_none(source: Path, newest: Snapshot, config: Config) -> str:
    saved = configuration.resume(newest.state["config"], {})
    begin, step = cooldown_start(saved, newest.state["steps_per_epoch"]), newest.state["step"]
    longer = f"--override epochs={config.epochs}"
    if begin == 0:
        return f"{source} cooled down from its first step (--cooldown {saved.cooldown:g}); {longer} makes another plan"
    if step < begin:
        return (
            f"the cooldown of {source} begins at step {begin}, and it has come to step {step}; go on with {longer}, "
            "which before the cooldown is the same"
        )
    return f"{source / 'snapshots' / COOLDOWN} was removed or never written; bring it back, or go on with {longer}"
