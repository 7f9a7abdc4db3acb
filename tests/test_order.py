"""Sample order: a pure function of (rows, epoch, seed), the same for all numbers of ranks, mixed by its window."""

import hashlib

import numpy as np
import pytest

from stream.order import _sorted, epoch_order

ROWS = np.random.default_rng(0).integers(1, 40, 60)
TOTAL = int(ROWS.sum())
STREAMS = 8


def order(epoch: int = 0, seed: int = 0, streams: int = STREAMS, window: int = 64) -> list[np.ndarray]:
    return epoch_order(ROWS, epoch, seed, streams, window)


# ---- epoch_order -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streams", [1, 3, 8])
@pytest.mark.parametrize("window", [1, 64, TOTAL - 1, TOTAL, 10 * TOTAL])
def test_an_epoch_holds_every_sample_once_and_its_streams_are_equal(streams: int, window: int) -> None:
    parts = order(streams=streams, window=window)
    assert len(parts) == streams
    assert {part.dtype for part in parts} == {np.dtype(np.int64)}
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert sorted(np.concatenate(parts).tolist()) == list(range(TOTAL))


def test_the_order_is_a_pure_function_that_numpys_global_generator_cannot_touch() -> None:
    np.random.seed(1)
    first = order(epoch=3, seed=5)
    np.random.random(10)
    again = order(epoch=3, seed=5)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert np.random.random(11)[-1] == np.random.RandomState(1).random(21)[-1]  # nor is it drawn from


def test_epochs_and_seeds_and_streams_have_orders_of_their_own() -> None:
    kinds = [np.concatenate(order(epoch=e, seed=s)).tobytes() for e in range(4) for s in range(4)]
    assert len(set(kinds)) == len(kinds)
    flat = epoch_order(np.array([2000]), 0, 0, 2, 10_000)
    assert (np.argsort(flat[0]) != np.argsort(flat[1])).mean() > 0.9


@pytest.mark.parametrize(
    ("window", "digest"),
    [
        (16, "8fe5e50f861eeef6050c754499610369ade670f5835214ded58a97d91878d947"),
        (10_000, "5bf820ce067e8d0f82692afb105e5a88069d289ca283e9cf10633274756e7129"),
    ],
)
def test_the_order_of_an_old_snapshot_is_still_the_order(window: int, digest: str) -> None:
    parts = epoch_order(np.array([5, 17, 1, 30, 8, 22]), 2, 7, 4, window)
    assert hashlib.sha256(np.concatenate(parts).astype("<i8").tobytes()).hexdigest() == digest


@pytest.mark.parametrize("count", [0, 1, 2, 1000])
@pytest.mark.parametrize("kinds", [1, 2, 50, 2**40])
def test_keys_that_begin_alike_or_are_the_same_are_sorted_as_by_a_stable_sort(kinds: int, count: int) -> None:
    keys = np.random.default_rng(0).integers(0, kinds, count).astype(np.uint64)
    for shift in (0, 8, 23):
        assert np.array_equal(_sorted(keys, keys << np.uint64(shift)), np.argsort(keys, kind="stable"))


@pytest.mark.parametrize("window", [64, TOTAL])
def test_the_streams_of_a_rank_are_those_of_all(window: int) -> None:
    some = epoch_order(ROWS, 1, 2, STREAMS, window, range(2, 4))
    assert [part.tolist() for part in some] == [part.tolist() for part in order(1, 2, window=window)[2:4]]


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_global_batches_are_the_same_for_every_number_of_ranks(world: int) -> None:
    batch, share = 32, STREAMS // world
    whole = order()
    ranks = [order()[rank * share : (rank + 1) * share] for rank in range(world)]
    each = batch // STREAMS
    for step in range(min(map(len, whole)) // each):
        span = slice(step * each, (step + 1) * each)
        expected = np.concatenate([stream[span] for stream in whole])
        shared = np.concatenate([np.concatenate([stream[span] for stream in streams]) for streams in ranks])
        assert np.array_equal(shared, expected)


def test_no_block_is_read_by_two_streams_but_those_across_a_cut() -> None:
    block_of = np.repeat(np.arange(len(ROWS)), ROWS)
    owners = [set(block_of[stream].tolist()) for stream in order()]
    seen_twice = sum(len(a & b) for i, a in enumerate(owners) for b in owners[:i])
    assert seen_twice <= STREAMS - 1


@pytest.mark.parametrize("window", [16, 64, 512])
def test_no_sample_moves_further_than_its_share_of_the_window(window: int) -> None:
    still, moved = order(window=1), order(window=window)
    furthest = 0
    for before, after in zip(still, moved, strict=True):
        assert np.array_equal(np.sort(before), np.sort(after))
        places = np.empty(TOTAL, np.int64)
        places[before] = np.arange(len(before))
        furthest = max(furthest, int(np.abs(places[after] - np.arange(len(after))).max()))
    share = window / STREAMS
    assert share / 2 <= furthest <= share


def test_a_window_of_one_reads_the_permuted_blocks_in_file_order() -> None:
    stream = epoch_order(ROWS, 0, 0, 1, 1)[0]
    assert (np.diff(stream) != 1).sum() < len(ROWS)
    starts = stream[np.flatnonzero(np.diff(stream, prepend=-9) != 1)]
    assert set(starts.tolist()) <= set((np.cumsum(ROWS) - ROWS).tolist())
    assert not np.array_equal(stream, np.arange(TOTAL))


def test_a_window_over_everything_is_a_uniform_permutation() -> None:
    """Chi-square of all 24 orders of 4 samples over 4,800 epochs; 23 degrees of freedom, 49.7 is the 0.1 % point."""
    counts: dict[bytes, int] = {}
    for epoch in range(4800):
        key = epoch_order(np.ones(4, np.int64), epoch, 0, 1, 4)[0].tobytes()
        counts[key] = counts.get(key, 0) + 1
    assert len(counts) == 24
    assert sum((count - 200) ** 2 / 200 for count in counts.values()) < 49.7


def test_a_window_over_everything_leaves_no_trace_of_the_file_order() -> None:
    """Correlation of place and id is normal with deviation 1/sqrt(n): each within four, and the mean within four."""
    rows = np.full(20, 50)
    ids = [np.concatenate(epoch_order(rows, epoch, 1, 1, 1000)) for epoch in range(50)]
    correlations = np.array([np.corrcoef(np.arange(1000), part)[0, 1] for part in ids])
    assert np.abs(correlations).max() < 4 / 1000**0.5
    assert abs(correlations.mean()) < 4 / 1000**0.5 / 50**0.5
    neighbours = np.mean([(np.abs(np.diff(part)) == 1).sum() for part in ids])
    assert abs(neighbours - 2) < 1  # of 999 pairs, 2 are neighbours in the files by chance


def test_a_larger_window_mixes_files_that_are_sorted_by_class() -> None:
    """40 blocks of 50 images of one class each: the classes in a batch of 64 rise with the window."""
    rows, label = np.full(40, 50), np.repeat(np.arange(40), 50)

    def classes_in_a_batch(window: int) -> float:
        streams = epoch_order(rows, 0, 0, 4, window)
        batches = [np.concatenate([s[k : k + 16] for s in streams]) for k in range(0, 496, 16)]
        return float(np.mean([len(set(label[batch])) for batch in batches]))

    mixing = [classes_in_a_batch(window) for window in (1, 400, 1200, 2000)]
    assert mixing == sorted(mixing)
    assert mixing[0] < 6
    assert mixing[3] == pytest.approx(40 * (1 - (39 / 40) ** 64), rel=0.05)
