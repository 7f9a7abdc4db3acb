"""What a snapshot of ResNet-50 and its momentum costs the training, against torch.save of the same tensors.

    uv run python benchmarks/snapshot.py

The state lies on the GPU where there is one. A step is forward and backward through a small stack of convolutions,
first with the writer idle, then while it is at work; what those steps took beyond the idle ones is what they lose.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
from torch import nn

from benchmarks.common import installed_versions, record
from model_resnet50 import build_model
from training.snapshot import SnapshotStore
from training.state import Progress, all_finite, capture

IDLE_STEPS = 30
OURS, ON_DISK = "ours: the pause, collecting and checking the state included", "ours: until it is on the disk"
IN_ALL = "ours: the pause, and what the steps lose while it is written"
SYNCED, CACHED = "torch.save, fsync of file and folder", "torch.save, no fsync"
Times = dict[str, list[float]]


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--rounds", type=int, default=7, help="how often each is measured, in turn")
    flags.add_argument("--folder", help="where to write; the system's temporary folder by default")
    given = flags.parse_args()
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, optimizer = resnet50(device)
    scaler = torch.amp.GradScaler(enabled=False)
    tensors, _ = capture(model, optimizer, scaler, Progress())
    step = convolutions(device)
    pauses: Times = {name: [] for name in (OURS, IN_ALL, ON_DISK, SYNCED, CACHED)}
    steps: Times = {name: [] for name in ("idle", "writing", "slowest", "lost")}
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        store = SnapshotStore(Path(folder), keep=1)
        for number in range(given.rounds + 1):

            def saved(number: int = number) -> None:
                """As Journal.save does it."""
                held, state = capture(model, optimizer, scaler, Progress(step=number))
                assert all_finite(model)
                store.save(held, state)

            one_round(store, saved, tensors, Path(folder), pauses)
            steps_beside_a_save(store, saved, step, steps)
            pauses[IN_ALL].append(pauses[OURS][-1] + steps["lost"][-1])
            print(f"round {number} of {given.rounds} is done", file=sys.stderr)
        filesystem = ["df", "--output=fstype", folder]
        kind = subprocess.run(filesystem, capture_output=True, text=True).stdout.split()[-1]
    for times in (*pauses.values(), *steps.values()):
        del times[0]  # the warm-up
    size = sum(tensor.nbytes for tensor in tensors.values()) / 1e6
    where = torch.cuda.get_device_name() if device.type == "cuda" else "host memory"
    set_up = (
        f"{len(tensors)} tensors of {size:.0f} MB in all in {where}, written to {kind}; one thread for torch; "
        f"{given.rounds} rounds in turn after one to warm up; load average {load:.1f} before. {describe(steps)}"
    )
    record("Snapshot of ResNet-50 and its momentum", set_up, table(pauses), installed_versions())


def resnet50(device: torch.device) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model and its optimiser after their first step."""
    model = build_model(1000, 224, "resnet50").to(device)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return model, optimizer


def convolutions(device: torch.device) -> Callable[[], float]:
    """A step of fixed work, which returns the seconds that it took."""
    model = nn.Sequential(*(nn.Conv2d(64, 64, 3, padding=1) for _ in range(4))).to(device)
    images = torch.randn(8, 64, 28, 28, device=device)

    def step() -> float:
        started = now()
        model(images).sum().backward()
        return now() - started

    return step


def now() -> float:
    """Seconds, when all that the GPU was given is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def one_round(
    store: SnapshotStore, save: Callable[[], None], tensors: dict[str, torch.Tensor], folder: Path, pauses: Times
) -> None:
    started = now()
    save()
    pauses[OURS].append(now() - started)
    store.wait()
    pauses[ON_DISK].append(now() - started)
    for name, sync in ((SYNCED, True), (CACHED, False)):
        started = now()
        save_with_torch(tensors, folder / "peer.pth", sync)
        pauses[name].append(now() - started)
        (folder / "peer.pth").unlink()


def save_with_torch(tensors: dict[str, torch.Tensor], path: Path, sync: bool) -> None:
    with path.open("wb") as file:
        torch.save(tensors, file)
        if sync:
            file.flush()
            os.fsync(file.fileno())
    if sync:
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def steps_beside_a_save(
    store: SnapshotStore, save: Callable[[], None], step: Callable[[], float], steps: Times
) -> None:
    """Times steps alone, and then for as long as the writer is at work."""
    usual = median(step() for _ in range(IDLE_STEPS))
    save()
    writing = threading.Thread(target=store.wait)
    writing.start()
    beside = [step()]
    while writing.is_alive():
        beside.append(step())
    writing.join()
    steps["idle"].append(usual)
    steps["writing"].append(median(beside))
    steps["slowest"].append(max(beside))
    steps["lost"].append(sum(beside) - usual * len(beside))


def describe(steps: Times) -> str:
    idle, writing, slowest, lost = (f"{spread(times)} ms" for times in steps.values())
    return (
        f"A step of convolutions takes {idle} with the writer idle and {writing} while it writes, the slowest "
        f"{slowest}; in all the steps beside one save lose {lost}."
    )


def spread(times: list[float]) -> str:
    """Median (min to max), in milliseconds."""
    return f"{median(times) * 1e3:,.1f} ({min(times) * 1e3:,.1f} to {max(times) * 1e3:,.1f})"


def table(pauses: Times) -> str:
    lines = ["| what | ms: median (min to max) | its / our pause: median (min to max) |", "| --- | --- | --- |"]
    for name, times in pauses.items():
        ratios = [its / ours for its, ours in zip(times, pauses[OURS], strict=True)]
        against = f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if name != OURS else ""
        lines.append(f"| {name} | {spread(times)} | {against} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
