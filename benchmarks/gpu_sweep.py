"""Training images/s of ResNet-50 on one GPU, variant by variant, smallest risk first.

    timeout 420 python benchmarks/gpu_sweep.py --budget 405            # 224 pixels, batch 256
    python benchmarks/gpu_sweep.py --only "eager, bf16"                # variants by their names
    python benchmarks/gpu_sweep.py --model resnet18 --image_size 40 --batch_size 4 --steps 1 --rounds 1  # dry, on a CPU

A table line is written as soon as a variant is done, to sweep.md in $OUT too. Each has a process of its own, which is
killed when its time is over; its last line counts. All, timm's model too, train from uint8 images on the device by
`train_step`. Clocks and watts show throttling. --profile writes where the time of three steps goes, by kernels, to
profile.txt.
"""

import argparse
import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir()) / "sweep-inductor"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
import torch._dynamo  # here, and not again in every process
from torch import nn

from config import resolve
from training import step
from training.optim import build_optimizer
from training.step import Training, build_training, train_step

CLASSES = 1000
GFLOP = 24.5  # of a training step for one image at 224 pixels: 3 x 2 x 4.09 GMACs
FUSED_BYTES = 334e6  # an image's memory traffic with BatchNorm, add and ReLU fused (benchmarks/step.py)
COLUMNS = ["variant", "images/s", "ms a step (min to max)", "ready, s", "peak GB", "TFLOP/s", "of the roof"]
COLUMNS += ["MHz, W", "copy TB/s"]


def inductor(**flags: Any) -> Callable[[], None]:
    def apply() -> None:
        from torch._inductor import config as known

        print("unknown flags of Inductor:", [name for name in flags if not hasattr(known, name)], file=sys.stderr)
        for name in filter(lambda name: hasattr(known, name), flags):
            setattr(known, name, flags[name])

    return apply


def pad_stem(training: Training) -> None:
    """A stem of 4 input channels, the last always zero, as in MLPerf's submissions."""
    model: Any = training.model
    stem: Any = nn.Conv2d(4, 64, 7, 2, padding=3, bias=False)
    stem = stem.to(training.device, memory_format=torch.channels_last)
    nn.init.zeros_(stem.weight).data[:, :3] = model.conv1.weight.data
    model.conv1 = stem
    padded: Any = nn.Sequential(training.normalize, nn.ConstantPad3d((0, 0, 0, 0, 0, 1), 0.0))
    training.normalize = padded
    training.optimizer = build_optimizer(training.model, 0.1, 0.9, 5e-5)


def use_timm(training: Training, compiled: bool) -> None:
    import timm

    model: Any = timm.create_model("resnet50", num_classes=CLASSES)
    model = model.to(training.device, memory_format=torch.channels_last)
    if compiled:
        model.compile()
    training.model = training.ddp = model
    training.optimizer = build_optimizer(model, 0.1, 0.9, 5e-5)


def graphed(train: Callable[[], Any]) -> Callable[[], Any]:
    """The whole step as one CUDA graph, its learning rate fixed, which is enough to time it."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            train()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        train()
    return graph.replay


AUTO = {"mode": "max-autotune-no-cudagraphs"}
ONE_BY_ONE, COMBINED = inductor(conv_1x1_as_mm=True), inductor(combo_kernels=True, multi_kernel=1)
VARIANTS: list[tuple[str, int, dict[str, Any]]] = [  # name, its seconds, what differs from bf16, eager, batch 256
    ("eager, bf16", 45, {}),
    ("timm: eager, bf16", 40, {"change": lambda training: use_timm(training, False)}),
    ("compiled, bf16", 120, {"compile": True}),
    ("compiled, bf16, step in a CUDA graph", 60, {"compile": True, "graph": True}),
    ("timm: compiled, bf16", 100, {"change": lambda training: use_timm(training, True)}),
    ("eager, float32 with TF32", 35, {"amp": False}),
    ("eager, bf16, step in a CUDA graph", 40, {"graph": True}),
    ("eager, bf16, stem of 4 channels", 35, {"change": pad_stem}),
    ("compiled, bf16, 160 pixels", 90, {"compile": True, "size": 160}),
    ("compiled, fp16 with its scaler", 100, {"compile": True, "amp_dtype": "fp16"}),
    ("compiled, bf16, batch 512", 100, {"compile": True, "scale": 2}),
    ("compiled, bf16, 1x1 as mm, max-autotune", 150, {"compile": True, "options": AUTO, "setup": ONE_BY_ONE}),
    ("compiled, bf16, combo kernels, multi-kernel", 100, {"compile": True, "setup": COMBINED}),
    ("eager, fp16 with its scaler", 35, {"amp_dtype": "fp16"}),
]


def build(given: argparse.Namespace, what: dict[str, Any], device: torch.device) -> tuple[Callable[[], Any], int]:
    """A function that takes a training step, and the images in it."""
    what.get("setup", lambda: None)()
    step.COMPILE_OPTIONS = what.get("options", {})
    size, batch = given.image_size * what.get("size", 224) // 224, given.batch_size * what.get("scale", 1)
    flags = {"dataset": "imagenet1k", "model": given.model, "image_size": size, "batch_size": batch, "streams": 1}
    flags |= {"amp": True, "compile": False}
    flags |= {name: what[name] for name in ("amp", "amp_dtype", "compile") if name in what}
    with contextlib.redirect_stdout(sys.stderr):
        training = build_training(resolve(flags), CLASSES, device)
    what.get("change", lambda training: None)(training)
    training.model.train()
    images = torch.randint(0, 256, (batch, size, size, 3), dtype=torch.uint8, device=device)
    labels = torch.randint(0, CLASSES, (batch,), device=device)
    train = lambda: train_step(training, images, labels)
    return (graphed(train) if what.get("graph") else train), batch


def timed(work: Callable[[], Any], times: int, on_gpu: bool) -> float:
    """Seconds that one of so many calls takes."""
    begun = time.perf_counter()
    for _ in range(times):
        work()
    if on_gpu:
        torch.cuda.synchronize()
    return (time.perf_counter() - begun) / times


def profile(name: str, train: Callable[[], Any]) -> None:
    """Appends the kernels that take most of three steps to profile.txt."""
    with torch.profiler.profile() as found:
        timed(train, 3, torch.cuda.is_available())
    rows = found.key_averages().table(sort_by="self_cuda_time_total", row_limit=25, max_name_column_width=90)
    with Path(os.environ.get("OUT", "."), "profile.txt").open("a") as file:
        file.write(f"{name}\n{rows}\n")


def measure(given: argparse.Namespace, number: int, pipe: Any) -> None:
    """Times a variant, and sends its table line after each round."""
    os.setsid()
    name, _, what = VARIANTS[number]
    started, on_gpu, seconds, speed, power = time.perf_counter(), torch.cuda.is_available(), [], 0.0, ""
    try:
        if on_gpu:
            source = torch.ones(2**28, device="cuda")
            speed = 2 * source.nbytes / min(timed(source.clone, 1, True) for _ in range(8))
            del source
        elif what.get("graph"):
            raise NotImplementedError("CUDA graphs need a GPU")
        train, batch = build(given, what, torch.device("cuda", 0) if on_gpu else torch.device("cpu"))
        timed(train, 3, on_gpu)
        ready = time.perf_counter() - started
        for _ in range(given.rounds):
            seconds.append(timed(train, given.steps, on_gpu))
            rate, full = batch / median(seconds), on_gpu and given.image_size == 224 == what.get("size", 224)
            if on_gpu:
                query = ["nvidia-smi", "--query-gpu=clocks.sm,power.draw", "--format=csv,noheader,nounits"]
                power = subprocess.run(query, capture_output=True, text=True).stdout.strip()
            low, middle, high = (1e3 * found(seconds) for found in (min, median, max))
            cells = [name, f"{rate:,.0f}", f"{middle:.1f} ({low:.1f} to {high:.1f})", f"{ready:.0f}"]
            cells.append(f"{torch.cuda.max_memory_allocated() / 1e9:.1f}" if on_gpu else "")
            cells.append(f"{rate * GFLOP / 1e3:.0f}" if full else "")
            cells += [f"{rate * FUSED_BYTES / speed:.0%}" if full else "", power, f"{speed / 1e12:.2f}"]
            pipe.send("| " + " | ".join(cells) + " |")
        if name in given.profile:
            profile(name, train)
    except BaseException as error:  # whatever it is, the next variant is to run
        pipe.send(
            f"| {name} | after {time.perf_counter() - started:.0f} s {type(error).__name__}: {str(error)[:120]!r} |"
        )


def run(given: argparse.Namespace, number: int, limit: float) -> str:
    """The last line that a variant sends within `limit` seconds; then it ends, with all that it started."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(False)
    process = context.Process(target=measure, args=(given, number, theirs))
    process.start()
    pid = process.pid
    assert pid is not None
    theirs.close()
    line, end = f"| {VARIANTS[number][0]} | nothing within {limit:.0f} s |", time.monotonic() + limit
    with contextlib.suppress(EOFError):
        while ours.poll(max(0.0, end - time.monotonic())):
            line = ours.recv()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    process.join()
    return line


def tell(line: str) -> None:
    print(line, flush=True)
    with Path(os.environ.get("OUT", "."), "sweep.md").open("a") as file:
        print(line, file=file)


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    defaults = {"image_size": 224, "batch_size": 256, "steps": 20, "rounds": 5, "budget": 405, "limit": 0}
    for name, default in defaults.items():
        flags.add_argument(f"--{name}", type=int, default=default)
    flags.add_argument("--only", nargs="*", metavar="VARIANT")
    flags.add_argument("--profile", nargs="*", default=[], metavar="VARIANT")
    flags.add_argument("--model", default="resnet50", help="another one for a dry run; timm's stays what it is")
    given, started = flags.parse_args(), time.monotonic()
    assert not torch.cuda.is_initialized()  # type: ignore[no-untyped-call]  # or no forked process could use it
    shape = f"{given.image_size} pixels, batch {given.batch_size}, {given.rounds} x {given.steps} steps"
    tell(f"torch {torch.__version__}; {shape}\n\n| " + " | ".join(COLUMNS) + " |\n|" + " --- |" * len(COLUMNS))
    for number, (name, limit, _) in enumerate(VARIANTS):
        left = given.budget - (time.monotonic() - started)
        if left > 20 and (given.only is None or name in given.only):
            tell(run(given, number, min(given.limit or limit, left)))


if __name__ == "__main__":
    main()
