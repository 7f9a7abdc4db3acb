"""Training fed by the loader, against the same steps on a batch that is already there; and what bounds the loader.

    uv run python benchmarks/train.py                                                           # a GPU: 224 pixels
    uv run python benchmarks/train.py --image_size 64 --batch_size 32 --images 512              # the same on a CPU
    uv run python benchmarks/train.py --alone --workers 1 2 4 8 16     # images/s of the loader alone, by its processes
    uv run python benchmarks/train.py --cifar              # small images kept on the device, against a DataLoader

Photographs of ImageNet's sizes: from parquet files on the local disk, from a Hub on this machine, and from the cache of
that Hub, which the epoch before the first round fills. An epoch is timed from its fifth batch on, up to the end of its
last step. On a GPU in bf16, compiled with --compile.
"""

import argparse
import multiprocessing
import os
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from time import perf_counter
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    PORT = probe.getsockname()[1]
HOME = tempfile.TemporaryDirectory()
os.environ |= {"HF_ENDPOINT": f"http://127.0.0.1:{PORT}", "HF_HUB_DISABLE_XET": "1", "HF_HOME": HOME.name}

import numpy as np
import torch
import torchvision.transforms as T
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset

from benchmarks.common import installed_versions, record, spread_of
from benchmarks.images import CLASSES, draw, encode, write_parquet
from benchmarks.worker import REPO_ID
from config import Config, resolve
from model_resnet50 import build_model
from preprocess import batch_augment, get_data_loaders
from stream.augment import IMAGENET_MEAN, IMAGENET_STD
from stream.loader import Loader
from stream.local import LocalDataset
from stream.order import epoch_order
from stream.resident import ResidentLoader
from training.step import build_training, train_step

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
ON_GPU = DEVICE.type == "cuda"
DRAWN = 512  # different photographs; a larger set repeats them
WARMUP_BATCHES = 4
PHOTOGRAPHS = 12_288
CIFAR_IMAGES = 50_000
FORMS: dict[str, dict[str, Any]] = {  # where the images come from, beside local files
    "a Hub": {},
    "a cache of JPEGs": {"cache_format": "jpeg", "cache_short_side": 256},
    "a cache of planes": {"cache_format": "planes"},
}
IMAGENET_CLASSES = 1000
Step = Callable[[torch.Tensor, torch.Tensor], Any]
Turn = Callable[[int], float]  # the number of an epoch -> images a second


def make_set(folder: Path, count: int) -> None:
    rng = np.random.default_rng(0)
    drawn = [encode(draw(number % CLASSES, rng)) for number in range(min(count, DRAWN))]
    images = [drawn[number % len(drawn)] for number in range(count)]
    write_parquet(folder / "datasets" / REPO_ID, images, np.arange(count) % CLASSES)


def serve(root: Path, connection: Connection) -> None:
    from hub import Hub

    with Hub(root, port=PORT):
        connection.send("ready")
        connection.poll(None)


@contextmanager
def hub(root: Path) -> Iterator[None]:
    """The test suite's Hub in a process of its own."""
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=serve, args=(root, there), daemon=True)
    process.start()
    here.recv()
    try:
        yield
    finally:
        process.terminate()


def settings(given: argparse.Namespace, **flags: Any) -> Config:
    shape = {"model": given.model, "image_size": given.image_size, "batch_size": given.batch_size}
    return resolve({**shape, "val_split": "train", "amp": ON_GPU, "compile": given.compile, **flags})


def fed_by(loader: Loader, step: Step) -> Turn:
    """A turn of a loader: one of its epochs."""

    def turn(epoch: int) -> float:
        loader.set_epoch(epoch)
        return images_per_s(((images, labels) for images, labels, _ in loader), step)

    return turn


def images_per_s(batches: Iterator[tuple[torch.Tensor, torch.Tensor]], step: Step) -> float:
    """Of one epoch, from its fifth batch on."""
    seen, started = 0, 0.0
    for number, (images, labels) in enumerate(batches):
        if number == WARMUP_BATCHES:
            synchronize()
            seen, started = 0, perf_counter()
        step(images, labels)
        seen += len(images)
    synchronize()
    return seen / (perf_counter() - started)


def synchronize() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def in_turn(systems: dict[str, Turn], rounds: int) -> dict[str, list[float]]:
    """Images a second of each system in each round, after one epoch to warm up."""
    for epoch in systems.values():
        epoch(0)
    found: dict[str, list[float]] = {name: [] for name in systems}
    for number in range(1, rounds + 1):
        for name, epoch in systems.items():
            found[name].append(epoch(number))
            print(f"{name}: {found[name][-1]:,.0f} images/s", file=sys.stderr)
    return found


def table(found: dict[str, list[float]], title: str) -> str:
    """Markdown: a row a system, with its speed over the first one's in each round."""
    lines = [f"| system | images/s | {title}: median (min to max) |", "| --- | --- | --- |"]
    first = next(iter(found))
    for name, rates in found.items():
        ratios = [rate / reference for rate, reference in zip(rates, found[first], strict=True)]
        lines.append(f"| {name} | {spread_of(rates, '{:,.0f}')} | {spread_of(ratios) if name != first else ''} |")
    return "\n".join(lines)


def loaders_of(given: argparse.Namespace, folder: Path) -> dict[str, Loader]:
    """A loader for each source of images and number of processes."""
    local = {"dataset": "hf", "dataset_name": str(folder / "datasets" / REPO_ID)}
    sources: dict[str, dict[str, Any]] = {"local files": local} | {
        name: {"dataset": "imagenet1k", **form, **({"cache_dir": str(folder / name)} if form else {})}
        for name, form in FORMS.items()
    }
    return {
        f"{name}, {workers} processes": get_data_loaders(settings(given, num_workers=workers, **source), DEVICE).train
        for workers in given.workers
        for name, source in sources.items()
        if given.sources is None or name in given.sources
    }


def feed(given: argparse.Namespace, folder: Path) -> None:
    """Steps fed from each source, against steps on one batch."""
    loaders = loaders_of(given, folder)
    step = step_of(settings(given, dataset="imagenet1k"), IMAGENET_CLASSES)
    first = next(iter(loaders.values()))
    images, labels, _ = next(iter(first))
    same = [(images, labels)] * len(first)
    systems: dict[str, Turn] = {"one batch, again and again": lambda _: images_per_s(iter(same), step)}
    systems |= {f"fed from {name}": fed_by(loader, step) for name, loader in loaders.items()}
    write_down("Training, fed", given, in_turn(systems, given.rounds))


def step_of(config: Config, classes: int) -> Step:
    training = build_training(config, classes, DEVICE)
    training.model.train()
    return lambda images, labels: train_step(training, images, labels)


def alone(given: argparse.Namespace, folder: Path) -> None:
    """The loader alone, up to batches on the device."""
    systems = {name: fed_by(loader, lambda *_: None) for name, loader in loaders_of(given, folder).items()}
    write_down("Loader, by its processes", given, in_turn(systems, given.rounds))


class Generated(Dataset[tuple[torch.Tensor, int]]):
    """As torchvision's CIFAR10: arrays that are made images of Pillow's, for torchvision's transforms."""

    def __init__(self, images: np.ndarray, labels: list[int]) -> None:
        self.images, self.labels = images, labels
        augment = [T.RandomCrop(32, padding=4), T.RandomHorizontalFlip(), T.ToTensor()]
        self.transform = T.Compose([*augment, T.Normalize(IMAGENET_MEAN, IMAGENET_STD)])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


def cifar(given: argparse.Namespace) -> None:
    """ResNet-18 on images of CIFAR's size, kept on the device, against a script of torchvision and a DataLoader."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (given.images, 32, 32, 3), np.uint8)
    labels = rng.integers(0, 10, given.images).tolist()
    config = settings(given, dataset="cifar10", model="resnet18", image_size=32)
    dataset = LocalDataset(images, labels, [str(label) for label in range(10)])
    loader = ResidentLoader(
        dataset,
        lambda epoch: epoch_order(dataset.block_rows, epoch, 0, config.streams, given.images),
        batch_size=given.batch_size,
        image_size=32,
        train=True,
        device=DEVICE,
        augment=batch_augment(config),
    )
    theirs = standard_script(Generated(images, labels), given)
    ours = fed_by(loader, step_of(config, 10))
    systems = {"a script of torchvision and a DataLoader: float32": theirs, "ours": ours}
    write_down("CIFAR's size", given, in_turn(systems, given.rounds))


def standard_script(dataset: Generated, given: argparse.Namespace) -> Turn:
    model = build_model(10, 32, "resnet18").to(DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)
    criterion = nn.CrossEntropyLoss()
    workers = len(os.sched_getaffinity(0))
    loader = DataLoader(
        dataset, given.batch_size, shuffle=True, num_workers=workers, pin_memory=ON_GPU, drop_last=True,
        persistent_workers=True,
    )  # fmt: skip

    def step(images: torch.Tensor, labels: torch.Tensor) -> None:
        optimizer.zero_grad()
        criterion(model(images.to(DEVICE, non_blocking=True)), labels.to(DEVICE, non_blocking=True)).backward()
        optimizer.step()

    return lambda epoch: images_per_s(iter(loader), step)


def write_down(title: str, given: argparse.Namespace, found: dict[str, list[float]]) -> None:
    on = torch.cuda.get_device_name() if ON_GPU else f"{torch.get_num_threads()} threads"
    shape = f"{given.model}, {given.images} images to {given.image_size} pixels, batch {given.batch_size}"
    set_up = f"{on}{', compiled' if given.compile else ''}. {shape}; {given.rounds} rounds in turn."
    record(title, set_up, table(found, "its / the first's"), installed_versions())


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--model", default="resnet50")
    flags.add_argument("--image_size", type=int, default=224)
    flags.add_argument("--batch_size", type=int, default=256)
    flags.add_argument("--images", type=int, help=f"in an epoch; {PHOTOGRAPHS}, or {CIFAR_IMAGES} with --cifar")
    flags.add_argument("--rounds", type=int, default=5)
    flags.add_argument("--compile", action="store_true")
    flags.add_argument("--alone", action="store_true", help="time the loader alone, without training")
    flags.add_argument("--sources", nargs="+", choices=["local files", *FORMS])
    flags.add_argument("--workers", type=int, nargs="+", default=[len(os.sched_getaffinity(0))], metavar="PROCESSES")
    flags.add_argument("--cifar", action="store_true")
    given = flags.parse_args()
    given.images = given.images or (CIFAR_IMAGES if given.cifar else PHOTOGRAPHS)
    if given.cifar:
        given.model, given.image_size = "resnet18", 32
        return cifar(given)
    folder = Path(HOME.name)
    make_set(folder, given.images)
    with hub(folder):
        (alone if given.alone else feed)(given, folder)


if __name__ == "__main__":
    main()
