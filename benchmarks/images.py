"""Photographs of ImageNet's sizes, as a folder of JPEG files and as parquet shards like those of ILSVRC/imagenet-1k."""

import sys
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
from shards import card, class_names, photographs, to_table

from benchmarks.worker import JPEG_QUALITY, REPO_ID
from stream.kept import reduce

CLASSES = 10
FILES = 8
ROWS_PER_GROUP = 25
TYPICAL_SIDES = [(375, 500), (500, 375), (333, 500), (500, 333), (400, 500)]
TYPICAL_SHARES = [0.5, 0.15, 0.2, 0.05, 0.1]
NOISE = np.float32(4)


def make_images(folder: Path, count: int, short_side: int | None = None) -> float:
    """Writes `count` images below `folder`, the same for the same arguments, and returns their mean size in bytes.

    They lie in images/<class>/<number>.jpg and, in the same bytes, in datasets/ILSVRC/imagenet-1k/data. With
    `short_side`, the parquet files alone hold larger images reduced as `--cache_short_side` does.
    """
    rng = np.random.default_rng(0)
    labels = np.arange(count) % CLASSES
    photos = [draw(int(label), rng) for label in labels]
    images = [encode(photo) for photo in photos]
    for number, (image, name) in enumerate(zip(images, np.array(class_names(CLASSES))[labels], strict=True)):
        path = folder / "images" / str(name) / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image)
    stored = images if short_side is None else [reduce(image, short_side) for image in images]
    write_parquet(folder / "datasets" / REPO_ID, stored, labels)
    return sum(map(len, stored)) / count


def write_parquet(folder: Path, images: list[bytes], labels: np.ndarray) -> None:
    (folder / "data").mkdir(parents=True)
    for part, rows in enumerate(np.array_split(np.arange(len(images)), FILES)):
        table = to_table([images[row] for row in rows], labels[rows], f"train_{part}", CLASSES)
        path = folder / "data" / f"train-{part:05d}-of-{FILES:05d}.parquet"
        pq.write_table(table, path, row_group_size=ROWS_PER_GROUP)
    size = sum(map(len, images))
    (folder / "README.md").write_text(card({"train": len(images)}, {"train": size}, CLASSES))


def draw(label: int, rng: np.random.Generator) -> np.ndarray:
    """A (H, W, 3) uint8 BGR crop of a photograph, rescaled by 1 to 1.5, with a camera's noise.

    Three in four have one of the usual sizes, the others any from 180 to 900 pixels a side: 500x375 or so in the mean.
    """
    photo = photographs()[label % 2]
    if rng.random() < 0.75:
        height, width = rng.choice(TYPICAL_SIDES, p=TYPICAL_SHARES)
    else:
        height, width = rng.integers(180, 701), rng.integers(240, 901)
    scale = max(height / photo.shape[0], width / photo.shape[1]) * rng.uniform(1, 1.5)
    photo = cv2.resize(photo, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)
    top, left = rng.integers(0, (photo.shape[0] - height + 1, photo.shape[1] - width + 1))
    crop = photo[top : top + height, left : left + width]
    noise = rng.standard_normal(crop.shape, np.float32) * NOISE
    return np.clip(crop + noise, 0, 255).astype(np.uint8)


def encode(image: np.ndarray) -> bytes:
    return bytes(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1])
