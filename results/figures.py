"""The figures of an evaluation: accuracies, precision, recall, F1, confusions, calibration, temperature."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from results.scores import Scores

BINS = 15
PAIRS = 10
WORST = 5
LOG_TEMPERATURES = (-3.0, 3.0)  # from a twentieth to twenty


@dataclass(frozen=True)
class ClassFigures:
    """A class of `images` images; of one without any, there are no fractions. top1 is the recall."""

    number: int
    name: str
    images: int
    precision: float | None
    recall: float | None
    f1: float | None


@dataclass(frozen=True)
class Figures:
    """All fractions are of 1. `confused` has label, prediction and images of pairs, the most confused first."""

    images: int
    correct1: int
    correct5: int
    loss: float
    macro_precision: float
    macro_recall: float
    macro_f1: float
    ece: float
    classes: list[ClassFigures]
    confused: list[tuple[int, int, int]]

    @property
    def top1(self) -> float:
        return self.correct1 / self.images

    @property
    def top5(self) -> float:
        return self.correct5 / self.images

    @property
    def with_images(self) -> list[ClassFigures]:
        """The classes that have images, the worst recall first, of equal ones that of more images."""
        return sorted((c for c in self.classes if c.images), key=lambda c: (c.recall, -c.images, c.number))


def figures_of(scores: Scores, names: Sequence[str], classes: np.ndarray) -> Figures:
    """The figures over the `classes` (int64) that could be answered; `names` are those of all of the model's.

    As scikit-learn's precision_recall_fscore_support with zero_division=0; macro means are over classes with images.
    """
    hits = scores.labels == scores.predictions
    there = np.bincount(scores.labels, minlength=len(names))[classes]
    answered = np.bincount(scores.predictions, minlength=len(names))[classes]
    right = np.bincount(scores.labels[hits], minlength=len(names))[classes]
    precision, recall = right / np.maximum(1, answered), right / np.maximum(1, there)
    f1 = 2 * right / np.maximum(1, there + answered)
    seen = there > 0
    listed = [
        ClassFigures(number, names[number], count, *(values if count else (None, None, None)))
        for number, count, *values in zip(
            *(array.tolist() for array in (classes, there, precision, recall, f1)), strict=True
        )
    ]
    return Figures(
        images=len(hits),
        correct1=int(hits.sum()),
        correct5=int(scores.in_top5.sum()),
        loss=float(scores.losses.mean()),
        macro_precision=float(precision[seen].mean()),
        macro_recall=float(recall[seen].mean()),
        macro_f1=float(f1[seen].mean()),
        ece=calibration_error(scores.probabilities, hits),
        classes=listed,
        confused=[pair for pair in confusions(scores) if pair[0] != pair[1]][:PAIRS],
    )


def confusions(scores: Scores) -> list[tuple[int, int, int]]:
    """Label, prediction and how many images, of every pair that there is, the most frequent first."""
    pairs, counts = np.unique(np.stack((scores.labels, scores.predictions)), axis=1, return_counts=True)
    order = np.lexsort((*pairs[::-1], -counts))
    return [*zip(*pairs[:, order].tolist(), counts[order].tolist(), strict=True)]


def reliability(probabilities: np.ndarray, hits: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of BINS equal ranges of the probability, and of 1 itself: images, mean probability and share of hits.

    A range has its lower end, as in torchmetrics.
    """
    edges = np.linspace(0, 1, BINS + 1, dtype=np.float32)
    places = np.clip(np.digitize(probabilities.astype(np.float32), edges) - 1, 0, BINS)
    counts = np.bincount(places, minlength=BINS + 1)
    sums = [np.bincount(places, weights, BINS + 1) for weights in (probabilities, hits.astype(float))]
    said, was = (total / np.maximum(1, counts) for total in sums)
    return counts, said, was


def calibration_error(probabilities: np.ndarray, hits: np.ndarray) -> float:
    """The expected calibration error (Guo et al. 2017): |probability - share of hits|, weighted by images."""
    counts, said, was = reliability(probabilities, hits)
    return float((counts * np.abs(said - was)).sum() / counts.sum())


@dataclass(frozen=True)
class Temperature:
    """By what to divide logits for the smallest loss, and loss and calibration error of the same images with it."""

    value: float
    images: int
    loss_before: float
    loss_after: float
    ece_before: float
    ece_after: float


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> Temperature:
    """The temperature (Guo et al. 2017) of logits (images, classes) with these labels (int64)."""
    from scipy.optimize import minimize_scalar  # takes half a second, for one flag
    from scipy.special import log_softmax

    def judged(temperature: float) -> tuple[float, float]:
        logs = log_softmax(logits.astype(np.float64) / temperature, axis=1)
        hits = logs.argmax(1) == labels
        return float(-logs[np.arange(len(labels)), labels].mean()), calibration_error(np.exp(logs.max(1)), hits)

    best = minimize_scalar(
        lambda log: judged(float(np.exp(log)))[0],
        bounds=LOG_TEMPERATURES,
        method="bounded",
        options={"xatol": 1e-4},
    )
    value = float(np.exp(best.x))
    (loss_before, ece_before), (loss_after, ece_after) = judged(1.0), judged(value)
    return Temperature(value, len(labels), loss_before, loss_after, ece_before, ece_after)
