"""What is drawn for one use tells nothing of what is drawn for another, in whatever run, epoch or rank."""

import random
from itertools import product
from typing import Any

import numpy as np
import pytest

from config import resolve
from preprocess import train_transform
from stream import augment, order
from stream.seeds import Use, seeded, text_seeded
from training import state


def test_no_two_sources_of_a_run_start_alike() -> None:
    """Seeds beyond 32 bits and trailing zeros included."""
    numbers = [(), (0,), (1,), (5,), (0, 0), (0, 1), (1, 0)]
    seeds = (0, 1, 4, 5, 2**32, 2**32 + 1, 2**64)
    sources = [*product(seeds, Use, numbers)]
    states = {seeded(seed, use, *more).generate_state(4).tobytes() for seed, use, more in sources}
    states |= {text_seeded(seed, use, *more).randbytes(16) for seed, use, more in sources}
    assert len(states) == 2 * len(sources)


def test_numbers_seed_alike_of_whatever_integers_they_are() -> None:
    assert text_seeded(0, Use.CROP, 1, 2).random() == text_seeded(*np.array([0]), Use.CROP, *np.array([1, 2])).random()


def test_the_order_the_crops_and_the_batches_of_an_epoch_are_drawn_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Records every source that the parts of a run ask numpy and Python for."""
    asked: list[object] = []
    original, of_text = np.random.SeedSequence, random.Random

    def recorded(*arguments: Any, **options: Any) -> np.random.SeedSequence:
        made = original(*arguments, **options)
        asked.append(made.generate_state(4).tobytes())
        return made

    def recorded_text(*seeds: str | None) -> random.Random:
        asked.extend(text for text in seeds if text is not None)  # which albumentations gives until it is seeded
        return of_text(*seeds)

    monkeypatch.setattr(np.random, "SeedSequence", recorded)
    monkeypatch.setattr(random, "Random", recorded_text)
    transform = train_transform(resolve({"dataset": "hf", "dataset_name": "x", "image_size": 8}))
    for epoch in range(3):
        order.epoch_order(np.ones(50, np.int64), epoch, 0, 8, 50)
        for use in (Use.BATCH, Use.AUTO_AUGMENT, Use.ERASING, Use.JITTER):
            augment.sample_bits(0, use, epoch, np.arange(9), 5)
        for sample in range(12):
            transform(np.zeros((9, 9, 3), np.uint8), (0, epoch, sample))
    monkeypatch.setattr(state.distributed, "rank", lambda: 0)
    state.seed_everything(0)
    monkeypatch.setattr(state.distributed, "rank", lambda: 1)
    state.seed_everything(0)
    assert len(asked) == len(set(asked)) == 3 * (1 + 8 + 4 + 12) + 2


def test_the_number_of_a_use_is_never_changed() -> None:
    assert {use.name: use.value for use in Use} == {
        "BLOCKS": 1,
        "WINDOW": 2,
        "CROP": 3,
        "BATCH": 4,
        "RANK": 5,
        "HOLD_OUT": 6,
        "AUTO_AUGMENT": 7,
        "ERASING": 8,
        "JITTER": 9,
        "MIX": 10,
        "REGISTERED": 11,
    }
