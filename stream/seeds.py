"""Where random numbers come from: a seed, what they are for, and which of that use they are."""

from enum import IntEnum

import numpy as np


class Use(IntEnum):
    """What numbers are drawn for. No two uses share any, and a number that was given is never given to another use."""

    BLOCKS = 1  # the order of an epoch's blocks
    WINDOW = 2  # the shuffle within a stream
    CROP = 3  # the crop of a sample
    BATCH = 4  # what the device does to a sample of a batch
    RANK = 5  # the generators of a process


def seeded(seed: int, use: Use, *numbers: int) -> np.random.SeedSequence:
    """A source of bits that depends on nothing else; `numbers`, an epoch, a sample id, a stream or a rank, are < 2^32.

    Source: numpy's SeedSequence, whose spawn keys keep streams of one seed apart.
    """
    return np.random.SeedSequence(seed, spawn_key=(use, *numbers))
