"""Which sample comes when: a pure function of the rows in each block, the seed and the epoch."""

import numpy as np

from stream.seeds import Use, seeded


def repeated(ids: np.ndarray, repeats: int, window: int, images: int) -> np.ndarray:
    """A stream of ids with `repeats` of each of its first ones, as many in all as before.

    Source: Hoffer et al. 2020, Augment Your Batch; an epoch is as long as without, as in torchvision's RASampler. The
    copies of a set of `images` have the ids of these plus multiples of `images`, so that what is drawn for an id
    differs. They follow each other at a distance of `window`, within which all images differ.
    """
    first = ids[: -(-len(ids) // repeats)]
    copies = images * np.arange(repeats)[:, None]
    ends = range(window, len(first) + window, window)
    parts = [(first[end - window : end] + copies).ravel() for end in ends]
    return np.concatenate([first[:0], *parts])[: len(ids)]


def epoch_order(
    block_rows: np.ndarray, epoch: int, seed: int, streams: int, window: int, wanted: range | None = None
) -> list[np.ndarray]:
    """The sample ids (int64) of each stream in one epoch, or of the `wanted` streams: a pure function of its arguments.

    The blocks are permuted, their samples cut into `streams` equal spans, and each span shuffled in a rolling window:
    samples are sorted by i + uniform(0, window / streams), where i is their position, so none moves further than its
    share of `window`, and a reader holds no more than that. A window over everything gives a uniform permutation. Only
    raw bits of Philox and sorts that leave no choice are used, so no release of numpy changes the order.
    """

    def noise(count: int, use: Use, *stream: int) -> np.ndarray:
        return np.random.Philox(seeded(seed, use, epoch, *stream)).random_raw(count)

    permuted = np.argsort(noise(len(block_rows), Use.BLOCKS), kind="stable")
    rows = block_rows[permuted]
    ends = np.cumsum(rows)
    shifts = (np.cumsum(block_rows) - block_rows)[permuted] - (ends - rows)  # from places to ids
    total = int(rows.sum())
    result = []
    for stream in range(streams) if wanted is None else wanted:
        begin, end = total * stream // streams, total * (stream + 1) // streams
        part = slice(np.searchsorted(ends, begin, "right"), np.searchsorted(ends, end) + 1)
        span = np.repeat(shifts[part], np.diff(ends[part].clip(max=end), prepend=begin))
        span += np.arange(begin, end)
        bits = noise(len(span), Use.WINDOW, stream)
        if window >= total:
            result.append(span[_sorted(bits, bits.copy())])
        else:
            keys = bits * (window / streams / 2**64)
            keys += np.arange(len(span))
            most = len(span) + window // streams + 1
            np.multiply(keys, 2.0 ** (64 - most.bit_length()), out=bits, casting="unsafe")
            result.append(span[_sorted(keys, bits)])
    return result


def _sorted(keys: np.ndarray, coarse: np.ndarray) -> np.ndarray:
    """What a stable argsort of `keys` gives, in less time; `coarse` (uint64) must not sort them otherwise, and is lost.

    The first bits of each coarse key and its place make one number, and these are sorted. Where the first bits are the
    same, which is rare, the keys decide.
    """
    low = np.uint64(2 ** max(1, (len(keys) - 1).bit_length()) - 1)
    coarse &= ~low
    coarse |= np.arange(len(keys), dtype=np.uint64)
    coarse.sort()
    same = np.flatnonzero((coarse[1:] ^ coarse[:-1]) <= low)  # as the next
    coarse &= low
    order = coarse.view(np.int64)
    for run in np.split(same, np.flatnonzero(np.diff(same) > 1) + 1):
        places = order[run[0] : run[-1] + 2] if len(run) else order[:0]
        places[:] = places[np.argsort(keys[places], kind="stable")]
    return order
