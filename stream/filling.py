"""Keeps blocks in the cache ahead of training."""

import os
from collections.abc import Iterable

from tqdm import tqdm

from stream.block_reader import FETCH_THREADS
from stream.dataset import HuggingFaceImageNetDataset
from stream.retry import in_threads


def fill(datasets: Iterable[HuggingFaceImageNetDataset], rank: int = 0, ranks: int = 1) -> tuple[int, int]:
    """Keep all blocks of some datasets, or a rank's share of them; those that are kept already cost no request.

    Returns how many there are and how many are kept now: fewer where a limit or a full disk leaves no room. Raises
    DataError.
    """
    blocks = [(dataset, number) for dataset in datasets for number in range(len(dataset.blocks))][rank::ranks]

    def keep(block: tuple[HuggingFaceImageNetDataset, int]) -> bool:
        dataset, number = block
        dataset.read_block(number)
        return dataset.find_block(number) is not None

    threads = max(FETCH_THREADS, os.cpu_count() or 1)
    shown = tqdm(in_threads(keep, blocks, threads), "cache", len(blocks), unit="block", disable=bool(rank) or None)
    return len(blocks), sum(shown)
