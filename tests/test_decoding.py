"""Decoding processes give what this process would, whatever is sent to them, and outlive nobody."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from program import ROOT, environment, until
from shards import draw, encode, make_imagenet_like
from slow import Deadly, SlowTransform, deadly_conversion, process_number, run_in, slow_conversion

from config import Config, resolve
from errors import DataError
from preprocess import get_data_loaders, train_transform
from stream import decode_pool as decoding
from stream import kept
from stream.decode_pool import DecodingPool, Job, WorkerDied, pack
from stream.images import EncodedImage, decode_into
from stream.kept import reduce, reduce_all
from stream.loader import StreamingDataLoader
from stream.local import LocalDataset

SIZE = 24
USER = """
import sys, time
sys.modules["torch"] = None  # takes seconds
import numpy as np
from stream.decode_pool import DecodingPool, Job, pack
from stream.transforms import AlbumentationsAdapter
pool = DecodingPool(2)
pixels = pool.memory.array((1, 4, 4, 3))
for _ in range(2):
    pool.run(pack(AlbumentationsAdapter()), [Job(pixels[0], (0, 0, 0))], pixels)
print("both decode", flush=True)
time.sleep(600)
"""


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
            errors = run_in(DecodingPool(1), pack(transform), list(map(Job, images, seeds)), out)
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
                found[int(path.name)] = parent_of(path)
    return found


def parent_of(path: Path) -> int:
    """The parent of a process below /proc, a zombie too."""
    return int((path / "stat").read_text().rpartition(")")[2].split()[1])


def forked_by(parent: int) -> int:
    """How many processes a process has forked that it still has, zombies too."""
    count = 0
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            count += parent_of(path) == parent
    return count


def decoders(parent: int) -> set[int]:
    """The decoding processes of a process: its grandchildren, forked by one child of it."""
    parents = running()
    return {process for process, its in parents.items() if parents.get(its) == parent}


def nurseries(parent: int) -> set[int]:
    """The processes that fork the decoding ones of a process."""
    return {process for process, its in running().items() if its == parent}


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
    assert not any(run_in(DecodingPool(1), pack(transform), list(map(Job, images, seeds)), out))
    for row, image, seed in zip(expected, images, seeds, strict=True):
        decode_into(row, image, transform, seed)
    assert np.array_equal(out, expected)


def test_not_even_a_large_photograph_is_decoded_in_this_process() -> None:
    """A phone's is larger than what a process is given at once."""
    large = bytes(2 * decoding.ARENA_BYTES)
    images: list[EncodedImage] = [b"small", large, np.zeros((50, 60, 3), np.uint8), large, b"small"]
    out, before = np.zeros((5, 1, 4, 3), np.uint8), decoders(os.getpid())
    pool = DecodingPool(1)
    assert not any(run_in(pool, pack(process_number), [Job(image, (0, 0, 0)) for image in images], out))
    numbers = {int(row.reshape(-1)[:8].view("<u8")[0]) for row in out}
    assert numbers == decoders(os.getpid()) - before


@pytest.mark.parametrize("as_planes", [False, True])
def test_what_a_cache_keeps_of_images_is_the_same_whichever_process_makes_it(as_planes: bool) -> None:
    encoded = [*map(bytes, photographs(35)), b"", b"no image", *map(bytes, photographs(1, (10, 12)))]
    images = [memoryview(image) for image in encoded]
    made = reduce_all(images, 20, as_planes, 0)
    assert made == reduce_all(images, 20, as_planes, 2)
    assert made == [reduce(image, 20, as_planes) for image in images]
    assert made[35:37] == [b"", b"no image"]


def test_an_image_that_ends_its_process_is_kept_as_it_is() -> None:
    before, pool = decoders(os.getpid()), DecodingPool(1)
    images = [str(number).encode() for number in range(20)]
    made = [*map(bytes, pool.convert(pack(deadly_conversion), images))]
    assert [image.rpartition(b" ")[2] for image in made] == images
    assert made[13] == b"13"
    (last,) = decoders(os.getpid()) - before
    numbers = {int(image.split()[0]) for image in made if image != b"13"}
    assert last in numbers
    assert os.getpid() not in numbers


def test_a_stop_waits_for_no_image_that_others_have_converted() -> None:
    pool, pixels = DecodingPool(1), np.zeros((1, 4, 4, 3), np.uint8)
    slow = Thread(target=pool.convert, args=(pack(slow_conversion), [b"5"]))
    slow.start()
    until(lambda: pool._idle.empty())
    with pytest.raises(WorkerDied):
        run_in(pool, pack(Deadly("never")), [Job(pixels[0], (0, 0, 0))], pixels, lambda: True)
    assert slow.is_alive()
    slow.join()  # and leave no descriptor to be closed in a later test


def test_where_no_process_lives_what_a_cache_keeps_ends_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "reduce", deadly_conversion)
    monkeypatch.setattr(kept, "partial", lambda call, **_: call)
    with pytest.raises(DataError, match="--num_workers"):
        reduce_all([memoryview(b"13")] * 10, 20, True, 1)


def test_a_transform_that_fails_comes_through_with_its_traceback() -> None:
    out = np.zeros((1, SIZE, SIZE, 3), np.uint8)
    with pytest.raises(RuntimeError, match="could not broadcast"):
        run_in(DecodingPool(1), pack(SlowTransform(0.0)), [Job(photographs(1)[0], (0, 0, 0))], out)


def test_a_pool_that_is_forgotten_ends_its_processes() -> None:
    before = decoders(os.getpid())
    pool = DecodingPool(2)
    until(lambda: len(decoders(os.getpid()) - before) == 2)
    ours = decoders(os.getpid()) - before
    del pool
    until(lambda: not ours & running().keys())


@pytest.mark.parametrize(
    ("how", "reason"), [("crash", "ended the decoding"), ("kill", "ended"), ("hang", "within 2 s")]
)
def test_an_image_that_ends_or_holds_up_its_process_costs_no_other(
    how: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "ANSWER_SECONDS", 2.0)
    images = [np.full((4, 4, 3), number, np.uint8) for number in range(20)]
    before, out = decoders(os.getpid()), np.full((20, 4, 4, 3), 99, np.uint8)
    monkeypatch.setattr(decoding, "ARENA_BYTES", 8 * images[0].nbytes)  # tasks of 8, 8 and 4
    pool = DecodingPool(1)
    told = run_in(pool, pack(Deadly(how)), [Job(image, (0, 0, 0)) for image in images], out)
    assert [number for number, error in enumerate(told) if error] == [13]
    assert reason in str(told[13])
    assert out[:, 0, 0, 0].tolist() == [*range(13), 99, *range(14, 20)]
    assert len(decoders(os.getpid()) - before) == 1


def test_a_process_that_something_else_ended_costs_no_image() -> None:
    before, out = decoders(os.getpid()), np.zeros((20, SIZE, SIZE, 3), np.uint8)
    jobs, packed = [Job(image, (0, 0, 0)) for image in photographs(20)], pack(train_transform(settings()))
    pool = DecodingPool(1)
    assert not any(run_in(pool, packed, jobs, out))
    for process in decoders(os.getpid()) - before:
        os.kill(process, signal.SIGKILL)
    assert not any(run_in(pool, packed, jobs, out))


def test_processes_that_all_end_are_the_machines_fault() -> None:
    out = np.zeros((20, 4, 4, 3), np.uint8)
    images = [np.full((4, 4, 3), 13, np.uint8)] * 20
    pool = DecodingPool(1)
    with pytest.raises(WorkerDied):
        run_in(pool, pack(Deadly("kill")), [Job(image, (0, 0, 0)) for image in images], out)
    jobs = [Job(image, (0, 0, 0)) for image in photographs(2)]
    assert not any(run_in(pool, pack(train_transform(settings())), jobs, np.zeros((2, SIZE, SIZE, 3), np.uint8)))


def test_a_process_that_is_not_waited_for_any_more_gives_its_answer_to_nobody() -> None:
    stuck, image = np.full((4, 4, 3), 13, np.uint8), np.full((4, 4, 3), 5, np.uint8)
    out = np.zeros((1, 4, 4, 3), np.uint8)
    pool = DecodingPool(1)
    with pytest.raises(WorkerDied):
        run_in(pool, pack(Deadly("hang")), [Job(stuck, (0, 0, 0))], out, lambda: True)
    assert not any(run_in(pool, pack(Deadly("hang")), [Job(image, (0, 0, 0))], out))
    assert (out == 5).all()


def test_replaced_processes_leave_no_descriptor_and_no_zombie() -> None:
    jobs = [Job(np.full((4, 4, 3), number, np.uint8), (0, 0, 0)) for number in (1, 13, 2)]
    before, counts, out = nurseries(os.getpid()), [], np.zeros((3, 4, 4, 3), np.uint8)
    pool = DecodingPool(2)
    until(lambda: nurseries(os.getpid()) - before)
    (nursery,) = nurseries(os.getpid()) - before
    for _ in range(3):
        run_in(pool, pack(Deadly("kill")), jobs, out)
        run_in(pool, pack(Deadly("kill")), jobs, out)
        opened = [len(list(Path(f"/proc/{process}/fd").iterdir())) for process in (os.getpid(), nursery)]
        counts.append((opened, forked_by(nursery)))
    assert counts[0] == counts[1] == counts[2]
    assert counts[0][1] == 2


@pytest.mark.parametrize("how", ["crash", "hang"])
def test_an_image_that_ends_its_process_is_replaced_named_and_not_tried_again(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "ANSWER_SECONDS", 2.0)
    images = np.stack([np.full((4, 4, 3), number, np.uint8) for number in range(64)])
    loader = StreamingDataLoader(
        LocalDataset(images, [0, 1] * 32, ["even", "odd"]),
        Deadly(how),
        lambda epoch: [np.arange(64)],
        batch_size=16,
        image_size=4,
        train=True,
        seed=0,
        num_workers=2,
        max_bad_fraction=0.001,
    )
    for epoch in range(2):
        named: list[tuple[str, str]] = []
        loader.report = lambda name, reason, named=named: named.append((name, reason))  # type: ignore[misc]
        loader.set_epoch(epoch)
        batches = list(loader)
        ids, pixels = (torch.cat([getattr(batch, field) for batch in batches]) for field in ("ids", "images"))
        assert ids.tolist() == [*range(13), 14, *range(14, 64)]
        assert pixels[:, 0, 0, 0].tolist() == ids.tolist()
        reason = "it was not decoded within 2 s" if how == "hang" else "it ended the decoding process"
        assert named == [(loader.dataset.name(13), reason)]
        loader.packed = pack(Deadly("never"))


@pytest.mark.parametrize("ends", ["user", "nursery"])
def test_a_process_that_hangs_ends_with_those_that_started_it(ends: str) -> None:
    with subprocess.Popen([sys.executable, "-c", USER], cwd=ROOT, env=environment(), stdout=subprocess.PIPE) as user:
        assert user.stdout is not None
        assert user.stdout.readline()
        hung, (nursery,) = decoders(user.pid), nurseries(user.pid)
        for process in hung:
            os.kill(process, signal.SIGSTOP)
        os.kill(user.pid if ends == "user" else nursery, signal.SIGKILL)
        until(lambda: not hung & running().keys())
        user.kill()
    until(lambda: nursery not in running())


def test_without_the_process_that_forks_them_the_run_ends_with_what_to_do(tmp_path: Path) -> None:
    folder = make_imagenet_like(tmp_path, train=64, validation=8, rows_per_group=16)
    flags = {"dataset": "hf", "dataset_name": str(folder), "image_size": SIZE, "batch_size": 16, "num_workers": 1}
    decoding._pool_of.cache_clear()
    before = nurseries(os.getpid())
    loader = get_data_loaders(resolve(flags), torch.device("cpu")).train
    until(lambda: nurseries(os.getpid()) - before)
    (process,) = nurseries(os.getpid()) - before
    os.kill(process, signal.SIGKILL)
    with pytest.raises(DataError, match=r"a decoding process died.*fewer --num_workers"):
        list(loader)
    assert decoding.shared_pool(1) is not loader.pool  # type: ignore[attr-defined]


def test_a_process_that_cannot_start_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(WorkerDied):
        run_in(
            DecodingPool(1),
            pack(SlowTransform(0.0)),
            [Job(photographs(1)[0], (0, 0, 0))],
            np.zeros((1, 9, 9, 3), np.uint8),
        )


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_a_parent_that_is_killed_leaves_no_process_behind(signum: signal.Signals) -> None:
    with subprocess.Popen([sys.executable, "-c", USER], cwd=ROOT, env=environment()) as parent:
        until(lambda: len(decoders(parent.pid)) == 2)
        theirs = decoders(parent.pid) | nurseries(parent.pid)
        parent.send_signal(signum)
    until(lambda: not theirs & running().keys())


def test_a_signal_to_the_processes_themselves_is_their_parents_to_act_on() -> None:
    before, out = decoders(os.getpid()), np.zeros((2, SIZE, SIZE, 3), np.uint8)
    pool, packed = DecodingPool(1), pack(train_transform(settings()))
    jobs = [Job(image, (0, 0, number)) for number, image in enumerate(photographs(2))]
    run_in(pool, packed, jobs, out)
    ours = decoders(os.getpid()) - before
    assert len(ours) == 1
    for process in ours:
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            os.kill(process, signum)
    assert not any(run_in(pool, packed, jobs, out))
