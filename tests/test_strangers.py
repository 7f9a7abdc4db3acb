"""A stranger's file does nothing through any flag but be refused."""

import ast
import contextlib
import csv
import hashlib
import io
import json
import os
import pickle
import resource
import shutil
import signal
import struct
import tarfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import xxhash
from hub import Hub
from program import ROOT, Outcome, cut, run, snapshot_path, train
from shards import REPO_ID, encode, photographs
from transformers import ResNetConfig

import lr_finder
from errors import DataError
from stream.dataset import Cache, HuggingFaceImageNetDataset
from training import snapshot

pytestmark = pytest.mark.usefixtures("small_model")

DIGITS: tuple[object, ...] = ("--max_samples", 16, "--batch_size", 16, "--num_workers", 0, "--epochs", 2)
IMAGES: tuple[object, ...] = ("--model", "resnet18", "--image_size", 16, "--batch_size", 8, "--epochs", 1)
STREAMED = (*IMAGES, "--num_workers", 1, "--network_patience", 0.001, "--stall_timeout", 5)
PRECIOUS = b"the only copy\n"
MEMORY = 2 * 2**30  # bytes that a refusal may take, and far more than any does
PATIENCE = 8.0  # seconds, more than a refusal takes
DEEP = b"[" * 100_000 + b"\n"


# ---- what a stranger sends -------------------------------------------------------------------------------------------


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.canary), "w")


def pickled(canary: Path, how: str = "pickle") -> bytes:
    """`how` is "pickle", or "zip" or "legacy" for torch.save's two formats."""
    if how == "pickle":
        return pickle.dumps(Payload(canary))
    file = io.BytesIO()
    torch.save({"model.fc.weight": Payload(canary)}, file, _use_new_zipfile_serialization=how == "zip")
    return file.getvalue()


def with_header_length(length: int) -> bytes:
    return struct.pack("<Q", length) + b"{}"


def deep_header() -> bytes:
    header = b'{"__metadata__":' + DEEP
    return struct.pack("<Q", len(header)) + header


LINKS = {"zeros": "/dev/zero", "link": "precious", "nowhere": "canary"}


def plant(path: Path, kind: str, home: Path) -> None:
    """Put a malicious file at `path`, in place of what is there; `home` has the user's only file and the canary."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    (home / "precious").write_bytes(PRECIOUS)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind in LINKS:
        path.symlink_to(home / LINKS[kind])
    elif kind == "sparse":
        path.touch()
        os.truncate(path, 2**40)
    else:
        lengths = {"2**63": 2**63, "2**40": 2**40}
        content = {"deep": DEEP, "deep header": deep_header(), "empty": b"{}\n"}
        path.write_bytes(
            content.get(kind)
            or (with_header_length(lengths[kind]) if kind in lengths else pickled(home / "canary", kind))
        )


@contextlib.contextmanager
def watched_pipes(folder: Path) -> Iterator[list[Path]]:
    """The pipes below `folder` that someone still waits at after `PATIENCE`, and is let go. They may be renamed.

    Not sooner, so that whoever opens a pipe without waiting, to see that it is one, is not taken for one who waits.
    """
    waited_at: list[Path] = []
    done = threading.Event()

    def watch() -> None:
        pause = PATIENCE
        while not done.wait(pause):
            pause = 0.02
            waited_at.extend(path for path in folder.rglob("*") if path.is_fifo() and _has_other_end(path))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield waited_at
    finally:
        done.set()
        watcher.join()


def _has_other_end(pipe: Path) -> bool:
    """Whether a process waits to read from or to write to a pipe; it finds an end there and goes on."""
    with contextlib.suppress(OSError):
        os.close(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))
        return True
    end = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    time.sleep(0.01)
    try:
        return bool(os.read(end, 1))
    except BlockingIOError:
        return True
    finally:
        os.close(end)


@contextlib.contextmanager
def bounded_memory() -> Iterator[None]:
    """Whoever wants more than `MEMORY` bytes on top of what is held gets a MemoryError."""
    held = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData"))
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (int(held.split()[1]) * 1024 + MEMORY, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def survive(home: Path, statuses: tuple[int, ...], *arguments: object) -> Outcome:
    """Run among planted files: an exit status of these, at most one line of error, and nothing below `home` harmed.

    A traceback, a MemoryError of `bounded_memory` included, comes through and fails the test.
    """
    (home / "precious").write_bytes(PRECIOUS)
    with watched_pipes(home) as waited_at, bounded_memory():
        done = run(*arguments)
    assert waited_at == []
    assert done.status in statuses, done.err
    errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == bool(done.status), done.err
    assert not (home / "canary").exists()
    assert (home / "precious").read_bytes() == PRECIOUS
    return done


# ---- files and folders given to a flag -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Two epochs of one step each."""
    folder = tmp_path_factory.mktemp("digits") / "run"
    train(*DIGITS, "--ledger", "--run_dir", folder)
    yield folder
    shutil.rmtree(folder)


NO_FOLDER = ("pickle", "pipe", "zeros", "link")
FLAGS: dict[str, tuple[int, tuple[object, ...], tuple[str, ...]]] = {
    "--resume_from": (5, (), ("pickle", "zip", "pipe", "zeros", "link", "2**63", "2**40", "deep header")),
    "--lr_from": (2, DIGITS, ("pickle", "pipe", "zeros", "link", "deep")),
    "--use_pretrained": (3, DIGITS, NO_FOLDER),
    "--data_dir": (3, ("--dataset", "imagefolder"), NO_FOLDER),
    "--dataset_name": (3, ("--dataset", "hf"), NO_FOLDER),
    "--run_dir": (2, DIGITS, NO_FOLDER),
}


@pytest.mark.parametrize(("flag", "kind"), [(flag, kind) for flag, (_, _, kinds) in FLAGS.items() for kind in kinds])
def test_a_strangers_file_is_refused_by_a_flag(tmp_path: Path, flag: str, kind: str) -> None:
    plant(tmp_path / "file.safetensors", kind, tmp_path)
    status, arguments, _ = FLAGS[flag]
    elsewhere = () if flag in ("--run_dir", "--resume_from") else ("--run_dir", tmp_path / "run")
    survive(tmp_path, (status,), *arguments, flag, tmp_path / "file.safetensors", *elsewhere)
    assert not (tmp_path / "run").exists()


def seal(state: Any, header: dict[str, Any] | None = None, data: bytes = b"") -> bytes:
    """A snapshot file with a correct digest."""
    metadata = {"sha256": "0" * 64, "format": snapshot.FORMAT, "state": json.dumps(state)}
    text = json.dumps({"__metadata__": metadata, **(header or {})}, separators=(",", ":")).encode()
    file = struct.pack("<Q", len(text)) + text + data
    return file.replace(b"0" * 64, hashlib.sha256(file).hexdigest().encode(), 1)


def tensor(end: int, shape: int) -> dict[str, Any]:
    return {"dtype": "U8", "shape": [shape], "data_offsets": [0, end]}


FORGED: dict[str, Callable[[dict[str, Any]], bytes]] = {
    "a number for a state": lambda state: seal(5),
    "an empty state": lambda state: seal({}),
    "no settings": lambda state: seal(state | {"config": None}),
    "an unknown dataset": lambda state: seal(state | {"config": {"dataset": "x"}}),
    "text for a number": lambda state: seal(state | {"config": state["config"] | {"epochs": "9"}}),
    "no data": lambda state: seal({name: value for name, value in state.items() if name != "data"}),
    "a number for the data": lambda state: seal(state | {"data": 5}),
    "no tensors": lambda state: seal(state),
    "a tensor past the end": lambda state: seal(state, {"model.x": tensor(2**42, 2**42)}),
    "a tensor of another size": lambda state: seal(state, {"model.x": tensor(4, 2**40)}, b"abcd"),
    "a tensor of no part": lambda state: seal(state, {"x": tensor(1, 1)}, b"a"),
}


@pytest.mark.parametrize("forged", FORGED)
def test_a_forged_snapshot_with_a_correct_digest_is_refused(digits: Path, tmp_path: Path, forged: str) -> None:
    path = tmp_path / "run" / "snapshots" / "step-000000003.safetensors"
    path.parent.mkdir(parents=True)
    path.write_bytes(FORGED[forged](snapshot.read(snapshot_path(digits, 2)).state))
    survive(tmp_path, (2, 5), "--resume_from", path)
    survive(tmp_path, (2, 5), "--resume_from", tmp_path / "run")
    assert os.listdir(tmp_path / "run") == ["snapshots"]


def test_a_run_goes_on_from_its_own_snapshot_past_a_strangers(digits: Path, tmp_path: Path) -> None:
    copy = cut(digits, 2, tmp_path / "run")
    evil = [snapshot_path(copy, step) for step in range(3, 9)]
    for path, kind in zip(evil, ("pickle", "zip", "pipe", "zeros", "link", "deep header"), strict=True):
        plant(path, kind, tmp_path)
    done = survive(tmp_path, (0,), "--resume_from", copy)
    assert "nothing left to do" in done.out
    passed_over = [line for line in done.err.splitlines() if line.startswith("passed over: ")]
    assert [path.name in line for path, line in zip(reversed(evil), passed_over, strict=True)] == [True] * len(evil)


WEIGHTS = [
    *(("pytorch_model.bin", kind) for kind in ("pickle", "zip", "legacy", "pipe")),
    *(("model.safetensors", kind) for kind in ("zip", "pipe", "zeros", "link", "sparse", "2**63", "2**40")),
    ("model.safetensors", "deep header"),
    *(("config.json", kind) for kind in ("pickle", "deep", "pipe", "zeros", "sparse")),
    *(("model.safetensors.index.json", kind) for kind in ("deep", "pipe")),
    *((name, "pickle") for name in ("tf_model.h5", "flax_model.msgpack", "adapter_config.json")),
]


@pytest.mark.parametrize(("name", "kind"), WEIGHTS)
def test_a_strangers_weights_are_refused(tmp_path: Path, name: str, kind: str) -> None:
    ResNetConfig().save_pretrained(tmp_path / "weights")
    plant(tmp_path / "weights" / name, kind, tmp_path)
    survive(tmp_path, (3,), *DIGITS, "--use_pretrained", tmp_path / "weights", "--run_dir", tmp_path / "run")


@pytest.mark.parametrize("how", ["named in the index", "named in the settings"])
def test_what_a_weights_folder_points_to_is_not_run(tmp_path: Path, how: str) -> None:
    folder = tmp_path / "weights"
    ResNetConfig().save_pretrained(folder)
    (folder / "evil.bin").write_bytes(pickled(tmp_path / "canary", "zip"))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')\nclass Evil: ...\n")
    if how == "named in the index":
        index = {"metadata": {}, "weight_map": {"resnet.embedder.embedder.convolution.weight": "evil.bin"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        classes = {"AutoConfig": "evil.Evil", "AutoModelForImageClassification": "evil.Evil"}
        config = json.loads((folder / "config.json").read_text()) | {"auto_map": classes}
        (folder / "config.json").write_text(json.dumps(config))
    survive(tmp_path, (3,), *DIGITS, "--use_pretrained", folder, "--run_dir", tmp_path / "run")


# ---- image folders and CIFAR -----------------------------------------------------------------------------------------


def png_of(width: int, height: int) -> bytes:
    """A PNG that claims to be this large."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["pickle", "pipe", "zeros", "sparse", "bomb", "larger bomb"])
def test_what_is_no_image_in_an_image_folder_is_counted_and_replaced(tmp_path: Path, kind: str) -> None:
    for name in ("train/a/1", "train/a/2", "train/b/1", "train/b/2", "val/a/1", "val/b/1"):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(tmp_path / "set" / f"{name}.png"), np.zeros((16, 16, 3), np.uint8))
    evil = tmp_path / "set" / "train" / "b" / "2.png"
    if kind in ("bomb", "larger bomb"):
        evil.write_bytes(png_of(*((30_000, 30_000) if kind == "bomb" else (2**31 - 1, 2**31 - 1))))
    else:
        plant(evil, kind, tmp_path)
    flags = ("--dataset", "imagefolder", "--data_dir", tmp_path / "set", *IMAGES, "--batch_size", 4, "--streams", 1)
    survive(tmp_path, (0,), *flags, "--num_workers", 1, "--run_dir", tmp_path / "run")
    rows = list(csv.DictReader((tmp_path / "run" / "unreadable.csv").open()))
    assert {row["image"] for row in rows} == {"train/b/2.png"}


@pytest.mark.parametrize("how", ["batches", "archive"])
def test_cifar_files_that_are_not_the_published_ones_are_not_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """torchvision unpickles these files once their MD5 is the published one, and fetches them anew otherwise."""
    from torchvision.datasets import CIFAR10

    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar")
    folder = tmp_path / "a" / "set"
    batches = folder / CIFAR10.base_folder
    batches.mkdir(parents=True)
    if how == "archive":
        add_members(folder / CIFAR10.filename, "w:gz", ("../../canary", b"x"), (f"{tmp_path}/canary", b"x"))
    else:
        for name in ("batches.meta", "test_batch", *(f"data_batch_{number}" for number in range(1, 6))):
            (batches / name).write_bytes(pickled(tmp_path / "canary"))
    survive(tmp_path, (3,), "--dataset", "cifar10", "--data_dir", folder, "--run_dir", tmp_path / "run")


# ---- folders of parquet and of tar files -----------------------------------------------------------------------------


def card(text: str) -> Callable[[Path, Path], None]:
    """Replaces the YAML of the dataset's card."""

    def rewrite(folder: Path, home: Path) -> None:
        (folder / "README.md").write_text(f"---\n{text}\n---\n")

    return rewrite


def script(folder: Path, home: Path) -> None:
    (folder / f"{folder.name}.py").write_text(f"open({str(home / 'canary')!r}, 'w')\n")


def yaml_object(folder: Path, home: Path) -> None:
    card(f"configs: !!python/object/apply:os.system ['touch {home / 'canary'}']")(folder, home)


def claims(features: bytes) -> Callable[[Path, Path], None]:
    """The files themselves claim these features, and there is no card."""

    def rewrite(folder: Path, home: Path) -> None:
        (folder / "README.md").unlink()
        for path in folder.glob("data/*.parquet"):
            pq.write_table(pq.read_table(path).replace_schema_metadata({"huggingface": features}), path)

    return rewrite


def feature(**label: Any) -> bytes:
    return json.dumps({"info": {"features": {"image": {"_type": "Image"}, "label": label}}}).encode()


def every_file(make: Callable[[Path, Path], Any]) -> Callable[[Path, Path], None]:
    """Makes each of the set's files anew."""

    def rewrite(folder: Path, home: Path) -> None:
        for path in folder.glob("data/*"):
            make(path, home)

    return rewrite


def is_a(kind: str) -> Callable[[Path, Path], None]:
    return every_file(lambda path, home: plant(path, kind, home))


PARQUET: dict[str, Callable[[Path, Path], None]] = {
    **{kind: is_a(kind) for kind in ("pickle", "pipe", "zeros", "link", "sparse")},
    "pickle for a footer": every_file(lambda path, home: path.write_bytes(b"PAR1" + framed(pickled(home / "canary")))),
    "endless footer": every_file(lambda path, home: path.write_bytes(b"PAR1" + bytes(100) + b"\xff\xff\xff\xffPAR1")),
    "script": script,
    "object in the card": yaml_object,
    "deep card": card("configs: " + "[" * 2_000),
    "list for a card": card("[1]"),
    "number for features": card("dataset_info:\n  features: 7"),
    "link to a server": card("configs:\n- config_name: default\n  data_files: http://127.0.0.1:9/train.parquet"),
    "deep infos": lambda folder, home: plant(folder / "dataset_infos.json", "deep", home),
    "deep features": claims(DEEP),
    "features that are no JSON": claims(b"x"),
    "features of a file": claims(feature(_type="ClassLabel", names_file="/dev/zero")),
    "features of no type": claims(feature(_type="os.system", names=["a"])),
    "features of no list": claims(feature(_type="ClassLabel", names=3)),
}


def framed(footer: bytes) -> bytes:
    return footer + struct.pack("<I", len(footer)) + b"PAR1"


@pytest.mark.parametrize("evil", PARQUET)
def test_a_strangers_parquet_folder_is_refused(small_hub: Path, tmp_path: Path, evil: str) -> None:
    folder = Path(shutil.copytree(small_hub / "datasets" / REPO_ID, tmp_path / "set"))
    PARQUET[evil](folder, tmp_path)
    survive(tmp_path, (3,), "--dataset", "hf", "--dataset_name", folder, *IMAGES, "--run_dir", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def add_members(path: Path, mode: str, *members: tuple[str | tarfile.TarInfo, bytes]) -> None:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for named, data in members:
            member = tarfile.TarInfo(named) if isinstance(named, str) else named
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def link(kind: bytes, name: str, target: str) -> tuple[tarfile.TarInfo, bytes]:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member, b""


def bomb() -> tuple[tarfile.TarInfo, bytes]:
    """A sparse member of a terabyte of zeros."""
    member = tarfile.TarInfo("a.jpg")
    sparse = {"major": "1", "minor": "0", "name": "a.jpg", "realsize": str(2**40)}
    member.pax_headers = {f"GNU.sparse.{key}": value for key, value in sparse.items()}
    return member, b"1\n0\n0\n".ljust(512, b"\0")


IMAGE = ("a.jpg", b"x")
TARS: dict[str, list[tuple[str | tarfile.TarInfo, bytes]]] = {
    "names outside": [("../../canary", b"x"), ("../../canary.jpg", b"x"), ("../../canary.cls", b"-5")],
    "absolute names": [("HOME/canary.jpg", b"x"), ("HOME/canary.cls", b"-5")],
    "symlink outside": [link(tarfile.SYMTYPE, "a.jpg", "../../precious"), ("a.cls", b"-5")],
    "hard link": [link(tarfile.LNKTYPE, "a.jpg", "/etc/hostname"), ("a.cls", b"-5")],
    "symlink to itself": [link(tarfile.SYMTYPE, "a.jpg", "a.jpg"), ("a.cls", b"-5")],
    "two symlinks": [link(tarfile.SYMTYPE, f"{a}.jpg", f"{b}.jpg") for a, b in ("ab", "ba")] + [("a.cls", b"-5")],
    "pipe": [link(tarfile.FIFOTYPE, "a.cls", ""), IMAGE, ("b.jpg", b"x"), ("b.cls", b"-5")],
    "device": [link(tarfile.CHRTYPE, "a.cls", ""), IMAGE, ("b.jpg", b"x"), ("b.cls", b"-5")],
    "bomb": [bomb(), ("a.cls", b"0")],
    "deep label": [IMAGE, ("a.json", DEEP)],
    "list for a label": [IMAGE, ("a.json", b"[1, 2]")],
    "bytes for a label": [IMAGE, ("a.cls", b"\xff")],
    "negative label": [IMAGE, ("a.cls", b"-9999999999")],
    "label past 64 bits": [IMAGE, ("a.json", b'{"label": %d}' % 2**70)],
    "label without end": [IMAGE, ("a.cls", b"x" * 10**6)],
}


def make_tars(folder: Path, *members: tuple[str | tarfile.TarInfo, bytes]) -> Path:
    folder.mkdir(parents=True)
    good = [
        (f"{n}.{kind}", data) for n in range(8) for kind, data in (("jpg", small_image()), ("cls", b"%d" % (n % 2)))
    ]
    add_members(folder / "train-0.tar", "w:", *good, *members)
    add_members(folder / "validation-0.tar", "w:", *good)
    return folder


def small_image() -> bytes:
    return encode(photographs()[0][:20, :20])


@pytest.mark.parametrize("evil", TARS)
def test_a_strangers_tar_file_is_refused(tmp_path: Path, evil: str) -> None:
    members = [
        (name.replace("HOME", str(tmp_path)) if isinstance(name, str) else name, data) for name, data in TARS[evil]
    ]
    folder = make_tars(tmp_path / "a" / "set", *members)
    survive(tmp_path, (3,), "--dataset", "hf", "--dataset_name", folder, *IMAGES, "--run_dir", tmp_path / "run")
    assert not list(tmp_path.rglob("canary*"))


OTHERS: dict[str, tuple[str, ...]] = {
    "csv": ("pickle", "pipe", "zeros", "link", "sparse", "deep"),
    "jsonl": ("pickle", "sparse", "deep"),
    "arrow": ("pickle", "pipe", "sparse", "empty"),
    "zip": ("pickle", "zip", "sparse", "empty"),
    "jpg": ("pickle", "pipe", "zeros"),
    "pkl": ("pickle",),
    "pt": ("zip",),
}


@pytest.mark.parametrize(("suffix", "kind"), [(suffix, kind) for suffix, kinds in OTHERS.items() for kind in kinds])
def test_a_strangers_file_of_another_form_is_refused(tmp_path: Path, suffix: str, kind: str) -> None:
    folder = tmp_path / "a" / "set"
    for name in ("train", "validation"):
        plant(folder / f"{name}.{suffix}", kind, tmp_path)
    survive(tmp_path, (3,), "--dataset", "hf", "--dataset_name", folder, *IMAGES, "--run_dir", tmp_path / "run")


@pytest.mark.parametrize("name", ["state.json", "dataset_dict.json"])
@pytest.mark.parametrize(
    "content", [DEEP, b"[]", b'{"_data_files": [{"filename": "../../precious"}], "splits": ["../.."]}']
)
def test_a_strangers_saved_folder_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    folder = tmp_path / "a" / "set"
    folder.mkdir(parents=True)
    (folder / name).write_bytes(content)
    survive(tmp_path, (3,), "--dataset", "hf", "--dataset_name", folder, *IMAGES, "--run_dir", tmp_path / "run")


@pytest.mark.parametrize("lengths", [[2**40], [2**70], [-5], ["x"]], ids=str)
def test_a_strangers_index_of_tar_files_is_refused(tmp_path: Path, lengths: list[Any]) -> None:
    folder = make_tars(tmp_path / "set")
    split = {"filenames": ["train-0.tar"], "shard_lengths": lengths}
    (folder / "_info.json").write_text(json.dumps({"splits": {"all": split}}))
    flags = ("--dataset", "hf", "--dataset_name", folder, *IMAGES, "--num_classes", 2)
    survive(tmp_path, (0, 3), *flags, "--run_dir", tmp_path / "run")


@pytest.mark.parametrize("kind", ["deep", "pipe", "zeros", "sparse", "pickle"])
def test_an_index_of_tar_files_that_is_none_is_not_waited_for(tmp_path: Path, kind: str) -> None:
    folder = make_tars(tmp_path / "set", IMAGE, ("a.cls", b"-5"))
    plant(folder / "_info.json", kind, tmp_path)
    survive(tmp_path, (3,), "--dataset", "hf", "--dataset_name", folder, *IMAGES, "--run_dir", tmp_path / "run")


class Endless(BaseException):
    pass


@contextlib.contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Endless is raised in the main thread when the time is over."""

    def ring(signum: int, frame: object) -> None:
        raise Endless

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("size", [-512, -(2**40), 2**40])
def test_a_tar_member_of_impossible_size_ends_the_reading(tmp_path: Path, size: int) -> None:
    """A size of -512 sends tarfile back to the same header, time and again."""
    folder = make_tars(tmp_path / "set")
    header = bytearray(tarfile.TarInfo("a.jpg").tobuf(tarfile.GNU_FORMAT))
    header[124:136] = tarfile.itn(size, 12, tarfile.GNU_FORMAT)  # type: ignore[attr-defined]
    header[148:156] = b"%06o\0 " % (256 + sum(header[:148]) + sum(header[156:512]))
    good = (folder / "train-0.tar").read_bytes()
    with tarfile.open(folder / "train-0.tar") as archive:
        second = archive.getmembers()[1].offset
    (folder / "train-0.tar").write_bytes(good[:second] + header + good[second:])
    split = {"filenames": ["train-0.tar"], "shard_lengths": [8]}
    (folder / "_info.json").write_text(json.dumps({"splits": {"all": split}}))
    dataset = HuggingFaceImageNetDataset.open(str(folder), split=["train"], num_classes=2)
    with alarm(10), pytest.raises(DataError, match=r"train-0\.tar"):
        dataset.read_block(0)


# ---- a run's folder --------------------------------------------------------------------------------------------------

NOT_TO_GO_ON_WITH = [
    *(("config.json", kind) for kind in ("pickle", "deep", "empty", "pipe", "zeros", "sparse", "nowhere")),
    *(("metrics.jsonl", kind) for kind in ("pipe", "zeros", "nowhere")),
    *((name, kind) for name in ("results.csv", "ledger.jsonl") for kind in ("pipe", "nowhere")),
    *(("lock", kind) for kind in ("pipe", "link")),
]


@pytest.mark.parametrize(("name", "kind"), NOT_TO_GO_ON_WITH)
def test_what_a_stranger_put_in_a_runs_folder_ends_the_run_and_harms_nothing(
    digits: Path, tmp_path: Path, name: str, kind: str
) -> None:
    copy = cut(digits, 1, tmp_path / "run")
    plant(copy / name, kind, tmp_path)
    survive(tmp_path, (2,), "--resume_from", copy)


PUT_UP_WITH = [
    {"metrics.jsonl": "deep", "results.csv": "pickle", "metrics.tmp": "pipe", "config.json.tmp": "link"},
    {"metrics.jsonl": "empty", "results.csv": "link", "metrics.tmp": "link", "config.json.tmp": "pipe"},
    dict.fromkeys(("metrics.jsonl", "ledger.jsonl", "plots/curves.png"), "link"),
    {"snapshots/step-000000002.safetensors.tmp": "link"},
]


@pytest.mark.parametrize("files", PUT_UP_WITH, ids=" ".join)
def test_what_a_stranger_put_in_a_runs_folder_is_replaced_and_harms_nothing(
    digits: Path, tmp_path: Path, files: dict[str, str]
) -> None:
    copy = cut(digits, 1, tmp_path / "run")
    for name, kind in files.items():
        plant(copy / name, kind, tmp_path)
    survive(tmp_path, (0,), "--resume_from", copy)


def test_a_new_run_does_not_overwrite_a_config_json_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text('{"model_type": "resnet"}')
    survive(tmp_path, (2,), *DIGITS, "--run_dir", tmp_path / "run")
    assert (tmp_path / "run" / "config.json").read_text() == '{"model_type": "resnet"}'


@pytest.mark.parametrize("name", ["config.json", "other.json"])
def test_a_snapshot_file_outside_a_run_changes_nothing_around_it(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A snapshot that was sent by mail is resumed from where downloads go, beside other programs' files."""
    theirs = {
        "notes.txt": b"mine\n",
        "metrics.jsonl": b'{"step": 7}\n',
        "results.csv": b"name\nx\n",
        name: b"{}",
        "downloads/half.tmp": b"mine\n",
        "downloads/step-000000009.safetensors": b"mine\n",
    }
    (tmp_path / "downloads").mkdir()
    for name, content in theirs.items():
        (tmp_path / name).write_bytes(content)
    path = tmp_path / "downloads" / snapshot_path(digits, 1).name
    shutil.copy(snapshot_path(digits, 1), path)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    survive(tmp_path, (0, 2), "--resume_from", path)
    assert {name: (tmp_path / name).read_bytes() for name in theirs if (tmp_path / name).exists()} == theirs


def test_the_finder_does_not_write_through_a_link(tmp_path: Path) -> None:
    for name in ("lr_finder.json", "lr_finder.csv"):
        plant(tmp_path / "lr_finder" / name, "link", tmp_path)
    found = lr_finder.RangeTest([0.1], [1.0], [1.0], {"minimum": 0.1}, "minimum", "", 1, [])
    lr_finder.save(found, tmp_path / "lr_finder", {})
    assert (tmp_path / "precious").read_bytes() == PRECIOUS
    assert json.loads((tmp_path / "lr_finder" / "lr_finder.json").read_text())["suggested_lr"] == 0.1


# ---- a cache ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cache(small_hub: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run leaves in --cache_dir."""
    folder = tmp_path_factory.mktemp("cache") / "cache"
    port = int(os.environ["HF_ENDPOINT"].rpartition(":")[2])
    with Hub(small_hub, port=port):
        for split in ("train", "validation"):
            HuggingFaceImageNetDataset.open(REPO_ID, split=[split], cache=Cache(folder)).read_block(0)
    return folder


def sealed(content: bytes) -> bytes:
    """An entry with a correct checksum."""
    return xxhash.xxh3_128_digest(content).ljust(64, b"\0") + content


def arrow(*columns: tuple[str, pa.DataType, list[Any]], **metadata: bytes) -> bytes:
    fields = [pa.field(name, kind, metadata=metadata) for name, kind, _ in columns]
    table = pa.table([pa.array(values, kind) for _, kind, values in columns], schema=pa.schema(fields))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue().to_pybytes())


def extension(home: Path) -> bytes:
    """A block whose columns are of the type that pyarrow once unpickled."""
    name = {"ARROW:extension:name": b"arrow.py_extension_type"}
    payload = {"ARROW:extension:metadata": pickled(home / "canary")}
    return arrow(("image", pa.binary(), [b"x"] * 8), ("label", pa.int64(), [0] * 8), **name, **payload)


def listing(**changes: Any) -> Callable[[Path], bytes]:
    splits = {"train": ["train.parquet"], "validation": ["validation.parquet"]}
    made = {"commit": "0" * 40, "splits": splits, "features": None, "lengths": {}} | changes
    return lambda home: json.dumps(made).encode()


POISONS: list[tuple[str, str, Callable[[Path], bytes]]] = [
    *(
        (name, "pickle", lambda home: pickled(home / "canary"))
        for name in ("*train*.arrow", "*train*.footer", "listing")
    ),
    *((name, "deep", lambda home: DEEP) for name in ("*train*.arrow", "*train*.footer", "listing")),
    ("*train*.arrow", "extension", extension),
    ("*train*.arrow", "too few", lambda home: arrow(("image", pa.binary(), [b"x"]), ("label", pa.int64(), [0]))),
    ("*train*.arrow", "other columns", lambda home: arrow(("x", pa.binary(), [b"x"]))),
    ("*train*.arrow", "other types", lambda home: arrow(("image", pa.int64(), [1]), ("label", pa.string(), ["x"]))),
    ("listing", "list", lambda home: b"[]"),
    ("listing", "object", lambda home: b"{}"),
    ("listing", "features", listing(features={"a": 7})),
    ("listing", "names outside", listing(splits={"train": ["../../../outside.parquet"], "validation": ["x.parquet"]})),
    ("listing", "commit outside", listing(commit="../../outside")),
]


def poisoned(cache: Path, home: Path, pattern: str) -> Path:
    """A copy of the cache's one entry of this pattern; beside the cache lies a file of the user's."""
    (home / "a").mkdir()
    (home / "a" / "outside.parquet.footer").write_bytes(PRECIOUS)
    (entry,) = Path(shutil.copytree(cache, home / "a" / "cache")).rglob(pattern)
    return entry


def read(home: Path, small_hub: Path, port: int, limit: int | None = None) -> list[int]:
    """The labels of the training set through the cache, read as `survive` runs."""
    (home / "precious").write_bytes(PRECIOUS)
    with Hub(small_hub, port=port), watched_pipes(home) as waited_at, bounded_memory():
        dataset = HuggingFaceImageNetDataset.open(REPO_ID, split=["train"], cache=Cache(home / "a" / "cache", limit))
        block = dataset.read_block(0)
    assert waited_at == []
    assert len(block.images) == len(block.labels) == len(dataset) == 8
    return [int(label) for label in block.labels]


def assert_unharmed(home: Path) -> None:
    assert not (home / "canary").exists()
    assert (home / "precious").read_bytes() == (home / "a" / "outside.parquet.footer").read_bytes() == PRECIOUS
    assert sorted(os.listdir(home / "a")) == ["cache", "outside.parquet.footer"]


@pytest.mark.parametrize(
    ("pattern", "name", "content"), POISONS, ids=[f"{pattern} {name}" for pattern, name, _ in POISONS]
)
def test_a_poisoned_cache_entry_with_a_correct_checksum_is_refused(
    small_hub: Path,
    cache: Path,
    hub_port: int,
    tmp_path: Path,
    pattern: str,
    name: str,
    content: Callable[[Path], bytes],
) -> None:
    """Made anew from the Hub, or put up with where it has the right form, it does no harm either."""
    poisoned(cache, tmp_path, pattern).write_bytes(sealed(content(tmp_path)))
    with contextlib.suppress(DataError):
        read(tmp_path, small_hub, hub_port)
    assert_unharmed(tmp_path)


NO_FILES_OF_OURS = [
    *((name, kind) for name in ("*train*.arrow", "*train*.footer", "listing", "main") for kind in ("pickle", "pipe")),
    *(("*train*.arrow", kind) for kind in ("zeros", "link", "link beside", "pipe beside")),
    *(("listing", kind) for kind in ("link", "link beside")),
]


@pytest.mark.parametrize(("pattern", "kind"), NO_FILES_OF_OURS)
def test_a_cache_entry_that_is_no_file_of_ours_is_made_again(
    small_hub: Path, cache: Path, hub_port: int, tmp_path: Path, pattern: str, kind: str
) -> None:
    entry = poisoned(cache, tmp_path, pattern)
    kind, _, beside = kind.partition(" ")
    if beside:
        entry.unlink()
        entry = entry.with_name(f"{entry.name}.tmp")
    plant(entry, kind, tmp_path)
    sound = pq.read_table(small_hub / "datasets" / REPO_ID / "data" / "train-00000-of-00001.parquet")
    assert read(tmp_path, small_hub, hub_port) == sound["label"].to_pylist()
    assert_unharmed(tmp_path)


@pytest.mark.parametrize("kind", ["pickle", "pipe", "zeros", "link", "nowhere", "a folder's link"])
@pytest.mark.parametrize("what", ["locks", "total"])
def test_a_lock_or_a_total_that_is_no_file_of_ours_does_no_harm(
    small_hub: Path, cache: Path, hub_port: int, tmp_path: Path, what: str, kind: str
) -> None:
    poisoned(cache, tmp_path, "*train*.arrow").unlink()
    (lock, *_) = (tmp_path / "a" / "cache").rglob("*.lock")
    if kind == "a folder's link":
        shutil.rmtree(lock.parent)
        lock.parent.symlink_to(tmp_path / "a")
    elif what == "total":
        plant(lock.with_name("total"), kind, tmp_path)
    else:
        for path in (lock.with_name("room.lock"), *lock.parent.glob("*.lock")):
            plant(path, kind, tmp_path)
    sound = pq.read_table(small_hub / "datasets" / REPO_ID / "data" / "train-00000-of-00001.parquet")
    assert read(tmp_path, small_hub, hub_port, limit=2**30) == sound["label"].to_pylist()
    assert_unharmed(tmp_path)
    assert (tmp_path / "precious").read_bytes() == PRECIOUS


@pytest.mark.parametrize(("pattern", "content"), [("*train*.arrow", b"x"), ("*train*.footer", DEEP), ("listing", DEEP)])
def test_a_poisoned_cache_ends_a_run_in_one_line(
    small_hub: Path, cache: Path, hub_port: int, tmp_path: Path, pattern: str, content: bytes
) -> None:
    poisoned(cache, tmp_path, pattern).write_bytes(sealed(content))
    flags = (*STREAMED, "--cache_dir", tmp_path / "a" / "cache", "--run_dir", tmp_path / "run")
    with Hub(small_hub, port=hub_port):
        survive(tmp_path, (3,), "--dataset", "imagenet1k", *flags)


# ---- unsafe loads in the code ----------------------------------------------------------------------------------------

UNPICKLERS = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle"}
FORBIDDEN = {
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen", "shutil.unpack_archive"),
    *("importlib.import_module", "runpy.run_path", "runpy.run_module"),
    *("yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "torch.jit.load", "torch.hub.load"),
    *("pandas.read_pickle", "torch.package.PackageImporter", "numpy.lib.format.read_array"),
}


def unsafe_uses(source: str) -> list[str]:
    """What in a module may run code that a file brings along."""
    tree = ast.parse(source)
    names: dict[str, str] = {}
    found: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            prefix = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            for alias in node.names:
                whole = f"{prefix}{alias.name}"
                names[alias.asname or alias.name] = whole
                found += [whole] if UNPICKLERS & set(whole.split(".")) or whole in FORBIDDEN else []
    return found + [
        ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Call) and _is_unsafe(node, names)
    ]


def _is_unsafe(call: ast.Call, names: dict[str, str]) -> bool:
    head, dot, rest = ast.unparse(call.func).partition(".")
    called = f"{names.get(head, head)}{dot}{rest}"
    options = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    if called == "torch.load":
        return options.get("weights_only") != "True"
    if called == "numpy.load" and (len(call.args) > 2 or options.get("allow_pickle", "False") != "False"):
        return True
    if called in FORBIDDEN or called.rpartition(".")[2] in ("extract", "extractall"):
        return True
    unsafe = {"shell": "False", "trust_remote_code": "False", "weights_only": "True"}
    return any(options.get(name, safe) != safe for name, safe in unsafe.items())


def test_no_module_loads_anything_unsafely() -> None:
    paths = [*ROOT.glob("*.py"), *ROOT.glob("stream/*.py"), *ROOT.glob("training/*.py")]
    found = {path.name: unsafe_uses(path.read_text()) for path in paths}
    assert len(found) > 20
    between_processes = {"decode_pool.py": ["pickle"]}  # between a process and its own children, never files
    assert {name: uses for name, uses in found.items() if uses} == between_processes


HIDDEN = [
    *("import pickle", "from pickle import loads", "def f():\n    import dill as d", "import os, joblib"),
    *("from torch.serialization import pickle", "import shelve", "from yaml import unsafe_load"),
    *("import torch\ntorch.load(p)", "import torch as t\nt.load(p, weights_only=False)"),
    *("from torch import load\nload(p)", "from torch import load as l\nl(p, map_location=d)"),
    *("import yaml\nyaml.load(text, Loader)", "import numpy as np\nnp.load(p, allow_pickle=True)"),
    *("import numpy\nnumpy.load(p, None, True)", "import numpy as np\nnp.load(p, allow_pickle=flag)"),
    *("eval(text)", "exec(text)", "__import__(name)", "import importlib\nimportlib.import_module(name)"),
    *("archive.extractall(folder)", "archive.extract(member)", "import os\nos.system(text)"),
    *("import subprocess\nsubprocess.run(text, shell=True)", "load_dataset(name, trust_remote_code=True)"),
]


def test_an_unsafe_load_cannot_hide() -> None:
    assert [source for source in HIDDEN if unsafe_uses(source) == []] == []
