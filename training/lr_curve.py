"""Reading the curve of a learning rate range test: whether it shows a learning rate, and which one."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from config import FEWEST_LR_STEPS
from defaults import CONSTANT_SHARE
from errors import DivergedError

SWEEP_STEPS = 50
HALVES_AGREE = {"high": 2.0, "medium": 3.0}  # the largest ratio of learning rates for each confidence
METHODS_AGREE = {"high": 6.0, "medium": 10.0}
FIRST_POINTS = 8
LEAST_FALL = 0.02
SKIP_START = 10
SLIDE_POINTS, SLIDE_SLOPE = 15, 0.005
WIDTH = 0.3  # decades


@dataclass(frozen=True)
class Curve:
    """Increasing learning rates, and for each the raw and the smoothed loss."""

    lr: np.ndarray
    loss: np.ndarray
    smoothed: np.ndarray


def average(sweeps: list[dict[str, list[float]]]) -> Curve:
    """The mean of several sweeps, up to the length of the shortest."""
    length = min(len(sweep["lr"]) for sweep in sweeps)
    loss, smoothed = (np.mean([sweep[name][:length] for sweep in sweeps], 0) for name in ("raw_loss", "loss"))
    return Curve(np.array(sweeps[0]["lr"][:length]), loss, smoothed)


def why_unreadable(curve: Curve, smooth_f: float, stopped: str) -> str | None:
    """Why this curve shows no learning rate, or None: it is short, or falls too little, or by less than three standard
    deviations of the noise in the mean of the first losses and in an exponential average (2 - f) / f losses wide.
    """
    loss, smoothed = curve.loss, curve.smoothed
    if len(loss) < FEWEST_LR_STEPS:
        return f"{stopped} after {len(loss)} of the {FEWEST_LR_STEPS} steps that a curve needs"
    first, lowest = loss[:FIRST_POINTS].mean(), smoothed[FIRST_POINTS:].min()
    falling = loss[: max(FIRST_POINTS, smoothed.argmin() + 1)]
    noise = np.diff(falling).std() / math.sqrt(2)
    width = min(len(falling), (2 - smooth_f) / smooth_f) if smooth_f else 1
    if first - lowest < max(LEAST_FALL * abs(first), 3 * noise * math.sqrt(1 / FIRST_POINTS + 1 / width)):
        return f"the loss never fell clearly: {first:.4g} at first, {lowest:.4g} at best, {noise:.2g} of noise"
    return None


def lowest(curve: Curve) -> float:
    """The learning rate of the lowest loss, smoothed by a Gaussian of WIDTH decades in log10(lr).

    This mean looks both ways, so it has no lag, and near the end of the fall it includes the start of the rise. Losses
    are capped at three times the first ones, so that a diverged end does not dominate.
    """
    decades = np.log10(curve.lr)
    weights = np.exp(-0.5 * ((decades[:, None] - decades) / WIDTH) ** 2)
    loss = np.minimum(curve.loss, 3 * curve.loss[:FIRST_POINTS].mean())
    return float(curve.lr[(weights @ loss / weights.sum(1)).argmin()])


def steepest(curve: Curve) -> float:
    """Where the smoothed loss falls fastest against log10(lr), left of its minimum.

    The first points are ignored as noise (after torch-lr-finder).
    """
    part = slice(SKIP_START, max(int(curve.smoothed.argmin()), SKIP_START + 1) + 1)
    return float(curve.lr[part][np.gradient(curve.smoothed[part], np.log10(curve.lr[part])).argmin()])


def minimum(curve: Curve) -> float:
    """A tenth of the learning rate with the lowest smoothed loss (after fastai's rule)."""
    return float(curve.lr[curve.smoothed.argmin()]) / 10


def valley(curve: Curve) -> float:
    """The middle, in log lr, of the longest decreasing subsequence of the smoothed loss (after fastai's rule)."""
    loss = curve.smoothed
    length, previous = np.ones(len(loss), int), np.full(len(loss), -1)
    for i in range(1, len(loss)):
        above = np.flatnonzero(loss[:i] > loss[i])
        if len(above):
            previous[i] = above[length[above].argmax()]
            length[i] = length[previous[i]] + 1
    path = [int(length.argmax())]
    while previous[path[-1]] >= 0:
        path.append(int(previous[path[-1]]))
    return float(np.sqrt(curve.lr[path[0]] * curve.lr[path[-1]]))


def slide(curve: Curve) -> float:
    """Where, from the right, two slopes SLIDE_POINTS apart first differ by at most SLIDE_SLOPE (after fastai's rule of
    that name; slopes are loss per step).
    """
    slopes = np.gradient(curve.smoothed)
    left = len(slopes) - 1 - SLIDE_POINTS
    while left > 0 and abs(slopes[left + SLIDE_POINTS] - slopes[left]) > SLIDE_SLOPE:
        left -= 1
    return float(curve.lr[left])


METHODS: dict[str, Callable[[Curve], float]] = {
    "lowest": lowest,
    "steepest": steepest,
    "minimum": minimum,
    "valley": valley,
    "slide": slide,
}
WITNESSES = ("steepest", "minimum")  # valley and slide look for the fall, and are far less reliable


@dataclass(frozen=True)
class RangeTest:
    """A range test: learning rates, losses (means over the sweeps, of equal length) and each method's suggestion.

    `halves` has the suggestions of `method` for every second sweep and for the rest; it is empty after a single sweep.
    Suggestions are for OneCycle's `max_lr`, and None if the curve shows no rate.
    """

    lr: list[float]
    loss: list[float]
    smoothed_loss: list[float]
    suggestions: dict[str, float | None]
    method: str
    stopped: str
    sweeps: int
    halves: list[float | None]

    @property
    def suggested_lr(self) -> float:
        """The chosen method's `max_lr`. Raises DivergedError when the curve shows none."""
        lr = self.suggestions[self.method]
        if lr is None:
            raise DivergedError(
                f"the finder suggests no learning rate: {self.stopped}; give --lr or a larger --lr_iter, or mend the "
                "model or data"
            )
        return lr

    @property
    def constant_lr(self) -> float:
        """The starting rate for cosine and step, which start at their highest; OneCycle only touches its peak."""
        return self.suggested_lr * CONSTANT_SHARE

    @property
    def confidence(self) -> tuple[str, str]:
        """The level (high, medium or low), and in words the reason and what to do about it.

        The halves must agree, and so must the methods that also look for the end of the fall (see WITNESSES).
        """
        lr = self.suggested_lr
        if not self.halves:
            return "low", f"one sweep cannot be checked against another; use --lr_iter {2 * SWEEP_STEPS} or more"
        if None in self.halves:
            return "low", "one half of the sweeps shows no learning rate; use a larger --lr_iter"
        halves = _ratio([half for half in self.halves if half is not None])
        witnesses = [value for name, value in self.suggestions.items() if name in WITNESSES and value is not None]
        methods = _ratio([lr, *witnesses])
        told = f"the halves of the sweeps agree within x{halves:.1f}, {', '.join(WITNESSES)} within x{methods:.1f}"
        for level in ("high", "medium"):
            if halves <= HALVES_AGREE[level] and methods <= METHODS_AGREE[level]:
                return level, told if level == "high" else f"{told}; look at the curve, or use a larger --lr_iter"
        if halves > HALVES_AGREE["medium"]:
            return "low", f"{told}; use a larger --lr_iter"
        return "low", f"{told}; look at the curve, and try a few rates around the suggestion"


def _ratio(values: list[float]) -> float:
    return max(values) / min(values)


def read_sweeps(sweeps: list[dict[str, list[float]]], endings: list[str], smooth_f: float, method: str) -> RangeTest:
    """The range test from the histories of all sweeps, with every second sweep and the rest also read separately."""
    curve = average(sweeps)
    stopped = min(zip(sweeps, endings, strict=True), key=lambda sweep: len(sweep[0]["lr"]))[1]
    problem = why_unreadable(curve, smooth_f, stopped)
    parts = [average(sweeps[first::2]) for first in range(2)] if len(sweeps) > 1 else []
    return RangeTest(
        lr=curve.lr.tolist(),
        loss=curve.loss.tolist(),
        smoothed_loss=curve.smoothed.tolist(),
        suggestions={name: None if problem else suggest(curve) for name, suggest in METHODS.items()},
        method=method,
        stopped=problem or stopped,
        sweeps=len(sweeps),
        halves=[None if why_unreadable(part, smooth_f, "") else METHODS[method](part) for part in parts],
    )
