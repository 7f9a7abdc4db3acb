"""Decoding processes give what this process would, whatever is sent to them, and outlive nobody."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from program import ROOT, environment, until
from shards import draw, encode, make_imagenet_like
from slow import SlowTransform, process_number

from config import Config, resolve
from errors import DataError
from preprocess import get_data_loaders, train_transform
from stream import decode_pool as decoding
from stream.decode_pool import DecodingPool, Job, WorkerDied, pack
from stream.images import EncodedImage, decode_into

SIZE = 24


def settings() -> Config:
    return resolve({"dataset": "hf", "dataset_name": "x", "image_size": SIZE})


def photographs(count: int, size: tuple[int, int] = (40, 90)) -> list[EncodedImage]:
    rng = np.random.default_rng(0)
    return [encode(draw(number, 10, size, rng)) for number in range(count)]


def both_ways(images: list[EncodedImage]) -> list[tuple[np.ndarray, list[str | None]]]:
    """The pixels and the kinds of errors of a pool, and of this process."""
    transform, seeds = train_transform(settings()), [(0, 1, number) for number in range(len(images))]
    found = []
    for in_pool in (True, False):
        out = np.full((len(images), SIZE, SIZE, 3), 7, np.uint8)
        if in_pool:
            errors = DecodingPool(1).run(pack(transform), list(map(Job, images, seeds)), out)
        else:
            jobs = zip(out, images, seeds, strict=True)
            errors = [decode_into(row, image, transform, seed) for row, image, seed in jobs]
        found.append((out, [None if error is None else str(error).partition(":")[0] for error in errors]))
    return found


def running() -> dict[int, int]:
    """The decoding processes of this machine, each with its parent."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            if b"stream.decode_pool" in (path / "cmdline").read_bytes():
                found[int(path.name)] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
    return found


def decoders(parent: int) -> set[int]:
    """The decoding processes that a process has started, and those that they have."""
    parents = running()
    first = {process for process, its in parents.items() if its == parent}
    return first | {process for process, its in parents.items() if its in first}


def test_a_pool_decodes_as_this_process_does() -> None:
    (pixels, errors), (expected, _) = both_ways(photographs(20))
    assert np.array_equal(pixels, expected)
    assert errors == [None] * 20


def test_what_cannot_be_read_is_told_and_its_row_left_alone() -> None:
    images = photographs(6)
    images[1], images[4] = b"", bytes(images[4])[:200]
    (pixels, errors), (expected, told) = both_ways(images)
    assert np.array_equal(pixels, expected)
    assert errors == told
    assert [error is None for error in errors] == [True, False, True, True, False, True]
    assert (pixels[1] == 7).all()


@pytest.mark.parametrize("room", [1, 3 * SIZE * SIZE + 1000, 20_000])
def test_images_that_a_process_has_no_room_for_are_decoded_all_the_same(
    room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "ARENA_BYTES", room)
    images = [*photographs(8), np.full((50, 60, 3), 9, np.uint8), *photographs(2)]
    transform, seeds = train_transform(settings()), [(0, 1, number) for number in range(len(images))]
    out = np.zeros((len(images), SIZE, SIZE, 3), np.uint8)
    expected = out.copy()
    assert not any(DecodingPool(1).run(pack(transform), list(map(Job, images, seeds)), out))
    for row, image, seed in zip(expected, images, seeds, strict=True):
        decode_into(row, image, transform, seed)
    assert np.array_equal(out, expected)


def test_not_even_a_large_photograph_is_decoded_in_this_process() -> None:
    """A phone's is larger than what a process is given at once."""
    large = bytes(2 * decoding.ARENA_BYTES)
    images: list[EncodedImage] = [b"small", large, np.zeros((50, 60, 3), np.uint8), large, b"small"]
    out, before = np.zeros((5, 1, 4, 3), np.uint8), decoders(os.getpid())
    pool = DecodingPool(1)
    assert not any(pool.run(pack(process_number), [Job(image, (0, 0, 0)) for image in images], out))
    numbers = {int(row.reshape(-1)[:8].view("<u8")[0]) for row in out}
    assert numbers == decoders(os.getpid()) - before


def test_a_transform_that_fails_comes_through_with_its_traceback() -> None:
    out = np.zeros((1, SIZE, SIZE, 3), np.uint8)
    with pytest.raises(RuntimeError, match="could not broadcast"):
        DecodingPool(1).run(pack(SlowTransform(0.0)), [Job(photographs(1)[0], (0, 0, 0))], out)


def test_a_pool_that_is_forgotten_ends_its_processes() -> None:
    before = decoders(os.getpid())
    pool = DecodingPool(2)
    until(lambda: len(decoders(os.getpid()) - before) == 2)
    ours = decoders(os.getpid()) - before
    del pool
    until(lambda: not ours & running().keys())


def test_a_process_that_dies_ends_the_run_with_what_to_do(tmp_path: Path) -> None:
    folder = make_imagenet_like(tmp_path, train=64, validation=8, rows_per_group=16)
    flags = {"dataset": "hf", "dataset_name": str(folder), "image_size": SIZE, "batch_size": 16, "num_workers": 1}
    decoding._pool_of.cache_clear()
    before = decoders(os.getpid())
    loader = get_data_loaders(resolve(flags), torch.device("cpu")).train
    until(lambda: decoders(os.getpid()) - before)
    (process,) = decoders(os.getpid()) - before
    os.kill(process, signal.SIGKILL)
    with pytest.raises(DataError, match=r"a decoding process died.*fewer --num_workers"):
        list(loader)
    assert decoding.shared_pool(1) is not loader.pool  # type: ignore[attr-defined]


def test_a_process_that_cannot_start_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(WorkerDied):
        DecodingPool(1).run(
            pack(SlowTransform(0.0)), [Job(photographs(1)[0], (0, 0, 0))], np.zeros((1, 9, 9, 3), np.uint8)
        )


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_a_parent_that_is_killed_leaves_no_process_behind(signum: signal.Signals) -> None:
    code = "from stream import decode_pool; import time; pool = decode_pool.DecodingPool(2); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment()) as parent:
        until(lambda: len(decoders(parent.pid)) == 2)
        theirs = decoders(parent.pid)
        parent.send_signal(signum)
    until(lambda: not theirs & running().keys())


def test_a_signal_to_the_processes_themselves_is_their_parents_to_act_on() -> None:
    before, out = decoders(os.getpid()), np.zeros((2, SIZE, SIZE, 3), np.uint8)
    pool, packed = DecodingPool(1), pack(train_transform(settings()))
    jobs = [Job(image, (0, 0, number)) for number, image in enumerate(photographs(2))]
    pool.run(packed, jobs, out)
    ours = decoders(os.getpid()) - before
    assert len(ours) == 1
    for process in ours:
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            os.kill(process, signum)
    assert not any(pool.run(packed, jobs, out))
