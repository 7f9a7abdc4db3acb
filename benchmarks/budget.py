"""What streaming asks of the Hub and of the memory, against what the preflight promises.

    uv run python benchmarks/budget.py
    uv run python benchmarks/budget.py --only photographs --small

For each situation a set is made, served by tests/hub.py, and read by a process of its own through `get_data_loaders`,
two epochs of training batches without a model. Memory is the most that the process held above what it had before it
opened the data: anonymous and shared pages, not those mapped from the cache; with what its decoding processes do not
share with one another. Requests are those for files, listings apart. Linux only.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
from hub import Hub
from shards import REPO_ID, card, encode, photographs, to_table

from benchmarks.common import PINNED, ROOT, installed_versions, record

SAMPLE_SECONDS = 0.005
CLASSES = 10
TARGET = 0.25  # of what is measured
Files = Iterator[tuple[str, pa.Table, int]]  # of each file its split, its rows, and the rows of a group


@dataclass(frozen=True)
class Situation:
    """A set, made smaller by a factor, and the settings that read it; `cached` gives it a folder for the cache."""

    title: str
    make: Callable[[int], Files]
    settings: dict[str, Any] = field(default_factory=dict)
    cached: bool = False


def pad(images: list[bytes], size: int, rng: np.random.Generator) -> list[bytes]:
    """The images with random bytes inside, so that each has about `size` bytes and none is like another."""
    return [image[:2] + comments(max(8, size - len(image)), rng) + image[2:] for image in images]


def comments(size: int, rng: np.random.Generator) -> bytes:
    """About `size` random bytes as comments of a JPEG, each of 64 KB at most."""
    parts = [min(65000, size - first) for first in range(0, size, 65000)]
    return b"".join(b"\xff\xfe" + (count + 2).to_bytes(2, "big") + rng.bytes(count) for count in parts)


def files_of(files: int, rows: int, group: int, size: int, image: np.ndarray | None = None) -> Files:
    """Training files of one size, with images of `size` bytes, and one for validation."""
    rng = np.random.default_rng(0)
    picture = encode(photographs()[0][:64, :64] if image is None else image)
    for number in range(files + 1):
        count = rows if number < files else min(rows, 16)
        labels = rng.integers(0, CLASSES, count)
        labels[:2] = 0, CLASSES - 1
        split = "train" if number < files else "validation"
        yield split, to_table(pad([picture] * count, size, rng), labels, f"{split}_{number}", CLASSES), group


def photo(width: int, height: int) -> np.ndarray:
    noise = np.random.default_rng(0).normal(0, 4, (height, width, 3))
    large = cv2.resize(photographs()[0], (width, height), interpolation=cv2.INTER_CUBIC)
    return np.clip(large + noise, 0, 255).astype(np.uint8)


def plain(small: int) -> Files:
    return files_of(8 // small, 500, 40, 100_000)


PLAIN = {"block_mb": 4, "shuffle_window": 1000}
SITUATIONS = {
    "index": Situation("294 files, each with a footer of 100 KB", lambda small: files_of(294 // small, 48, 1, 30_000)),
    "small": Situation("2,000 files of 4 rows", lambda small: files_of(2000 // small, 4, 4, 20_000)),
    "groups": Situation(
        "row groups of 100 MB, no cache", lambda small: files_of(4 // small, 1000, 500, 200_000), {"streams": 2}
    ),
    "groups-cache": Situation(
        "row groups of 100 MB, a cache", lambda small: files_of(4 // small, 1000, 500, 200_000), {"streams": 2}, True
    ),
    "photographs": Situation(
        "photographs of 24 megapixels and 5 MB",
        lambda small: files_of(4 // small, 40, 3, 5_000_000, photo(6000, 4000)),
        {"batch_size": 16, "streams": 4, "shuffle_window": 40},
    ),
    "limit": Situation(
        "a cache of 60 MB, a window of 1,000 images of 100 KB", plain, PLAIN | {"cache_limit_gb": 0.06}, True
    ),
    "cache": Situation("a cache, a window of 1,000 images of 100 KB", plain, PLAIN, True),
    "no-cache": Situation("no cache, a window of 1,000 images of 100 KB", plain, PLAIN),
}


def write(folder: Path, files: Files) -> None:
    """The files and the card of a set."""
    (folder / "data").mkdir(parents=True)
    counts: dict[str, int] = {}
    for number, (split, table, group) in enumerate(files):
        pq.write_table(table, folder / "data" / f"{split}-{number:05d}.parquet", row_group_size=group)
        counts[split] = counts.get(split, 0) + len(table)
    (folder / "README.md").write_text(card(counts, dict.fromkeys(counts, 1), CLASSES))


def read(settings: dict[str, Any]) -> None:
    """The body of the measured process: says when it is ready to open the data, what is promised, and when it ends."""
    import torch

    import preflight
    from config import resolve
    from preprocess import get_data_loaders

    config = resolve(settings)
    print(json.dumps("ready"), flush=True)
    sys.stdin.readline()
    data = get_data_loaders(config, torch.device("cpu"))
    lines = preflight.describe_data(config, data)
    memory = next(line.removeprefix("memory").strip() for line in lines if line.startswith("memory"))
    (index, blocks), val = data.train.dataset.requests(), data.val.dataset.requests()
    requests = f"{index + val[0]:,} + {blocks:,} an epoch"
    told = {"memory": preflight.memory_bytes(config, data), "line": memory, "requests": requests}
    print(json.dumps(told), flush=True)
    sys.stdin.readline()
    for epoch in range(2):
        data.train.set_epoch(epoch)
        for _ in data.train:
            pass
    print(json.dumps("done"), flush=True)
    sys.stdin.readline()


def held(pid: int) -> int:
    """Bytes that a process holds and that are no file's, and those of its children that they hold alone."""
    total = _field(f"/proc/{pid}/status", "RssAnon", "RssShmem")
    return total + sum(_field(f"/proc/{child}/smaps_rollup", "Pss_Anon") for child in descendants(pid))


def descendants(pid: int) -> list[int]:
    """The processes below this one."""
    found: list[int] = []
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += [int(child) for child in (task / "children").read_text().split()]
    return found + [below for child in found for below in descendants(child)]


def _field(path: str, *names: str) -> int:
    """The sum of these values of a file in /proc, in bytes."""
    try:
        pairs = (line.split()[:2] for line in Path(path).read_text().splitlines())
    except OSError:
        return 0
    return sum(int(pair[1]) * 1024 for pair in pairs if pair[0].rstrip(":") in names)


class Process:
    """The measured process; `peak` has the most that it held, in bytes."""

    def __init__(self, settings: dict[str, Any], env: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--read", json.dumps(settings)],
            cwd=ROOT,
            env=os.environ | PINNED | env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.peak = 0
        os.set_blocking(self._stdout.fileno(), False)
        self.answer()
        self.before = held(self._process.pid)

    @property
    def _stdout(self) -> Any:
        return self._process.stdout

    def go_on(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(b"\n")
        self._process.stdin.flush()

    def answer(self) -> Any:
        """What the process says next; its memory is watched until then."""
        line = b""
        while not line.endswith(b"\n"):
            line += self._stdout.readline() or b""
            self.peak = max(self.peak, held(self._process.pid))
            if self._process.poll() is not None:
                raise SystemExit("the measured process ended")
            time.sleep(SAMPLE_SECONDS)
        return json.loads(line)

    def close(self) -> None:
        self.go_on()
        self._process.wait()


def measure(situation: Situation, small: bool) -> list[str]:
    """The cells of a row."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder / "datasets" / REPO_ID, situation.make(4 if small else 1))
        settings = {"dataset": "hf", "dataset_name": REPO_ID, "num_workers": 2, "batch_size": 64, "streams": 8}
        settings |= situation.settings | ({"cache_dir": str(folder / "cache")} if situation.cached else {})
        with Hub(folder) as hub:
            process = Process(settings, hub.env() | {"HF_HOME": str(folder / "hf")})
            process.go_on()
            told = process.answer()
            opened = asked(hub)
            at_open = process.peak - process.before
            process.go_on()
            process.answer()
            read_all = asked(hub)
            process.close()
    peak = process.peak - process.before
    cells = [situation.title, str(opened[0]), str(read_all[0] - opened[0]), f"{read_all[1] / 1e6:,.1f}"]
    cells += [f"{value / 1e6:,.0f}" for value in (at_open, peak, told["memory"])]
    print(f"{situation.title}: {told['line']}", file=sys.stderr)
    return [*cells, f"{told['memory'] / peak:.2f}", told["requests"]]


def asked(hub: Hub) -> tuple[int, int]:
    """How often files were asked for, and the bytes that were sent."""
    with hub.lock:
        answers = [request for request in hub.requests if "/resolve/" in request.path]
    return len(answers), sum(request.sent for request in answers)


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--only", choices=list(SITUATIONS), help="measure one situation and record nothing")
    flags.add_argument("--small", action="store_true", help="a quarter of the files, for a quick try; nothing recorded")
    flags.add_argument("--read", type=json.loads, help=argparse.SUPPRESS)
    given = flags.parse_args()
    if given.read:
        read(given.read)
        return
    head = [
        "situation",
        "requests: index",
        "two epochs",
        "MB received",
        "MB held, at the start",
        "at most",
        "promised",
    ]
    head += ["promised / held", "requests promised"]
    found = [measure(SITUATIONS[name], given.small) for name in ([given.only] if given.only else SITUATIONS)]
    rows = "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *found])
    if given.only or given.small:
        print(rows)
    else:
        set_up = f"Two decoding processes. The target is a promise within {TARGET:.0%} of the most that is held."
        record("Requests and memory, promised and measured", set_up, rows, installed_versions())


if __name__ == "__main__":
    main()
