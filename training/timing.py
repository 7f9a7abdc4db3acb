"""Where the time of an epoch goes and what would help, and traces of single steps."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from config import Config
from distributed import print0
from stream.loader import Loader, StreamingDataLoader
from training.compiling import wants_compile

WARMUP_STEPS = 3
ROWS = 10
WORTH_NAMING = 0.1  # of an epoch's time


class TimeSpent:
    """The seconds of an epoch by part: `data` (waiting for it), `step`, `evaluation`, `snapshot`, and `other` (pictures
    and logs).

    Steps are timed on their device, from the first operation to the last; on a GPU with events, which `collect` reads
    when they have been reached, so that reading them does not wait.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.begin()

    def begin(self) -> None:
        """Reset all parts, and start counting."""
        self._began = perf_counter()
        self._seconds = dict.fromkeys(("data", "step", "evaluation", "snapshot", "other"), 0.0)
        self._events: list[tuple[torch.Event, torch.Event]] = []

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """A context around the work that a step gives to the device."""
        if self._device.type != "cuda":
            with self.part("step"):
                yield
            return
        first, last = (torch.Event(self._device, enable_timing=True) for _ in range(2))
        first.record()
        yield
        last.record()
        self._events.append((first, last))

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A context around any other part, during which the device becomes idle."""
        start = perf_counter()
        yield
        self._seconds[name] += perf_counter() - start

    def collect(self) -> None:
        """Add the times of the recorded steps, all of which the device must have finished."""
        self._seconds["step"] += sum(first.elapsed_time(last) for first, last in self._events) / 1000
        self._events.clear()

    def waiting(self) -> float:
        """The share of the time since `begin` that no part accounts for so far, which went by waiting for data."""
        total = perf_counter() - self._began
        return max(0.0, 1 - sum(self._seconds.values()) / max(total, 1e-9))

    def end_training(self) -> None:
        """Count the time that no part has accounted for so far as waiting for data."""
        self._seconds["data"] = max(0.0, perf_counter() - self._began - sum(self._seconds.values()))

    def shares(self) -> dict[str, float]:
        """The fraction of the time since `begin` that each part took; the fractions sum to 1."""
        total = perf_counter() - self._began
        shares = {name: seconds / total for name, seconds in self._seconds.items()}
        return shares | {"other": shares["other"] + max(0.0, 1 - sum(shares.values()))}


def describe_time(shares: dict[str, float], config: Config, loader: Loader, train_seconds: float) -> str:
    """One line: the shares of an epoch, and what would help, against waiting for data first, else for the largest."""
    shown = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
    if shares["data"] >= WORTH_NAMING:
        return f"{shown}; {_why_data(config, loader, train_seconds)}"
    if shares["snapshot"] >= WORTH_NAMING and config.snapshot_steps:
        return f"{shown}; snapshots hold training up: a larger --snapshot_steps writes fewer"
    largest = max(shares, key=lambda name: shares[name])
    if largest != "step":
        return f"{shown}; {'pictures and logs take' if largest == 'other' else f'{largest} takes'} longest"
    used = {"--amp": config.amp, "--compile": wants_compile(config, loader.device.type)}
    missing = [name for name, is_used in used.items() if not is_used]
    helpful = f"; {' and '.join(missing)} would help" if missing and loader.device.type == "cuda" else ""
    return f"{shown}; the step takes longest{helpful}"


def _why_data(config: Config, loader: Loader, seconds: float) -> str:
    """Why training waits for data, and the flag that would help; `loader.read_seconds` tells reading from decoding."""
    if not isinstance(loader, StreamingDataLoader):
        return "the steps are too short to keep the device busy: a larger --batch_size would help"
    if not loader.num_workers:
        return "images are decoded between the steps: use --num_workers"
    if loader.read_seconds > 0.5 * seconds * loader.num_workers:
        helpful = "a faster disk would help" if config.cache_dir else "keep what is streamed with --cache_dir"
        return f"training waits for data, and the decoding processes for what is read: {helpful}"
    quicker = ", or --cache_dir with --cache_format planes," if config.cache_format != "planes" else ""
    return (
        f"training waits for {loader.num_workers} decoding processes: more cores and --num_workers{quicker} would help"
    )


class StepProfiler:
    """Writes a trace of `steps` training steps, after WARMUP_STEPS others, for chrome://tracing or Perfetto.

    Prints the most expensive operators, by their own time on the device.
    """

    def __init__(self, steps: int, path: Path, device: torch.device) -> None:
        self._path = path
        self._order = f"self_{device.type}_time_total"
        on_gpu = [ProfilerActivity.CUDA] if device.type == "cuda" else []
        self._profile = profile(
            activities=[ProfilerActivity.CPU, *on_gpu],
            schedule=schedule(wait=0, warmup=WARMUP_STEPS, active=steps, repeat=1),
            on_trace_ready=self._write,
        )
        self._written = False
        self._profile.start()

    def step(self) -> None:
        """Count a finished training step."""
        self._profile.step()

    def close(self) -> None:
        """Stop, and write the trace if it is incomplete; print a line if there is none."""
        self._profile.stop()
        if not self._written:
            print0(f"profile   nothing: the first {WARMUP_STEPS} steps only warm up, and no more were left")

    def _write(self, finished: profile) -> None:
        self._written = True
        self._path.parent.mkdir(parents=True, exist_ok=True)
        finished.export_chrome_trace(str(self._path))
        print0(finished.key_averages().table(sort_by=self._order, row_limit=ROWS))
        print0(f"profile   {self._path}")
