"""A rehearsal of a run: a few real steps and a batch of the evaluation, and what the whole run would take.

No run folder is made, and nothing else is written than what opening the data writes: the Hub's downloads, --cache_dir.
"""

import resource
import sys
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch

import distributed
from config import Config, resolve
from distributed import print0
from errors import redact
from preflight import free_bytes, most_snapshots
from preprocess import Data
from stream.loader import BATCHES_AHEAD, Loader, StreamingDataLoader
from train import evaluate
from training.compiling import COMPILES
from training.freezing import set_frozen
from training.layers import layer_table
from training.optim import build_schedule, default_lr, describe_schedule, schedule_at
from training.signals import StopRequest, batches_until
from training.state import Progress, snapshot_bytes
from training.step import Training, train_step
from units import as_rate, as_size, duration

STEPS = 6  # the first of them is slower than the others
STEP_SECONDS = 20.0  # after which no further step is begun
DATA_BATCHES = 4  # timed after those that the loader has made meanwhile
DATA_SECONDS = 10.0
RATES_LOOKED_AT = 200
LABELS = ("dataset", "dataset_name", "dataset_config", "data_dir", "dummy_data")  # what a run is of
NO_SETTINGS = {"dry_run", "debug", "resume_from", "override"}


@dataclass(frozen=True)
class Times:
    """Seconds: until the first batch came, of each step, of a batch to be made (None if there were too few), and of a
    batch to be evaluated.
    """

    first: float
    steps: list[float]
    data: float | None
    evaluation: float

    @property
    def step(self) -> float:
        """The median of the steps, without the first if there are others."""
        return median(self.steps[1:] or self.steps)


def rehearse(config: Config, data: Data, training: Training, progress: Progress) -> None:
    """Take a few steps from `progress` on, evaluate a batch, and print the plan. All ranks must call this together.

    Raises Interrupted on all ranks when one of them was told to stop, and DataError when the data fails.
    """
    stop, steps = StopRequest.listening(data.train, data.val), len(data.train)
    lr = progress.lr or default_lr(config)[0]
    table = layer_table(training.model, config.image_size, data.train.batch_size // config.accumulate_steps)
    if training.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(training.device)
    build_schedule(
        training.optimizer, config, lr, steps, progress.step
    )  # which sets the rate; it stays for these steps
    first, seconds, made, loss = _take_steps(config, data.train, training, progress, stop)
    memory = _memory_line(config, training)
    evaluation, result = _evaluate(training, data.val, stop)
    snapshot = snapshot_bytes(training.model, training.optimizer, training.average)
    times = Times(first, seconds, made, evaluation)
    print0(*table, sep="\n")
    print0(f"step      loss {loss:.4f} in training, {result['val_loss']:.4f} in a batch of the evaluation")
    print0(f"schedule  {describe_schedule(config, config.epochs * steps)}")
    print0(f"lr        {rate_line(config, lr, steps, progress.step)}")
    print0(*time_lines(config, times, data, progress), sep="\n")
    print0(memory, f"disk      {disk_line(config, snapshot, steps, progress.step)}", sep="\n")
    print0(f"settings  {' '.join(changed_settings(config))}")
    print0("dry run   no run folder was written; the same command without --dry_run trains")


def _take_steps(
    config: Config, loader: Loader, training: Training, progress: Progress, stop: StopRequest
) -> tuple[float, list[float], float | None, float]:
    """Train for a few steps, then only read: seconds until the first batch, of each step and of a batch; the loss."""
    loader.set_epoch(progress.epoch, progress.step - progress.epoch * len(loader))
    training.model.train()
    if config.freeze_backbone:
        set_frozen(training, progress.epoch < config.freeze_backbone)
    batches, began = batches_until(stop, loader, every_step=True), perf_counter()
    first, steps, loss = 0.0, list[float](), 0.0
    for batch in islice(batches, STEPS):
        first = first or perf_counter() - began
        start, step = perf_counter(), progress.step + len(steps)
        compiles = training.compiled and not steps
        with distributed.announced(f"for the first step, {COMPILES}") if compiles else nullcontext():
            numbers = train_step(training, batch.images, batch.labels, training.mix(step, batch.images))
        if training.ema is not None:
            training.ema.update(training.model, step + 1)
        loss = loss if steps else float(distributed.mean_over_ranks(numbers.loss))
        _finish(training.device)
        steps.append(perf_counter() - start)
        if _on_any_rank(sum(steps[1:] if training.compiled else steps) > STEP_SECONDS):
            break
    came = [perf_counter()]
    for _ in islice(batches, BATCHES_AHEAD + DATA_BATCHES):
        _finish(training.device)
        came.append(perf_counter())
        if _on_any_rank(came[-1] - came[0] > DATA_SECONDS):
            break
    del batches  # which ends the threads that read ahead
    ahead = BATCHES_AHEAD if isinstance(loader, StreamingDataLoader) and loader.num_workers else 0
    made = len(came) - 1 - ahead  # since the first of these times
    return first, steps, (came[-1] - came[0]) / made if made > 0 else None, loss


def _evaluate(training: Training, loader: Loader, stop: StopRequest) -> tuple[float, dict[str, float]]:
    """Evaluate the first batch of each rank; a GPU does it twice, as it is slower at first. The seconds, the result."""
    batches = list(islice(batches_until(stop, loader, every_step=True), 1))
    seconds, result = 0.0, dict[str, float]()
    for _ in range(1 if training.device.type == "cpu" else 2):
        start = perf_counter()
        result = evaluate(training, batches, stop)
        seconds = perf_counter() - start
    return seconds, result


def _finish(device: torch.device) -> None:
    """Wait for the device."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _on_any_rank(fact: bool) -> bool:
    return bool(distributed.largest_over_ranks(int(fact)))


def _memory_line(config: Config, training: Training) -> str:
    """The most memory that the steps have taken."""
    images = config.batch_size // distributed.world_size() // config.accumulate_steps
    per_pass = f"passes of {images} images"
    if training.device.type == "cuda":
        peak, whole = torch.cuda.max_memory_allocated(training.device), torch.cuda.mem_get_info(training.device)[1]
        return f"memory    {as_size(peak)} of the GPU's {as_size(whole)} at the peak of a step, in {per_pass}"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return f"memory    {as_size(peak)} at the peak of this process, in {per_pass}; decoding processes come on top"


def time_lines(config: Config, times: Times, data: Data, progress: Progress) -> list[str]:
    """How long steps, epochs and the run take, from what was timed."""
    steps, epochs_left = len(data.train), config.epochs - progress.epoch
    overlap, made = _overlaps(data.train), times.data or 0.0
    each = max(times.step, made) if overlap else times.step + made
    validation = times.evaluation * len(data.val) * (2 if config.ema_decay else 1)
    relative = [(config.size_at(epoch) / config.size_at(progress.epoch)) ** 2 for epoch in range(config.epochs)]
    done = progress.step - progress.epoch * steps
    whole = times.first + each * (steps * sum(relative[progress.epoch :]) - done) + epochs_left * validation
    epoch, remaining = duration(each * steps + validation), config.epochs * steps - progress.step
    return [
        f"time      {_of_steps(times, config.batch_size)}; {_of_data(times, config.batch_size, overlap)}",
        f"          about {epoch} an epoch of {steps:,} steps, {duration(validation)} of it for the evaluation of "
        f"{len(data.val):,} batches",
        f"          about {duration(whole)} for {epochs_left:,} epochs, {remaining:,} steps, without pictures, "
        "snapshots and waiting for the network",
    ]


def _of_steps(times: Times, batch: int) -> str:
    rate = f"{as_rate(batch / times.step)} images/s"
    if len(times.steps) == 1:
        return f"{times.step:.3g} s for the first step, {rate}; later ones are faster"
    return f"{times.step:.3g} s a step, the median of {len(times.steps) - 1}, {rate}"


def _of_data(times: Times, batch: int, overlap: bool) -> str:
    first = f"the first batch came after {times.first:.1f} s"
    if not times.data:
        return f"{first}; too few batches to time the others"
    where = "while the device trains" if overlap else "between the steps or beside them on the same cores"
    return f"{first}, others took {times.data:.3g} s, {as_rate(batch / times.data)} images/s, {where}"


def _overlaps(loader: Loader) -> bool:
    """Whether batches are made while the device trains; on the CPU both need the same cores."""
    return isinstance(loader, StreamingDataLoader) and loader.num_workers > 0 and loader.device.type != "cpu"


def rate_line(config: Config, lr: float, steps_per_epoch: int, step: int) -> str:
    """The first, the highest and the last learning rate from `step` on, each with its step."""
    last = config.epochs * steps_per_epoch - 1
    stride = max(1, (last - step) // RATES_LOOKED_AT)
    corners = {round(config.pct_start * (last + 1)) - 1, round(config.warmup_epochs * steps_per_epoch)}
    looked_at = sorted({*range(step, last + 1, stride), *(at for at in corners if step <= at <= last), last})
    rates = {at: schedule_at(config, lr, steps_per_epoch, at)[0] for at in looked_at}
    peak = max(rates, key=lambda at: rates[at])
    line = (
        f"{rates[step]:.3g} at step {step + 1:,}, {rates[peak]:.3g} at step {peak + 1:,}, the highest, and "
        f"{rates[last]:.3g} at step {last + 1:,}, the last"
    )
    if config.lr == "auto":
        return f"{line}; the finder will tell another rate at the start, and this is the default one"
    return line


def disk_line(config: Config, snapshot: int, steps_per_epoch: int, step: int) -> str:
    """What the snapshots of `snapshot` bytes will take, against what is free."""
    count, kinds = most_snapshots(config, steps_per_epoch, step)
    folder, need = Path(config.run_dir or "runs"), count * snapshot
    free = free_bytes(folder)
    line = f"{as_size(snapshot)} a snapshot ({kinds}): {as_size(need)} at most; {folder} has {as_size(free)} free"
    return line if free >= need else f"{line}. WARNING: make room, or give another --run_dir"


def changed_settings(config: Config) -> list[str]:
    """The dataset, and the settings that are not its defaults, as flags."""
    values = asdict(config)
    usual = asdict(resolve({name: values[name] for name in LABELS if values[name]}))
    changed = [name for name in values if values[name] != usual[name] and name not in NO_SETTINGS]
    return [_as_flag(name, values[name]) for name in [*(name for name in LABELS if values[name]), *changed]]


def _as_flag(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no_{name}"
    return f"--{name} {redact(str(value))}"
