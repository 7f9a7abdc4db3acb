"""What a model says of every image of a set, gathered from all ranks."""

import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

import distributed
from errors import DataError
from stream.loader import UNREADABLE, Batch, Loader
from stream.picks import spread
from train import scored
from training.predictor import Predictor
from training.signals import StopRequest

MOST_LOGITS = 20_000  # images, evenly spread, that a temperature is fitted to


@dataclass(frozen=True)
class Judge:
    """How a model's answers are judged.

    `numbers` (int64) has the model's class of each class of the data; `allowed` (int64, sorted) the classes that may be
    answered, None for all; `options` (int64, images x most, filled up with -1) those that an image may be taken for
    instead of its label.
    """

    numbers: np.ndarray
    allowed: np.ndarray | None = None
    options: np.ndarray | None = None


@dataclass(frozen=True)
class Scores:
    """Of each image that counts, by its id: label and prediction (int64), its probability and loss (float64).

    Labels and predictions are the model's classes. `logits` (float32, images x classes) and `logit_labels` (int64) are
    those of some images, where they are asked for.
    """

    ids: np.ndarray
    labels: np.ndarray
    predictions: np.ndarray
    probabilities: np.ndarray
    losses: np.ndarray
    in_top5: np.ndarray
    unreadable: int
    unlabelled: int
    seconds: float
    logits: np.ndarray | None = None
    logit_labels: np.ndarray | None = None


class _Gathered:
    """The rows of this rank's images, and the logits of some, kept on the device until the end."""

    def __init__(self, judge: Judge, classes: int, device: torch.device) -> None:
        allowed = np.arange(classes) if judge.allowed is None else judge.allowed
        place = np.full(classes + 1, -1, np.int64)
        place[allowed] = np.arange(len(allowed))
        self.allowed = allowed
        self._columns = None if judge.allowed is None else torch.from_numpy(allowed).to(device)
        self._lookup = torch.from_numpy(place[judge.numbers]).to(device)
        self._options = None if judge.options is None else torch.from_numpy(place[judge.options])
        self.rows: list[tuple[torch.Tensor, ...]] = []

    def add(self, logits: torch.Tensor, y: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Take the logits (N, classes) and labels (N,) of a batch, and return the logits (N, allowed) as float32."""
        count = len(batch.ids)
        logits, y = logits[:count].float(), y[:count]
        if self._columns is not None:
            logits = logits[:, self._columns]
        target = torch.where(y == UNREADABLE, UNREADABLE, self._lookup[y.clamp(min=0)])
        if self._options is not None:
            target = torch.where(y == UNREADABLE, UNREADABLE, self._likeliest(logits, batch.ids))
        probability = logits.softmax(1).amax(1)
        top5 = logits.topk(min(5, logits.shape[1]), dim=1).indices
        loss = F.cross_entropy(logits, target, reduction="none", ignore_index=UNREADABLE)
        hit = (top5 == target[:, None]).any(1)
        self.rows.append((batch.ids, y != UNREADABLE, target, top5[:, 0], probability, loss, hit))
        return logits

    def _likeliest(self, logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Of the classes that each image may be taken for, the one that the model finds likeliest; -1 without any."""
        assert self._options is not None
        options = self._options[ids].to(logits.device)
        among = logits.gather(1, options.clamp(min=0)).masked_fill(options < 0, -torch.inf)
        return options.gather(1, among.argmax(1, keepdim=True))[:, 0]

    def table(self, images: int) -> np.ndarray:
        """A row (float64) for each image of the set, zero for those of other ranks."""
        table = np.zeros((images, 7))
        if self.rows:
            columns = [torch.cat(parts).cpu().double().numpy() for parts in zip(*self.rows, strict=True)]
            ids = columns[0].astype(np.int64)
            table[ids, 0] = 1
            table[ids, 1:] = np.stack(columns[1:], axis=1)
        return table


@torch.inference_mode()
def collect(
    predictor: Predictor, loader: Loader, stop: StopRequest, judge: Judge, classes: int, with_logits: bool = False
) -> Scores:
    """Run the model, of so many `classes`, over a set. Raises DataError, Interrupted."""
    images, began = len(loader.dataset), time.perf_counter()
    gathered = _Gathered(judge, classes, predictor.device)
    chosen = spread(min(MOST_LOGITS, images), images)
    kept: list[tuple[np.ndarray, torch.Tensor]] = []
    for logits, y, batch in scored(predictor, loader, stop):
        answered = gathered.add(logits, y, batch)
        if with_logits:
            picked = np.flatnonzero(np.isin(batch.ids.numpy(), chosen))
            kept.append((batch.ids.numpy()[picked], answered[torch.from_numpy(picked).to(answered.device)].cpu()))
    table = distributed.sum_over_ranks(gathered.table(images))
    seconds = time.perf_counter() - began
    unreadable, unlabelled = int((table[:, 1] == 0).sum()), int(((table[:, 1] == 1) & (table[:, 2] < 0)).sum())
    counts = (table[:, 1] == 1) & (table[:, 2] >= 0)
    if not counts.any():
        why = "has a ReaL label" if unlabelled else "can be read; see the messages above, and mend the data"
        raise DataError(f"not one image to evaluate on {why}")
    places = table[counts, 2].astype(np.int64)
    extra: dict[str, np.ndarray] = {}
    if with_logits:
        every = np.zeros((len(chosen), len(gathered.allowed)), np.float32)
        for ids, rows in kept:
            every[np.searchsorted(chosen, ids)] = rows.numpy()
        used = counts[chosen]
        extra["logits"] = distributed.sum_over_ranks(every)[used]
        extra["logit_labels"] = table[chosen[used], 2].astype(np.int64)
    return Scores(
        ids=np.flatnonzero(counts),
        labels=gathered.allowed[places],
        predictions=gathered.allowed[table[counts, 3].astype(np.int64)],
        probabilities=table[counts, 4],
        losses=table[counts, 5],
        in_top5=table[counts, 6] == 1,
        unreadable=unreadable,
        unlabelled=unlabelled,
        seconds=seconds,
        **extra,
    )
