"""The speed of streaming from a Hub on this machine (tests/hub.py), against other ways to stream the same images.

    uv run python benchmarks/stream.py

LitData and MosaicML Streaming read their own formats from the local disk, which spares them the network altogether.
Speed is counted from the first batch of an epoch on, with two workers each and batches of 64. Nothing is cached but by
the system that says so, whose last column sets its speed against the others' as theirs sets ours without a cache.
"""

import multiprocessing
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.common import Contest, System, parser, report, spread
from benchmarks.images import make_images

SYSTEMS = [
    System("ours, hub", "ours, from the Hub: uint8"),
    System("ours, cache", "ours, from the Hub, kept by --cache_dir in the epoch before: uint8"),
    System("ours", "ours, from the local disk: uint8", target=0.9),
    System("naive", "datasets, from the Hub: Pillow, float", target=3),
    System("litdata", "LitData's recipe: torchvision v2, float", "litdata", 2),
    System("mosaic", "Mosaic's recipe: Pillow, uint8", "mosaic", 2),
    System("litdata, our decode", "LitData with our decode: uint8", "litdata", 1),
    System("mosaic, our decode", "Mosaic with our decode: uint8", "mosaic", 1),
]


def serve(root: Path, connection: Connection) -> None:
    """Serves until the other end hangs up; tells the environment, then for any message the requests and bytes
    since the last one and the CPU seconds in all."""
    from hub import Hub

    with Hub(root) as hub:
        connection.send(hub.env())
        while True:
            try:
                connection.recv()
            except EOFError:
                return
            with hub.lock:
                seen, hub.requests = hub.requests, []
            connection.send((len(seen), sum(request.sent for request in seen), time.process_time()))


class Traffic:
    """The hub in a process of its own, and what each system asked of it in its measured rounds."""

    def __init__(self, root: Path) -> None:
        self._connection, other = multiprocessing.Pipe()
        self._process = multiprocessing.get_context("spawn").Process(target=serve, args=(root, other), daemon=True)
        self._process.start()
        other.close()
        self.env: dict[str, str] = self._connection.recv()
        self._seen: dict[str, list[tuple[int, int, float]]] = {}

    @contextmanager
    def counting(self, system: System) -> Iterator[None]:
        _, _, before = self._read()
        yield
        requests, sent, after = self._read()
        if requests:
            self._seen.setdefault(system.name, []).append((requests, sent, after - before))

    def columns(self) -> dict[str, dict[str, str]]:
        """Requests, megabytes and CPU seconds of the hub in an epoch, by the column and the system."""
        medians = {name: [median(values) for values in zip(*seen, strict=True)] for name, seen in self._seen.items()}
        return {
            "requests": {name: f"{requests:.0f}" for name, (requests, _, _) in medians.items()},
            "MB sent": {name: f"{sent / 1e6:.0f}" for name, (_, sent, _) in medians.items()},
            "the hub's CPU, s": {name: f"{seconds:.2f}" for name, (_, _, seconds) in medians.items()},
        }

    def close(self) -> None:
        self._connection.close()
        self._process.join()

    def _read(self) -> tuple[int, int, float]:
        self._connection.send("count")
        counts: tuple[int, int, float] = self._connection.recv()
        return counts


def main() -> None:
    given = parser(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = make_images(folder, given.images)
        traffic = Traffic(folder)
        env = {**traffic.env, "HF_HOME": str(folder / "hf")}
        with Contest(SYSTEMS, folder, given.peers, env) as contest:
            contest.take_turns(given.rounds, traffic.counting)
        traffic.close()
    total = given.images * size / 1e6
    set_up = f"{given.images} images, {total:.0f} MB in all, in blocks of 4 MiB; {given.rounds} rounds in turn."
    kept = {"with the cache / its": {system.name: spread(contest, "ours, cache", system.name) for system in SYSTEMS}}
    report("Stream, from a Hub on this machine", set_up, contest, {**traffic.columns(), **kept})


if __name__ == "__main__":
    main()
