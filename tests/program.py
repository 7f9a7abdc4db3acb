"""Runs the program as its users do, in this process or in one of its own, and reads what a run left behind."""

import contextlib
import csv
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import distributed
import main

ROOT = Path(main.__file__).parent
TIMEOUT = 180  # seconds a process of its own may take
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
TIMES = {"images_per_s", "seconds"}  # what a clock decides
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node")


@dataclass(frozen=True)
class Outcome:
    """The exit status, and what was printed."""

    status: int
    out: str
    err: str


def run(*arguments: object, entry: Callable[[Sequence[str]], int] = main.main) -> Outcome:
    """Call a front door in this process, on one thread, with random number generators that no run may depend on."""
    out, err = io.StringIO(), io.StringIO()
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    torch.set_num_threads(1)
    random.seed(9)
    np.random.seed(9)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = entry([str(argument) for argument in arguments])
    except SystemExit as stop:
        status = int(stop.code or 0)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return Outcome(status, out.getvalue(), err.getvalue())


def train(*arguments: object) -> Outcome:
    """`run`, for runs that must succeed."""
    done = run(*arguments)
    assert done.status == 0, done.err
    return done


def pretend_rank(patch: pytest.MonkeyPatch, rank: int, world: int) -> None:
    """This process is one of several from now on, none of which it can ask anything."""
    patch.setattr(distributed, "rank", lambda: rank)
    patch.setattr(distributed, "world_size", lambda: world)
    patch.setattr(distributed, "require_agreement", lambda *facts: None, raising=False)
    patch.setattr(distributed, "from_rank0", lambda make: make())


def environment(**changes: str) -> dict[str, str]:
    """A process's environment: one thread, as `run` has, and nothing of this machine's Hub user but `changes`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "OMP_", "TORCHELASTIC"))}
    own = {name: os.environ[name] for name in ("HF_ENDPOINT", "HF_HOME", "HF_HUB_DISABLE_XET")}
    return kept | own | {"OMP_NUM_THREADS": "1"} | changes


def start(
    *arguments: object, ranks: int = 0, restarts: int = 0, door: str = "main.py", **env: str
) -> "subprocess.Popen[str]":
    """A process of its own, or with `ranks` torchrun with so many; whoever starts it must wait for it."""
    launcher = [*TORCHRUN, str(ranks), "--max_restarts", str(restarts)] if ranks else []
    command = [sys.executable, *launcher, str(ROOT / door), *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment(**env), stdout=pipe, stderr=pipe, text=True)


def wait(process: "subprocess.Popen[str]") -> Outcome:
    try:
        out, err = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        raise AssertionError(f"no end after {TIMEOUT} s\n{out}\n{err}") from None
    return Outcome(process.returncode, out, err)


def wait_for(path: Path, process: "subprocess.Popen[str]") -> None:
    """Until the file is there; fails when the process ends first."""
    limit = time.monotonic() + TIMEOUT
    while not path.exists():
        if process.poll() is not None or time.monotonic() > limit:
            for pid in (process.pid, *children(process)):
                os.kill(pid, signal.SIGKILL)
            raise AssertionError(f"{path.name} never came: {process.communicate()}")
        time.sleep(0.005)


def until(condition: Callable[[], object]) -> None:
    """Waits for something that is about to come true."""
    limit = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.005)


def children(process: "subprocess.Popen[str]") -> list[int]:
    """The ids of the processes that a process started, in their order."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            if path.read_text().rpartition(")")[2].split()[1] == str(process.pid):
                found.append(int(path.parent.name))
    return sorted(found)


def snapshot_path(folder: Path, step: int) -> Path:
    return folder / "snapshots" / f"step-{step:09d}.safetensors"


def steps_kept(folder: Path) -> list[int]:
    return sorted(int(path.stem.removeprefix("step-")) for path in (folder / "snapshots").glob("step-*.safetensors"))


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path)


def ledger(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, without what a clock decides."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def results(folder: Path) -> list[dict[str, str]]:
    """The rows of results.csv, without what a clock decides."""
    with open(folder / "results.csv", newline="") as file:
        return [{name: value for name, value in row.items() if name not in TIMES} for row in csv.DictReader(file)]


def assert_same_tensors(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def assert_same_run(one: Path, other: Path, apart: tuple[str, ...] = ()) -> None:
    """The same last snapshot, but for the tensors named `apart`, and the same logs, but for the clock."""
    assert ledger(one) == ledger(other)
    assert metrics(one) == metrics(other)
    assert results(one) == results(other)
    last = steps_kept(one)[-1]
    assert steps_kept(other)[-1] == last
    pair = [tensors(snapshot_path(folder, last)) for folder in (one, other)]
    for held in pair:
        for name in apart:
            del held[name]
    assert_same_tensors(*pair)


def cut(folder: Path, step: int, copy: Path) -> Path:
    """A copy of a run as a kill would have left it, `step` being the last step with a snapshot."""

    def later(where: str, names: list[str]) -> set[str]:
        return {name for name in names if name > snapshot_path(folder, step).name and name.startswith("step-")}

    def link_snapshots(source: str, target: str) -> None:
        (os.link if source.endswith(".safetensors") else shutil.copy2)(source, target)

    return Path(shutil.copytree(folder, copy, ignore=later, copy_function=link_snapshots))
