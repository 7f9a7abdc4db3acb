"""What it costs a step that a run is watched: its pictures and report, the bar of a terminal, and each tracker.

    uv run python benchmarks/watching.py

Runs of main.py in one process, turn by turn: one that draws nothing and prints into nowhere, and the same run with one
thing more. The time of a step is read from metrics.jsonl, in the second half of the epochs: the median of the steps,
and their mean, which has the pauses too. What trackers do at the start lies before it; a first round does not count.
Beside it, the share of the training thread's processor time that goes into the journal, which feeds logs, bar and
trackers: noise slows both parts of it alike. With `--threads 1` that thread does all the computing. A signal ends it
with the table so far.
"""

import argparse
import contextlib
import itertools
import json
import os
import pty
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


import torch

import main
import visualization
from benchmarks.common import installed_versions, record, spread_of
from stream.loader import Batch
from training.journal import Journal
from training.step import StepNumbers

OURS = ("tensorboard", "wandb", "trackio", "mlflow")


@dataclass
class System:
    """A way to watch, and of each round the milliseconds of a step, median and mean, and the journal's share of it."""

    title: str
    flags: Sequence[str] = ()
    is_bare: bool = True
    on_terminal: bool = False
    medians: list[float] = field(default_factory=list)
    means: list[float] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)


SYSTEMS = (
    System("none"),
    System("none, again"),
    System("the bar of a terminal", on_terminal=True),
    System("pictures and report, which every run has", is_bare=False),
    *(System(name, ("--track", name)) for name in OURS),
    System("all of these", ("--track", ",".join(OURS)), is_bare=False, on_terminal=True),
)


def measure() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--rounds", type=int, default=5)
    flags.add_argument("--epochs", type=int, default=16, help="of which the second half counts")
    flags.add_argument("--threads", type=int, default=2)
    flags.add_argument("--flags", default="--log_steps 10", help="of main.py, beside these")
    given = flags.parse_args()
    load = os.getloadavg()[0]
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"WANDB_MODE": "offline", "TRACKIO_DIR": f"{folder}/trackio"}
        done = -1
        while done < given.rounds:
            turn = [steps_of(system, Path(folder), given.epochs, given.flags.split()) for system in SYSTEMS]
            if None in turn:
                break  # a run failed, or was stopped by a signal
            done += 1
            print(f"round {done} of {given.rounds} is done", file=sys.stderr)
            for system, (times, share) in zip(SYSTEMS, filter(None, turn), strict=True):
                if done:
                    system.medians.append(median(times))
                    system.means.append(mean(times))
                    system.shares.append(share)
    if done < 1:
        raise SystemExit("a run failed or was stopped before the first round was done")
    set_up = (
        f"ResNet-20 on digits, batch 64, {given.flags}; {given.epochs // 2} epochs of 22 steps count in each run; "
        f"{given.threads} threads for torch; {done} rounds in turn; load average {load:.1f} before. A ratio is "
        "that of a round to `none` of the same round; those of `none, again` tell the noise."
    )
    record("Watching a run", set_up, rows(), versions())


def steps_of(system: System, folder: Path, epochs: int, more: Sequence[str]) -> tuple[list[float], float] | None:
    """Milliseconds of each step in the second half of a run, and the journal's share of the training thread's time.

    What lies between epochs is left out. None if the run fails.
    """
    clock: list[tuple[float, float]] = []
    step = Journal.step

    def timed(journal: Journal, batch: Batch, numbers: StepNumbers) -> None:
        began = time.thread_time()
        step(journal, batch, numbers)
        clock.append((began, time.thread_time()))

    run = folder / f"run {len(list(folder.iterdir()))}"  # MLflow remembers a store by its path
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(Journal, "step", timed))
        if system.is_bare:
            for name in ("samples", "curves", "report"):
                stack.enter_context(mock.patch.object(visualization.RunPictures, name))
        if system.on_terminal:
            master, terminal = pty.openpty()
            out = stack.enter_context(open(terminal, "w"))
            threading.Thread(target=swallow, args=(master,), daemon=True).start()
        else:
            out = stack.enter_context(open(os.devnull, "w"))
        stack.enter_context(contextlib.redirect_stdout(out))
        flags = ["--epochs", str(epochs), "--run_dir", str(run), *more, *system.flags]
        if main.main(flags):
            return None
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    shutil.rmtree(run / "snapshots")
    pairs = [(a, b) for a, b in itertools.pairwise(range(len(found))) if counts(found[a], found[b], epochs)]
    journal, whole = sum(clock[b][1] - clock[b][0] for _, b in pairs), sum(clock[b][1] - clock[a][1] for a, b in pairs)
    return [1000 * (found[b]["seconds"] - found[a]["seconds"]) for a, b in pairs], journal / whole


def counts(before: dict[str, Any], after: dict[str, Any], epochs: int) -> bool:
    """Whether both steps are of the same epoch, in the second half."""
    return before["epoch"] == after["epoch"] > epochs // 2


def swallow(master: int) -> None:
    """Read what a program writes to its terminal, until it ends."""
    try:
        while os.read(master, 65536):
            pass
    except OSError:
        os.close(master)


def rows() -> str:
    head = (
        "watched by",
        "ms a step, median",
        "over none: median (min to max)",
        "mean over none",
        "the journal's share",
    )
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    for system in SYSTEMS:
        cells = [system.title, f"{median(system.medians):.2f}"]
        for mine, none in ((system.medians, SYSTEMS[0].medians), (system.means, SYSTEMS[0].means)):
            ratios = [a / b for a, b in zip(mine, none, strict=True)]
            cells.append("" if system is SYSTEMS[0] else spread_of(ratios, "{:.3f}"))
        cells.append(spread_of(system.shares, "{:.2%}"))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def versions() -> dict[str, str]:
    from importlib.metadata import version

    names = ("tensorboard", "wandb", "trackio", "mlflow-skinny")
    return installed_versions() | {name: version(name) for name in names}


if __name__ == "__main__":
    measure()
