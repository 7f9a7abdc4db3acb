"""The time of augmentation and mixing on the device, for a batch, beside a training step of ResNet-50.

    uv run python benchmarks/augment.py                                          # batch 256, 176 and 224 pixels: a GPU
    uv run python benchmarks/augment.py --batch_size 16 --rounds 5                                  # the same on a CPU

All in one process, turn by turn, with new draws each time. On a GPU times are from CUDA events around one call, so the
host's work counts where the device waits for it; ResNet-50 is ours in bf16, channels_last and eager, forward and
backward without the optimiser. `host` is the time until the call returns. On a CPU the step is left out.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
import torch.nn.functional as F

from benchmarks.common import installed_versions, record, spread_of
from model_resnet50 import build_model
from stream.augment import Augment, Normalize
from stream.auto_augment import AutoAugment
from stream.erasing import boxes, erase
from stream.jitter import ColorJitter
from training.mixing import Mixing, partners

CLASSES = 1000
WARMUP = 3
SIZES = (176, 224)
Call = Callable[[int], object]


def calls(size: int, count: int, device: torch.device) -> dict[str, Call]:
    """What is measured, as functions of the epoch or step."""
    shape = (count, size, size, 3)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).to(device)
    ids = torch.arange(count)
    floats = Normalize().to(device)(images)
    labels, pairs = torch.arange(count, device=device) % CLASSES, partners(torch.arange(count, device=device), count)
    mixup, cutmix = (Mixing(alpha, beta, 0, count) for alpha, beta in ((0.2, 0.0), (0.0, 1.0)))

    def mix(mixing: Mixing, step: int) -> object:
        drawn = mixing.draw(step, size, size)
        targets = drawn.targets(labels, labels[pairs], CLASSES)
        return drawn.apply(floats, floats[pairs]), targets

    found: dict[str, Call] = {
        "flip": lambda epoch: Augment(0, flip=True)(images, ids, epoch),
        "ta_wide": lambda epoch: AutoAugment.parse("ta_wide", 0)(images, ids, epoch),
        "ra-n2-m9": lambda epoch: AutoAugment.parse("ra-n2-m9", 0)(images, ids, epoch),
        "rand-m7-n2-mstd0.5-inc1": lambda epoch: AutoAugment.parse("rand-m7-n2-mstd0.5-inc1", 0)(images, ids, epoch),
        "colour jitter, all four": lambda epoch: ColorJitter(0, 0.4, 0.4, 0.4, 0.1)(images, ids, epoch),
        "erasing, normalised": lambda epoch: erase(floats, boxes(0, epoch, ids.numpy(), size, size, 0.1)),
        "mixup": lambda step: mix(mixup, step),
        "cutmix": lambda step: mix(cutmix, step),
    }
    if device.type == "cuda":
        found["ResNet-50, forward and backward"] = training_step(size, floats, labels)
    return found


def training_step(size: int, images: torch.Tensor, labels: torch.Tensor) -> Call:
    model = build_model(CLASSES, size, "resnet50").to(images.device).to(memory_format=torch.channels_last).train()

    def step(number: int) -> object:
        with torch.autocast(images.device.type, torch.bfloat16):
            loss = F.cross_entropy(model(images), labels)
        return loss.backward()  # type: ignore[no-untyped-call]

    return step


def timed(call: Call, number: int, device: torch.device) -> tuple[float, float]:
    """Milliseconds on the device, and until the call returned."""
    if device.type != "cuda":
        started = perf_counter()
        call(number)
        spent = 1000 * (perf_counter() - started)
        return spent, spent
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    started = perf_counter()
    events[0].record()
    call(number)
    events[1].record()
    host = 1000 * (perf_counter() - started)
    torch.cuda.synchronize()
    return events[0].elapsed_time(events[1]), host


def rows(times: dict[str, list[tuple[float, float]]], size: int) -> list[str]:
    """Markdown: a row for each call, with its share of the step's median if there is one."""
    step = next((median(spent for spent, _ in found) for name, found in times.items() if "ResNet" in name), None)
    lines = []
    for name, found in times.items():
        device, host = zip(*found, strict=True)
        share = f"{median(device) / step:.1%}" if step else ""
        lines.append(f"| {name} | {size} | {spread_of(list(device))} | {median(host):.2f} | {share} |")
    return lines


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--batch_size", type=int, default=256)
    flags.add_argument("--rounds", type=int, default=20)
    given = flags.parse_args()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    torch.backends.cudnn.benchmark = True
    lines = ["| what | pixels | ms a batch: median (min to max) | host, ms | of the step |", "|" + " --- |" * 5]
    for size in SIZES:
        measured = calls(size, given.batch_size, device)
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in measured}
        for number in range(WARMUP + given.rounds):
            for name, call in measured.items():
                spent = timed(call, number, device)
                if number >= WARMUP:
                    times[name].append(spent)
        lines += rows(times, size)
    on = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    set_up = f"{on}. Batch {given.batch_size}; {given.rounds} rounds in turn."
    record("Augmentation on the device", set_up, "\n".join(lines), installed_versions())


if __name__ == "__main__":
    main()
