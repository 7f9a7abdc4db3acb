"""Reads an epoch from a Hub that fails at random, again and again, and compares its order with that of the disk.

    uv run python tests/fault_sweep.py --schedules 500

A schedule is a seed: it draws how many of the requests for bytes fail, and in which ways. The epoch must hold the ids
of the same files on a disk, or end in an error, which only a Hub that hardly ever answers is allowed to cause.
"""

import argparse
import random
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from conftest import HUB_PORT
from hub import Hub
from shards import REPO_ID, make_imagenet_like

from config import resolve
from errors import DataError
from preprocess import train_transform
from stream import hub as remote
from stream import retry as network
from stream.dataset import HuggingFaceImageNetDataset
from stream.loader import StreamingDataLoader
from stream.order import epoch_order
from stream.retry import Network

Fault = Callable[[str, str], int | str | None]
STATUSES = (408, 429, 500, 502, 503, 504)
KINDS: tuple[int | str, ...] = (*STATUSES, "reset", "short")
RATES = (0.0, 0.1, 0.3, 0.6, 0.95)


def seeded_faults(seed: int, rate: float, kinds: tuple[int | str, ...], only: str = "") -> Fault:
    """This share of the requests whose path has `only` in it fails, in one of these ways."""
    rng, lock = random.Random(seed), threading.Lock()

    def fault(method: str, path: str) -> int | str | None:
        with lock:
            return rng.choice(kinds) if only in path and rng.random() < rate else None

    return fault


@contextmanager
def short_waits() -> Iterator[pytest.MonkeyPatch]:
    """Waits are a fraction of what users get."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(network, "FIRST_WAIT", 0.01)
        patch.setattr(network, "LONGEST_WAIT", 0.05)
        yield patch


def epoch_ids(name: str, network: Network) -> list[int]:
    """The ids of an epoch of 64 images, read and decoded."""
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
    return [int(number) for batch in loader for number in batch.ids]


def sweep(root: Path, seeds: Iterable[int]) -> Counter[str]:
    """Reads an epoch under each schedule; returns how many came to their end, and how many gave up."""
    expected = epoch_ids(str(root / "datasets" / REPO_ID), Network())
    ends: Counter[str] = Counter()
    with short_waits() as patch:
        for seed in seeds:
            rng = random.Random(seed)
            rate = rng.choice(RATES)
            patience = 0.3 if rate > 0.9 else 60.0
            patch.setattr(remote, "START_PATIENCE", patience)
            kinds = tuple(rng.sample(KINDS, rng.randint(1, 4)))
            with Hub(root, port=HUB_PORT, fault=seeded_faults(seed, rate, kinds, only="/resolve/")):
                try:
                    ids = epoch_ids(REPO_ID, Network(stall_timeout=5, patience=patience))
                except DataError:
                    assert rate == max(RATES), f"schedule {seed} gave up at a rate of {rate}"
                    ends["gave up"] += 1
                    continue
            assert ids == expected, f"schedule {seed} changed the order"
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
        f"{given.schedules} schedules of faults: {ends['whole']} epochs in the order of the disk, {ends['gave up']} "
        f"given up, with {max(RATES):.0%} of the requests failing"
    )


if __name__ == "__main__":
    main()
