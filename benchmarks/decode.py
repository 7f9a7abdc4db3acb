"""Where an image's time goes on one core, and so how much faster than the others any loader of JPEGs could be.

    uv run python benchmarks/decode.py

libjpeg-turbo, which cv2, Pillow, FFCV and DALI all decode with, must undo the entropy coding of a JPEG before anything
else. Reading at an eighth of the size does that and next to nothing more.
"""

import io
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import cv2
import numpy as np
import torch
from PIL import Image

from benchmarks.common import installed_versions, parser, record
from benchmarks.images import make_images
from benchmarks.peers import SIZE, reference_transform
from config import resolve
from preprocess import train_transform
from stream.images import decode


def main() -> None:
    flags = parser(__doc__)
    flags.set_defaults(images=256)
    given = flags.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        size = make_images(Path(folder), given.images)
        images = [path.read_bytes() for path in sorted(Path(folder, "images").rglob("*.jpg"))]
    stages = {
        "entropy decoding: cv2 at an eighth of the size": lambda image: cv2.imdecode(
            np.frombuffer(image, np.uint8), cv2.IMREAD_REDUCED_COLOR_8
        ),
        "our decode of the whole": decode,
        "our decode of the crop, resized": ours(),
        "Pillow's decode": pillow,
        "torchvision's reference: Pillow, crop, flip, float": reference(),
    }
    times: dict[str, list[float]] = {stage: [] for stage in stages}
    for _ in range(given.rounds):
        for stage, work in stages.items():
            started = time.perf_counter()
            for image in images:
                work(image)
            times[stage].append((time.perf_counter() - started) / len(images) * 1e6)
    entropy, *_ = times.values()
    rows = ["| stage | us an image: median (min to max) | over entropy decoding |", "| --- | --- | --- |"]
    for stage, found in times.items():
        ratio = median(value / floor for value, floor in zip(found, entropy, strict=True))
        rows.append(f"| {stage} | {median(found):,.0f} ({min(found):,.0f} to {max(found):,.0f}) | {ratio:.2f} |")
    set_up = f"{given.images} images of {size / 1000:.0f} kB in the mean; {given.rounds} rounds in turn."
    record("Decoding, one core", set_up, "\n".join(rows), installed_versions())


def ours() -> Callable[[bytes], Any]:
    transform = train_transform(resolve({"dataset": "imagenet1k", "image_size": SIZE}))
    return lambda image: transform(image, (0, 0, len(image)))


def pillow(image: bytes) -> Image.Image:
    return Image.open(io.BytesIO(image)).convert("RGB")


def reference() -> Callable[[bytes], Any]:
    transform = reference_transform()
    return lambda image: transform(pillow(image))


if __name__ == "__main__":
    main()
