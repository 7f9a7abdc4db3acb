"""Snapshots: write, verify, find and prune. One safetensors file each, and no pickle.

The header's metadata holds `state`, the run's settings and counters as JSON, and `sha256`, the digest of the whole file
with the 64 characters of the digest itself set to zeros: one flipped bit anywhere, header or tensors, is found.
"""

import contextlib
import hashlib
import json
import os
import random
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from errors import SnapshotError

FORMAT = "imagenet1k-snapshot-1"
_NO_DIGEST = "0" * 64
_MARK = b'"sha256":"'


@dataclass(frozen=True)
class Snapshot:
    """A verified snapshot: its tensors by name, and everything else as `state`."""

    path: Path
    tensors: dict[str, torch.Tensor]
    state: dict[str, Any]


def encode(tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> bytes:
    """The bytes of a snapshot file. `state` must survive JSON."""
    on_host = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"format": FORMAT, "sha256": _NO_DIGEST, "state": json.dumps(state)}
    data = safetensors.torch.save(on_host, metadata)
    at = data.index(_MARK + _NO_DIGEST.encode()) + len(_MARK)
    return data[:at] + hashlib.sha256(data).hexdigest().encode() + data[at + len(_NO_DIGEST) :]


def read(path: Path) -> Snapshot:
    """Read and verify one snapshot. Raises SnapshotError saying what is wrong with the file."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SnapshotError(f"cannot read snapshot {path}: {error.strerror}; give a run folder or a file") from error
    try:
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        metadata = header["__metadata__"]
        digest, state = metadata["sha256"], json.loads(metadata["state"])
        at = data.index(_MARK + digest.encode(), 0, 8 + length) + len(_MARK)
        if metadata["format"] != FORMAT:
            raise ValueError(metadata["format"])
    except (struct.error, ValueError, LookupError, TypeError, AttributeError):
        raise SnapshotError(f"{path} is not a snapshot of this program, or it is damaged; give another") from None
    zeroed = hashlib.sha256(data[:at])
    zeroed.update(_NO_DIGEST.encode())
    zeroed.update(memoryview(data)[at + len(_NO_DIGEST) :])
    if zeroed.hexdigest() != digest:
        raise SnapshotError(f"{path} is damaged: its SHA-256 does not match; give an older one")
    return Snapshot(path, safetensors.torch.load(data), state)


def find(source: Path) -> tuple[Snapshot, list[str]]:
    """The snapshot in `source`, a file, or the newest one that verifies in a run folder.

    Also returns a line for each newer file that had to be passed over. Raises SnapshotError when there is none.
    """
    if not source.is_dir():
        return read(source), []
    passed_over: list[str] = []
    for path in reversed(step_files(source / "snapshots")):
        try:
            return read(path), passed_over
        except SnapshotError as error:
            passed_over.append(str(error))
    reason = "; ".join(passed_over) or "it has none"
    raise SnapshotError(f"no usable snapshot in {source}: {reason}; start anew without --resume_from")


def step_files(folder: Path) -> list[Path]:
    """The snapshots of a folder in the order of their steps, `best` left out."""
    return sorted(folder.glob(f"step-{'[0-9]' * 9}.safetensors"))


class SnapshotStore:
    """The `snapshots/` folder of one run."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep

    def rewind(self, step: int) -> list[str]:
        """Drop the snapshots of later steps, which a resume from an older file leaves behind; their names."""
        later = [path for path in step_files(self.folder) if int(path.stem.removeprefix("step-")) > step]
        for path in later:
            path.unlink()
        return [path.name for path in later]

    def save(self, tensors: dict[str, torch.Tensor], state: dict[str, Any], best: bool = False) -> Path:
        """Write `step-<9 digits>.safetensors` durably, `best.safetensors` too if asked, then prune the older ones.

        Raises SnapshotError when the disk refuses; what was there before is untouched.
        """
        data = encode(tensors, state)
        path = self.folder / f"step-{state['step']:09d}.safetensors"
        for target in [path, self.folder / "best.safetensors"] if best else [path]:
            try:
                _write_durably(target, data)
            except OSError as error:
                raise SnapshotError(
                    f"cannot write {target}: {error.strerror}; make room and resume, the older snapshots are intact"
                ) from error
        for old in step_files(self.folder)[: -self.keep]:
            old.unlink()
        return path


def rng_state() -> dict[str, torch.Tensor]:
    """The state of this process's random number generators (Python's, numpy's, torch's, the GPU's) as tensors."""
    _, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    _, python, python_gauss = random.getstate()
    state = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(python),
        "python_gauss": torch.tensor([] if python_gauss is None else [python_gauss], dtype=torch.float64),
        "numpy": torch.tensor([*map(int, keys), position, has_gauss]),
        "numpy_gauss": torch.tensor([gauss], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, torch.Tensor]) -> None:
    """Put back what `rng_state` gave; a GPU's state is left out where there is none."""
    torch.set_rng_state(state["torch"])
    python_gauss = state["python_gauss"].tolist()
    random.setstate((3, tuple(state["python"].tolist()), python_gauss[0] if python_gauss else None))
    *keys, position, has_gauss = state["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, np.uint32), position, has_gauss, float(state["numpy_gauss"])))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _write_durably(path: Path, data: bytes) -> None:
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
