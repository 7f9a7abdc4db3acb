"""A generated image set in the schema of ILSVRC/imagenet-1k, to try the program without access to it."""

import contextlib
import json
import os
import shutil
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import constants

CLASSES = 1000
IMAGES = {"train": 1024, "validation": 256}
FILES = {"train": 8, "validation": 1}
ROWS_PER_GROUP = 32
SIDES = (200, 500)  # pixels, the smallest and largest


def make_dummy_data() -> Path:
    """The folder with the generated set, which the first process that needs it makes."""
    folder = Path(constants.HF_HOME) / "imagenet1k" / "dummy-1"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = folder.with_suffix(f".{os.getpid()}")
        temporary.mkdir()
        try:
            for number, split in enumerate(IMAGES):
                _write_split(temporary / "data", split, np.random.default_rng(number))
            with contextlib.suppress(OSError):  # another process was faster
                temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _write_split(folder: Path, split: str, rng: np.random.Generator) -> None:
    folder.mkdir(exist_ok=True)
    names = [f"generated {number}" for number in range(CLASSES)]
    features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    fields = [("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("label", pa.int64())]
    schema = pa.schema(fields, {"huggingface": json.dumps({"info": {"features": features}})})
    labels = rng.integers(0, CLASSES, IMAGES[split])
    for number, part in enumerate(np.array_split(labels, FILES[split])):
        images = [
            {"bytes": draw(int(label), rng), "path": f"{split}_{number}_{row}.JPEG"} for row, label in enumerate(part)
        ]
        path = folder / f"{split}-{number:05d}-of-{FILES[split]:05d}.parquet"
        pq.write_table(pa.table([images, part], schema=schema), path, row_group_size=ROWS_PER_GROUP)


def draw(label: int, rng: np.random.Generator) -> bytes:
    """A JPEG of soft blobs whose colours and grain depend on the class."""
    own = np.random.default_rng(label)
    width, height = rng.integers(*SIDES, 2).tolist()
    grain = int(own.integers(3, 12))
    coarse = own.uniform(0, 255, 3) + rng.normal(0, 60, (grain, grain, 3))
    image = cv2.resize(np.clip(coarse, 0, 255).astype(np.uint8), (width, height), interpolation=cv2.INTER_CUBIC)
    return bytes(cv2.imencode(".jpg", image)[1])
