"""The speed of an epoch from --cache_dir in each --cache_format, and of an epoch that fills the cache.

    uv run python benchmarks/cached.py

The images come from a Hub on this machine (tests/hub.py). The warm-up round fills the caches, but for the systems that
begin with an empty one in each round. An epoch after the first decodes less of images that are known to be sound, so
those that keep are compared with a first one. Speed is counted from the first batch on, with two workers and batches of
64, and once with the time to the first batch as well, in which windows are filled.
"""

import sys
import tempfile
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.common import Contest, System, parser, report, spread
from benchmarks.images import make_images
from benchmarks.stream import Traffic

FIRST = "ours, hub, anew"
SYSTEMS = [
    System("kept planes 256", "planes, short side 256"),
    System("kept jpeg 256", "jpeg, short side 256"),
    System("kept jpeg 400", "jpeg, short side 400"),
    System("kept original", "original", target=2.5),
    System("filling planes 256", "planes 256, while they are kept"),
    System("filling original", "originals, while they are kept"),
    System(FIRST, "nothing kept, a first epoch"),
    System("ours, hub", "nothing kept, a later epoch"),
    System("torchvision", "torchvision's reference, from files: Pillow, float", target=4),
    System("ffcv 400", "FFCV, JPEGs of 400 px: uint8", "ffcv", 1.6),
    System("ffcv half raw", "FFCV, half raw, half JPEGs of 400 px: uint8", "ffcv", 1.2),
]


def main() -> None:
    given = parser(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = make_images(folder, given.images)
        traffic = Traffic(folder)
        env = {**traffic.env, "HF_HOME": str(folder / "hf")}
        with Contest(SYSTEMS, folder, given.peers, env) as contest:
            contest.take_turns(given.rounds)
            room = {}
            for system in SYSTEMS:
                if system.name.startswith("kept"):
                    held = sum(path.stat().st_size for path in (folder / system.name).rglob("*.arrow"))
                    room[system.name] = f"{held / given.images / 1000:.0f}"
        traffic.close()
    set_up = f"{given.images} images, {size / 1000:.0f} kB in the mean; {given.rounds} rounds in turn."
    whole = {
        name: f"{median(given.images / (first + given.images / rate) for first, rate in zip(*times, strict=True)):,.0f}"
        for name, result in contest.results.items()
        if (times := (result.first_batches, result.rates)) and not result.note
    }
    uncached = {system.name: spread(contest, system.name, FIRST) for system in SYSTEMS}
    report(
        "Cached epochs",
        set_up,
        contest,
        {"its / nothing kept, first": uncached, "of whole epochs": whole, "kB kept an image": room},
    )


if __name__ == "__main__":
    main()
