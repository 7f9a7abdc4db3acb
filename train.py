"""The training loop: train_epoch, evaluate, fit, and the step they share."""

import contextlib
import math
import signal
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

import distributed
from augment import Normalize
from config import Config
from distributed import print0
from errors import DataError, DivergedError, Interrupted
from loader import UNREADABLE, Batch, StreamingDataLoader
from model_resnet50 import ResNet34, ResNet50, build_model, describe, load_pretrained_resnet50
from optim import build_optimizer, build_scaler, momentum_of
from preprocess import Data
from snapshot import SnapshotStore
from state import Progress, all_finite, capture, seed_everything
from stopping import StopRequest, batches_until
from tracking import Stopwatch, Tracker
from visualization import plot_curves, plot_samples

warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")  # a step that the scaler skips counts too


@dataclass
class Training:
    """A model and everything that trains it on one device. `ddp` is the model itself on one process."""

    model: nn.Module
    ddp: nn.Module
    normalize: Normalize
    criterion: nn.Module
    optimizer: Optimizer
    scaler: torch.amp.GradScaler
    device: torch.device
    amp_dtype: torch.dtype | None
    accumulate_steps: int
    max_grad_norm: float | None
    steps_applied: int = 0

    def autocast(self) -> torch.autocast:
        """Mixed precision, or nothing without an `amp_dtype`."""
        return torch.autocast(self.device.type, dtype=self.amp_dtype, enabled=self.amp_dtype is not None)


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
    pending: list[dict[str, Any]] = field(default_factory=list)


def build_training(config: Config, classes: int, device: torch.device) -> Training:
    """The model on its device with its optimiser, scaler and loss. The schedule will bring the learning rate.

    Raises UsageError for an unknown model, DataError when pretrained weights cannot be had.
    """
    torch.manual_seed(config.seed)
    if config.use_pretrained:
        model: ResNet34 | ResNet50 = load_pretrained_resnet50(config.use_pretrained, classes)
    else:
        model = build_model(classes, config.image_size, config.model)
    print0(f"model     {describe(model, config.image_size)}")
    dtype = _amp_dtype(config, device)
    torch.backends.cudnn.benchmark = not config.deterministic
    torch.use_deterministic_algorithms(config.deterministic, warn_only=True)
    model = model.to(device).to(memory_format=torch.channels_last)
    ddp: nn.Module = model
    if distributed.world_size() > 1:
        ddp = DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)
    optimizer = build_optimizer(
        model, 0.1, config.momentum, config.weight_decay, config.optimizer, config.head_lr_scale
    )
    training = Training(
        model=model,
        ddp=ddp,
        normalize=Normalize().to(device),
        criterion=nn.CrossEntropyLoss(label_smoothing=config.label_smoothing),
        optimizer=optimizer,
        scaler=build_scaler(device, dtype),
        device=device,
        amp_dtype=dtype,
        accumulate_steps=config.accumulate_steps,
        max_grad_norm=config.max_grad_norm,
    )

    def count(*_: Any) -> None:
        training.steps_applied += 1

    optimizer.register_step_post_hook(count)
    print0(f"device    {_device_name(device)}, {str(dtype or torch.float32).removeprefix('torch.')}")
    seed_everything(config.seed)
    return training


def _device_name(device: torch.device) -> str:
    ranks = distributed.world_size()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{ranks} x {name}" if ranks > 1 else name


def _amp_dtype(config: Config, device: torch.device) -> torch.dtype | None:
    if not config.amp:
        return None
    if config.amp_dtype == "auto":
        has_bf16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_bf16 else torch.float16
    return {"bf16": torch.bfloat16, "fp16": torch.float16}[config.amp_dtype]


def train_step(training: Training, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One optimiser step on uint8 images (N, H, W, 3) and int64 labels (N,).

    Returns this rank's mean loss (float32) and number of correct images, as 0-d tensors that stay on the device.
    """
    images = images.to(training.device, non_blocking=True)
    labels = labels.to(training.device, non_blocking=True)
    parts = training.accumulate_steps
    loss_sum = torch.zeros((), device=training.device)
    correct = torch.zeros((), dtype=torch.int64, device=training.device)
    training.optimizer.zero_grad(set_to_none=True)
    for part, (x, y) in enumerate(zip(images.chunk(parts), labels.chunk(parts), strict=True), 1):
        local = part < parts and isinstance(training.ddp, DistributedDataParallel)
        with training.ddp.no_sync() if local else contextlib.nullcontext():  # type: ignore[operator]
            with training.autocast():
                logits = training.ddp(training.normalize(x))
                loss = training.criterion(logits, y) / parts
            training.scaler.scale(loss).backward()
        loss_sum += loss.detach()
        correct += (logits.detach().argmax(1) == y).sum()
    if training.max_grad_norm is not None:
        training.scaler.unscale_(training.optimizer)
        nn.utils.clip_grad_norm_(training.model.parameters(), training.max_grad_norm)
    training.scaler.step(training.optimizer)
    training.scaler.update()
    return loss_sum, correct


def train_epoch(run: Run) -> None:
    """Train from where `run.progress` stands to the end of its epoch, logging and snapshotting on the way."""
    config, progress, training, loader = run.config, run.progress, run.training, run.data.train
    first = progress.step - progress.epoch * len(loader)
    loader.set_epoch(progress.epoch, first)
    training.model.train()
    run.tracker.start_epoch(progress.epoch + 1, config.epochs, len(loader), first)
    watch = Stopwatch(progress.train_seconds)
    for images, labels, ids in batches_until(run.stop, loader, every_step=True):
        if progress.step == 0 and run.folder is not None:
            plot_samples(images.numpy(), labels.tolist(), run.data.classes, run.folder / "plots" / "samples.png")
        group, applied = training.optimizer.param_groups[0], training.steps_applied
        row = {"lr": group["lr"], "momentum": momentum_of(group), "ids": ids}
        row["loss"], row["correct"] = train_step(training, images, labels)
        progress.step += 1
        progress.last_lr = group["lr"]
        skipped = training.steps_applied == applied
        progress.skipped_steps += skipped
        run.pending.append({"step": progress.step, "epoch": progress.epoch + 1, "skipped": skipped, **row})
        if progress.step < config.epochs * len(loader):
            run.schedule.step()
        progress.train_seconds = watch.seconds()
        done = progress.step - progress.epoch * len(loader)
        if progress.step % config.log_steps == 0 or done == len(loader):
            flush_steps(run)
        if config.snapshot_steps and progress.step % config.snapshot_steps == 0 and done < len(loader):
            save_snapshot(run)


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
    numbers = torch.stack([torch.stack((row["loss"], row["correct"].float())) for row in rows])
    ids = torch.stack([row["ids"] for row in rows]).numpy()
    if run.config.ledger:
        ids = distributed.gather_columns(ids)
    for row, row_ids, (loss, correct) in zip(rows, ids, distributed.mean_over_ranks(numbers).tolist(), strict=True):
        finite = math.isfinite(loss)
        progress.bad_steps = 0 if finite and not row["skipped"] else progress.bad_steps + 1
        if progress.bad_steps >= run.config.max_bad_steps and not diverged_at:
            diverged_at = row["step"] - progress.bad_steps + 1
        progress.last_loss = loss
        all_correct = round(correct * world)
        row.update(loss=loss, top1=all_correct / run.config.batch_size, ids=row_ids)
        del row["correct"]
        if finite:
            progress.loss_sum += loss
            progress.losses += 1
        progress.correct += all_correct
    done = progress.step - progress.epoch * len(run.data.train)
    run.tracker.log_steps(rows, done, done * run.config.batch_size / max(progress.train_seconds, 1e-9))
    if diverged_at:
        raise _diverged(run, diverged_at)


@torch.inference_mode()
def evaluate(training: Training, loader: StreamingDataLoader | list[Batch], stop: StopRequest) -> dict[str, float]:
    """Loss and top-1 and top-5 accuracy (fractions of 1) over a whole dataset, and the integer counts behind them.

    Every image counts once and every batch is the same on any number of ranks; unreadable images do not count.
    Without label smoothing. Raises Interrupted or DataError on all ranks when one of them must stop.
    """
    distributed.copy_from_rank0(training.model.buffers())
    training.model.eval()
    sums = []
    for images, labels, _ in batches_until(stop, loader, every_step=False):
        y = labels.to(training.device, non_blocking=True)
        with training.autocast():
            logits = training.model(training.normalize(images.to(training.device, non_blocking=True)))
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


def fit(run: Run) -> None:
    """Train to the last epoch. Each one ends with an evaluation, a row in results.csv and a snapshot.

    Raises Interrupted after a signal and DataError when the data fails, both with a snapshot written; DivergedError
    or SnapshotError.
    """
    try:
        while run.progress.epoch < run.config.epochs:
            train_epoch(run)
            watch = Stopwatch()
            result = evaluate(run.training, run.data.val, run.stop)
            end_epoch(run, result, run.progress.train_seconds + watch.seconds())
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
    if run.folder is not None:
        plot_curves(run.folder)
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
