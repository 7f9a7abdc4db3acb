"""How a set of millions of samples is opened, looked at before a run, ordered and begun: seconds and memory.

    uv run python benchmarks/scale.py
    uv run python benchmarks/scale.py --against ../before        # another checkout too, in turn

Each in a process of its own, in turn, once each in every round. The shards are those of ImageNet-1K and of ImageNet-21k
by number, rows and footers, which repeat the names of the classes; all are links to one file of small images. They lie
in a folder, and are also opened as a set on the Hub whose footers were kept: the first time, and again.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

COMMIT, SOURCE = "0" * 40, "simulated/set"
SETS = {"1.28 M": (294, 4_358, 1_000), "13.2 M": (2_048, 6_445, 19_167)}  # files, rows of each, classes
BLOCK_MB = 2
IMAGE_BYTES = 6_500  # three row groups make a block; a footer has no smallest and largest image, they are too long
WHAT = {
    "local": "open, in a folder",
    "first": "open, footers kept",
    "again": "open again",
    "preflight": "preflight",
    "order": "order of an epoch",
    "start": "epoch start, until the first blocks are asked for",
    "resume": "the same in the middle of an epoch",
    "batch": "first batch",
}
TARGETS = {"13.2 M": {"again": (5, 400), "preflight": (2, None), "start": (1.5, None), "resume": (1.5, None)}}


def write_set(folder: Path, files: int, rows: int, classes: int) -> None:
    """The shards in `folder`/set, and in `folder`/cache what is kept of a set on the Hub with the same ones."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    names = [f"n{label:08d} of a name" for label in range(classes)]
    features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    fields = [("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("label", pa.int64())]
    schema = pa.schema(fields, metadata={"huggingface": json.dumps({"info": {"features": features}})})
    picture = io.BytesIO()
    Image.new("RGB", (16, 16)).save(picture, "JPEG")
    image = picture.getvalue().ljust(IMAGE_BYTES, b"\0")
    images = [{"bytes": image, "path": f"n_{row:08d}.JPEG"} for row in range(rows)]
    table = pa.table([images, np.random.default_rng(0).integers(0, classes, rows)], schema=schema)
    (folder / "set" / "data").mkdir(parents=True)
    first = folder / "set" / "data" / "validation-00000-of-00001.parquet"
    pq.write_table(table, first, row_group_size=100, compression="none", use_dictionary=["image.path"])
    paths = [f"data/train-{number:05d}-of-{files:05d}.parquet" for number in range(files)]
    for path in paths:
        os.link(first, folder / "set" / path)
    _keep_footers(folder / "cache", paths, first)


def _keep_footers(cache: Path, names: list[str], file: Path) -> None:
    from stream.cache import FileStore

    data = file.read_bytes()
    store = FileStore(cache / SOURCE.replace("/", "--"))
    told = {name: (len(data), "") for name in names}
    listing = {"commit": COMMIT, "splits": {"train": names}, "features": None, "lengths": {}, "told": told}
    store.put(f"{COMMIT}/listing", json.dumps(listing).encode())
    store.put(f"{COMMIT}/{names[0]}.footer", data[-8 - int.from_bytes(data[-8:-4], "little") :])
    for name in names[1:]:
        os.link(store.folder / COMMIT / f"{names[0]}.footer", store.folder / COMMIT / f"{name}.footer")


def measured(what: str, folder: Path) -> dict[str, float]:
    """Seconds, and megabytes by which the process grew at most over what it held before."""
    call = _prepared(what, folder)
    Path("/proc/self/clear_refs").write_text("5")  # so that the peak counts from now on
    before, began = _megabytes("VmRSS"), perf_counter()
    end = call() or perf_counter()
    return {"seconds": end - began, "mb": _megabytes("VmHWM") - before}


def _prepared(what: str, folder: Path) -> Callable[[], Any]:
    """What is to be measured; it may return the time at which it was done."""
    import stream.dataset as streamed

    opened = partial(streamed.HuggingFaceImageNetDataset.open, split=["train"], block_bytes=BLOCK_MB * 2**20)
    if what == "first":
        for index in (folder / "cache").rglob("*.index"):
            index.unlink()
    if what in ("first", "again"):
        return lambda: opened(SOURCE, revision=COMMIT, cache=streamed.Cache(folder / "cache")) and None
    if what == "local":
        return lambda: opened(str(folder / "set")) and None
    import torch

    from config import resolve
    from preflight import describe_data
    from preprocess import get_data_loaders

    flags = {"dataset": "hf", "dataset_name": str(folder / "set"), "image_size": 32, "num_workers": 0}
    config = resolve(flags | {"block_mb": BLOCK_MB, "batch_size": 256})
    data = get_data_loaders(config, torch.device("cpu"))
    if what == "preflight":
        return lambda: describe_data(config, data) and None
    if what == "order":
        return lambda: data.train.order(1) and None
    data.train.set_epoch(1, len(data.train) // 2 if what == "resume" else 0)
    known: list[float] = []
    make_reader = data.train.dataset.reader

    def reader(ids: Any) -> Any:
        made = make_reader(ids)
        known.append(perf_counter())
        return made

    def first_batch() -> float | None:
        next(iter(data.train))
        return known[0] if what != "batch" else None

    data.train.dataset.reader = reader
    return first_batch


def _megabytes(name: str) -> float:
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1000 for line in status if line.startswith(f"{name}:"))


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--rounds", type=int, default=3)
    flags.add_argument("--against", type=Path, help="another checkout, to be measured in turn with this one")
    flags.add_argument("--only", choices=WHAT, nargs="+", default=list(WHAT))
    flags.add_argument("--sets", choices=SETS, nargs="+", default=list(SETS))
    flags.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    given = flags.parse_args()
    if given.measure:
        what, folder, tree = given.measure
        sys.path.insert(0, tree)
        print(json.dumps(measured(what, Path(folder))))
        return
    trees = {"before": given.against, "now": ROOT} if given.against else {"now": ROOT}
    found: dict[tuple[str, str, str], list[dict[str, float]]] = {}
    for name in given.sets:
        with tempfile.TemporaryDirectory() as folder:
            write_set(Path(folder), *SETS[name])
            for _ in range(given.rounds):
                for what in given.only:
                    for when, tree in trees.items():
                        found.setdefault((name, what, when), []).append(_in_a_process(what, folder, tree))
                        print(name, what, when, found[name, what, when][-1], file=sys.stderr)
    from benchmarks.common import installed_versions, record

    told = f"{given.rounds} rounds in turn. Memory is the most that the process grew by, in MB."
    record("Sets of millions of samples", told, _rows(found, list(trees)), installed_versions())


def _in_a_process(what: str, folder: str, tree: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--measure", what, folder, str(tree)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    line = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
    answer: dict[str, float] = json.loads(line)
    return answer


def _rows(found: dict[tuple[str, str, str], list[dict[str, float]]], trees: list[str]) -> str:
    from benchmarks.common import spread_of

    titles = [title for when in trees for title in (f"{when}, s", f"{when}, MB")]
    lines = ["| " + " | ".join(["samples", "what", *titles, "target"]) + " |", "| --- " * (len(titles) + 3) + "|"]
    for name, what in dict.fromkeys((name, what) for name, what, _ in found):
        cells = [name, WHAT[what]]
        for when in trees:
            rounds = found[name, what, when]
            cells += [spread_of([each["seconds"] for each in rounds]), f"{median(each['mb'] for each in rounds):,.0f}"]
        seconds, megabytes = TARGETS.get(name, {}).get(what, (None, None))
        last = found[name, what, trees[-1]]
        is_met = seconds is not None and median(each["seconds"] for each in last) <= seconds
        is_met = is_met and (megabytes is None or median(each["mb"] for each in last) <= megabytes)
        bound = f"{seconds:g} s" + (f", {megabytes} MB" if megabytes else "") if seconds else ""
        cells.append(f"{bound}: {'met' if is_met else 'missed'}" if bound else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
