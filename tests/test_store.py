"""What the store gives is whole and right, is made once whoever asks, never passes the limit, and survives the disk."""

import contextlib
import errno
import logging
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from stream import cache
from stream.cache import HEADER, OWN, FileStore

ROOT = Path(__file__).resolve().parent.parent
DATA = np.random.default_rng(0).bytes(1000)
OTHER = np.random.default_rng(1).bytes(1000)
PATIENCE = 30  # seconds that a thread or process may take before a test fails


def never() -> bytes:
    raise AssertionError("made although it is kept")


def files(folder: Path) -> list[Path]:
    """What lies in the folder, temporary files too but neither the locks nor the total."""
    return [path for path in folder.rglob("*") if path.is_file() and path.parent != folder / OWN]


def kept(folder: Path) -> dict[str, bytes]:
    """The files of the folder without their headers."""
    return {path.relative_to(folder).as_posix(): path.read_bytes()[HEADER:] for path in files(folder)}


def size_on_disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in files(folder))


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def start_python(source: str, *arguments: object) -> "subprocess.Popen[str]":
    """A process of its own, to which the store is known."""
    imports = "import os, sys, time\nfrom pathlib import Path\nfrom stream.cache import FileStore\n"
    command = [sys.executable, "-c", imports + source]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen([*command, *map(str, arguments)], env=env, stdout=subprocess.PIPE, text=True)


def output(process: "subprocess.Popen[str]") -> str:
    out, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0
    return out


# ---- keeping ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [b"", b"\0", DATA], ids=["nothing", "one byte", "more"])
@pytest.mark.parametrize("name", ["a", "deep/er/a.arrow", "refs/main"])
def test_what_is_kept_comes_back_unmade(tmp_path: Path, name: str, data: bytes) -> None:
    store = FileStore(tmp_path / "store")
    assert store.find(name) is None
    assert bytes(store.get(name, lambda: data)) == data
    for again in (store, FileStore(tmp_path / "store")):
        assert bytes(again.get(name, never)) == data
        assert bytes(again.find(name) or b"") == data
    assert kept(tmp_path / "store") == {name: data}


def test_what_is_kept_comes_back_in_another_process(tmp_path: Path) -> None:
    FileStore(tmp_path).put("a", DATA)
    source = "sys.stdout.write(bytes(FileStore(Path(sys.argv[1])).find('a')).hex())"
    assert output(start_python(source, tmp_path)) == DATA.hex()


def test_what_is_put_takes_the_place_of_what_was_there(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    for data in (DATA, b"short", OTHER):
        store.put("a", data)
        assert bytes(store.get("a", never)) == data
    assert kept(tmp_path) == {"a": OTHER}


def test_what_was_found_stays_readable_when_it_is_replaced_or_removed(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    store.put("a", DATA)
    found = store.find("a")
    store.put("a", OTHER)
    (tmp_path / "a").unlink()
    assert bytes(found or b"") == DATA


def test_names_are_those_of_whole_files(tmp_path: Path) -> None:
    store = FileStore(tmp_path / "store")
    assert store.names() == set()
    for name in ("a", "b/c.arrow"):
        store.put(name, DATA)
    (tmp_path / "store" / "b" / "d.arrow.tmp").write_bytes(b"half")
    assert store.names() == {"a", "b/c.arrow"}


def test_what_is_kept_is_found_without_a_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FileStore(tmp_path)
    store.put("a", DATA)
    monkeypatch.setattr(cache, "FileLock", lambda *arguments, **options: never())
    for again in (store, FileStore(tmp_path)):
        assert bytes(again.find("a") or b"") == bytes(again.get("a", never)) == DATA


# ---- damage ----------------------------------------------------------------------------------------------------------


def damaged(folder: Path, data: bytes) -> FileStore:
    (folder / "a").write_bytes(data)
    return FileStore(folder)


def test_any_flipped_byte_is_noticed_and_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    FileStore(tmp_path).put("a", DATA)
    whole = (tmp_path / "a").read_bytes()
    for position in [*range(16), *range(HEADER, len(whole), 41), len(whole) - 1]:
        caplog.clear()
        flipped = bytearray(whole)
        flipped[position] ^= 1 << position % 8
        store = damaged(tmp_path, bytes(flipped))
        made: list[int] = []
        assert bytes(store.get("a", lambda: made.append(1) or DATA)) == DATA  # type: ignore[func-returns-value, misc]  # noqa: B023
        assert made == [1]
        assert [str(tmp_path / "a") in line for line in warnings(caplog)] == [True]
        assert (tmp_path / "a").read_bytes() == whole


def test_a_flipped_byte_of_the_padding_changes_nothing_that_is_given(tmp_path: Path) -> None:
    FileStore(tmp_path).put("a", DATA)
    whole = (tmp_path / "a").read_bytes()
    for position in range(16, HEADER):
        assert bytes(damaged(tmp_path, whole[:position] + b"?" + whole[position + 1 :]).get("a", lambda: DATA)) == DATA


@pytest.mark.parametrize("length", [1, 16, HEADER - 1, HEADER, HEADER + 1, HEADER + 999, HEADER + 1001])
def test_a_file_cut_short_or_gone_on_is_noticed_and_made_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, length: int
) -> None:
    FileStore(tmp_path).put("a", DATA)
    whole = (tmp_path / "a").read_bytes()
    store = damaged(tmp_path, (whole + b"\0")[:length])
    assert store.find("a") is None
    assert len(warnings(caplog)) == 1
    assert bytes(store.get("a", lambda: DATA)) == DATA
    assert (tmp_path / "a").read_bytes() == whole


def test_an_empty_file_is_made_again(tmp_path: Path) -> None:
    store = damaged(tmp_path, b"")
    assert store.find("a") is None
    assert bytes(store.get("a", lambda: DATA)) == DATA
    assert kept(tmp_path) == {"a": DATA}


def test_what_is_damaged_is_not_found_and_thrown_away(tmp_path: Path) -> None:
    store = damaged(tmp_path, b"\1" * 200)
    assert store.find("a") is None
    assert kept(tmp_path) == {}


@pytest.mark.parametrize("damage", [b"", b"rubbish", b"-100 -100", b"1", b"492 49", b"492 483", b"9" * 9999, None])
def test_a_total_that_is_damaged_or_gone_is_measured_anew(tmp_path: Path, damage: bytes | None) -> None:
    store = fill(tmp_path, "abc", entries=5)
    total = tmp_path / OWN / "total"
    if damage is None:
        total.unlink()
    else:
        total.write_bytes(damage)
    for name in "defg":
        store.put(name, entry(name))
    assert store.names() == {*"abcde"}
    assert total.read_text().split()[0] == str(5 * ENTRY)


# ---- failures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
def test_what_fails_to_be_made_leaves_nothing_behind(tmp_path: Path, error: type[BaseException]) -> None:
    store = FileStore(tmp_path)

    def fail() -> bytes:
        raise error("the network is gone")

    with pytest.raises(error, match="the network is gone"):
        store.get("a", fail)
    assert kept(tmp_path) == {}
    assert bytes(store.get("a", lambda: DATA)) == DATA
    assert kept(tmp_path) == {"a": DATA}


def refuse(patch: pytest.MonkeyPatch, call: str) -> None:
    def fail(*arguments: object) -> None:
        raise OSError({"fsync": errno.ENOSPC, "replace": errno.EIO}[call], "the disk refuses")

    patch.setattr(os, call, fail)


def check_that_nothing_is_kept(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = FileStore(folder)
    for name in ("a", "b", "a"):
        assert bytes(store.get(name, lambda: DATA)) == DATA
        assert store.find(name) is None
        store.put(name, OTHER)
    assert store.names() == set()
    assert [str(folder) in line for line in warnings(caplog)] == [True]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_fails_costs_one_warning_and_no_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, call: str
) -> None:
    with monkeypatch.context() as patch:
        refuse(patch, call)
        check_that_nothing_is_kept(tmp_path, caplog)
    assert kept(tmp_path) == {}


def test_a_folder_that_cannot_be_made_costs_one_warning_and_no_data(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    check_that_nothing_is_kept(tmp_path / "file" / "store", caplog)
    (tmp_path / "file").unlink()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_fails_leaves_what_was_kept_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    store = FileStore(tmp_path)
    store.put("a", DATA)
    with monkeypatch.context() as patch:
        refuse(patch, call)
        store.put("a", OTHER)
    assert kept(tmp_path) == {"a": DATA}
    assert bytes(FileStore(tmp_path).get("a", never)) == DATA


@pytest.mark.parametrize("beyond", [-HEADER + 1, 0, 3000, 10**6], ids=["a byte", "a header", "a page", "much"])
def test_a_disk_that_is_full_in_mid_write_costs_one_warning_and_no_data(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, beyond: int
) -> None:
    room = 10**6
    data = bytes(room + beyond)
    store = FileStore(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        given = [bytes(store.get(name, lambda: data)) for name in "aba"]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert given == [data] * 3
    assert kept(tmp_path) == {}
    assert len(warnings(caplog)) == 1
    assert bytes(store.get("a", lambda: DATA)) == DATA
    assert kept(tmp_path) == {"a": DATA}


def test_what_is_interrupted_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FileStore(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda number: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            store.put("a", DATA)
    assert kept(tmp_path) == {}
    assert bytes(store.get("a", lambda: DATA)) == DATA


def test_what_a_killed_writer_left_is_not_in_the_way_and_is_gone_after(tmp_path: Path) -> None:
    source = "os.fsync = lambda number: os.kill(os.getpid(), 9)\n"
    source += "FileStore(Path(sys.argv[1])).put('a', b'rubbish' * 1000)"
    process = start_python(source, tmp_path)
    process.communicate(timeout=PATIENCE)
    assert process.returncode == -signal.SIGKILL
    assert kept(tmp_path) == {"a.tmp": b"rubbish" * 1000}
    store = FileStore(tmp_path)
    assert store.find("a") is None
    assert bytes(store.get("a", lambda: DATA)) == DATA
    assert kept(tmp_path) == {"a": DATA}


def test_what_was_damaged_takes_nothing_of_the_limit(tmp_path: Path) -> None:
    fill(tmp_path, "abc", entries=3)
    store = fill(tmp_path, "d", entries=3)
    (tmp_path / "a").write_bytes(b"rubbish")
    assert bytes(store.get("a", lambda: entry("a"))) == entry("a")
    assert store.names() == {*"abc"}


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_write_that_fails_takes_nothing_of_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    store = fill(tmp_path, "a", entries=3)
    with monkeypatch.context() as patch:
        refuse(patch, call)
        for name in "bcdef":
            store.put(name, entry(name))
    for name in "ghi":
        store.put(name, entry(name))
    assert store.names() == {*"agh"}


def test_what_a_killed_writer_left_counts_for_others_that_run(tmp_path: Path) -> None:
    store = fill(tmp_path, "a", entries=3)
    source = "os.fsync = lambda number: os.kill(os.getpid(), 9)\n"
    source += "FileStore(Path(sys.argv[1]), int(sys.argv[2])).put('b', bytes(100))"
    assert start_python(source, tmp_path, 3 * ENTRY).wait(PATIENCE) == -signal.SIGKILL
    assert set(kept(tmp_path)) == {"a", "b.tmp"}
    for name in "cde":
        store.put(name, entry(name))
    assert set(kept(tmp_path)) == {"a", "b.tmp", "c"}
    store.mark_used("c")
    store.put("b", entry("b"))
    store.put("d", entry("d"))
    assert set(kept(tmp_path)) == {*"abd"}


# ---- several at once -------------------------------------------------------------------------------------------------


def test_threads_that_ask_at_once_have_it_made_once(tmp_path: Path) -> None:
    store, made = FileStore(tmp_path), []
    ready = threading.Barrier(8)

    def make() -> bytes:
        made.append(threading.get_ident())
        time.sleep(0.05)
        return DATA

    def ask(number: int) -> bytes:
        ready.wait(PATIENCE)
        return bytes(store.get("a", make))

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(8))) == [DATA] * 8
    assert len(made) == 1
    assert kept(tmp_path) == {"a": DATA}


def test_processes_that_ask_at_once_have_it_made_once(tmp_path: Path) -> None:
    source = """
mine, others, folder, notes = sys.argv[1], sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4])
def make():
    with open(notes / "made", "a") as file:
        file.write(mine)
    time.sleep(0.1)
    return b"data" * 1000
(notes / mine).touch()
while not (notes / others).exists():
    time.sleep(0.001)
print(bytes(FileStore(folder).get("a", make)) == b"data" * 1000, end="")
"""
    notes = tmp_path / "notes"
    notes.mkdir()
    pair = [start_python(source, mine, other, tmp_path / "store", notes) for mine, other in ("12", "21")]
    assert [output(process) for process in pair] == ["True", "True"]
    assert len((notes / "made").read_text()) == 1
    assert kept(tmp_path / "store") == {"a": b"data" * 1000}


def test_a_second_asker_makes_what_the_first_failed_to_make(tmp_path: Path) -> None:
    failing, asking = threading.Event(), threading.Event()

    def fail() -> bytes:
        failing.set()
        asking.wait(PATIENCE)
        time.sleep(0.05)
        raise RuntimeError("the network is gone")

    def ask() -> bytes:
        failing.wait(PATIENCE)
        asking.set()
        return bytes(FileStore(tmp_path).get("a", lambda: DATA))

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.submit(FileStore(tmp_path).get, "a", fail), pool.submit(ask)
        assert second.result(PATIENCE) == DATA
        assert isinstance(first.exception(PATIENCE), RuntimeError)


def test_a_failure_to_make_does_not_take_away_the_next_ones_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The first gives the second half a second, before it cleans up, to claim what is no longer the first's."""
    started, making, cleaned = threading.Event(), threading.Event(), threading.Event()
    unlink = Path.unlink

    def slow_unlink(path: Path, missing_ok: bool = False) -> None:
        if threading.current_thread().name.startswith("first"):
            making.wait(0.5)
        unlink(path, missing_ok=missing_ok)

    def fail() -> bytes:
        started.set()
        time.sleep(0.1)
        raise RuntimeError("the network is gone")

    def make() -> bytes:
        making.set()
        cleaned.wait(PATIENCE)
        return DATA

    def fail_first() -> None:
        with pytest.raises(RuntimeError):
            FileStore(tmp_path).get("a", fail)
        cleaned.set()

    monkeypatch.setattr(Path, "unlink", slow_unlink)
    with ThreadPoolExecutor(1, "first") as one, ThreadPoolExecutor(1, "second") as other:
        first = one.submit(fail_first)
        started.wait(PATIENCE)
        assert bytes(other.submit(FileStore(tmp_path).get, "a", make).result(PATIENCE)) == DATA
        first.result(PATIENCE)
    assert kept(tmp_path) == {"a": DATA}
    assert warnings(caplog) == []


def test_two_that_put_at_once_do_not_take_away_each_others_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The first gives the second half a second, right after its rename, to be in the middle of its own writing."""
    renamed, writing, done = threading.Event(), threading.Event(), threading.Event()
    replace, fsync = os.replace, os.fsync

    def replace_slowly(source: str, target: str) -> None:
        replace(source, target)
        if threading.current_thread().name.startswith("first"):
            renamed.set()
            writing.wait(0.5)

    def sync_slowly(number: int) -> None:
        if threading.current_thread().name.startswith("second"):
            writing.set()
            done.wait(PATIENCE)
        fsync(number)

    def put_first() -> None:
        FileStore(tmp_path).put("a", DATA)
        done.set()

    def put_second() -> None:
        renamed.wait(PATIENCE)
        FileStore(tmp_path).put("a", OTHER)

    monkeypatch.setattr(os, "replace", replace_slowly)
    monkeypatch.setattr(os, "fsync", sync_slowly)
    with ThreadPoolExecutor(1, "first") as one, ThreadPoolExecutor(1, "second") as other:
        for future in (one.submit(put_first), other.submit(put_second)):
            future.result(PATIENCE)
    assert warnings(caplog) == []
    assert kept(tmp_path) == {"a": OTHER}


def test_locks_are_few_and_names_that_share_one_are_all_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "LOCKS", 2)
    store = FileStore(tmp_path, 200 * ENTRY)

    def work(thread: int) -> None:
        for number in range(20):
            name = f"{number}/{thread}"
            assert bytes(store.get(name, lambda: entry(name))) == entry(name)  # noqa: B023

    in_threads(work)
    assert len(store.names()) == 160
    assert sorted(os.listdir(tmp_path / OWN)) == ["0.lock", "1.lock", "room.lock", "total"]


# ---- the limit -------------------------------------------------------------------------------------------------------

ENTRY = HEADER + 100


def entry(name: str) -> bytes:
    return name.encode().ljust(100, b".")


def fill(folder: Path, names: str, entries: int) -> FileStore:
    """A store with room for so many entries of 100 bytes, asked for those named by a letter each."""
    store = FileStore(folder, ENTRY * entries)
    for name in names:
        assert bytes(store.get(name, lambda name=name: entry(name))) == entry(name)  # type: ignore[misc]
    return store


def test_what_is_unused_never_makes_room(tmp_path: Path) -> None:
    store = fill(tmp_path, "abcdef", entries=3)
    assert store.names() == {"a", "b", "c"}


def test_what_was_used_makes_room_oldest_first_and_no_more_than_needed(tmp_path: Path) -> None:
    store = fill(tmp_path, "abc", entries=3)
    for used, new, left in [
        ("b", "d", "acd"),
        ("ca", "e", "ade"),
        ("", "f", "def"),
        ("", "g", "def"),
        ("f", "g", "deg"),
    ]:
        for name in used:
            store.mark_used(name)
        store.get(new, lambda new=new: entry(new))  # type: ignore[misc]
        assert store.names() == set(left)
    assert size_on_disk(tmp_path) == 3 * ENTRY


def test_a_large_entry_takes_the_room_of_several(tmp_path: Path) -> None:
    store = fill(tmp_path, "abcd", entries=4)
    for name in "abcd":
        store.mark_used(name)
    store.put("large", bytes(2 * ENTRY - HEADER))
    assert store.names() == {"c", "d", "large"}
    assert size_on_disk(tmp_path) == 4 * ENTRY


def test_what_is_larger_than_the_limit_is_given_and_not_kept(tmp_path: Path) -> None:
    store = FileStore(tmp_path, ENTRY)
    assert bytes(store.get("a", lambda: bytes(101))) == bytes(101)
    assert kept(tmp_path) == {}
    store.put("b", bytes(100))
    assert store.names() == {"b"}


def test_a_new_epoch_makes_no_room_for_anything(tmp_path: Path) -> None:
    store = fill(tmp_path, "abc", entries=3)
    for name in "abc":
        store.mark_used(name)
    store.forget_used()
    store.put("d", entry("d"))
    assert store.names() == {"a", "b", "c"}


def test_what_was_used_but_never_kept_makes_no_room(tmp_path: Path) -> None:
    store = fill(tmp_path, "abcd", entries=3)
    store.mark_used("d")
    store.put("e", entry("e"))
    assert store.names() == {"a", "b", "c"}


def test_what_made_room_is_made_again_when_it_is_asked_for(tmp_path: Path) -> None:
    store = fill(tmp_path, "ab", entries=2)
    store.mark_used("a")
    store.put("c", entry("c"))
    store.mark_used("b")
    assert bytes(store.get("a", lambda: entry("new a"))) == entry("new a")
    assert store.names() == {"a", "c"}


def test_what_lies_there_of_earlier_runs_counts_and_so_does_rubbish(tmp_path: Path) -> None:
    fill(tmp_path, "ab", entries=3)
    (tmp_path / "z.tmp").write_bytes(bytes(50))
    assert fill(tmp_path, "c", entries=3).names() == {"a", "b"}
    (tmp_path / "z.tmp").unlink()
    assert fill(tmp_path, "c", entries=3).names() == {"a", "b", "c"}


def test_the_disk_never_holds_more_than_the_limit(tmp_path: Path) -> None:
    """A thousand steps of what a run may do, with entries of many sizes."""
    rng = np.random.default_rng(0)
    store = FileStore(tmp_path, 5000)
    for _ in range(1000):
        name = str(rng.integers(40))
        data = bytes(int(rng.integers(1500)))
        step = rng.integers(10)
        if step < 5:
            store.get(name, lambda data=data: data)  # type: ignore[misc]
        elif step < 9:
            store.mark_used(name)
        elif not rng.integers(10):
            store.forget_used()
        assert size_on_disk(tmp_path) <= 5000


def test_many_new_entries_have_the_folder_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    walks: list[Path] = []
    rglob = Path.rglob

    def counted(path: Path, *arguments: Any, **options: Any) -> Any:
        walks.append(path)
        return rglob(path, *arguments, **options)

    store = fill(tmp_path, "abc", entries=3)
    monkeypatch.setattr(Path, "rglob", counted)
    for number in range(100):
        store.mark_used("abc"[number] if number < 3 else str(number - 3))
        store.put(str(number), entry(str(number)))
    assert walks == []
    other = FileStore(tmp_path, 3 * ENTRY)
    for number in range(100, 200):
        other.mark_used(str(number - 3))
        other.put(str(number), entry(str(number)))
    assert walks == [tmp_path]
    assert other.names() == {"197", "198", "199"}


def test_stores_of_one_folder_and_limit_see_each_others_total(tmp_path: Path) -> None:
    one, other = (FileStore(tmp_path, 4 * ENTRY) for _ in range(2))
    for store, name, left in [
        (one, "a", "a"),
        (other, "b", "ab"),
        (one, "c", "abc"),
        (other, "d", "abcd"),
        (one, "e", "abcd"),
        (other, "f", "abcd"),
    ]:
        store.put(name, entry(name))
        assert one.names() == other.names() == set(left)
    other.mark_used("a")
    other.put("g", bytes(10))
    assert one.names() == {*"bcdg"}
    one.put("h", bytes(100))
    one.put("i", bytes(26))
    assert one.names() == {*"bcdgi"}
    assert size_on_disk(tmp_path) == 4 * ENTRY


def test_processes_of_one_folder_never_exceed_their_limit_together(tmp_path: Path) -> None:
    """Each looks at the disk at its fullest: the room is its own, and what it has just written is not renamed yet."""
    source = """
import random
folder, limit, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
rng, store, replace = random.Random(seed), FileStore(folder, limit), os.replace
def replace_within(source, target):
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.parent.name != ".store"]
    assert sum(sizes) <= limit, sizes
    print(seed, end="")
    replace(source, target)
os.replace = replace_within
for _ in range(300):
    name = str(rng.randrange(30))
    (store.put if rng.random() < 0.2 else lambda n, d: store.get(n, lambda: d))(name, bytes(rng.randrange(1500)))
    store.mark_used(str(rng.randrange(30)))
"""
    written = [output(process) for process in [start_python(source, tmp_path, 5000, seed) for seed in (1, 2)]]
    assert min(map(len, written)) > 20
    assert size_on_disk(tmp_path) <= 5000
    assert (tmp_path / OWN / "total").read_text() == f"{size_on_disk(tmp_path)} {size_on_disk(tmp_path)}"


def in_threads(work: Callable[[int], None]) -> None:
    """Eight threads at once, which change places as often as they can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(8)))
    finally:
        sys.setswitchinterval(interval)


def test_threads_that_make_room_at_once_do_not_trip_over_each_other(tmp_path: Path) -> None:
    store = FileStore(tmp_path, 10 * ENTRY)

    def work(thread: int) -> None:
        for number in range(40):
            name = f"{thread}/{number}"
            assert bytes(store.get(name, lambda: entry(name))) == entry(name)  # noqa: B023
            store.mark_used(name)

    in_threads(work)
    assert size_on_disk(tmp_path) <= 10 * ENTRY


def test_a_temporary_file_that_goes_while_the_room_is_measured_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stat = Path.stat

    def stat_and_lose(path: Path, **options: Any) -> os.stat_result:
        result = stat(path, **options)
        if path.name == "z.tmp":
            path.unlink()
        return result

    (tmp_path / "z.tmp").write_bytes(b"half")
    monkeypatch.setattr(Path, "stat", stat_and_lose)
    assert fill(tmp_path, "a", entries=3).names() == {"a"}


def test_threads_that_find_no_room_do_not_trip_over_each_others_temporary_files(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = FileStore(tmp_path, 3 * ENTRY)

    def work(thread: int) -> None:
        for number in range(60):
            name = f"{thread}/{number}"
            assert bytes(store.get(name, lambda: entry(name))) == entry(name)  # noqa: B023

    in_threads(work)
    assert len(store.names()) == 3
    assert size_on_disk(tmp_path) == 3 * ENTRY
    assert warnings(caplog) == []


def test_threads_that_keep_at_once_stay_within_the_limit_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each waits a while for the other before it writes and before it syncs, as a busy machine may let it."""
    store, together = FileStore(tmp_path, ENTRY), threading.Barrier(2)

    def meet_before(call: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def met(argument: Any) -> Any:
            with contextlib.suppress(threading.BrokenBarrierError):
                together.wait(0.3)
            return call(argument)

        return met

    monkeypatch.setattr(os, "fsync", meet_before(os.fsync))
    monkeypatch.setattr(xxhash, "xxh3_128_digest", meet_before(xxhash.xxh3_128_digest))
    with ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(store.get, name, lambda: bytes(100)) for name in "ab"]:
            assert bytes(future.result(PATIENCE)) == bytes(100)
    assert size_on_disk(tmp_path) <= ENTRY
