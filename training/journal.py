"""The journal of a run: its numbers, time, pictures and snapshots, recorded while it trains."""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

import distributed
from config import Config
from distributed import print0
from errors import DivergedError
from stream.loader import Batch, Loader
from training.logs import Stopwatch, Tracker
from training.optim import cooldown_start, momentum_of
from training.snapshot import BEST, SnapshotStore
from training.state import Progress, all_finite, capture
from training.step import StepNumbers, Training
from training.timing import StepProfiler, TimeSpent, describe_time


class Pictures(Protocol):
    """Draws pictures of a run."""

    def samples(self, batch: Batch) -> None:
        """Draw the images of the first batch."""

    def curves(self) -> None:
        """Draw the logs up to now, in the background."""

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
    ) -> None:
        self.config = config
        self.training = training
        self.progress = progress
        self.loader = loader
        self.record = record
        self.pictures = pictures
        self.spent = TimeSpent(training.device)
        self.tracker = Tracker(folder, config.ledger)
        self.store = SnapshotStore(folder / "snapshots", config.keep_snapshots, self.tracker.logs) if folder else None
        self.cooldown = cooldown_start(config, len(loader)) if config.scheduler == "trapezoid" else None
        self.profiler: StepProfiler | None = None
        if config.profile and folder:
            self.profiler = StepProfiler(config.profile, folder / "profile" / "trace.json", training.device)
        self._watch = Stopwatch()
        self._pending: list[dict[str, Any]] = []

    def rewind(self) -> list[str]:
        """Delete logs and snapshots of steps after `progress`; returns the names of the deleted snapshots."""
        self.tracker.rewind(self.progress.step, self.progress.epoch)
        dropped = self.store.rewind(self.progress.step) if self.store else []
        if BEST in dropped:
            self.progress.best_top1 = -1.0  # no earlier best has a file any more: the next epoch becomes the best
        return dropped

    def start_epoch(self) -> None:
        """Begin an epoch, at the step in `progress`."""
        steps = len(self.loader)
        first = self.progress.step - self.progress.epoch * steps
        self.tracker.start_epoch(self.progress.epoch + 1, self.config.epochs, steps, first)
        self._watch = Stopwatch(self.progress.train_seconds)
        self.spent.begin()

    @contextlib.contextmanager
    def timed_step(self, batch: Batch) -> Iterator[None]:
        """A context around the training step on this batch."""
        if self.progress.step == 0 and self.pictures is not None:
            with self.spent.part("other"):
                self.pictures.samples(batch)
        with self.spent.step():
            yield

    def step(self, batch: Batch, numbers: StepNumbers) -> None:
        """Record a finished step, before the schedule moves; log and save when due.

        Raises DivergedError and SnapshotError, see `flush` and `save`.
        """
        config, progress, group = self.config, self.progress, self.training.optimizer.param_groups[0]
        progress.step += 1
        progress.last_lr = group["lr"]
        plan = {"lr": group["lr"], "momentum": momentum_of(group)}
        row = {"step": progress.step, "epoch": progress.epoch + 1, **plan, "ids": batch.ids, "numbers": numbers}
        self._pending.append(row)
        if self.profiler is not None:
            with self.spent.part("other"):
                self.profiler.step()
        is_last = progress.step == (progress.epoch + 1) * len(self.loader)
        if progress.step % config.log_steps == 0 or is_last:
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
        diverged_at = 0
        for row, row_ids, (loss, correct, skipped) in zip(rows, ids, means, strict=True):
            all_correct = round(correct * distributed.world_size())
            row.update(loss=loss, top1=all_correct / self.config.batch_size, ids=row_ids, skipped=bool(skipped))
            self.progress.add(loss, all_correct, bool(skipped))
            if self.progress.bad_steps >= self.config.max_bad_steps and not diverged_at:
                diverged_at = row["step"] - self.progress.bad_steps + 1
        done = self.progress.step - self.progress.epoch * len(self.loader)
        self.tracker.log_steps(rows, done, done * self.config.batch_size / max(self.progress.train_seconds, 1e-9))
        if diverged_at:
            raise self._diverged(diverged_at)

    def end_epoch(self, result: dict[str, float], seconds: float) -> None:
        """Log an epoch and its evaluation, which took `seconds`, count the epoch as completed, and save."""
        progress = self.progress
        images, train_seconds = len(self.loader) * self.config.batch_size, progress.train_seconds
        self.tracker.end_epoch(
            {
                "epoch": progress.epoch + 1,
                "step": progress.step,
                "train_loss": progress.loss_sum / progress.losses if progress.losses else math.nan,
                "train_top1": progress.correct / images,
                **result,
                "lr": progress.last_lr,
                "images_per_s": images / train_seconds,
                "seconds": train_seconds + seconds,
            }
        )
        if self.pictures is not None:
            self.pictures.curves()
        judged = result.get("ema_top1", result["val_top1"])
        is_best = judged > progress.best_top1
        progress.end_epoch(judged)
        self.save(best=is_best and self.config.save_best)
        print0(f"time      {describe_time(self.spent.shares(), self.config, self.loader, train_seconds)}")

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
        self.tracker.close()
        path = self.save()
        if self.store is not None:
            self.store.wait()
        print0(f"stopped by {cause} at step {self.progress.step}; snapshot {path}")

    def close(self) -> None:
        """Finish writing and drawing. Raises SnapshotError."""
        self.tracker.close()
        for part in (self.profiler, self.pictures):
            if part is not None:
                part.close()
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
