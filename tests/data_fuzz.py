"""Sets drawn at random, with known content: each is read right, or refused in one line with status 2 or 3.

    uv run python tests/data_fuzz.py --draws 500

An image is of one colour, which tells its number; so what a loader reads can be compared with what was written.
"""

import argparse
import io
import json
import random
import shutil
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

KINDS = {
    "png": "PNG",
    "PNG": "PNG",
    "bmp": "BMP",
    "webp": "WEBP",
    "tiff": "TIFF",
    "TIF": "TIFF",
    "ppm": "PPM",
    "tga": "TGA",
}
NAMES = ["ant", "Bee", "n01440764", "7", "a b", "größe", "x.y", "train", "-dash", "a,b"]
CLUTTER = [
    ".hidden.png",
    "._0.png",
    "Thumbs.db",
    ".DS_Store",
    "__MACOSX/x.png",
    "@eaDir/x.png",
    ".ipynb_checkpoints/x.png",
]
Content = dict[int, str]  # of each image, by number, its class


def image_of(number: int, kind: str = "PNG") -> bytes:
    """An image that tells its number."""
    file = io.BytesIO()
    colour = (number % 200, number // 200, 250)
    Image.new("RGB", (9 + number % 5, 8), colour).save(file, kind, **({"lossless": True} if kind == "WEBP" else {}))
    return file.getvalue()


def number_of(encoded: Any) -> int:
    from stream.images import decode

    red, green, blue = decode(encoded)[0, 0].tolist()
    assert blue == 250, "other pixels than were written"
    return int(red) + 200 * int(green)


class Draw:
    """One set: `flags` for the program, the `train` and `val` content, None where they share `train`."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.rng = random.Random(seed)
        self.folder = folder
        self.names = self.rng.sample(NAMES, self.rng.randint(2, 5))
        self.train: Content = {}
        self.val: Content | None = {}
        self.flags: dict[str, Any] = {}
        self.may_refuse = False
        self._next = 0

    def images(self, least: int = 1) -> Content:
        """New numbers, some for each class."""
        found = {}
        for name in self.names:
            for _ in range(self.rng.randint(least, 6)):
                found[self._next] = name
                self._next += 1
        return found

    def chance(self, share: float) -> bool:
        return self.rng.random() < share


def draw_folder(draw: Draw) -> None:
    rng, root = draw.rng, draw.folder
    draw.flags = {"dataset": "imagefolder", "data_dir": str(root)}
    layout = rng.choice(["flat", "train", "both"])
    draw.names = [f"a {name}" if layout == "flat" and name == "train" else name for name in draw.names]
    parts = {
        "flat": [("", 3)],
        "train": [("train", 3)],
        "both": [("train", 1), (rng.choice(["val", "valid", "test"]), 1)],
    }
    for place, (split, least) in enumerate(parts[layout]):
        content = draw.images(least)
        for number, name in content.items():
            suffix = rng.choice([*KINDS])
            deeper = rng.choice(["", "", "sub", "a/b"])
            path = root / split / name / deeper / f"{number}.{suffix}"
            path = path.with_suffix("") if KINDS[suffix] in ("PNG", "BMP", "WEBP") and draw.chance(0.1) else path
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(image_of(number, KINDS[suffix]))
        for name in rng.sample(CLUTTER, rng.randint(0, 4)):
            path = root / split / rng.choice(["", draw.names[0]]) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(image_of(1))
        if draw.chance(0.3):
            (root / split / draw.names[0] / "notes.txt").write_text("words")
        if draw.chance(0.2):
            (root / split / "empty class").mkdir()
        if place == 0:
            draw.train = content
        else:
            draw.val = content
    if layout != "both":
        draw.flags["val_share"] = 0.3
        draw.val = None


def draw_parquet(draw: Draw) -> None:
    rng, root = draw.rng, draw.folder
    draw.flags = {"dataset": "hf", "dataset_name": str(root)}
    image, label = rng.choice([("image", "label"), ("img", "y"), ("photo.x", "class")])
    kind = rng.choice(["names", "names", "numbers", "from one", "text", "list", "text list", "bool"])
    more = draw.chance(0.4)
    form = rng.choice(["struct", "feature", "plain", "feature"])
    if kind == "bool":
        draw.names = ["False", "True"]
    elif kind in ("numbers", "from one", "list"):
        first = 1 if kind == "from one" else 0
        draw.names = [str(number) for number in range(first, first + len(draw.names))]
    splits = ["train", "validation"] if draw.chance(0.7) else ["train"]
    files = [(split, part) for split in splits for part in range(rng.randint(1, 3))]
    for split, part in files:
        content = draw.images(2)
        items = list(content.items())
        rng.shuffle(items)
        order = rng.sample(draw.names, len(draw.names)) if draw.chance(0.3) else draw.names
        schema, arrays = [], []
        images = [image_of(number) for number, _ in items]
        if form == "plain":
            arrays.append(pa.array(images, pa.binary()))
        else:
            arrays.append(
                pa.array(
                    [{"bytes": data, "path": None} for data in images],
                    pa.struct({"bytes": pa.binary(), "path": pa.string()}),
                )
            )
        values: dict[str, Callable[[str], Any]] = {
            "names": order.index,
            "numbers": int,
            "from one": int,
            "text": str,
            "list": lambda name: [int(name)],
            "text list": lambda name: [name],
            "bool": lambda name: name == "True",
        }
        arrays.append(pa.array([values[kind](name) for _, name in items]))
        schema = [image, label]
        if more:
            schema.append("id")
            arrays.append(pa.array([f"row {row}" for row in range(len(items))]))
        table = pa.table(arrays, schema)
        told: dict[str, Any] = {}
        if form == "feature":
            told[image] = {"_type": "Image"}
        if kind == "names":
            told[label] = {"_type": "ClassLabel", "names": order}
        if told and kind == "names":
            rest = {name: {"dtype": "string", "_type": "Value"} for name in schema[2:]}
            if form != "feature":
                told[image] = {"_type": "Image"}
            table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": told | rest}})})
        path = root / "data" / f"{split}-{part:05d}-of-{sum(s == split for s, _ in files):05d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, path, row_group_size=rng.choice([2, 5, 100]), write_statistics=draw.chance(0.8))
        if split == "train":
            draw.train |= content
        else:
            draw.val = (draw.val or {}) | content
    if "validation" not in splits:
        draw.flags["val_share"] = 0.3
        draw.val = None
    if kind in ("text", "numbers", "from one", "list", "text list", "bool") and draw.chance(0.5):
        draw.flags |= {"image_column": image, "label_column": label}
    if more and kind != "names":
        draw.flags |= {"image_column": image, "label_column": label}


def draw_tars(draw: Draw) -> None:
    rng, root = draw.rng, draw.folder
    draw.flags = {"dataset": "hf", "dataset_name": str(root)}
    told = rng.choice(["cls number", "cls name", "txt name", "json number", "json name"])
    if told.endswith("number"):
        draw.names = [str(number) for number in range(len(draw.names))]
    suffix = rng.choice(["png", "PNG", "bmp", "webp", "image.png", "tiff"])
    pattern = rng.choice(["{0:05d}", "n0{0}_1", "sub/{0:05d}", "a.b/{0}"])
    zipped = draw.chance(0.2)
    splits = ["train", "validation"] if draw.chance(0.7) else ["train"]
    for split in splits:
        for part in range(rng.randint(1, 2)):
            content = draw.images(2)
            path = root / f"{split}-{part:04d}.tar{'.gz' if zipped else ''}"
            with tarfile.open(path, "w:gz" if zipped else "w") as archive:
                add = partial(_add, archive)
                if draw.chance(0.3):
                    add("README.md", b"words")
                for number, name in content.items():
                    key = pattern.format(number)
                    kind = told.split()[1]
                    value: Any = draw.names.index(name) if kind == "number" else name
                    label = json.dumps({"label": value}).encode() if told.startswith("json") else str(value).encode()
                    add(f"{key}.{suffix}", image_of(number, KINDS[suffix.rpartition(".")[2]]))
                    add(f"{key}.{told.split()[0]}", label)
                    if draw.chance(0.05):
                        add(f"._{number}.{suffix}", b"clutter")
                if draw.chance(0.2):
                    add(f"alone.{suffix}", image_of(0))
                if draw.chance(0.2):
                    add("lonely.txt", b"words")
                    draw.may_refuse = draw.may_refuse or told.startswith("txt")
            if split == "train":
                draw.train |= content
            else:
                draw.val = (draw.val or {}) | content
    if "validation" not in splits:
        draw.flags["val_share"] = 0.3
        draw.val = None


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def content_of(dataset: Any) -> Content:
    """What a loader would read."""
    ids = np.arange(len(dataset))
    reader, found = dataset.reader([ids]), {}
    for number in ids.tolist():
        image, label = reader.read(number)
        assert dataset.name(number), "a sample without a name"
        found[number_of(image)] = dataset.classes[label]
    reader.close()
    return found


KINDS_OF_SETS = {"folder": draw_folder, "parquet": draw_parquet, "tar": draw_tars}


def check(seed: int, folder: Path) -> str:
    """Draws a set and reads it; returns how it ended. Raises AssertionError where that is wrong."""
    import torch

    from config import resolve
    from errors import DataError, UsageError
    from preprocess import get_data_loaders

    kind = list(KINDS_OF_SETS)[seed % 3]
    draw = Draw(folder / "set", seed)
    draw.folder.mkdir()
    KINDS_OF_SETS[kind](draw)
    flags = draw.flags | {"batch_size": 2, "streams": 1, "image_size": 8, "num_workers": 0}
    try:
        data = get_data_loaders(resolve(flags), torch.device("cpu"))
    except (DataError, UsageError) as error:
        refusal = str(error)
    else:
        refusal = ""
    assert "\n" not in refusal
    if refusal:
        assert draw.may_refuse, f"draw {seed}, a {kind}: refused: {refusal}"
        return f"{kind} refused"
    train, val = content_of(data.train.dataset), content_of(data.val.dataset)
    expected = draw.train if draw.val is None else None
    if expected is not None:
        assert not train.keys() & val.keys(), f"draw {seed}, a {kind}: an image is trained and validated on"
        train, val = train | val, {}
    assert train == draw.train, f"draw {seed}, a {kind}: {_first(draw.train, train)}"
    assert val == (draw.val or {}), f"draw {seed}, a {kind}: in validation {_first(draw.val or {}, val)}"
    return f"{kind} read right"


def _first(wanted: Content, found: Content) -> str:
    number = min(key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key))
    return f"image {number} is {found.get(number)}, not {wanted.get(number)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=500)
    parser.add_argument("--first", type=int, default=0)
    given = parser.parse_args()
    ends: Counter[str] = Counter()
    for seed in range(given.first, given.first + given.draws):
        folder = Path(tempfile.mkdtemp())
        try:
            ends[check(seed, folder)] += 1
        except AssertionError as error:
            print(error)
            ends["wrong"] += 1
        shutil.rmtree(folder)
    print(f"{given.draws} sets: " + ", ".join(f"{count} {end}" for end, count in sorted(ends.items())))
    sys.exit(bool(ends["wrong"]))


if __name__ == "__main__":
    main()
