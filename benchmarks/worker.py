"""One system under measure, in a process and an interpreter of its own: `python -m benchmarks.worker SYSTEM FOLDER`.

Each line on stdin runs an epoch and is answered by a line of JSON on stdout. Everything else goes to stderr.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import peers
from benchmarks.common import installed_versions
from benchmarks.peers import BATCH, SIZE, WORKERS, Epoch, reference_transform

BLOCK_BYTES = 4 * 2**20
STREAMS = 8
WINDOW = 512
REPO_ID = "ILSVRC/imagenet-1k"
JPEG_QUALITY = 96  # of the photographs in benchmarks/images.py


def ours(source: str, cache_dir: Path | None = None, anew: bool = False, **form: Any) -> Epoch:
    """This repository's loader, as `main.py` puts it together, over a local folder or the Hub, with a cache or none.

    The cache keeps images in a `form`, see `stream.dataset.Cache`. With `anew` each epoch is as the first: the cache is
    empty, and no image is known to be sound.
    """
    from config import resolve
    from preprocess import train_transform
    from stream.dataset import Cache, HuggingFaceImageNetDataset
    from stream.loader import StreamingDataLoader
    from stream.order import epoch_order

    cache = Cache(cache_dir, processes=WORKERS, **form) if cache_dir else None
    dataset = HuggingFaceImageNetDataset.open(source, split=["train"], block_bytes=BLOCK_BYTES, cache=cache)
    loader = StreamingDataLoader(
        dataset,
        train_transform(resolve({"dataset": "imagenet1k", "image_size": SIZE})),
        lambda epoch: epoch_order(dataset.block_rows, epoch, 0, STREAMS, WINDOW),
        batch_size=BATCH,
        image_size=SIZE,
        train=True,
        seed=0,
        num_workers=WORKERS,
        max_bad_fraction=0.0,
    )

    def epoch(number: int) -> Iterator[int]:
        if anew:
            loader.sound[:] = False
            for path in cache_dir.rglob("*.arrow") if cache_dir else ():
                path.unlink()
        loader.set_epoch(number)
        return (len(batch.images) for batch in loader)

    return epoch


def decoding_alone(source: str) -> Epoch:
    """Our decode and transform in as many threads, of images in memory: what no loading around them can exceed."""
    from concurrent.futures import ThreadPoolExecutor

    from config import resolve
    from preprocess import train_transform
    from stream.dataset import HuggingFaceImageNetDataset

    dataset = HuggingFaceImageNetDataset.open(source, split=["train"], block_bytes=BLOCK_BYTES)
    blocks = map(dataset.read_block, range(len(dataset.blocks)))
    images = [image.as_py() for block in blocks for image in block.images]
    transform = train_transform(resolve({"dataset": "imagenet1k", "image_size": SIZE}))

    def decode_batch(first: int) -> int:
        batch = images[first : first + BATCH]
        for number, image in enumerate(batch, first):
            transform(image, (0, 0, number))
        return len(batch)

    def epoch(number: int) -> Iterator[int]:
        with ThreadPoolExecutor(WORKERS) as pool:
            yield from pool.map(decode_batch, range(0, len(images), BATCH))

    return epoch


def torchvision_reference(folder: Path) -> Epoch:
    """torchvision's reference: ImageFolder, Pillow and float tensors, in a DataLoader."""
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder

    images = ImageFolder(str(folder / "images"), reference_transform())
    loader = DataLoader(
        images, BATCH, shuffle=True, num_workers=WORKERS, drop_last=True, multiprocessing_context="fork"
    )
    return lambda number: (len(batch) for batch, _ in loader)


def naive_stream() -> Epoch:
    """`load_dataset(streaming=True)` in a DataLoader, whose workers decode with Pillow.

    Without the 5 s for which `datasets` sleeps at the end of an epoch: they would be lost in one of ImageNet's length.
    """
    import datasets
    import torch
    from torch.utils.data import DataLoader

    datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0
    transform = reference_transform()

    def collate(rows: list[dict[str, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
        images = torch.stack([transform(row["image"].convert("RGB")) for row in rows])
        return images, torch.tensor([row["label"] for row in rows])

    stream = datasets.load_dataset(REPO_ID, split="train", streaming=True).shuffle(
        seed=0, buffer_size=WINDOW // WORKERS
    )

    def epoch(number: int) -> Iterator[int]:
        stream.set_epoch(number)
        loader = DataLoader(
            stream, BATCH, num_workers=WORKERS, drop_last=True, collate_fn=collate, multiprocessing_context="fork"
        )
        return (len(batch) for batch, _ in loader)

    return epoch


def systems(folder: Path) -> dict[str, Callable[[], Epoch]]:
    return {
        "ours": partial(ours, str(folder / "datasets" / REPO_ID)),
        "ours, hub": partial(ours, REPO_ID),
        "ours, hub, anew": partial(ours, REPO_ID, anew=True),
        "ours, cache": partial(ours, REPO_ID, folder / "cache"),
        "decoding alone": partial(decoding_alone, str(folder / "datasets" / REPO_ID)),
        "torchvision": partial(torchvision_reference, folder),
        "naive": naive_stream,
        "dali": partial(peers.dali, folder),
        "ffcv same": partial(peers.ffcv, folder, "same", write_mode="jpg", jpeg_quality=JPEG_QUALITY),
        "ffcv 92": partial(peers.ffcv, folder, "92", write_mode="jpg", jpeg_quality=92),
        "ffcv half raw": partial(
            peers.ffcv,
            folder,
            "half raw",
            write_mode="proportion",
            compress_probability=0.5,
            max_resolution=400,
            jpeg_quality=90,
        ),
        "ffcv 400": partial(peers.ffcv, folder, "400", write_mode="jpg", max_resolution=400, jpeg_quality=90),
        "litdata": partial(peers.litdata, folder, our_decode=False),
        "litdata, our decode": partial(peers.litdata, folder, our_decode=True),
        "mosaic": partial(peers.mosaic, folder, our_decode=False),
        "mosaic, our decode": partial(peers.mosaic, folder, our_decode=True),
    }


def kept(folder: Path) -> dict[str, Callable[[], Epoch]]:
    """Ours from a cache in each of its forms, full or empty before each epoch."""
    forms: dict[str, dict[str, Any]] = {
        "original": {},
        "jpeg 400": {"short_side": 400},
        "jpeg 256": {"short_side": 256},
        "planes 256": {"short_side": 256, "planes": True},
    }
    return {
        f"{way} {name}": partial(ours, REPO_ID, folder / f"{way} {name}", anew=way == "filling", **form)
        for way in ("kept", "filling")
        for name, form in forms.items()
    }


def run(epoch: Epoch, number: int) -> dict[str, float]:
    """One epoch: seconds to its first batch, and from there on images a second."""
    started = time.perf_counter()
    batches = epoch(number)
    next(batches)
    first = time.perf_counter()
    images = sum(batches)
    return {"first_batch_s": first - started, "images_per_s": images / (time.perf_counter() - first)}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    system, folder = sys.argv[1:]
    epoch = (systems(Path(folder)) | kept(Path(folder)))[system]()
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    print(json.dumps(installed_versions()), file=answers)
    for number, _ in enumerate(sys.stdin):
        print(json.dumps(run(epoch, number)), file=answers)


if __name__ == "__main__":
    main()
