"""Snapshots: written in the background, verified, found and pruned. Each is one safetensors file; there is no pickle.

The header's metadata starts with `sha256`, the digest of the whole file with these 64 characters set to zeros, so one
flipped bit anywhere, in header or tensors, is detected. Its `state` holds the run's settings and counters as JSON.
"""

import hashlib
import json
import shutil
import stat
import struct
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from beforehand import BEST, COOLDOWN, kept_apart, step_files
from errors import SnapshotError
from stream.files import sync, write_durably

FORMAT = "imagenet1k-snapshot-6"
SPARE_BYTES = 2**20
_NO_DIGEST = "0" * 64
_FIRST = b'{"__metadata__":{"sha256":"'
_DIGEST = slice(8 + len(_FIRST), 8 + len(_FIRST) + len(_NO_DIGEST))  # where it stands in the file
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Snapshot:
    """A verified snapshot: its tensors by name, and everything else as `state`."""

    path: Path
    tensors: dict[str, torch.Tensor]
    state: dict[str, Any]


def encode(tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> tuple[bytes | memoryview, ...]:
    """The bytes of a snapshot file, in parts. `tensors` are contiguous in host memory; `state` must survive JSON.

    safetensors' own writer is not used, because it makes a copy while holding the interpreter lock, which would pause
    training.
    """
    header: dict[str, Any] = {"__metadata__": {"sha256": _NO_DIGEST, "format": FORMAT, "state": json.dumps(state)}}
    data, end = [], 0
    for name in sorted(tensors, key=lambda name: -tensors[name].element_size()):  # so that each lies aligned
        tensor = tensors[name]
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": [*tensor.shape], "data_offsets": [start, end]}
        data.append(tensor.reshape(-1).view(torch.uint8).numpy().data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    text = struct.pack("<Q", len(text)) + text
    digest = hashlib.sha256(text)
    for part in data:
        digest.update(part)
    return text[: _DIGEST.start], digest.hexdigest().encode(), text[_DIGEST.stop :], *data


def copy_to_host(tensors: dict[str, torch.Tensor], buffers: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Contiguous copies in host memory, which later steps do not change; `buffers`, by name, are reused if present."""
    copies = {}
    for name, tensor in tensors.items():
        buffer = buffers.get(name)
        if buffer is None:
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        copies[name] = buffer.copy_(tensor.detach(), non_blocking=True)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return copies


def read(path: Path) -> Snapshot:
    """Read and verify one snapshot. Raises SnapshotError, which says what is wrong with the file."""
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise OSError(0, "it is a link, a pipe or a device")
        data = path.read_bytes()
    except OSError as error:
        raise SnapshotError(f"cannot read snapshot {path}: {error.strerror}; give a run folder or a file") from error
    try:
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        metadata = header["__metadata__"]
        saved_as, state = metadata["format"], json.loads(metadata["state"])
        if not str(saved_as).startswith("imagenet1k-snapshot-") or not isinstance(state, dict):
            raise ValueError(saved_as)
    except (struct.error, ValueError, LookupError, TypeError, RecursionError):
        raise SnapshotError(f"{path} is not a snapshot of this program, or it is damaged; give another") from None
    if saved_as != FORMAT:
        raise SnapshotError(f"{path} was saved by another version of this program; go on with that one, or start anew")
    zeroed = hashlib.sha256(data[: _DIGEST.start])
    zeroed.update(_NO_DIGEST.encode())
    zeroed.update(memoryview(data)[_DIGEST.stop :])
    if zeroed.hexdigest().encode() != data[_DIGEST]:
        raise SnapshotError(f"{path} is damaged: its SHA-256 does not match; give an older one")
    try:
        return Snapshot(path, safetensors.torch.load(data), state)
    except safetensors.SafetensorError as error:
        raise SnapshotError(f"{path} is not a snapshot of this program ({error}); give another") from error


def is_snapshot(path: Path) -> bool:
    """Whether a file begins as a snapshot does."""
    with open(path, "rb") as file:
        return file.read(_DIGEST.start)[8:] == _FIRST


def find(source: Path) -> tuple[Snapshot, list[str]]:
    """The snapshot in the file `source`, or the newest one in the run folder `source` that passes verification.

    Where the newest file of a step does not pass, those kept apart count too. Also returns a line for each file that
    was skipped. Raises SnapshotError when there is none.
    """
    if not source.is_dir():
        return read(source), []
    passed_over: list[str] = []
    sound: list[Snapshot] = []

    def found(path: Path) -> bool:
        try:
            sound.append(read(path))
        except SnapshotError as error:
            passed_over.append(str(error))
            return False
        return True

    folder = source / "snapshots"
    in_steps = any(found(path) for path in reversed(step_files(folder)))
    if passed_over or not in_steps:
        for path in kept_apart(folder):
            found(path)
    if sound:
        return max(sound, key=_step_in), passed_over
    if not passed_over:
        raise SnapshotError(f"{source} holds no run: no snapshots are in it; give the folder of one, or start anew")
    raise SnapshotError(f"no usable snapshot in {source}: {'; '.join(passed_over)}; start anew in another --run_dir")


def _step_in(snapshot: Snapshot) -> int:
    """The step of a snapshot, or -1 where it tells none."""
    step = snapshot.state.get("step")
    return step if isinstance(step, int) else -1


def _step_of(path: Path) -> int:
    """The step of a snapshot, or -1 if it cannot be read."""
    try:
        return _step_in(read(path))
    except SnapshotError:
        return -1


def _copy(source: Path, target: Path) -> None:
    """Raises SnapshotError."""
    try:
        write_durably(target, source.read_bytes())
    except OSError as error:
        raise SnapshotError(
            f"cannot write {target}: {error.strerror}; make room and resume, the older snapshots are intact"
        ) from error


class SnapshotStore:
    """The `snapshots/` folder of one run. A thread writes one snapshot at a time, and syncs the `logs` before it."""

    def __init__(self, folder: Path, keep: int, logs: Sequence[Path] = ()) -> None:
        self.folder = folder
        self.keep = keep
        self.logs = logs
        self._copies: dict[str, torch.Tensor] = {}
        self._writer = ThreadPoolExecutor(1, "snapshot")
        self._writing: Future[None] | None = None

    def rewind(self, step: int, source: Path | None = None) -> list[str]:
        """Make the snapshot of this step the newest: drop those of later steps, also those kept apart, that a resume
        from an older file leaves behind, and partly written files of a killed process; returns the dropped names.

        A `source` of this folder that is kept apart becomes the file of its step before. Whenever the process is
        killed, the newest of the files is that step or one that the logs, which are rewound after this, still reach.
        """
        for path in self.folder.glob("*.tmp"):
            path.unlink()
        kept = self.folder / f"step-{step:09d}.safetensors"
        if source is not None and source.parent == self.folder and source != kept:
            _copy(source, kept)
        later = [path for path in step_files(self.folder) if int(path.stem.removeprefix("step-")) > step]
        apart = [path for path in kept_apart(self.folder) if _step_of(path) > step]
        for paths in (later, apart):
            for path in paths:
                path.unlink()
            if paths:
                sync(self.folder)  # what is kept apart goes only when no later step counts on it
        return [path.name for path in (*later, *apart)]

    def save(
        self, tensors: dict[str, torch.Tensor], state: dict[str, Any], best: bool = False, cooldown: bool = False
    ) -> Path:
        """Copy the tensors to host memory, and write them to `step-<9 digits>.safetensors` in the background.

        A tensor must have the same shape at every save. With `best`, `best.safetensors` is written too, and with
        `cooldown` `cooldown.safetensors`; then older snapshots are pruned. Waits for the previous snapshot. Raises
        SnapshotError when that one failed or there is no room; existing snapshots are untouched.
        """
        self.wait()
        path = self.folder / f"step-{state['step']:09d}.safetensors"
        targets = [path, self.folder / BEST] if best else [path]
        if cooldown:  # first: a run that goes on from `path` does not come by here again
            targets.insert(0, self.folder / COOLDOWN)
        size = sum(tensor.nbytes for tensor in tensors.values()) + SPARE_BYTES
        free = shutil.disk_usage(self.folder).free
        if free < size * len(targets):
            raise SnapshotError(
                f"cannot write {path}: {free / 1e6:,.1f} MB are free and {size * len(targets) / 1e6:,.1f} needed; "
                f"make room and {'resume, older snapshots are intact' if step_files(self.folder) else 'start again'}"
            )
        self._copies = copy_to_host(tensors, self._copies)
        self._writing = self._writer.submit(self._write, targets, self._copies, state)
        return path

    def wait(self) -> None:
        """Wait until nothing is being written. Raises SnapshotError when writing failed."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def check(self) -> None:
        """Raise SnapshotError when a snapshot could not be written, without waiting."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def _write(self, targets: list[Path], tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
        parts = encode(tensors, state)
        try:
            for log in filter(Path.exists, self.logs):
                sync(log)
            sync(self.folder.parent)
            for target in targets:
                write_durably(target, *parts)
        except OSError as error:
            raise SnapshotError(
                f"cannot write {targets[0]}: {error.strerror}; make room and resume, the older snapshots are intact"
            ) from error
        for old in step_files(self.folder)[: -self.keep]:
            old.unlink()
