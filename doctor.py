"""Is this machine ready? A line for each fact that decides whether a run works here and how fast, with what mends it.

What is found goes into `Facts`; a function for each subject makes lines of them and asks nobody.
"""

import os
import platform
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

import config as configuration
import distributed
import machine
import speed
from choices import DATASETS
from config import Config
from errors import UsageError, redact
from flags import listed
from machine import Gpu, Machine
from preflight import free_bytes, most_snapshots
from speed import Speed
from stream import jpeg, reach
from stream.cache import FileStore
from stream.decode_pool import FILES_OF_A_PROCESS, PROCESS_BYTES
from stream.reach import Reach
from tracking.clients import describe
from training.compiling import wants_compile
from units import as_rate, as_size, duration

OK, NOTE, WARNING = "ok", "note", "warning"
PACKAGES = ("torchvision", "datasets", "huggingface_hub", "opencv-python-headless", "albumentations", "turbojpeg")
OPTIONAL = {
    "timm": "--model timm:NAME and --optimizer lamb",
    **dict.fromkeys(("onnx", "onnxruntime", "onnxscript"), "export.py --to onnx"),
}
KEPT = ("num_workers", "amp", "amp_dtype", "device", "run_dir")  # flags that concern the machine, whatever the data
IMAGENET_BYTES, IMAGENET_IMAGES = 150e9, 1_281_167  # on the Hub
LONG_EPOCH = 86400  # seconds
IMAGE_BYTES = 110_000  # of a photograph of ImageNet
PROCESS_MEMORY = 2e9  # bytes, of the training process beside its data, as measured
OTHER_FILES = 200  # descriptors for everything but decoding processes
UNKNOWN, LITTLE_SHARED = 2**62, 2**30  # bytes


class Line(NamedTuple):
    """One fact: OK, NOTE or WARNING, what it is about, and the fact with what mends it."""

    mark: str
    topic: str
    text: str

    def __str__(self) -> str:
        return f"{self.mark:<8}{self.topic:<11}{redact(self.text)}"


class Room(NamedTuple):
    """A folder, the free bytes of its disk, and the bytes that it holds."""

    folder: Path
    free: int
    held: int


@dataclass(frozen=True)
class Facts:
    """What was found. `threads` are PyTorch's; `cuda` is what it was built for; `driver` is NVIDIA's, if there is one.

    `ask` and `measure` take seconds, and are called once other lines have been told. `disks` are the rooms of folders
    by their use; `packages` are versions, None of those that are missing; `trackers` are whether each can be used, and
    what there is to tell of it.
    """

    machine: Machine
    ask: Callable[[], Reach]
    measure: Callable[[], Speed]
    device: str
    problem: str | None = None
    gpus: list[Gpu] = field(default_factory=list)
    cuda: str | None = None
    driver: str = ""
    threads: int = 1
    capability: str = ""
    revision: str = ""
    jpeg_library: str | None = None
    no_compiler: str | None = None
    disks: Mapping[str, Room] = field(default_factory=dict)
    packages: Mapping[str, str | None] = field(default_factory=dict)
    trackers: list[tuple[bool, str]] = field(default_factory=list)


def examine(config: Config, given: Mapping[str, Any]) -> None:
    """Look at this machine for a run, and print the report. Under torchrun the first rank does."""
    if int(os.environ.get("RANK", "0")):
        return
    print(Line(NOTE, "doctor", "looks, asks the Hub and measures, which takes about 20 s"), flush=True)
    measured = config
    if config.is_small:  # nothing to decode: measured is what photographs would take
        kept = {name: given[name] for name in KEPT if name in given}
        measured = configuration.resolve({"dataset": "imagenet1k", **kept})
    for line in report(find(config, measured), config, measured):
        print(line, flush=True)


def find(config: Config, measured: Config) -> Facts:
    """Everything that `report` needs."""
    device, problem = torch.device("cpu"), None
    try:
        device = distributed.pick_device(config.device)
    except UsageError as error:
        problem = str(error)
    dataset = config.dataset_id if DATASETS[config.dataset].on_hub and not config.dummy_data else None
    return Facts(
        machine=machine.look(),
        ask=lambda: reach.ask(None if dataset is None or Path(dataset).is_dir() else dataset),
        measure=lambda: speed.measure(measured, device),
        device=device.type,
        problem=problem,
        gpus=machine.gpus(),
        cuda=torch.version.cuda,
        driver=machine.told_by("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        threads=torch.get_num_threads(),
        capability=torch.backends.cpu.get_cpu_capability(),
        revision=machine.told_by("git", "describe", "--always", "--dirty"),
        jpeg_library=jpeg.library_path() if jpeg.can_decode_regions() else None,
        no_compiler=machine.missing_for_compile(device.type),
        disks={use: _room(folder) for use, folder in _folders(config).items()},
        packages={name: machine.package_version(name) for name in (*PACKAGES, *OPTIONAL)},
        trackers=[describe(name) for name in listed(config.track)],
    )


def _folders(config: Config) -> dict[str, Path]:
    """The folders that a run writes to, by what for."""
    from huggingface_hub import constants

    folders = {"snapshots": Path(config.run_dir or "runs")}
    if config.cache_dir:
        folders["cache"] = Path(config.cache_dir)
    if config.no_streaming:
        folders["downloads"] = Path(constants.HF_HUB_CACHE)
    return folders


def _room(folder: Path) -> Room:
    return Room(folder, free_bytes(folder), sum(FileStore(folder).sizes().values()))


def report(facts: Facts, config: Config, measured: Config) -> Iterator[Line]:
    """The lines of the report. `measured` are the settings that the speed is of."""
    yield from of_versions(facts)
    if config.is_small:
        yield Line(
            NOTE, "dataset", f"{config.dataset} is kept in memory; speed and disk are those of --dataset imagenet1k"
        )
    yield from of_devices(facts, config)
    yield from of_cores(facts, config)
    yield from of_memory(facts, config)
    yield from of_jpeg(facts)
    yield from of_packages(facts, config)
    yield from (Line(OK if usable else WARNING, "track", told) for usable, told in facts.trackers)
    yield from of_hub(facts.ask(), config)
    found = facts.measure()
    yield from of_speed(found, facts, measured)
    yield from of_disks(found, facts, measured)


def of_versions(facts: Facts) -> Iterator[Line]:
    told = ", ".join(f"{name} {facts.packages.get(name)}" for name in PACKAGES if facts.packages.get(name))
    revision = f"revision {facts.revision}, " if facts.revision else ""
    yield Line(OK, "versions", f"{revision}Python {platform.python_version()}, torch {torch.__version__}, {told}")
    yield Line(OK, "platform", platform.platform())


def of_devices(facts: Facts, config: Config) -> Iterator[Line]:
    """The GPUs or why there are none, and what --amp does there."""
    if facts.problem:
        yield Line(WARNING, "device", facts.problem)
    for gpu in facts.gpus:
        told = f"{gpu.name}, {as_size(gpu.memory)} of memory, {as_size(gpu.free)} free, CUDA {facts.cuda}, driver "
        half_used = gpu.free < gpu.memory / 2
        mend = "; another process uses it: wait, or choose another with CUDA_VISIBLE_DEVICES" if half_used else ""
        yield Line(WARNING if half_used else OK, "gpu", f"{told}{facts.driver or 'unknown'}{mend}")
    if not facts.gpus and facts.driver:
        built = f"for CUDA {facts.cuda}, which the driver does not fit" if facts.cuda else "for the CPU only"
        yield Line(
            WARNING, "gpu", f"NVIDIA's driver {facts.driver} is here, but PyTorch is built {built}; install another"
        )
    elif not facts.gpus:
        yield Line(NOTE, "gpu", f"none: runs use {facts.device}")
    if facts.gpus and not facts.gpus[0].has_bf16:
        yield Line(NOTE, "bf16", "this GPU has no bfloat16: --amp uses float16 with a gradient scaler")
    elif facts.gpus:
        told = "bfloat16 is used" if config.amp else "this GPU computes in bfloat16; --amp makes steps faster"
        yield Line(OK if config.amp else NOTE, "bf16", told)
    elif facts.device == "cpu" and facts.machine.has_bf16 is False:
        told = "this CPU has no bfloat16 instructions and would emulate them: --amp trains in float32 here"
        yield Line(NOTE, "bf16", told)
    elif facts.device == "cpu":
        told = "has instructions for bfloat16" if facts.machine.has_bf16 else "may lack bfloat16: try --dry_run"
        yield Line(NOTE, "bf16", f"this CPU {told}")


def of_cores(facts: Facts, config: Config) -> Iterator[Line]:
    """The cores, and whether decoding processes and PyTorch's threads are as many."""
    here, limit = facts.machine, facts.machine.core_limit
    cores = min(here.cores, max(1, int(limit))) if limit else here.cores
    told = f"{here.cores} usable"
    told += f", of which the container may use {limit:g}" if limit and limit < here.cores else ""
    kind = ", ".join(filter(None, (here.cpu, facts.capability)))
    if config.num_workers > cores:
        mend = f"; {config.num_workers} decoding processes would take turns: --num_workers {cores}"
        yield Line(WARNING, "cores", f"{told} ({kind}){mend}")
    else:
        yield Line(OK, "cores", f"{told} ({kind}), for {config.num_workers} decoding processes")
    variable = "unset" if here.threads is None else here.threads
    told = f"OMP_NUM_THREADS is {variable}, so PyTorch computes with {facts.threads} of {cores} cores"
    if facts.device == "cpu" and facts.threads < cores:
        yield Line(
            WARNING, "threads", f"{told}, and on the CPU steps are slow so: unset it, or export OMP_NUM_THREADS={cores}"
        )
    elif facts.threads > cores:
        yield Line(WARNING, "threads", f"{told}, which wait for each other: export OMP_NUM_THREADS={cores}")
    else:
        yield Line(OK, "threads", told)


def of_memory(facts: Facts, config: Config) -> Iterator[Line]:
    """Memory against what a run's processes and windows take, /dev/shm and open files."""
    here = facts.machine
    sizes = [size for size in (here.memory, here.memory_limit) if size]
    told = f"{as_size(min(sizes))}" if sizes else "unknown how much"
    told += f", the container's limit (the machine has {as_size(here.memory or 0)})" if here.memory_limit else ""
    told += f", {as_size(here.memory_free)} free on the machine" if here.memory_free else ""
    windows = 0 if config.is_small or config.cache_dir else config.shuffle_window * IMAGE_BYTES
    need = PROCESS_MEMORY + config.num_workers * PROCESS_BYTES + windows
    told += f"; about {as_size(need)} for this process, {config.num_workers} decoding processes and what they read"
    usable = min([*sizes, here.memory_free or UNKNOWN])
    mend = "" if need <= usable else ": use fewer --num_workers or a smaller --shuffle_window"
    yield Line(WARNING if mend else OK, "memory", told + mend)
    if here.shared is not None:
        told = f"{as_size(here.shared)}; decoding processes share memory without it (memfd)"
        if len(facts.gpus) > 1 and here.shared < LITTLE_SHARED:
            told += ", but NCCL may need it among several GPUs: docker run --shm-size=1g, or --ipc=host"
            yield Line(WARNING, "/dev/shm", told)
        else:
            yield Line(OK, "/dev/shm", f"{told}, so its size does not matter" if len(facts.gpus) < 2 else told)
    need = config.num_workers * FILES_OF_A_PROCESS + OTHER_FILES
    told = f"{here.files:,} at once, which a run raises to {here.files_most:,} at most; it opens up to about {need}"
    mend = "" if need <= here.files_most else ": use fewer --num_workers, or raise the limit (ulimit -Hn)"
    yield Line(WARNING if mend else OK, "open files", told + mend)


def of_disks(found: Speed, facts: Facts, config: Config) -> Iterator[Line]:
    """The room in each folder against what a run puts there."""
    flags = {"snapshots": "--run_dir", "cache": "--cache_limit_gb or --cache_dir", "downloads": "HF_HOME"}
    for use, room in facts.disks.items():
        need, what = 0.0, ""
        if use == "snapshots" and found.snapshot:
            count, kinds = most_snapshots(config, steps_per_epoch=1, step=0)
            need, what = count * found.snapshot, f"snapshots of {as_size(found.snapshot)} ({kinds})"
        elif use != "snapshots" and config.dataset == "imagenet1k" and not config.dummy_data and not config.max_samples:
            limit = config.cache_limit_gb if use == "cache" else None
            need = max(0, (min(IMAGENET_BYTES, limit * 1e9) if limit else IMAGENET_BYTES) - room.held)
            smaller = ", less with --cache_format jpeg" if use == "cache" else ""
            what = f"ImageNet-1K beyond the {as_size(room.held)} that are there{smaller}"
        told = f"{as_size(room.free)} free in {room.folder}{f', {as_size(need)} needed for {what}' if what else ''}"
        mend = "" if room.free >= need else f": make room, or change {flags[use]}"
        yield Line(WARNING if mend else OK, use, told + mend)


def of_hub(found: Reach, config: Config) -> Iterator[Line]:
    """Whether the Hub answers, takes the token, and lets the dataset be read."""
    if found.offline:
        yield Line(
            NOTE, "hub", "HF_HUB_OFFLINE is set: only what is on this machine can be read; unset it to reach the Hub"
        )
    elif found.hub and found.hub.problem:
        yield Line(WARNING, "hub", found.hub.problem)
    elif found.hub:
        yield Line(OK, "hub", f"{found.endpoint} answers after {found.hub.seconds:.2f} s")
    if not found.has_token:
        yield Line(NOTE, "token", "none: set HF_TOKEN for sets that ask for one, ImageNet-1K among them")
    elif found.token_accepted is None:
        yield Line(NOTE, "token", "there is one; whether it is accepted is unknown")
    elif found.token_accepted:
        yield Line(OK, "token", "there is one, and the Hub accepts it")
    else:
        yield Line(WARNING, "token", "the Hub refused it; make a new one and set HF_TOKEN")
    if found.dataset and found.dataset.problem:
        yield Line(WARNING, "licence", found.dataset.problem)
    elif found.dataset:
        yield Line(OK, "licence", f"{config.dataset_id} may be read")


def of_jpeg(facts: Facts) -> Iterator[Line]:
    if facts.jpeg_library:
        yield Line(OK, "jpeg", f"libjpeg-turbo 3 decodes only the crop of a photograph ({facts.jpeg_library})")
    else:
        yield Line(
            WARNING,
            "jpeg",
            "libjpeg-turbo 3 is missing: photographs are decoded whole by OpenCV, which takes 1.2 times as long, and "
            "damaged data are not noticed; pip install turbojpeg (Linux, x86_64), or the system's libturbojpeg of "
            "version 3",
        )


def of_speed(found: Speed, facts: Facts, config: Config) -> Iterator[Line]:
    """What was measured, and which of the two waits for the other."""
    if found.problem:
        yield Line(WARNING, "speed", found.problem)
    size, workers = config.image_size, f"{found.processes} processes" if found.processes else "no process of its own"
    told = f"images/s: generated photographs of {speed.WIDTH}x{speed.HEIGHT} decoded and cropped to {size}, {workers}"
    if found.trained:
        where = facts.gpus[0].name if facts.device == "cuda" and facts.gpus else facts.device
        told_of_steps = f"{as_rate(found.trained)} images/s at {size} pixels in steps of {found.batch} on {where}"
        told_of_steps += ", --amp" if config.amp and facts.device != "cpu" else ""
        epoch = IMAGENET_IMAGES / found.trained
        mend = "; train on a GPU, or on fewer images with --max_samples" if epoch > LONG_EPOCH else ""
        yield Line(
            NOTE if mend else OK, "steps", f"{told_of_steps}; an epoch of ImageNet-1K in {duration(epoch)}{mend}"
        )
    if found.decoded and found.trained and facts.device != "cpu" and found.decoded < found.trained:
        waits = f"the device would wait {1 - found.decoded / found.trained:.0%} of the time"
        mend = "more cores and --num_workers, or --cache_dir with --cache_format planes would help"
        yield Line(WARNING, "decoding", f"{as_rate(found.decoded)} {told}; {waits}: {mend}")
    elif found.decoded:
        yield Line(OK, "decoding", f"{as_rate(found.decoded)} {told}")


def of_packages(facts: Facts, config: Config) -> Iterator[Line]:
    """The optional packages, and the compiler."""
    for name, use in OPTIONAL.items():
        if version := facts.packages.get(name):
            yield Line(OK, "package", f"{name} {version}, for {use}")
    missing = [f"{name} ({use})" for name, use in OPTIONAL.items() if not facts.packages.get(name)]
    if missing:
        yield Line(NOTE, "package", f"not here, and needed for these alone: {', '.join(missing)}; pip install NAME")
    if facts.no_compiler is None:
        yield Line(OK, "compiler", "there is one, for --compile")
    else:
        mark = WARNING if wants_compile(config, facts.device) else NOTE
        yield Line(mark, "compiler", f"--compile cannot be used: {facts.no_compiler}")
