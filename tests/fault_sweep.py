"""Reads an epoch from a Hub that fails at random, again and again, and compares its order with that of the disk.

    uv run python tests/fault_sweep.py --schedules 500

A schedule is a seed: it draws how many of the requests for bytes fail, and in which ways: refused, broken off, silent,
a byte at a time, told to wait, or answered with other bytes than asked for. The epoch must hold the ids and the images
of the same files on a disk, or end in time in an error, which only a Hub that hardly ever answers is allowed to cause.
"""

import argparse
import hashlib
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from conftest import HUB_PORT
from hub import LIES, SLOW, Hub
from shards import REPO_ID, make_imagenet_like

from config import resolve
from errors import DataError
from preprocess import train_transform
from stream import allowance
from stream import retry as network
from stream.dataset import HuggingFaceImageNetDataset
from stream.loader import StreamingDataLoader
from stream.order import epoch_order
from stream.retry import Network

Fault = Callable[[str, str], int | str | None]
STATUSES = (408, 429, 500, 502, 503, 504)
KINDS: tuple[int | str, ...] = (*STATUSES, "reset", "short", *LIES, *SLOW, "wait 0", "wait 1")
SLOW_SHARE = 0.2
SLOW_KINDS = {*SLOW, "wait 1"}  # each costs a moment even here
STALL = 0.3  # seconds
RATES = (0.0, 0.1, 0.3, 0.6, 0.95)


def seeded_faults(seed: int, rate: float, kinds: tuple[int | str, ...], only: str = "") -> Fault:
    """This share of the requests whose path has `only` in it fails, in one of these ways."""
    rng, lock = random.Random(seed), threading.Lock()

    def fault(method: str, path: str) -> int | str | None:
        with lock:
            if only not in path or rng.random() >= rate:
                return None
            kind = rng.choice(kinds)
            return None if kind in SLOW_KINDS and rng.random() >= SLOW_SHARE else kind

    return fault


@contextmanager
def short_waits() -> Iterator[pytest.MonkeyPatch]:
    """Waits are a fraction of what users get."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(network, "FIRST_WAIT", 0.01)
        patch.setattr(network, "LONGEST_WAIT", 0.05)
        patch.setattr(allowance, "requests", allowance.Allowance())
        yield patch


def epoch_of(name: str, network: Network) -> str:
    """A digest of the ids, labels and images of an epoch of 64 images, read and decoded."""
    dataset = HuggingFaceImageNetDataset.open(
        name, split=["train"], max_samples=64, block_bytes=30_000, network=network
    )
    loader = StreamingDataLoader(
        dataset,
        train_transform(resolve({"dataset": "hf", "dataset_name": "x", "image_size": 24})),
        lambda epoch: epoch_order(dataset.block_rows, epoch, 0, 4, 32),
        batch_size=16,
        image_size=24,
        train=True,
        seed=0,
        num_workers=2,
        max_bad_fraction=0.0,
    )
    digest = hashlib.sha256()
    for batch in loader:
        for part in batch:
            digest.update(part.numpy().tobytes())
    return digest.hexdigest()


def sweep(root: Path, seeds: Iterable[int]) -> Counter[str]:
    """Reads an epoch under each schedule; returns how many came to their end, and how many gave up."""
    expected = epoch_of(str(root / "datasets" / REPO_ID), Network())
    ends: Counter[str] = Counter()
    with short_waits() as patch:
        for seed in seeds:
            rng = random.Random(seed)
            rate = rng.choice(RATES)
            patience = 0.3 if rate > 0.9 else 60.0
            patch.setattr(network, "START_PATIENCE", patience)
            kinds = tuple(rng.sample(KINDS, rng.randint(1, 4)))
            began = time.monotonic()
            with Hub(
                root, port=HUB_PORT, redirect=rng.random() < 0.3, fault=seeded_faults(seed, rate, kinds, only="/data/")
            ):
                try:
                    seen = epoch_of(REPO_ID, Network(stall_timeout=STALL, patience=patience))
                except DataError:
                    seconds = time.monotonic() - began
                    assert rate == max(RATES), f"schedule {seed} gave up at a rate of {rate}"
                    assert seconds < patience + 20, f"schedule {seed} gave up after {seconds:.0f} s"
                    ends["gave up"] += 1
                    continue
            assert seen == expected, f"schedule {seed} changed the epoch"
            ends["whole"] += 1
    return ends


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedules", type=int, default=500)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        make_imagenet_like(Path(name), files=30, rows_per_group=10)
        ends = sweep(Path(name), range(given.first, given.first + given.schedules))
    print(
        f"{given.schedules} schedules of faults: {ends['whole']} epochs equal to those of the disk, {ends['gave up']} "
        f"given up, with {max(RATES):.0%} of the requests failing"
    )


if __name__ == "__main__":
    main()
