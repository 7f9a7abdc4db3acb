"""The speed of the loader from parquet files on the local disk, against other projects' loaders on the same images.

    uv run python benchmarks/loader.py                     # whole JPEGs
    uv run python benchmarks/loader.py --short_side 400    # ours shrunk to that short side, as a cache may keep them

Speed is counted from the first batch of an epoch on, with two workers each and batches of 64.
"""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.common import Contest, System, parser, report, spread
from benchmarks.images import make_images

OURS = [
    System("ours", "ours: uint8"),
    System("decoding alone", "our decode and transform alone, from memory: the most a loader around them can do"),
]
PEERS = [
    System("torchvision", "torchvision's reference: Pillow, float", target=3.5),
    System("dali", "DALI on the CPU: uint8", "dali", 1.2),
    System("ffcv same", "FFCV, whole JPEGs of the same quality: uint8", "ffcv", 1.8),
    System("ffcv 92", "FFCV, whole JPEGs of quality 92: uint8", "ffcv"),
    System("ffcv 400", "FFCV, JPEGs of 400 px: uint8", "ffcv"),
]
PEERS_OF_SHRUNK = [System("ffcv 400", "FFCV, JPEGs of 400 px: uint8", "ffcv", 1.2)]


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument(
        "--short_side", type=int, help="shrink our images to this short side, and meet FFCV's 400 px mode"
    )
    given = flags.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = make_images(folder, given.images, given.short_side)
        systems = [*OURS, *(PEERS_OF_SHRUNK if given.short_side else PEERS)]
        with Contest(systems, folder, given.peers, {"HF_HOME": str(folder / "hf")}) as contest:
            contest.take_turns(given.rounds)
    ours = f", ours shrunk to a short side of {given.short_side}" if given.short_side else ""
    set_up = (
        f"{given.images} images{ours}, in our files {size / 1000:.0f} kB in the mean; {given.rounds} rounds in turn."
    )
    alone = {system.name: spread(contest, "decoding alone", system.name) for system in systems}
    report("Loader, from the local disk", set_up, contest, {"decoding alone / its": alone})


if __name__ == "__main__":
    main()
