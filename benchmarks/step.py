"""The speed of a training step on synthetic data: ours, timm's, torchvision's reference recipe and a plain loop.

    uv run python benchmarks/step.py                                          # ResNet-50, 224 pixels, batch 256: a GPU
    uv run python benchmarks/step.py --image_size 64 --batch_size 32 --steps 3                   # the same on a CPU
    uv run python benchmarks/step.py --model resnet18 --image_size 32 --batch_size 64 --steps 10

All in one process, turn by turn. On a GPU in mixed precision: ours in bf16, timm and torchvision in fp16 with a
gradient scaler, as their scripts do, but without the wait for the loss that they have in every step. Ours starts from
uint8 images, the others from float images that are already normalised. timm takes part where it is installed. Ctrl-C,
or `timeout --signal INT`, ends it after a round with the table so far. Compiling takes an H200 a minute for each model.
"""

import argparse
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
import torchvision
from torch import nn

from benchmarks.common import installed_versions, record, spread_of
from config import resolve
from model_resnet50 import CIFAR_STEM_UP_TO, build_model
from training import step
from training.step import build_training, train_step

CLASSES = 1000
WARMUP_STEPS = 3
FUSED_BYTES = 334e6  # an image's memory traffic in a step of ResNet-50 at 224 pixels with BatchNorm, add and ReLU fused
Step = Callable[[], Any]


@dataclass(frozen=True)
class Setting:
    """What every system trains on."""

    model: str
    image_size: int
    batch_size: int
    device: torch.device

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def uint8_batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (self.batch_size, self.image_size, self.image_size, 3)
        images = torch.randint(0, 256, shape, dtype=torch.uint8, device=self.device)
        return images, torch.randint(0, CLASSES, (self.batch_size,), device=self.device)

    def float_batch(self, layout: torch.memory_format) -> tuple[torch.Tensor, torch.Tensor]:
        images, labels = self.uint8_batch()
        return images.permute(0, 3, 1, 2).float().div(255).sub(0.45).contiguous(memory_format=layout), labels


@dataclass
class System:
    """A way to train, the ratio of our speed to its speed that we aim at, and what was measured."""

    title: str
    build: Callable[[Setting], Step]
    target: float | None = None
    rates: list[float] = field(default_factory=list)
    peak_gb: float = 0.0


def ours(setting: Setting, options: dict[str, Any] | None = None, **flags: Any) -> Step:
    """The step of main.py; with `options` for torch.compile, those in place of step.COMPILE_OPTIONS."""
    given = {"model": setting.model, "image_size": setting.image_size, "batch_size": setting.batch_size}
    usual, step.COMPILE_OPTIONS = step.COMPILE_OPTIONS, step.COMPILE_OPTIONS if options is None else options
    training = build_training(
        resolve({"dataset": "imagenet1k", "compile": False, **given, **flags}), CLASSES, setting.device
    )
    step.COMPILE_OPTIONS = usual
    images, labels = setting.uint8_batch()
    training.model.train()
    return lambda: train_step(training, images, labels)


def plain(setting: Setting) -> Step:
    """The same model in the loop that one writes by hand: float32, NCHW, eager."""
    model = build_model(CLASSES, setting.image_size, setting.model).to(setting.device)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=5e-5)
    images, labels = setting.float_batch(torch.contiguous_format)
    criterion = nn.CrossEntropyLoss()

    def train() -> None:
        optimizer.zero_grad()
        criterion(model(images), labels).backward()
        optimizer.step()

    return train


def peer(setting: Setting, model: nn.Module, layout: torch.memory_format, compiled: bool, nesterov: bool) -> Step:
    """fp16 with a gradient scaler on a GPU, float32 elsewhere."""
    model = model.to(setting.device).to(memory_format=layout).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, nesterov=nesterov, weight_decay=5e-5)
    scaler = torch.amp.GradScaler(setting.device.type, enabled=setting.on_gpu)
    run: Any = torch.compile(model) if compiled else model
    images, labels = setting.float_batch(layout)
    criterion = nn.CrossEntropyLoss()

    def train() -> None:
        with torch.autocast(setting.device.type, torch.float16, enabled=setting.on_gpu):
            loss = criterion(run(images), labels)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    return train


def timm_step(setting: Setting, compiled: bool = False) -> Step:
    import timm

    return peer(setting, timm.create_model(setting.model), torch.channels_last, compiled, nesterov=True)


def torchvision_step(setting: Setting) -> Step:
    model = torchvision.models.get_model(setting.model)
    return peer(setting, model, torch.contiguous_format, compiled=False, nesterov=False)


def contestants(setting: Setting, modes: list[str]) -> list[System]:
    """The first is the one that the others are set against."""
    if not setting.on_gpu:
        found = [System("ours, eager", ours), System("a plain loop: float32, NCHW", plain, 1.0)]
    else:
        found = [
            System("ours, bf16, compiled", lambda s: ours(s, amp=True, compile=True)),
            System("ours, bf16, eager", lambda s: ours(s, amp=True)),
            System("ours, float32 with TF32, eager", ours),
        ]
    for mode in modes:
        build = partial(ours, options=VARIANTS[mode], amp=True, compile=True)
        found.append(System(f"ours, bf16, compiled: {mode}", build))
    if setting.image_size <= CIFAR_STEM_UP_TO:
        return found  # theirs have no such stem
    if find_spec("timm"):
        found.append(System("timm, channels_last, eager", timm_step, 1.38 if setting.on_gpu else None))
    if find_spec("timm") and setting.on_gpu:
        found.append(System("timm, channels_last, compiled", lambda s: timm_step(s, compiled=True), 1.0))
    return [*found, System("torchvision's reference: NCHW, eager", torchvision_step, 2.0 if setting.on_gpu else None)]


VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "reduce-overhead": {"mode": "reduce-overhead"},
    "coordinate descent": {"options": {"coordinate_descent_tuning": True}},
    "max-autotune-no-cudagraphs": {"mode": "max-autotune-no-cudagraphs"},
}


def measure(systems: list[System], setting: Setting, steps: int, rounds: int) -> int:
    """Builds and warms up all systems, then gives each its turn in every round. Ctrl-C ends it after a round; returns
    how many there were."""
    built = []
    for system in systems:
        started, before = perf_counter(), allocated(setting)
        train = system.build(setting)
        for _ in range(WARMUP_STEPS):
            train()
        synchronize(setting)
        built.append((system, train, allocated(setting) - before))
        print(f"{system.title} is ready after {perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    asked: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: asked.append(number))
    for number in range(rounds):
        for system, train, own in built:
            take_turn(system, train, own, setting, steps)
        rates = ", ".join(f"{system.rates[-1]:.0f}" for system in systems)
        print(f"round {number + 1}: {rates}", file=sys.stderr, flush=True)
        if asked:
            break
    return number + 1


def take_turn(system: System, train: Step, own: int, setting: Setting, steps: int) -> None:
    """Times some steps after one to warm up. `own` is the memory, in bytes, that the system holds between its turns."""
    if setting.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    others = allocated(setting) - own
    train()
    synchronize(setting)
    started = perf_counter()
    for _ in range(steps):
        train()
    synchronize(setting)
    system.rates.append(steps * setting.batch_size / (perf_counter() - started))
    if setting.on_gpu:
        system.peak_gb = (torch.cuda.max_memory_allocated() - others) / 1e9


def allocated(setting: Setting) -> int:
    return torch.cuda.memory_allocated() if setting.on_gpu else 0


def synchronize(setting: Setting) -> None:
    if setting.on_gpu:
        torch.cuda.synchronize()


def copy_bandwidth(setting: Setting) -> float:
    """Bytes a second that a copy within the device's memory reads and writes."""
    source = torch.ones(2**30, device=setting.device)
    target = torch.empty_like(source)
    times = []
    for _ in range(10):
        synchronize(setting)
        started = perf_counter()
        target.copy_(source)
        synchronize(setting)
        times.append(perf_counter() - started)
    return 2 * source.nbytes / median(times)


def rows(systems: list[System], roof: float | None) -> str:
    """Markdown: a row a system; the ratios are those of the first one's speed, round by round."""
    lines = ["| system | images/s | ours / its: median (min to max) | target | peak GB | share of the roof |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for system in systems:
        ratios = [a / b for a, b in zip(systems[0].rates, system.rates, strict=True)]
        met = (
            ""
            if system.target is None
            else f"{system.target:g}: {'met' if median(ratios) >= system.target else 'missed'}"
        )
        cells = [
            system.title,
            spread_of(system.rates, "{:,.0f}"),
            "" if system is systems[0] else spread_of(ratios),
            met,
        ]
        cells += [
            f"{system.peak_gb:.1f}" if system.peak_gb else "",
            f"{median(system.rates) / roof:.0%}" if roof else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--model", default="resnet50")
    flags.add_argument("--image_size", type=int, default=224)
    flags.add_argument("--batch_size", type=int, default=256)
    flags.add_argument("--steps", type=int, default=20, help="steps of a turn")
    flags.add_argument("--rounds", type=int, default=5)
    flags.add_argument("--modes", nargs="*", default=[], choices=VARIANTS, help="further ways to compile ours")
    given = flags.parse_args()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    setting = Setting(given.model, given.image_size, given.batch_size, device)
    torch.backends.cudnn.benchmark = True
    systems = contestants(setting, given.modes)
    rounds = measure(systems, setting, given.steps, given.rounds)
    roof, text = None, ""
    if setting.on_gpu and (given.model, given.image_size) == ("resnet50", 224):
        bandwidth = copy_bandwidth(setting)
        roof = bandwidth / FUSED_BYTES
        text = (
            f" A copy moves {bandwidth / 1e12:.2f} TB/s; at {FUSED_BYTES / 1e6:.0f} MB an image the roof is {roof:,.0f}"
        )
    on = torch.cuda.get_device_name() if setting.on_gpu else f"{torch.get_num_threads()} threads"
    shape = f"{given.model}, {given.image_size} pixels, batch {given.batch_size}"
    set_up = f"{on}. {shape}; {rounds} rounds of {given.steps} steps in turn.{text}"
    record("Step, synthetic data", set_up, rows(systems, roof), installed_versions())


if __name__ == "__main__":
    main()
