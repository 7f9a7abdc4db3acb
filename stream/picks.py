"""Which images of a set are used: a fair sample of it, and the share that is held out for validation."""

import os
from collections.abc import Iterable, Sequence

import numpy as np
import xxhash

from stream.seeds import Use, seeded


def fair_sample(labels: np.ndarray, limit: int | None, wanted: np.ndarray | None = None) -> np.ndarray:
    """The sorted ids of `limit` images with these labels, or of all; only of the `wanted` classes, if told.

    As many of each class as its share, and at least one while `limit` allows that; evenly spread over each class.
    """
    ids = np.arange(len(labels)) if wanted is None else np.flatnonzero(np.isin(labels, wanted))
    if limit is None or limit >= len(ids):
        return ids
    classes, counts = np.unique(labels[ids], return_counts=True)
    if limit < len(classes):
        quotas = np.isin(np.arange(len(classes)), spread(limit, len(classes))).astype(np.int64)
    else:
        quotas = 1 + _shares(counts - 1, limit - len(classes))
    members = np.split(ids[np.argsort(labels[ids], kind="stable")], np.cumsum(counts)[:-1])
    return np.sort(np.concatenate([of[spread(quota, len(of))] for quota, of in zip(quotas, members, strict=True)]))


def hold_out(labels: np.ndarray, names: Iterable[str], share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The sorted ids to train on and the others, which are about `share` of each class; training keeps one at least.

    An image's place follows from its name, so that more images or fewer move only few of the others.
    """
    start = int(seeded(seed, Use.HOLD_OUT).generate_state(1, np.uint64)[0])
    hashes = np.array([xxhash.xxh3_64_intdigest(os.fsencode(name), start) for name in names], np.uint64)
    counts = np.unique(labels, return_counts=True)[1]
    order = np.lexsort((hashes, labels))
    first = np.cumsum(counts) - counts
    rest, quotas = np.modf(share * counts)
    fullest = np.lexsort((hashes[order[first]], -rest))  # the classes that lose most where all are rounded down
    quotas[fullest[: round(share * len(labels)) - int(quotas.sum())]] += 1
    quotas = np.minimum(quotas.astype(np.int64), counts - 1)
    held = np.zeros(len(labels), bool)
    held[order] = np.arange(len(labels)) - np.repeat(first, counts) < np.repeat(quotas, counts)
    return np.flatnonzero(~held), np.flatnonzero(held)


def places(names: Sequence[str], of: Sequence[str] | None) -> np.ndarray:
    """The places (int64) in `names` of the others, without those that are not there; of all names if `of` is None."""
    found = {name: place for place, name in enumerate(names)}
    return np.array([found[name] for name in (names if of is None else of) if name in found], np.int64)


def spread(count: int, size: int) -> np.ndarray:
    """`count` of the numbers below `size`, evenly spread."""
    return np.arange(count) * size // max(1, count)


def classes_within(ranges: np.ndarray, wanted: np.ndarray) -> int:
    """How many of the `wanted` classes lie in one of these ranges of labels, (2, groups): lowest and highest."""
    edges = np.zeros(int(max(ranges.max(), wanted.max())) + 2, np.int64)
    np.add.at(edges, ranges[0], 1)
    np.add.at(edges, ranges[1] + 1, -1)
    return int((np.cumsum(edges)[wanted] > 0).sum())


def _shares(sizes: np.ndarray, total: int) -> np.ndarray:
    """`total` shared out by size, none more than its size; `total` is at most the sum."""
    ends = np.cumsum(sizes)
    return np.diff(ends * total // max(1, int(ends[-1])), prepend=0)
