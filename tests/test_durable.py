"""Whatever instant the power fails, a disk fills or breaks, a run keeps a snapshot to go on from."""

import builtins
import ctypes
import errno
import gc
import io
import itertools
import os
import re
import resource
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from program import Outcome, assert_same_run, run, snapshot_path, start, steps_kept, train, wait, wait_for

from beforehand import step_files
from errors import SnapshotError
from training import snapshot
from training.logs import RunLogs
from training.snapshot import SnapshotStore, find, read

FLAGS: tuple[object, ...] = ("--max_samples", 160, "--batch_size", 16, "--epochs", 1, "--ledger", "--snapshot_steps", 2)
FLAGS = (*FLAGS, "--num_workers", 1)
STEPS = 10
MEGABYTE = 10**6
Operation = tuple[Any, ...]  # create name, write name data, fsync name (. is the folder), replace old new, unlink name
Disk = dict[str, bytes]


# ---- the order of the system calls, and what a crash between them leaves ---------------------------------------------


class RecordedFile(io.FileIO):
    """A file that notes each write that reaches the system."""

    note: Callable[..., None]

    def write(self, data: Any) -> int:
        written = super().write(data)
        self.note("write", os.readlink(f"/proc/self/fd/{self.fileno()}"), bytes(data)[:written])
        return written


class Recorder:
    """What is done to the files of one folder while the patches hold, in order."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder = folder.resolve()
        self.operations: list[Operation] = []
        self._open = open
        patch.setattr(builtins, "open", self._opened)
        patch.setattr(io, "open", self._opened)
        for call, kind in (("rename", "replace"), ("replace", "replace"), ("unlink", "unlink"), ("remove", "unlink")):
            patch.setattr(os, call, self._noting(getattr(os, call), kind))
        patch.setattr(os, "fsync", self._noting(os.fsync, "fsync"))

    def note(self, kind: str, *arguments: Any) -> None:
        """Keep an operation whose first argument, a path or a descriptor, is in the folder."""
        first, *others = arguments
        path = Path(os.readlink(f"/proc/self/fd/{first}") if isinstance(first, int) else first).resolve()
        if self.folder in (path, path.parent):
            name = path.name if path != self.folder else "."
            self.operations.append((kind, name, *(x if isinstance(x, bytes) else Path(x).name for x in others)))

    def _noting(self, call: Callable[..., Any], kind: str) -> Callable[..., Any]:
        def noting(*arguments: Any, **options: Any) -> Any:
            done = call(*arguments, **options)
            self.note(kind, *arguments)
            return done

        return noting

    def _opened(self, path: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if isinstance(path, int) or Path(path).resolve().parent != self.folder or not {*mode} & {*"wxa+"}:
            return self._open(path, mode, *arguments, **options)
        file = RecordedFile(path, mode.replace("b", ""))
        file.note = self.note
        self.note("create", path)
        return io.BufferedWriter(file)


class Folder:
    """A folder of which the disk need not yet hold what programs see; `disks` are all that a crash may leave.

    A file's contents are certain once it was synced, the names once the folder was. Before that each operation on a
    name may or may not have come to the disk, in any order, and the contents may be the old, none, torn or the new.
    """

    def __init__(self, files: Disk) -> None:
        self.synced = list(files.values())
        self.written = list(files.values())
        self.names = {name: number for number, name in enumerate(files)}
        self.names_on_disk = dict(self.names)
        self.pending: list[dict[str, int | None]] = []

    def apply(self, kind: str, name: str, *arguments: Any) -> None:
        if (kind, name) == ("fsync", "."):
            self.names_on_disk, self.pending = dict(self.names), []
        elif kind == "fsync":
            self.synced[self.names[name]] = self.written[self.names[name]]
        elif kind == "write":
            self.written[self.names[name]] += arguments[0]
        elif kind == "create" and name in self.names:
            self.written[self.names[name]] = b""
        elif kind == "create":
            self.synced.append(b"")
            self.written.append(b"")
            self._change({name: len(self.written) - 1})
        elif kind == "replace":
            self._change({arguments[0]: self.names[name], name: None})
        else:
            self._change({name: None})

    def _change(self, change: dict[str, int | None]) -> None:
        self.pending.append(change)
        self.names = merged(self.names, [change])

    def contents(self, number: int) -> set[bytes]:
        old, new = self.synced[number], self.written[number]
        return {old} if old == new else {old, b"", new[: len(new) // 2], bytes(len(new)), new}

    def disks(self) -> Iterator[Disk]:
        for done in itertools.product([False, True], repeat=len(self.pending)):
            names = merged(self.names_on_disk, itertools.compress(self.pending, done))
            for contents in itertools.product(*map(self.contents, names.values())):
                yield dict(zip(names, contents, strict=True))


def merged(names: dict[str, int], changes: Iterable[dict[str, int | None]]) -> dict[str, int]:
    for change in changes:
        names = {name: number for name, number in {**names, **change}.items() if number is not None}
    return names


def on_disk(folder: Path) -> Disk:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def saving(
    run_folder: Path, again: bool, monkeypatch: pytest.MonkeyPatch, best: bool = True
) -> tuple[Disk, list[Operation]]:
    """A folder with an old snapshot, also the `best`; and how a new one, of a later step or of the same, gets there."""
    folder = run_folder / "snapshots"
    folder.mkdir(parents=True)
    store = SnapshotStore(folder, keep=1)
    store.save({"model.weight": torch.zeros(99)}, {"step": 1, "age": "old"}, best)
    store.wait()
    before = on_disk(folder)
    with monkeypatch.context() as patch:
        recorder = Recorder(folder, patch)
        store.save({"model.weight": torch.ones(99)}, {"step": 1 if again else 2, "age": "new"}, best)
        store.wait()
    model = Folder(before)
    for operation in recorder.operations:
        model.apply(*operation)
    assert {name: model.written[number] for name, number in model.names.items()} == on_disk(folder)
    return before, recorder.operations


def loaded(run_folder: Path) -> tuple[str, str]:
    """Which of the two snapshots a resume would take, and which is the best: old, new or neither."""

    def age(load: Callable[[], snapshot.Snapshot]) -> str:
        try:
            held = load()
        except SnapshotError:
            return "neither"
        assert held.tensors["model.weight"].tolist() == [float(held.state["age"] == "new")] * 99
        return str(held.state["age"])

    return age(lambda: find(run_folder)[0]), age(lambda: read(run_folder / "snapshots" / "best.safetensors"))


def after_each_crash(before: Disk, operations: list[Operation], scratch: Path) -> list[set[tuple[str, str]]]:
    """Of each prefix of the operations, from none to all: what is `loaded` from the folders that it may leave."""
    model, number = Folder(before), itertools.count()
    outcomes: list[set[tuple[str, str]]] = []
    for operation in [None, *operations]:
        if operation is not None:
            model.apply(*operation)
        outcomes.append(set())
        for disk in {tuple(sorted(disk.items())) for disk in model.disks()}:
            folder = scratch / str(next(number))
            (folder / "snapshots").mkdir(parents=True)
            for name, data in disk:
                (folder / "snapshots" / name).write_bytes(data)
            outcomes[-1].add(loaded(folder))
            shutil.rmtree(folder)
    return outcomes


def test_a_save_writes_syncs_renames_and_syncs_the_folder_before_it_prunes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    operations = saving(tmp_path / "run", False, monkeypatch)[1]
    steps = [step for step, _ in itertools.groupby(operation[:2] for operation in operations)]
    expected = []
    for name in ("step-000000002.safetensors", "best.safetensors"):
        expected += [(kind, f"{name}.tmp") for kind in ("create", "write", "fsync", "replace")] + [("fsync", ".")]
    assert steps == [*expected, ("unlink", "step-000000001.safetensors")]


@pytest.mark.parametrize("again", [False, True], ids=["a later step", "the same step again"])
def test_a_crash_after_any_operation_leaves_the_old_snapshot_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    before, operations = saving(tmp_path / "run", again, monkeypatch)
    outcomes = after_each_crash(before, operations, tmp_path / "crashes")
    assert len(outcomes) > 10
    assert set.union(*outcomes) == {("old", "old"), ("new", "old"), ("new", "new")}
    assert (outcomes[0], outcomes[-1]) == ({("old", "old")}, {("new", "new")})


def test_a_crash_while_a_run_goes_back_to_its_best_leaves_that_or_the_newest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run" / "snapshots"
    folder.mkdir(parents=True)
    store = SnapshotStore(folder, keep=1)
    store.save({"model.weight": torch.zeros(99)}, {"step": 2, "age": "old"}, best=True)
    store.save({"model.weight": torch.ones(99)}, {"step": 3, "age": "new"})
    store.wait()
    before = on_disk(folder)
    with monkeypatch.context() as patch:
        recorder = Recorder(folder, patch)
        assert store.rewind(2, folder / "best.safetensors") == ["step-000000003.safetensors"]
    outcomes = after_each_crash(before, recorder.operations, tmp_path / "crashes")
    assert set.union(*outcomes) == {("new", "old"), ("old", "old")}
    assert (outcomes[0], outcomes[-1]) == ({("new", "old")}, {("old", "old")})


def test_the_logs_are_on_the_disk_before_a_snapshot_that_counts_on_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced, fsync = [], os.fsync

    def noting(descriptor: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).relative_to(tmp_path).as_posix())
        fsync(descriptor)

    logs = RunLogs(tmp_path, ledger=False)
    (tmp_path / "snapshots").mkdir()
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    store = SnapshotStore(tmp_path / "snapshots", 1, logs.paths)
    monkeypatch.setattr(os, "fsync", noting)
    store.save({"model.weight": torch.zeros(9)}, {"step": 1})
    store.wait()
    assert synced == ["metrics.jsonl", ".", "snapshots/step-000000001.safetensors.tmp", "snapshots"]


def write_loosely(
    path: Path, *parts: Any, sync_file: bool = True, flush: bool = True, sync_folder: bool = True
) -> None:
    """write_durably, less something."""
    temporary = path.with_name(f"{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(b"".join(parts))
        if flush:
            file.flush()
        if sync_file:
            os.fsync(file.fileno())
    os.replace(temporary, path)
    descriptor = os.open(path.parent, os.O_RDONLY)
    if sync_folder:
        os.fsync(descriptor)
    os.close(descriptor)


def write_in_place(path: Path, *parts: Any) -> None:
    with open(path, "wb") as file:
        file.write(b"".join(parts))
        file.flush()
        os.fsync(file.fileno())


def removing_first(path: Path, *parts: Any) -> None:
    for old in step_files(path.parent):
        old.unlink()
    write_loosely(path, *parts)


@pytest.mark.parametrize(
    ("writer", "again"),
    [
        (lambda *a: write_loosely(*a, sync_file=False), False),
        (lambda *a: write_loosely(*a, sync_file=False), True),
        (lambda *a: write_loosely(*a, flush=False), False),
        (lambda *a: write_loosely(*a, sync_folder=False), False),
        (write_in_place, False),
        (write_in_place, True),
        (removing_first, False),
    ],
    ids=[
        "no fsync",
        "no fsync, same step",
        "no flush",
        "no fsync of the folder",
        "in place",
        "in place, same step",
        "prunes first",
    ],
)
def test_a_writer_that_can_lose_both_snapshots_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: Callable[..., None], again: bool
) -> None:
    monkeypatch.setattr(snapshot, "write_durably", writer)
    outcomes = after_each_crash(*saving(tmp_path / "run", again, monkeypatch, best=False), tmp_path / "crashes")
    assert "neither" in {newest for newest, _ in set.union(*outcomes)}


def test_a_writer_that_returns_before_all_is_on_the_disk_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshot, "write_durably", lambda *a: write_loosely(*a, sync_folder=False))
    outcomes = after_each_crash(*saving(tmp_path / "run", True, monkeypatch), tmp_path / "crashes")
    assert outcomes[-1] == set(itertools.product(("old", "new"), repeat=2))


# ---- whole runs on a disk that fails ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("durable") / "whole"
    train(*FLAGS, "--run_dir", folder)
    yield folder
    shutil.rmtree(folder)


def assert_ended_for_want_of_a_snapshot(done: Outcome, folder: Path, why: str) -> None:
    """Status 5 and one line, and the newest snapshot that is there is whole."""
    line = re.escape(f"error: cannot write {folder}/snapshots/step-") + rf"\d{{9}}\.safetensors: {why}; "
    assert re.fullmatch(line + "make room and resume, the older snapshots are intact\n", done.err), done.err
    assert done.status == 5
    assert not list(folder.rglob("*.tmp"))
    found, passed_over = find(folder)
    assert (found.path, passed_over) == (snapshot_path(folder, steps_kept(folder)[-1]), [])


@pytest.mark.slow
def test_a_disk_that_fills_up_under_a_run_costs_no_more_than_the_steps_since_its_last_snapshot(
    uninterrupted: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    process = start(*FLAGS, "--run_dir", folder)
    wait_for(snapshot_path(folder, 2), process)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (MEGABYTE, MEGABYTE))
    assert_ended_for_want_of_a_snapshot(wait(process), folder, os.strerror(errno.EFBIG))
    assert steps_kept(folder)[-1] < STEPS
    train("--resume_from", folder)
    assert_same_run(folder, uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize(("part", "kept"), [("file", [2]), ("folder", [2, 4])])
def test_a_disk_that_breaks_under_a_run_costs_no_more_than_the_steps_since_its_last_snapshot(
    uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str, kept: list[int]
) -> None:
    folder, fsync, synced = tmp_path / "run", os.fsync, []

    def fail_the_second_time(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        synced.append((path.parent if part == "file" else path).name)
        if synced[-1] == "snapshots" and synced.count("snapshots") == 2:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail_the_second_time)
        done = run(*FLAGS, "--run_dir", folder)
    assert_ended_for_want_of_a_snapshot(done, folder, os.strerror(errno.EIO))
    assert steps_kept(folder) == kept
    train("--resume_from", folder)
    assert_same_run(folder, uninterrupted)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_a_disk_that_takes_no_more_logs_ends_a_run_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fail(path: Path, lines: Iterable[str]) -> None:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr("training.logs._append", fail)
    done = run(*FLAGS, "--max_samples", 16, "--run_dir", tmp_path / "run")
    where = tmp_path / "run" / "metrics.jsonl"
    assert done.err.startswith(f"error: {os.strerror(number)} at {where}; make room or mend the disk, then resume, or")
    assert done.err.count("\n") == 1
    assert done.status == 5


# ---- many saves ------------------------------------------------------------------------------------------------------


def usage() -> tuple[int, int, int]:
    """Open descriptors, threads, and bytes of memory, without what was freed but not given back to the system."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return len(os.listdir("/proc/self/fd")), threading.active_count(), pages * resource.getpagesize()


def watch(run_folder: Path, done: threading.Event) -> tuple[int, list[str]]:
    """Look for a snapshot again and again: how often there was one, and what was said when there was none."""
    finds, failures = 0, []
    while not done.is_set():
        before = set(step_files(run_folder / "snapshots"))
        try:
            find(run_folder)
            finds += 1
        except SnapshotError as error:
            after = set(step_files(run_folder / "snapshots"))
            if not after or before & after:  # else all that were there made way for newer ones in the meantime
                failures.append(str(error))
    return finds, failures


@pytest.mark.slow
def test_a_thousand_saves_always_leave_one_to_go_on_from_and_pile_up_nothing(tmp_path: Path) -> None:
    (tmp_path / "snapshots").mkdir()
    store, tensors = SnapshotStore(tmp_path / "snapshots", keep=3), {"model.weight": torch.randn(50_000)}

    def save(steps: range) -> tuple[int, list[str]]:
        done = threading.Event()
        with ThreadPoolExecutor(1) as pool:
            watching = pool.submit(watch, tmp_path, done)
            try:
                for step in steps:
                    store.save(tensors, {"step": step}, best=step % 10 == 0)
                store.wait()
            finally:
                done.set()
        return watching.result()

    store.save(tensors, {"step": 1})
    store.wait()
    save(range(2, 51))
    before = usage()
    finds, failures = save(range(51, 1051))
    descriptors, threads, memory = (now - then for now, then in zip(usage(), before, strict=True))
    assert failures == []
    assert finds > 100
    assert steps_kept(tmp_path) == [1048, 1049, 1050]
    assert descriptors <= 0
    assert threads <= 0
    assert memory < 10 * MEGABYTE  # 0.3 was measured; a thousand snapshots are 200
