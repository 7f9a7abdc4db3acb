"""Memory that is shared with decoding processes: used again, given up, and files of a cache that change."""

import gc
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from slow import Deadly, mean_byte
from test_decoding import decoders

from stream.decode_pool import DecodingPool, EndsProcess, Job, WorkerDied, _Worker, pack
from stream.shared import DIGEST, PAGE, InFile, MappedFiles, SharedMemory

ROOM = (PAGE // 8, 8)


def kept(path: Path, contents: bytes, digest: bytes) -> InFile:
    """All of what a file of a cache holds."""
    path.write_bytes(digest + contents)
    return InFile(str(path), digest, DIGEST, len(contents), memoryview(contents))


def test_memory_serves_again_once_no_tensor_of_it_is_left() -> None:
    memory = SharedMemory()
    tensor = torch.from_numpy(memory.array(ROOM))
    address, part = tensor.data_ptr(), tensor[3:4]
    del tensor
    assert memory.array(ROOM).ctypes.data != address
    del part
    assert address in {memory.array(ROOM).ctypes.data for _ in range(2)}
    assert len(memory.numbers()) == 2


def test_memory_that_is_too_small_is_given_up_for_larger_and_unpinned() -> None:
    pinned: dict[int, int] = {}

    def pin(address: int, size: int) -> object:
        pinned[address] = size
        return lambda: pinned.pop(address)

    memory, before = SharedMemory(), len(os.listdir("/proc/self/fd"))
    for factor in range(1, 6):
        array = memory.array((factor * PAGE,), pin)  # type: ignore[arg-type]
        assert len(array) == factor * PAGE
        del array
    assert [*pinned.values()] == [5 * PAGE]
    assert len(os.listdir("/proc/self/fd")) == before + 2  # and that of its mapping
    smaller = memory.array((PAGE,), pin)  # type: ignore[arg-type]
    assert memory.find(smaller[1:]) == (memory.find(smaller)[0], 1)  # type: ignore[index]
    memory.discard(smaller)
    assert memory.find(smaller) is not None  # for other threads that have it filled
    del smaller
    assert not pinned
    assert not memory.numbers()


def test_memory_goes_with_its_owner() -> None:
    pinned: list[int] = []

    def pin(address: int, size: int) -> object:
        pinned.append(address)
        return pinned.clear

    memory, before = SharedMemory(), len(os.listdir("/proc/self/fd"))
    array = memory.array(ROOM, pin)  # type: ignore[arg-type]
    del memory, array
    assert not pinned
    assert len(os.listdir("/proc/self/fd")) == before


def test_other_threads_may_make_memory_while_it_is_listed() -> None:
    memory = SharedMemory()
    arrays = [memory.array((1,)) for _ in range(40)]

    def collecting(*_: object) -> None:
        arrays.append(memory.array((1,)))

    threshold = gc.get_threshold()
    gc.callbacks.append(collecting)
    gc.set_threshold(1)
    try:
        listed = [len(memory.numbers()) for _ in range(3)]
    finally:
        gc.set_threshold(*threshold)
        gc.callbacks.remove(collecting)
    assert min(listed) >= 40


def test_other_memory_is_not_taken_for_shared() -> None:
    memory = SharedMemory()
    array = memory.array(ROOM)
    assert memory.find(np.zeros(ROOM, np.uint8)) is None
    assert memory.find(array) is not None


def test_decoding_processes_read_a_cache_and_write_batches_themselves(tmp_path: Path) -> None:
    images = [kept(tmp_path / str(number), bytes([number]) * 1000, bytes([number]) * DIGEST) for number in range(3)]
    images[1] = images[1]._replace(data=memoryview(b"it is not asked for"))
    pool = DecodingPool(1)
    out = pool.memory.array((3, 1, 1, 3))
    assert pool.run(pack(mean_byte), [Job(image, (0, 0, 0)) for image in images], out) == [None] * 3
    assert out[:, 0, 0, 0].tolist() == [0, 1, 2]


@pytest.mark.parametrize("change", ["is gone", "is another", "is cut short", "cannot be mapped"])
def test_a_file_of_a_cache_that_is_another_by_now_is_not_read(change: str, tmp_path: Path) -> None:
    image = kept(tmp_path / "file", b"\x05" * 1000, b"A" * DIGEST)
    pool = DecodingPool(1)
    out = pool.memory.array((2, 1, 1, 3))
    (tmp_path / "file").unlink()
    if change == "is another":
        kept(tmp_path / "file", b"\x09" * 1000, b"B" * DIGEST)
    elif change == "is cut short":
        (tmp_path / "file").write_bytes(b"A")
    elif change == "cannot be mapped":
        (tmp_path / "file").mkdir()
    jobs = [Job(image, (0, 0, 0)), Job(b"\x07" * 10, (0, 0, 0))]
    assert pool.run(pack(mean_byte), jobs, out) == [None, None]
    assert out[:, 0, 0, 0].tolist() == [5, 7]


def test_a_file_that_was_made_anew_is_opened_anew(tmp_path: Path) -> None:
    files = MappedFiles()
    for number in (1, 2):
        contents, digest = bytes([number]) * 100, bytes([number]) * DIGEST
        (tmp_path / "file").unlink(missing_ok=True)
        image = kept(tmp_path / "file", contents, digest)
        found = files.find(image.path, image.digest, image.start, image.size)
        assert found is not None
        assert bytes(found) == contents


def test_files_that_a_cache_has_removed_take_no_room(tmp_path: Path) -> None:
    files = MappedFiles()
    for name in "abc":
        image = kept(tmp_path / name, b"any", DIGEST * name.encode())
        assert files.find(*image[:-1]) is not None
        if name != "c":
            os.unlink(image.path)
        if name == "b":
            kept(tmp_path / name, b"any", image.digest)
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]
    assert [line.split("/")[-1] for line in mapped] == ["c"]


def test_decoding_processes_forget_memory_that_was_given_up() -> None:
    before, pool = decoders(os.getpid()), DecodingPool(1)
    jobs = [Job(b"any", (0, 0, 0))]
    for factor in range(1, 8):
        out = pool.memory.array((1, factor * PAGE, 1, 3))
        pool.run(pack(mean_byte), jobs, out[:, :1])
        del out
    (process,) = decoders(os.getpid()) - before
    mapped = [line for line in Path(f"/proc/{process}/maps").read_text().splitlines() if "memfd:decoding" in line]
    assert len(mapped) == 2  # the arena, and the memory of the last


def test_memory_that_another_thread_gives_up_is_filled_to_the_end() -> None:
    pool, images = DecodingPool(1), [np.full((1, 1, 3), value, np.uint8) for value in (13, 7)]
    out = pool.memory.array((2, 1, 1, 3))

    def another_thread_gives_up() -> bool:
        pool.memory.discard(out)
        return False

    told = pool.run(pack(Deadly("kill")), [Job(image, (0, 0, 0)) for image in images], out, another_thread_gives_up)
    assert isinstance(told[0], EndsProcess)
    assert told[1] is None
    assert out[1].tolist() == [[[7] * 3]]


def test_memory_is_not_used_again_where_no_process_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise OSError

    pool = DecodingPool(1)
    out = pool.memory.array((1, 1, 1, 3))
    monkeypatch.setattr(_Worker, "restart", lambda worker: refuse())
    with pytest.raises(WorkerDied):
        pool.run(pack(Deadly("kill")), [Job(np.full((1, 1, 3), 13, np.uint8), (0, 0, 0))], out)
    del out
    assert not pool.memory.numbers()
