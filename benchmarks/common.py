"""Measuring several systems in turn, each in a worker process, and writing down what was found."""

import argparse
import csv
import json
import os
import platform
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "RESULTS.md"
PINNED = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
MEMORY_SAMPLE_SECONDS = 0.05
PACKAGES = ["torch", "torchvision", "datasets", "huggingface_hub", "albumentations", "opencv-python-headless", "pillow"]
PACKAGES += ["timm", "nvidia-dali-cuda130", "ffcv", "litdata", "mosaicml-streaming"]


@dataclass(frozen=True)
class System:
    """What to measure: the worker's name for it, the peers' environment it needs (None is our own), and our target.

    `target` is the least ratio of our speed to its speed that we want.
    """

    name: str
    title: str
    peer: str | None = None
    target: float | None = None


@dataclass
class Result:
    """Of each round, images a second and seconds to the first batch; `note` says why there are none."""

    rates: list[float] = field(default_factory=list)
    first_batches: list[float] = field(default_factory=list)
    peak_mb: float = 0.0
    note: str = ""


class WorkerError(Exception):
    """The worker ended; the message is the last line that it wrote."""


class Worker:
    """A process of benchmarks/worker.py, idle but while `round` runs."""

    def __init__(self, name: str, folder: Path, python: str, env: Mapping[str, str]) -> None:
        self.log = folder / f"{name.replace(', ', '_').replace(' ', '_')}.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [python, "-m", "benchmarks.worker", name, str(folder)],
                cwd=ROOT,
                env={**os.environ, **PINNED, **env},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self.versions: dict[str, str] = self._answer()

    def round(self) -> dict[str, float]:
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.write("round\n")
            self.process.stdin.flush()
        answer: dict[str, float] = self._answer()
        return answer

    def peak_memory(self) -> float:
        """The most megabytes that the process and its children held during a further round, shared pages split."""
        peak, done = 0.0, threading.Event()

        def watch() -> None:
            nonlocal peak
            while not done.wait(MEMORY_SAMPLE_SECONDS):
                peak = max(peak, memory_of_tree(self.process.pid))

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            self.round()
        finally:
            done.set()
            watcher.join()
        return peak

    def close(self) -> None:
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)
        self.process.wait()
        raise WorkerError((self.log.read_text().strip().splitlines() or ["no message"])[-1])


def memory_of_tree(pid: int) -> float:
    """Megabytes of a process and all below it, each shared page counted once (Linux)."""
    total = 0.0
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total = int(line.split()[1]) / 1000
        for task in Path(f"/proc/{pid}/task").iterdir():
            total += sum(memory_of_tree(int(child)) for child in (task / "children").read_text().split())
    return total


class Contest:
    """The systems that are installed here, each in its worker and warmed up by one round; a context manager."""

    def __init__(self, systems: list[System], folder: Path, peers: Path, env: Mapping[str, str]) -> None:
        self.systems = systems
        self.results = {system.name: Result() for system in systems}
        self.versions: dict[str, str] = {}
        self._workers: dict[str, Worker] = {}
        for system in systems:
            python = peers / system.peer / "bin" / "python" if system.peer else Path(sys.executable)
            if not python.exists():
                self.results[system.name].note = "not installed"
                continue
            with self._noting(system):
                worker = self._workers[system.name] = Worker(system.name, folder, str(python), env)
                self.versions = worker.versions | self.versions
                worker.round()

    def __enter__(self) -> "Contest":
        return self

    def __exit__(self, *error: object) -> None:
        for worker in self._workers.values():
            worker.close()

    def take_turns(self, rounds: int, around: Callable[[System], AbstractContextManager[None]] | None = None) -> None:
        """Measures every system once a round, within the context `around` it, and at last its memory."""
        for number in range(rounds):
            for system, worker in self._running():
                with self._noting(system), around(system) if around else nullcontext():
                    answer = worker.round()
                    self.results[system.name].rates.append(answer["images_per_s"])
                    self.results[system.name].first_batches.append(answer["first_batch_s"])
            print(f"round {number + 1} of {rounds} is done", file=sys.stderr)
        for system, worker in self._running():
            with self._noting(system):
                self.results[system.name].peak_mb = worker.peak_memory()

    def _running(self) -> list[tuple[System, Worker]]:
        found = [(system, self._workers.get(system.name)) for system in self.systems]
        return [(system, worker) for system, worker in found if worker and not self.results[system.name].note]

    @contextmanager
    def _noting(self, system: System) -> Iterator[None]:
        try:
            yield
        except WorkerError as error:
            self.results[system.name].note = f"failed: {error}"


def table(contest: Contest, extra: Mapping[str, Mapping[str, str]]) -> str:
    """Markdown: a row a system, the first one ours, with the ratio of each round; `extra` columns by title and name."""
    head = ["system", "images/s", "ours / its: median (min to max)", "target", "first batch, s", "peak MB", *extra]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    ours = contest.systems[0]
    for system in contest.systems:
        result = contest.results[system.name]
        if result.note:
            cells = [system.title, result.note, *[""] * (len(head) - 2)]
        else:
            rate = spread_of(result.rates, "{:,.0f}")
            ratio = spread(contest, ours.name, system.name)
            cells = [system.title, rate, ratio, verdict(system, ratios(contest, ours.name, system.name))]
            cells += [f"{median(result.first_batches):.2f}", f"{result.peak_mb:,.0f}"]
            cells += [column.get(system.name, "") for column in extra.values()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def ratios(contest: Contest, first: str, second: str) -> list[float]:
    """Of each round, the speed of one system over that of another."""
    rates = (contest.results[name].rates for name in (first, second))
    return [a / b for a, b in zip(*rates, strict=True)]


def spread(contest: Contest, first: str, second: str) -> str:
    """Median and extremes of `ratios`; nothing for a system against itself, or one that did not run."""
    if first == second or contest.results[first].note or contest.results[second].note:
        return ""
    return spread_of(ratios(contest, first, second))


def spread_of(values: list[float], form: str = "{:.2f}") -> str:
    """Median and extremes of some values."""
    return "{} ({} to {})".format(*(form.format(found) for found in (median(values), min(values), max(values))))


def verdict(system: System, ratios: list[float]) -> str:
    if system.target is None:
        return ""
    return f"{system.target:g}: {'met' if median(ratios) >= system.target else 'missed'}"


def report(title: str, set_up: str, contest: Contest, extra: Mapping[str, Mapping[str, str]] | None = None) -> None:
    """Records the table of a contest."""
    record(title, set_up, table(contest, extra or {}), contest.versions)


def record(title: str, set_up: str, rows: str, versions: Mapping[str, str]) -> None:
    """Prints a table, and appends it to RESULTS.md with the command, the hardware and the versions."""
    print(rows)
    revision = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    command = shlex.join(["uv", "run", "python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    named = ", ".join(f"{name} {number}" for name, number in sorted(versions.items()))
    section = [
        f"## {title}, {time.strftime('%Y-%m-%d')}",
        f"`{command}` at {revision.stdout.strip()}",
        f"{hardware()}. Python {platform.python_version()}, {named}.",
        set_up,
        rows,
    ]
    with RESULTS.open("a") as results:
        results.write("\n\n".join(section) + "\n\n")


def last_epoch(run: Path) -> dict[str, str]:
    """The last row of a run's results.csv."""
    with open(run / "results.csv", newline="") as file:
        return list(csv.DictReader(file))[-1]


def installed_versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def hardware() -> str:
    info = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in info if line.startswith("model name")), platform.machine())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{model}, {len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB of memory"


def parser(description: str) -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--images", type=int, default=2048, help="images in an epoch, each drawn differently")
    result.add_argument("--rounds", type=int, default=5, help="epochs of each system that are measured, in turn")
    result.add_argument(
        "--peers",
        type=Path,
        default=ROOT / "benchmarks" / ".peers",
        help="folder of the other projects' environments (see benchmarks/peers.py)",
    )
    return result
