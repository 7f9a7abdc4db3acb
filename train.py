"""The training loop: train_epoch, evaluate, fit."""

import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch.optim.lr_scheduler import LRScheduler

import distributed
from errors import DataError, Interrupted
from preprocess import Data
from stream.loader import UNREADABLE, Batch, Loader
from training.freezing import set_frozen
from training.journal import Journal
from training.logs import Stopwatch
from training.predictor import Predictor
from training.signals import StopRequest, batches_until
from training.state import Progress, rng_state, set_rng_state
from training.step import Training, train_step


@dataclass
class Run:
    """A run in progress. Its journal counts steps in `progress`; `schedule` covers `epochs` epochs."""

    data: Data
    training: Training
    progress: Progress
    schedule: LRScheduler
    epochs: int
    stop: StopRequest
    journal: Journal


def compile_ahead(training: Training, sizes: Sequence[int], batch: int, stop: StopRequest) -> None:
    """Compile what passes of `batch` images of these heights and widths run; nothing else of it stays.

    All ranks must call this together. Raises Interrupted on all when one of them must stop.
    """
    buffers, generators = [(buffer, buffer.clone()) for buffer in training.model.buffers()], rng_state()
    training.model.train()
    try:
        for size in sizes:
            stop.check()
            images = torch.zeros((batch, size, size, 3), dtype=torch.uint8, device=training.device)
            with training.autocast():
                logits = training.ddp(training.normalize(images))
            logits.sum().backward()
    finally:
        for buffer, before in buffers:
            buffer.copy_(before)
        training.optimizer.zero_grad(set_to_none=True)
        set_rng_state(generators)


def _compile_later_sizes(run: Run) -> None:
    """Compile for the sizes that later epochs have, so that the run need not wait in its middle.

    A first step compiles for its own size. Nothing is done while the backbone is frozen, which is compiled otherwise.
    """
    config = run.journal.config
    sizes = [*dict.fromkeys(map(config.size_at, range(run.progress.epoch, config.epochs)))][1:]
    is_frozen = run.progress.epoch < config.freeze_backbone
    if sizes and run.training.compiled and not is_frozen:
        batch = config.batch_size // distributed.world_size() // run.training.accumulate_steps
        with distributed.announced(f"for the compiler, which prepares images of {', '.join(map(str, sizes))} pixels"):
            compile_ahead(run.training, sizes, batch, run.stop)


def train_epoch(run: Run) -> None:
    """Train from the step in `run.progress` to the end of its epoch."""
    loader, progress = run.data.train, run.progress
    loader.set_epoch(progress.epoch, progress.step - progress.epoch * len(loader))
    run.training.model.train()
    if run.journal.config.freeze_backbone:
        set_frozen(run.training, progress.epoch < run.journal.config.freeze_backbone)
    run.journal.start_epoch()
    for batch in batches_until(run.stop, loader, every_step=True):
        with run.journal.timed_step(batch):
            mix = run.training.mix(progress.step, batch.images)
            numbers = train_step(run.training, batch.images, batch.labels, mix, run.journal.is_log_step())
            if run.training.ema is not None:
                run.training.ema.update(run.training.model, progress.step + 1)
        run.journal.step(batch, numbers)
        if progress.step < run.epochs * len(loader):
            run.schedule.step()
    run.journal.spent.end_training()


@torch.inference_mode()
def scored(
    predictor: Predictor, loader: Loader | list[Batch], stop: StopRequest
) -> Iterator[tuple[torch.Tensor, torch.Tensor, Batch]]:
    """This rank's share of a dataset: logits (N, classes), labels (N,) and the batch that they belong to.

    The batches are the same on any number of ranks. Logits and labels of the last one are padded to the size of the
    others; what is padding or unreadable has the label UNREADABLE. Raises Interrupted or DataError on all ranks when
    one of them must stop.
    """
    distributed.copy_from_rank0(predictor.model.buffers())
    predictor.model.eval()
    most = 0
    for batch in batches_until(stop, loader, every_step=False):
        most = max(most, len(batch.images))
        x, y = _pad(batch.images, batch.labels, most)  # a compiled or autotuned model is made for one size
        yield predictor.logits(x), y, batch


@torch.inference_mode()
def evaluate(predictor: Predictor, loader: Loader | list[Batch], stop: StopRequest) -> dict[str, float]:
    """Loss and top-1 and top-5 accuracy (fractions of 1) over a whole dataset, and the integer counts behind them.

    Every image counts once; unreadable images do not count. The loss has no label smoothing. Raises Interrupted or
    DataError on all ranks when one of them must stop.
    """
    sums: list[torch.Tensor] = []
    for logits, y, _ in scored(predictor, loader, stop):
        loss = F.cross_entropy(logits.float(), y, reduction="sum", ignore_index=UNREADABLE)
        hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == y[:, None]
        sums.append(torch.stack((loss, hits[:, 0].sum(), hits.sum(), (y != UNREADABLE).sum())))
    lengths = distributed.gather_columns(np.array([[len(loader)]]))[0]
    table = np.zeros((lengths.sum(), 4))
    first = lengths[: distributed.rank()].sum()
    if sums:
        table[first : first + len(sums)] = torch.stack(sums).cpu().double().numpy()
    loss_sum, top1, top5, images_seen = distributed.sum_over_ranks(table).sum(axis=0).tolist()
    if not images_seen:
        raise DataError("not one image to evaluate on can be read; see the messages above, and mend the data")
    return {
        "val_loss": loss_sum / images_seen,
        "val_top1": top1 / images_seen,
        "val_top5": top5 / images_seen,
        "correct1": int(top1),
        "correct5": int(top5),
        "images": int(images_seen),
    }


def evaluate_average(training: Training, loader: Loader, stop: StopRequest) -> dict[str, float]:
    """`ema_loss`, `ema_top1` and `ema_top5` of the averaged model; nothing if there is none."""
    if training.average is None:
        return {}
    result = evaluate(replace(training, model=training.average), loader, stop)
    return {f"ema_{name}": result[f"val_{name}"] for name in ("loss", "top1", "top5")}


def _pad(images: torch.Tensor, labels: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The batch padded to `count` images with images that are not counted."""
    missing = count - len(images)
    return F.pad(images, (0, 0, 0, 0, 0, 0, 0, missing)), F.pad(labels, (0, missing), value=UNREADABLE)


def fit(run: Run) -> None:
    """Train to the last epoch, or to where --early_stop ends the run.

    Each epoch ends with an evaluation, a row in results.csv and a snapshot.

    Raises Interrupted after a signal and DataError when the data fails, both after writing a snapshot; also raises
    DivergedError and SnapshotError.
    """
    try:
        _compile_later_sizes(run)
        while not (why := run.progress.why_over(run.journal.config)):
            train_epoch(run)
            watch = Stopwatch()
            with run.journal.spent.part("evaluation"):
                result = evaluate(run.training, run.data.val, run.stop)
                result |= evaluate_average(run.training, run.data.val, run.stop)
            run.journal.end_epoch(result, watch.seconds())
        if run.progress.epoch < run.epochs:
            distributed.print0(f"stopped early: {why}", always=True)
    except (Interrupted, DataError) as stop:
        signum = stop.status - 128 if isinstance(stop, Interrupted) else None
        run.journal.save_before_stopping(signal.Signals(signum).name if signum else "a failure of the data")
        raise
    finally:
        run.journal.close()
