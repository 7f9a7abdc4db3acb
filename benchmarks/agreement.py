"""Whether our decoding of image files agrees with Pillow's, and what we do with those that one of the two refuses.

    uv run python benchmarks/agreement.py FOLDER...

Every file below the folders is read in a process of its own kind, so that a crash or a hang is seen: by
`ImageOps.exif_transpose(Image.open(file)).convert("RGB")`, and by `Picture`, whole and in random regions, with
libjpeg-turbo and without.
"""

import argparse
import contextlib
import io
import json
import select
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np
from PIL import Image, ImageOps

from benchmarks.common import ROOT, installed_versions, record
from stream import jpeg
from stream.formats import REFUSED
from stream.pictures import Picture, UnreadableImage

PATIENCE = 60  # seconds
REGIONS = 5
OUTCOMES = ["equal", "wide grey", "another picture", "read by us alone", "read by Pillow alone", "read by neither"]
NOTED = ["another picture", "read by us alone", "read by Pillow alone"]


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("folders", type=Path, nargs="+")
    folders = flags.parse_args().folders
    paths = sorted(path for folder in folders for path in folder.rglob("*") if path.is_file())
    lines = []
    for title, options in {"With libjpeg-turbo": [], "Without": ["without"]}.items():
        lines += ["", f"{title}:", "", *_table(paths, _look_at(paths, options))]
    set_up = f"{len(paths):,} files of {', '.join('/'.join(folder.parts[-3:]) for folder in folders)}."
    record("Agreement with Pillow", set_up, "\n".join(lines).strip(), installed_versions())


def _look_at(paths: list[Path], options: list[str]) -> list[dict[str, Any]]:
    """What a worker says of each file, or that it crashed or hung."""
    found: list[dict[str, Any]] = []
    worker: subprocess.Popen[str] | None = None
    for path in paths:
        if worker is None:
            command = [sys.executable, "-m", "benchmarks.agreement", "worker", *options]
            worker = subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
        assert worker.stdin is not None
        assert worker.stdout is not None
        worker.stdin.write(f"{path.resolve()}\n")
        worker.stdin.flush()
        ready, _, _ = select.select([worker.stdout], [], [], PATIENCE)
        line = worker.stdout.readline() if ready else ""
        if line:
            found.append(json.loads(line))
            continue
        worker.kill()
        found.append({"format": "?", "outcome": "another picture", "note": "crash" if ready else "hang"})
        worker = None
    if worker is not None:
        worker.communicate()
    return found


def _table(paths: list[Path], found: list[dict[str, Any]]) -> list[str]:
    by_format: dict[str, Counter[str]] = defaultdict(Counter)
    notes: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for path, one in zip(paths, found, strict=True):
        by_format[one["format"]][one["outcome"]] += 1
        if one["outcome"] in NOTED:
            notes[one["outcome"], one["format"], one["note"]].append(path.name)
    rows = [f"| format | files | {' | '.join(OUTCOMES)} |", "| --- " * (len(OUTCOMES) + 2) + "|"]
    total = sum(by_format.values(), Counter[str]())
    for name, counts in [*sorted(by_format.items()), ("all", total)]:
        cells = [f"{counts[outcome]:,}" if counts[outcome] else "" for outcome in OUTCOMES]
        rows.append(f"| {name} | {counts.total():,} | {' | '.join(cells)} |")
    for (outcome, name, note), files in sorted(notes.items()):
        shown = ", ".join(files[:3]) + (f" and {len(files) - 3} more" if len(files) > 3 else "")
        rows += ["" if rows[-1].startswith("|") else None, f"- {outcome}: {name}, {shown}: {note}"]  # type: ignore[list-item]
    return [row for row in rows if row is not None]


def work() -> None:
    for line in sys.stdin:
        with contextlib.redirect_stdout(sys.stderr):
            answer = _compare(Path(line[:-1]).read_bytes())
        print(json.dumps(answer), flush=True)


def _compare(data: bytes) -> dict[str, Any]:
    kind, mode, theirs, error = _by_pillow(data)
    try:
        picture = Picture(data)
        ours, refusal = picture.pixels, ""
    except UnreadableImage as reason:
        ours, refusal = None, str(reason)
    if ours is None or theirs is None:
        who = {(False, False): "neither", (True, False): "us alone", (False, True): "Pillow alone"}
        outcome = f"read by {who[ours is not None, theirs is not None]}"
        return {"format": kind, "outcome": outcome, "note": refusal or error}
    if ours.shape == theirs.shape and np.array_equal(ours, theirs):
        outcome, note = "equal", ""
    elif mode.startswith(("I", "F")):
        outcome, note = "wide grey", ""
    else:
        apart = np.abs(ours.astype(int) - theirs).max() if ours.shape == theirs.shape else "shape"
        outcome, note = "another picture", f"{mode}, {apart}"
    if not _regions_agree(data, ours):
        outcome, note = "another picture", "a region differs from the whole"
    return {"format": kind, "outcome": outcome, "note": note}


def _by_pillow(data: bytes) -> tuple[str, str, np.ndarray | None, str]:
    """Format, mode, pixels and error."""
    kind, mode = "unknown", ""
    try:
        with Image.open(io.BytesIO(data)) as image:
            kind, mode = str(image.format), image.mode
            if kind in REFUSED - {"FITS"}:
                return kind, mode, None, "not asked"
            return kind, mode, np.asarray(ImageOps.exif_transpose(image).convert("RGB")), ""
    except Exception as error:
        return kind, mode, None, f"{type(error).__name__}: {str(error).partition(' <')[0]}"


def _regions_agree(data: bytes, whole: np.ndarray) -> bool:
    rng = np.random.default_rng(0)
    height, width = whole.shape[:2]
    for number in range(REGIONS):
        left, right = (0, width) if number == 0 else sorted(rng.choice(width + 1, 2, replace=False).tolist())
        top, bottom = (0, height) if number == 0 else sorted(rng.choice(height + 1, 2, replace=False).tolist())
        picture = Picture(data)
        region = picture.region(left, top, right, bottom)
        if picture.shape != whole.shape or not np.array_equal(region, whole[top:bottom, left:right]):
            return False
    return True


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        if sys.argv[2:]:
            jpeg._library = lambda: None  # type: ignore[assignment]
        work()
    else:
        main()
