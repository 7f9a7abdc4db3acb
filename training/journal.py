"""The journal of a run: its numbers, time, pictures and snapshots, recorded while it trains."""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

import distributed
from beforehand import BEST
from config import Config
from distributed import print0
from errors import DivergedError
from stream.loader import Batch, Loader
from tracking.runner import Trackers
from training.compiling import COMPILES
from training.console import Console, header, resume_command
from training.logs import RunLogs, Stopwatch
from training.optim import cooldown_start, momentum_of
from training.snapshot import SnapshotStore
from training.state import Progress, all_finite, capture
from training.step import StepNumbers, Training
from training.timing import StepProfiler, TimeSpent, describe_time


class Pictures(Protocol):
    """Draws pictures of a run."""

    def samples(self, batch: Batch) -> None:
        """Draw the images of the first batch."""

    def curves(self, step: int) -> None:
        """Draw the logs up to now, after so many steps, in the background."""

    def close(self) -> None:
        """Wait until everything is drawn."""


class Journal:
    """Counts the steps of a run in its `progress`, logs their numbers, and saves snapshots.

    Every rank has a journal and makes the same calls, because numbers are means over ranks. Only rank 0, whose journal
    has a `folder`, writes anything. `record` is what snapshots hold about the run besides its progress.
    """

    def __init__(
        self,
        config: Config,
        training: Training,
        progress: Progress,
        loader: Loader,
        record: dict[str, Any],
        folder: Path | None,
        pictures: Pictures | None = None,
        trackers: Trackers | None = None,
    ) -> None:
        self.config = config
        self.training = training
        self.progress = progress
        self.loader = loader
        self.record = record
        self.pictures = pictures
        self.spent = TimeSpent(training.device)
        self.trackers = trackers
        self.logs = RunLogs(folder, config.ledger)
        self.console = Console(config, len(loader), len(record.get("classes", ())), speaks=folder is not None)
        self.store = SnapshotStore(folder / "snapshots", config.keep_snapshots, self.logs.paths) if folder else None
        self.cooldown = cooldown_start(config, len(loader)) if config.scheduler == "trapezoid" else None
        self.profiler: StepProfiler | None = None
        if config.profile and folder:
            self.profiler = StepProfiler(config.profile, folder / "profile" / "trace.json", training.device)
        self._watch = Stopwatch()
        self._flushed = 0, 0.0  # steps and seconds of the epoch
        self._seconds_before = 0.0  # of the epochs before this one
        self._told = set[str]()  # why time went
        self._is_first = True  # the step that comes
        self._pending: list[dict[str, Any]] = []

    def rewind(self, source: Path | None = None) -> list[str]:
        """Delete snapshots, then logs, of steps after `progress`, which `source` holds; returns the former's names."""
        dropped = self.store.rewind(self.progress.step, source) if self.store else []
        self.logs.rewind(self.progress.step, self.progress.epoch)
        self._seconds_before = self.logs.seconds_logged()
        if BEST in dropped:
            self.progress.best_top1 = -1.0  # no earlier best has a file any more: the next epoch becomes the best
        return dropped

    def start_epoch(self) -> None:
        """Begin an epoch, at the step in `progress`."""
        steps = len(self.loader)
        first = self.progress.step - self.progress.epoch * steps
        self.console.start_epoch(self.progress.epoch + 1, first)
        if self._is_first:
            workers = getattr(self.loader, "num_workers", 0)
            self.console.waits_for(f"for the first batch{f' of {workers} decoding processes' if workers else ''}")
        self._watch = Stopwatch(self.progress.train_seconds)
        self._flushed = first, self.progress.train_seconds
        self.spent.begin()

    @contextlib.contextmanager
    def timed_step(self, batch: Batch) -> Iterator[None]:
        """A context around the training step on this batch."""
        self.console.over()
        if self._is_first:
            self.console.waits_for(f"for the first step{f', {COMPILES}' if self.training.compiled else ''}")
        with self.spent.step():
            yield
        if self._is_first:
            self.console.over()
            self._is_first = False
        if self.progress.step == 0 and self.pictures is not None:  # not before: the first one imports matplotlib
            with self.spent.part("other"):
                self.pictures.samples(batch)

    def is_log_step(self) -> bool:
        """Whether the step that begins is one after which numbers are fetched."""
        done, steps = self.progress.step + 1, len(self.loader)
        return done % self.config.log_steps == 0 or done == (self.progress.epoch + 1) * steps

    def step(self, batch: Batch, numbers: StepNumbers) -> None:
        """Record a finished step, before the schedule moves; log and save when due.

        Raises DivergedError and SnapshotError, see `flush` and `save`.
        """
        config, progress, group = self.config, self.progress, self.training.optimizer.param_groups[0]
        is_due_to_log = self.is_log_step()
        progress.step += 1
        progress.last_lr = group["lr"]
        plan = {"lr": group["lr"], "momentum": momentum_of(group)}
        row = {"step": progress.step, "epoch": progress.epoch + 1, **plan, "ids": batch.ids, "numbers": numbers}
        self._pending.append(row | {"seconds": self._watch.seconds()})
        self.console.tick()
        if self.profiler is not None:
            with self.spent.part("other"):
                self.profiler.step()
        is_last = progress.step == (progress.epoch + 1) * len(self.loader)
        if is_due_to_log:
            self.flush()
        is_due = config.snapshot_steps and progress.step % config.snapshot_steps == 0
        if (is_due or progress.step == self.cooldown) and not is_last:
            self.save()

    def flush(self) -> None:
        """Fetch the numbers of the steps since the last flush from the device, and log them.

        Raises DivergedError after too many consecutive steps without a finite loss or skipped by the scaler, and
        SnapshotError when a snapshot could not be written.
        """
        if self.store is not None:
            self.store.check()
        rows, self._pending = self._pending, []
        if not rows:
            return
        numbers = torch.stack([torch.stack([number.float() for number in row.pop("numbers")]) for row in rows])
        ids = torch.stack([row["ids"] for row in rows]).numpy()
        if self.config.ledger:
            ids = distributed.gather_columns(ids)
        means = distributed.mean_over_ranks(numbers).tolist()  # the one place where training waits for the device
        self.progress.train_seconds = self._watch.seconds()
        self.spent.collect()
        done = self.progress.step - self.progress.epoch * len(self.loader)
        speed = self._speed(done)
        diverged_at = 0
        for row, row_ids, (loss, correct, skipped, grad_norm) in zip(rows, ids, means, strict=True):
            all_correct = round(correct * distributed.world_size())
            row.update(loss=loss, top1=all_correct / self.config.batch_size, ids=row_ids, skipped=bool(skipped))
            row.update(grad_norm=grad_norm, seconds=self._seconds_before + row["seconds"], images_per_s=speed)
            self.progress.add(loss, all_correct, bool(skipped))
            if self.progress.bad_steps >= self.config.max_bad_steps and not diverged_at:
                diverged_at = row["step"] - self.progress.bad_steps + 1
        self.logs.log_steps(rows)
        if self.trackers is not None:
            self.trackers.steps(rows)
        self.console.steps(rows[-1], done, self.progress.train_seconds, self.spent.waiting())
        if diverged_at:
            raise self._diverged(diverged_at)

    def _speed(self, done: int) -> float:
        """Images a second since the last flush, at the end of `done` steps of the epoch."""
        (steps, seconds), self._flushed = self._flushed, (done, self.progress.train_seconds)
        return (done - steps) * self.config.batch_size / max(self.progress.train_seconds - seconds, 1e-9)

    def end_epoch(self, result: dict[str, float], seconds: float) -> None:
        """Log an epoch and its evaluation, which took `seconds`, count the epoch as completed, and save."""
        progress = self.progress
        images, train_seconds = len(self.loader) * self.config.batch_size, progress.train_seconds
        row = {
            "epoch": progress.epoch + 1,
            "step": progress.step,
            "train_loss": progress.loss_sum / progress.losses if progress.losses else math.nan,
            "train_top1": progress.correct / images,
            **result,
            "lr": progress.last_lr,
            "images_per_s": images / train_seconds,
            "seconds": train_seconds + seconds,
        }
        judged = result.get("ema_top1", result["val_top1"])
        is_best = judged > progress.best_top1
        self.logs.end_epoch(row)
        if self.trackers is not None:
            self.trackers.epoch(row)
        self.console.end_epoch(row, is_best)
        self._seconds_before += row["seconds"]
        if self.pictures is not None:
            self.pictures.curves(progress.step)
        progress.end_epoch(judged)
        self.save(best=is_best and self.config.save_best)
        told = describe_time(self.spent.shares(), self.config, self.loader, train_seconds)
        cause = told.partition("; ")[2]
        if self.config.verbose or cause not in self._told:
            header([f"time      {told}"], self.config)
        self._told.add(cause)

    def save(self, best: bool = False) -> Path | None:
        """Flush, then save everything the next step depends on. Rank 0 writes, and returns the path.

        Where a cooldown begins, the snapshot is also kept for an extension of the run.
        Weights that are not finite are not saved: raises DivergedError on all ranks when one rank has them.
        """
        self.flush()
        training = self.training
        with self.spent.part("snapshot"):
            tensors, state = capture(
                training.model, training.optimizer, training.scaler, self.progress, training.average
            )
            if distributed.largest_over_ranks(int(not all_finite(training.model))):
                raise self._diverged(self.progress.step - max(0, self.progress.bad_steps - 1))
            if self.store is None:
                return None
            return self.store.save(tensors, self.record | state, best, self.progress.step == self.cooldown)

    def save_before_stopping(self, cause: str) -> None:
        """Save a snapshot, wait until it is on disk, and print its path."""
        self.flush()
        self.console.close()
        path = self.save()
        if self.store is not None:
            self.store.wait()
            print0(f"stopped by {cause} at step {self.progress.step}; snapshot {path}", always=True)
            print0(f"resume    {resume_command(self.store.folder.parent)}", always=True)

    def close(self) -> None:
        """Finish writing and drawing. Raises SnapshotError."""
        self.console.close()
        try:
            if self.profiler is not None:
                self.profiler.close()
        finally:
            if self.pictures is not None:
                self.pictures.close()
        if self.store is not None:
            self.store.wait()

    def _diverged(self, first: int) -> DivergedError:
        scaler, progress = self.training.scaler, self.progress
        gradients = [p.grad for p in self.training.model.parameters() if p.grad is not None]
        scale = f", the gradient scale {scaler.get_scale():g}" if scaler.is_enabled() else ""
        return DivergedError(
            f"training diverged at step {first}: at step {progress.step} the loss is {progress.last_loss:.4g}, the "
            f"learning rate {progress.last_lr:.3g}, the gradient norm {nn.utils.get_total_norm(gradients):.3g}{scale}; "
            "--resume_from the last good snapshot with a lower --override lr=..., or clip with --max_grad_norm"
        )
