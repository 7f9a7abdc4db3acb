"""A snapshot is exact or refused, and a write that fails costs nothing that was there before."""

import errno
import os
import random
import shutil
import struct
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from beforehand import holds_run, step_files
from errors import SnapshotError
from training.snapshot import SnapshotStore, copy_to_host, encode, find, read
from training.state import rng_state, set_rng_state

ROOT = Path(__file__).resolve().parent.parent


def make_tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(3, 4, 2, 2, generator=generator)
    return {
        "model.weight": weight,
        "model.channels_last": weight.to(memory_format=torch.channels_last),
        "model.half": weight.bfloat16(),
        "model.slice": torch.arange(12).view(3, 4).t()[1:],
        "model.steps": torch.tensor(2**40 + 1),
        "model.special": torch.tensor([float("nan"), float("inf"), -0.0, 5e-324], dtype=torch.float64),
        "model.empty": torch.empty(0, 3),
        "rng.torch": torch.get_rng_state(),
        "model.flag": torch.tensor(True),
    }


def make_state(step: int = 7) -> dict[str, Any]:
    return {"step": step, "lr": 0.1 + 0.2, "best": -1.0, "config": {"name": 'ü "quoted"', "none": None, "on": True}}


def encoded(step: int = 7) -> bytes:
    return b"".join(encode(copy_to_host(make_tensors(), {}), make_state(step)))


def write(path: Path) -> bytes:
    data = encoded()
    path.write_bytes(data)
    return data


def save(store: SnapshotStore, *arguments: Any, **options: Any) -> None:
    """Save, and wait until it is written."""
    store.save(*arguments, **options)
    store.wait()


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    raw = [t.contiguous().reshape(-1).view(torch.uint8) if t.numel() else t for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*raw)


# ---- reading and verifying -------------------------------------------------------------------------------------------


def test_what_is_written_comes_back_bit_for_bit(tmp_path: Path) -> None:
    write(tmp_path / "a.safetensors")
    snapshot = read(tmp_path / "a.safetensors")
    expected = make_tensors()
    assert snapshot.tensors.keys() == expected.keys()
    assert [name for name, tensor in expected.items() if not same_bits(snapshot.tensors[name], tensor)] == []
    assert snapshot.state == make_state()
    assert snapshot.path == tmp_path / "a.safetensors"


def test_any_program_can_read_the_weights_as_safetensors(tmp_path: Path) -> None:
    write(tmp_path / "a.safetensors")
    weights = safetensors.torch.load_file(tmp_path / "a.safetensors")
    assert same_bits(weights["model.weight"], make_tensors()["model.weight"])


@pytest.mark.parametrize("bit", [0, 7])
def test_one_flipped_bit_anywhere_is_found(tmp_path: Path, bit: int) -> None:
    path = tmp_path / "a.safetensors"
    data = write(path)
    header = 8 + struct.unpack("<Q", data[:8])[0]
    positions = {*range(8), *range(8, header, 7), *range(header, len(data), 31), len(data) - 1}
    assert len(positions) > 200
    unnoticed = []
    for position in sorted(positions):
        path.write_bytes(data[:position] + bytes([data[position] ^ 1 << bit]) + data[position + 1 :])
        try:
            read(path)
            unnoticed.append(position)
        except SnapshotError:
            pass
    assert unnoticed == []


def test_every_truncation_and_every_extension_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    data = write(path)
    lengths = {*range(12), *range(0, len(data), 13), len(data) - 1}
    for changed in [*(data[:length] for length in lengths), data + b"\0", data + data]:
        path.write_bytes(changed)
        with pytest.raises(SnapshotError):
            read(path)


def foreign_safetensors(path: Path) -> None:
    path.write_bytes(safetensors.torch.save({"conv1.weight": torch.ones(3)}))


def foreign_metadata(path: Path) -> None:
    path.write_bytes(safetensors.torch.save({"conv1.weight": torch.ones(3)}, {"format": "pt", "state": "{}"}))


def foreign_pth(path: Path) -> None:
    torch.save({"conv1.weight": torch.ones(3)}, path)


def another_format(path: Path) -> None:
    path.write_bytes(encoded().replace(b"imagenet1k-snapshot-6", b"imagenet1k-snapshot-9"))


def empty(path: Path) -> None:
    path.write_bytes(b"")


def nothing(path: Path) -> None:
    pass


def header_is_a_list(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 2) + b"[]")


def header_of_numbers(path: Path) -> None:
    text = b'{"__metadata__": {"sha256": 1, "state": 2, "format": 3}}'
    path.write_bytes(struct.pack("<Q", len(text)) + text)


def huge_header(path: Path) -> None:
    path.write_bytes(b"\xff" * 8 + b"{}")


@pytest.mark.parametrize(
    "make",
    [
        *(foreign_safetensors, foreign_metadata, foreign_pth, another_format, empty, nothing),
        *(header_is_a_list, header_of_numbers, huge_header),
    ],
)
def test_what_is_no_snapshot_is_refused_in_one_line(tmp_path: Path, make: Any) -> None:
    path = tmp_path / "a.safetensors"
    make(path)
    with pytest.raises(SnapshotError, match=r"a\.safetensors") as refusal:
        find(path)
    assert "\n" not in str(refusal.value)


# ---- find ------------------------------------------------------------------------------------------------------------


def save_some(folder: Path, steps: list[int], keep: int = 99) -> SnapshotStore:
    (folder / "snapshots").mkdir()
    store = SnapshotStore(folder / "snapshots", keep)
    for step in steps:
        save(store, make_tensors(step), make_state(step))
    return store


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "snapshots").iterdir())


def test_find_takes_the_newest_and_not_the_best(tmp_path: Path) -> None:
    store = save_some(tmp_path, [5, 100, 20])
    save(store, make_tensors(3), make_state(3), best=True)
    snapshot, passed_over = find(tmp_path)
    assert snapshot.path.name == "step-000000100.safetensors"
    assert same_bits(snapshot.tensors["model.weight"], make_tensors(100)["model.weight"])
    assert passed_over == []


@pytest.mark.parametrize("step", [4, 6])
def test_find_takes_what_is_kept_apart_where_no_newer_step_is_sound(tmp_path: Path, step: int) -> None:
    store = save_some(tmp_path, [5, step])
    save(store, make_tensors(step), make_state(step), best=True)
    (tmp_path / "snapshots" / f"step-{step:09d}.safetensors").write_bytes(b"")
    assert find(tmp_path)[0].state["step"] == max(5, step)
    for path in step_files(tmp_path / "snapshots"):
        path.unlink()
    assert holds_run(tmp_path)
    assert find(tmp_path)[0].path.name == "best.safetensors"


def test_find_passes_over_damaged_ones_and_names_them(tmp_path: Path) -> None:
    save_some(tmp_path, [1, 2, 3, 4])
    for step in (3, 4):
        os.truncate(tmp_path / "snapshots" / f"step-{step:09d}.safetensors", 1000 * (step - 3))
    snapshot, passed_over = find(tmp_path)
    assert snapshot.state["step"] == 2
    assert ["step-000000004" in passed_over[0], "step-000000003" in passed_over[1]] == [True, True]
    assert len(passed_over) == 2


def test_find_takes_a_file_as_given_however_old(tmp_path: Path) -> None:
    save_some(tmp_path, [1, 2])
    snapshot, _ = find(tmp_path / "snapshots" / "step-000000001.safetensors")
    assert snapshot.state["step"] == 1


def test_find_never_takes_a_half_written_file(tmp_path: Path) -> None:
    save_some(tmp_path, [1])
    (tmp_path / "snapshots" / "step-000000002.safetensors.tmp").write_bytes(encoded(2))
    assert find(tmp_path)[0].state["step"] == 1


@pytest.mark.parametrize("steps", [[], [1, 2]])
def test_a_run_without_a_usable_snapshot_says_so_and_why(tmp_path: Path, steps: list[int]) -> None:
    save_some(tmp_path, steps)
    for path in step_files(tmp_path / "snapshots"):
        os.truncate(path, 100)
    with pytest.raises(SnapshotError, match="no usable snapshot" if steps else "holds no run") as refusal:
        find(tmp_path)
    assert [step for step in steps if f"step-{step:09d}" not in str(refusal.value)] == []
    assert "\n" not in str(refusal.value)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    for source in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(SnapshotError):
            find(source)


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: os.symlink("/dev/zero", path)], ids=["pipe", "link"])
def test_what_is_no_regular_file_is_passed_over_unread(tmp_path: Path, make: Any) -> None:
    save_some(tmp_path, [1])
    make(tmp_path / "snapshots" / "step-000000002.safetensors")
    snapshot, passed_over = find(tmp_path)
    assert snapshot.state["step"] == 1
    assert len(passed_over) == 1
    assert "step-000000002" in passed_over[0]


# ---- writing and pruning ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [1, 3])
def test_pruning_keeps_the_newest_and_the_best(tmp_path: Path, keep: int) -> None:
    store = save_some(tmp_path, [1], keep)
    save(store, make_tensors(2), make_state(2), best=True)
    for step in range(3, 7):
        save(store, make_tensors(step), make_state(step))
    assert names(tmp_path) == ["best.safetensors", *(f"step-{step:09d}.safetensors" for step in range(7 - keep, 7))]
    assert read(tmp_path / "snapshots" / "best.safetensors").state["step"] == 2


def test_a_step_is_not_there_before_the_cooldown_that_begins_at_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that goes on from the step would never write the other, one that goes on from before it does so again."""
    store, replace = save_some(tmp_path, [1], keep=1), os.replace

    def only_the_first(old: Path, new: Path) -> None:
        if "cooldown.safetensors" in names(tmp_path):
            raise OSError(errno.EIO, "killed")
        replace(old, new)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", only_the_first)
        with pytest.raises(SnapshotError):
            save(store, make_tensors(2), make_state(2), best=True, cooldown=True)
    assert names(tmp_path) == ["cooldown.safetensors", "step-000000001.safetensors"]
    assert store.rewind(1) == ["cooldown.safetensors"]
    save(store, make_tensors(2), make_state(2), cooldown=True)
    save(store, make_tensors(3), make_state(3))
    assert names(tmp_path) == ["cooldown.safetensors", "step-000000003.safetensors"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_failed_write_leaves_the_older_ones_and_no_half_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    store = save_some(tmp_path, [1, 2], keep=2)

    def refuse(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, refuse)
        with pytest.raises(SnapshotError, match=os.strerror(number)) as refusal:
            save(store, make_tensors(3), make_state(3), best=True)
    assert "step-000000003" in str(refusal.value)
    assert names(tmp_path) == ["step-000000001.safetensors", "step-000000002.safetensors"]
    assert find(tmp_path)[0].state["step"] == 2
    save(store, make_tensors(3), make_state(3))
    assert find(tmp_path)[0].state["step"] == 3


def test_a_snapshot_holds_what_was_there_when_it_was_saved_though_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_some(tmp_path, [1])
    store = SnapshotStore(tmp_path / "snapshots", keep=9)
    written, fsync, weights = threading.Event(), os.fsync, {"model.weight": torch.ones(3)}

    def slow_fsync(file: int) -> None:
        assert written.wait(10)
        fsync(file)

    monkeypatch.setattr(os, "fsync", slow_fsync)
    store.save(weights, make_state(2))
    weights["model.weight"] += 1
    assert find(tmp_path)[0].state["step"] == 1
    store.check()
    written.set()
    store.wait()
    assert find(tmp_path)[0].tensors["model.weight"].tolist() == [1, 1, 1]


def test_a_write_that_failed_in_the_background_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = save_some(tmp_path, [1])
    monkeypatch.setattr("training.snapshot.encode", lambda *_: 1 / 0)
    store.save(make_tensors(2), make_state(2))
    with pytest.raises(ZeroDivisionError):
        store.wait()
    store.check()


@pytest.mark.parametrize(
    ("free", "best", "told"),
    [(1000, False, "0.0 MB are free and 1.1 needed"), (1_400_000, True, "1.4 MB are free and 2.1 needed")],
)
def test_a_disk_without_room_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, best: bool, told: str
) -> None:
    """The best takes as much again."""
    store = save_some(tmp_path, [1])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - free, free))  # type: ignore[attr-defined]
    with pytest.raises(SnapshotError, match=f"{told}; make room and resume"):
        store.save(make_tensors(2), make_state(2), best)
    assert names(tmp_path) == ["step-000000001.safetensors"]


def test_going_on_clears_away_what_a_kill_left_half_written(tmp_path: Path) -> None:
    store = save_some(tmp_path, [1])
    (tmp_path / "snapshots" / "step-000000002.safetensors.tmp").write_bytes(b"half")
    assert store.rewind(1) == []
    assert [path.name for path in (tmp_path / "snapshots").iterdir()] == ["step-000000001.safetensors"]


def test_going_back_drops_the_later_snapshots_so_that_none_of_them_is_taken_or_kept_for_a_newer_one(
    tmp_path: Path,
) -> None:
    store = save_some(tmp_path, [1, 2, 3, 4])
    (tmp_path / "snapshots" / "step-foreign.safetensors").write_bytes(b"")
    assert store.rewind(2) == ["step-000000003.safetensors", "step-000000004.safetensors"]
    assert find(tmp_path)[0].state["step"] == 2
    save(store, make_tensors(3), make_state(3))
    assert find(tmp_path)[0].state["step"] == 3
    assert names(tmp_path) == [*(f"step-00000000{step}.safetensors" for step in (1, 2, 3)), "step-foreign.safetensors"]


@pytest.mark.parametrize(("best", "dropped"), [(2, []), (3, []), (4, ["best.safetensors"])])
def test_going_back_drops_the_best_of_what_is_dropped_and_no_other(
    tmp_path: Path, best: int, dropped: list[str]
) -> None:
    """The best may be the very step that a run goes back to."""
    store = save_some(tmp_path, [1])
    for step in range(2, 5):
        save(store, make_tensors(step), make_state(step), best=step == best)
    later = ["step-000000004.safetensors"]
    assert store.rewind(3) == later + dropped
    assert ("best.safetensors" in names(tmp_path)) is not bool(dropped)


def test_writing_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    store = save_some(tmp_path, [1])
    save(store, make_tensors(9), make_state(1))
    assert names(tmp_path) == ["step-000000001.safetensors"]
    assert same_bits(find(tmp_path)[0].tensors["model.weight"], make_tensors(9)["model.weight"])


# ---- random numbers --------------------------------------------------------------------------------------------------


def draw_numbers() -> tuple[Any, ...]:
    python = (random.random(), random.gauss(0, 1), random.getrandbits(64))
    numpy = (np.random.random(), np.random.normal(), np.random.randint(1 << 40))
    return *python, *numpy, *torch.rand(3).tolist(), *torch.randperm(9).tolist()


@pytest.mark.parametrize("drawn", [0, 1, 700])
def test_random_numbers_go_on_after_a_resume_where_they_stood(tmp_path: Path, drawn: int) -> None:
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    for _ in range(drawn):
        random.gauss(0, 1), np.random.normal(), torch.rand(1)
    store = save_some(tmp_path, [])
    save(store, {f"rng.{name}": tensor for name, tensor in rng_state().items()}, make_state())
    expected = draw_numbers()
    random.seed(4)
    np.random.seed(5)
    torch.manual_seed(6)
    saved = find(tmp_path)[0].tensors
    set_rng_state({name.removeprefix("rng."): tensor for name, tensor in saved.items()})
    assert draw_numbers() == expected


def test_asking_for_the_state_draws_nothing() -> None:
    state = rng_state()
    again = rng_state()
    assert all(torch.equal(state[name], again[name]) for name in state)
