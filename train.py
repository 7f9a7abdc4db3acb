"""The training loop: train_epoch, evaluate, fit."""

import math
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

import distributed
from config import Config
from distributed import print0
from errors import DataError, DivergedError, Interrupted
from preprocess import Data
from stream.loader import UNREADABLE, Batch, Loader
from training.logs import Stopwatch, Tracker
from training.optim import momentum_of
from training.signals import StopRequest, batches_until
from training.snapshot import SnapshotStore
from training.state import Progress, all_finite, capture
from training.step import Training, train_step
from training.timing import StepProfiler, TimeSpent, describe_time
from visualization import CurvePlotter, plot_samples


@dataclass
class Run:
    """A run in progress. `record` is what its snapshots say of it; `folder` and `store` are None but on rank 0."""

    config: Config
    data: Data
    training: Training
    progress: Progress
    tracker: Tracker
    store: SnapshotStore | None
    folder: Path | None
    schedule: LRScheduler
    record: dict[str, Any]
    stop: StopRequest
    spent: TimeSpent
    profiler: StepProfiler | None = None
    curves: CurvePlotter | None = None
    watch: Stopwatch = field(default_factory=Stopwatch)
    pending: list[dict[str, Any]] = field(default_factory=list)


def train_epoch(run: Run) -> None:
    """Train from where `run.progress` stands to the end of its epoch, logging and snapshotting on the way."""
    config, progress, training, loader = run.config, run.progress, run.training, run.data.train
    first = progress.step - progress.epoch * len(loader)
    loader.set_epoch(progress.epoch, first)
    training.model.train()
    run.tracker.start_epoch(progress.epoch + 1, config.epochs, len(loader), first)
    run.watch = Stopwatch(progress.train_seconds)
    run.spent.begin()
    for images, labels, ids in batches_until(run.stop, loader, every_step=True):
        if progress.step == 0 and run.folder is not None:
            with run.spent.part("other"):
                picture = run.folder / "plots" / "samples.png"
                plot_samples(images.cpu().numpy(), labels.tolist(), run.data.classes, picture)
        group = training.optimizer.param_groups[0]
        with run.spent.step():
            numbers = train_step(training, images, labels)
        progress.step += 1
        progress.last_lr = group["lr"]
        plan = {"lr": group["lr"], "momentum": momentum_of(group)}
        row = {"step": progress.step, "epoch": progress.epoch + 1, **plan, "ids": ids, "numbers": numbers}
        run.pending.append(row)
        if run.profiler is not None:
            with run.spent.part("other"):
                run.profiler.step()
        if progress.step < config.epochs * len(loader):
            run.schedule.step()
        done = progress.step - progress.epoch * len(loader)
        if progress.step % config.log_steps == 0 or done == len(loader):
            flush_steps(run)
        if config.snapshot_steps and progress.step % config.snapshot_steps == 0 and done < len(loader):
            save_snapshot(run)
    run.spent.end_training()


def flush_steps(run: Run) -> None:
    """Fetch the numbers of the steps since the last time from the device, and log them.

    Raises DivergedError after too many steps in a row without a finite loss, or skipped by the scaler, and
    SnapshotError when a snapshot could not be written.
    """
    if run.store is not None:
        run.store.check()
    rows, run.pending = run.pending, []
    if not rows:
        return
    progress, world, diverged_at = run.progress, distributed.world_size(), 0
    numbers = torch.stack([torch.stack([number.float() for number in row.pop("numbers")]) for row in rows])
    ids = torch.stack([row["ids"] for row in rows]).numpy()
    if run.config.ledger:
        ids = distributed.gather_columns(ids)
    means = distributed.mean_over_ranks(numbers).tolist()  # the one place where training waits for the device
    progress.train_seconds = run.watch.seconds()
    run.spent.collect()
    for row, row_ids, (loss, correct, skipped) in zip(rows, ids, means, strict=True):
        finite = math.isfinite(loss)
        progress.skipped_steps += bool(skipped)
        progress.bad_steps = 0 if finite and not skipped else progress.bad_steps + 1
        if progress.bad_steps >= run.config.max_bad_steps and not diverged_at:
            diverged_at = row["step"] - progress.bad_steps + 1
        progress.last_loss = loss
        all_correct = round(correct * world)
        row.update(loss=loss, top1=all_correct / run.config.batch_size, ids=row_ids, skipped=bool(skipped))
        if finite:
            progress.loss_sum += loss
            progress.losses += 1
        progress.correct += all_correct
    done = progress.step - progress.epoch * len(run.data.train)
    run.tracker.log_steps(rows, done, done * run.config.batch_size / max(progress.train_seconds, 1e-9))
    if diverged_at:
        raise _diverged(run, diverged_at)


@torch.inference_mode()
def evaluate(training: Training, loader: Loader | list[Batch], stop: StopRequest) -> dict[str, float]:
    """Loss and top-1 and top-5 accuracy (fractions of 1) over a whole dataset, and the integer counts behind them.

    Every image counts once and every batch is the same on any number of ranks; unreadable images do not count.
    Without label smoothing. Raises Interrupted or DataError on all ranks when one of them must stop.
    """
    distributed.copy_from_rank0(training.model.buffers())
    training.model.eval()
    sums: list[torch.Tensor] = []
    most = 0
    for images, labels, _ in batches_until(stop, loader, every_step=False):
        most = max(most, len(images))
        x, y = _pad(images, labels, most)  # a compiled or autotuned model is made for one size
        with training.autocast():
            logits = training.model(training.normalize(x))
        loss = F.cross_entropy(logits.float(), y, reduction="sum", ignore_index=UNREADABLE)
        hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == y[:, None]
        sums.append(torch.stack((loss, hits[:, 0].sum(), hits.sum(), (y != UNREADABLE).sum())))
    lengths = distributed.gather_columns(np.array([[len(loader)]]))[0]
    table = np.zeros((lengths.sum(), 4))
    first = lengths[: distributed.rank()].sum()
    if sums:
        table[first : first + len(sums)] = torch.stack(sums).cpu().double().numpy()
    loss_sum, top1, top5, images_seen = distributed.sum_over_ranks(table).sum(axis=0).tolist()
    count = max(1, int(images_seen))
    return {
        "val_loss": loss_sum / count,
        "val_top1": top1 / count,
        "val_top5": top5 / count,
        "correct1": int(top1),
        "correct5": int(top5),
        "images": int(images_seen),
    }


def _pad(images: torch.Tensor, labels: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch of `count`, filled up with images that do not count."""
    missing = count - len(images)
    return F.pad(images, (0, 0, 0, 0, 0, 0, 0, missing)), F.pad(labels, (0, missing), value=UNREADABLE)


def fit(run: Run) -> None:
    """Train to the last epoch. Each one ends with an evaluation, a row in results.csv and a snapshot.

    Raises Interrupted after a signal and DataError when the data fails, both with a snapshot written; DivergedError
    or SnapshotError.
    """
    try:
        while run.progress.epoch < run.config.epochs:
            train_epoch(run)
            train_seconds, watch = run.progress.train_seconds, Stopwatch()
            with run.spent.part("evaluation"):
                result = evaluate(run.training, run.data.val, run.stop)
            end_epoch(run, result, train_seconds + watch.seconds())
            told = describe_time(run.spent.shares(), run.config, run.data.train, train_seconds)
            print0(f"time      {told}")
    except (Interrupted, DataError) as stop:
        flush_steps(run)
        run.tracker.close()
        path = save_snapshot(run)
        if run.store is not None:
            run.store.wait()
        cause = signal.Signals(stop.status - 128).name if isinstance(stop, Interrupted) else "a failure of the data"
        print0(f"stopped by {cause} at step {run.progress.step}; snapshot {path}")
        raise
    finally:
        run.tracker.close()
        if run.profiler is not None:
            run.profiler.close()
        if run.curves is not None:
            run.curves.close()
        if run.store is not None:
            run.store.wait()


def end_epoch(run: Run, result: dict[str, float], seconds: float) -> None:
    """Log the epoch, count it as completed, and write its snapshot."""
    progress, steps = run.progress, len(run.data.train)
    images = steps * run.config.batch_size
    run.tracker.end_epoch(
        {
            "epoch": progress.epoch + 1,
            "step": progress.step,
            "train_loss": progress.loss_sum / progress.losses if progress.losses else math.nan,
            "train_top1": progress.correct / images,
            **result,
            "lr": progress.last_lr,
            "images_per_s": images / progress.train_seconds,
            "seconds": seconds,
        }
    )
    if run.curves is not None:
        run.curves.draw()
    best = result["val_top1"] > progress.best_top1
    progress.best_top1 = max(progress.best_top1, result["val_top1"])
    progress.epoch += 1
    progress.loss_sum, progress.losses, progress.correct, progress.train_seconds = 0.0, 0, 0, 0.0
    save_snapshot(run, best=best and run.config.save_best)


def save_snapshot(run: Run, best: bool = False) -> Path | None:
    """Log what is pending, then save everything the next step depends on. Rank 0 writes, and returns the path.

    Raises DivergedError rather than save weights that are not finite, on all ranks when one has them.
    """
    flush_steps(run)
    training = run.training
    with run.spent.part("snapshot"):
        tensors, state = capture(training.model, training.optimizer, training.scaler, run.progress)
        if distributed.largest_over_ranks(int(not all_finite(training.model))):
            raise _diverged(run, run.progress.step - max(0, run.progress.bad_steps - 1))
        return run.store.save(tensors, run.record | state, best) if run.store else None


def _diverged(run: Run, first: int) -> DivergedError:
    training, progress = run.training, run.progress
    gradients = [p.grad for p in training.model.parameters() if p.grad is not None]
    scale = f", the gradient scale {training.scaler.get_scale():g}" if training.scaler.is_enabled() else ""
    return DivergedError(
        f"training diverged at step {first}: at step {progress.step} the loss is {progress.last_loss:.4g}, "
        f"the learning rate {progress.last_lr:.3g}, the gradient norm {nn.utils.get_total_norm(gradients):.3g}{scale}; "
        "--resume_from the last good snapshot with a lower --override lr=..., or clip with --max_grad_norm"
    )
