"""The names of a set's files, kept beside a run, so that a resume can tell what changed."""

import gzip
import json
import os
from collections import Counter
from pathlib import Path

from stream.files import read_small, write_durably

Inventory = dict[str, tuple[int, str]]  # of each file its images, and what stays the same when it gets another name


def save(folder: Path, digest: str, inventory: Inventory) -> None:
    """Keep an inventory under the digest of its data, unless it is kept. Raises OSError."""
    path = _path(folder, digest)
    if inventory and not os.path.lexists(path):
        path.parent.mkdir(exist_ok=True)
        write_durably(path, gzip.compress(json.dumps(inventory).encode(), 1, mtime=0))


def load(folder: Path, digest: str) -> Inventory:
    """What is kept under a digest; nothing if that cannot be read."""
    try:
        kept = json.loads(gzip.decompress(read_small(_path(folder, digest), most=2**30)))
        return {str(name): (int(images), str(mark)) for name, (images, mark) in kept.items()}
    except (OSError, EOFError, ValueError, TypeError, AttributeError):
        return {}


def _path(folder: Path, digest: str) -> Path:
    return folder / "data" / f"{digest}.json.gz"


def describe_changes(before: Inventory, now: Inventory) -> str:
    """How many images were added, removed and renamed, or lie in files of the same name that changed; in words."""
    gone = {name: before[name] for name in before.keys() - now.keys()}
    new = {name: now[name] for name in now.keys() - before.keys()}
    left, renamed = Counter(mark for _, mark in gone.values()), 0
    for name, (images, mark) in list(new.items()):
        if left[mark]:
            left[mark] -= 1
            renamed += images
            del new[name]
    kept = [(before[name], now[name]) for name in before.keys() & now.keys()]
    added = sum(images for images, _ in new.values()) + sum(max(0, b[0] - a[0]) for a, b in kept)
    removed = sum(gone_images for gone_images, _ in gone.values()) - renamed + sum(max(0, a[0] - b[0]) for a, b in kept)
    other = sum(b[0] for a, b in kept if a[0] == b[0] and a[1] != b[1])
    counts = {"added": added, "removed": removed, "renamed or moved": renamed, "in files that changed": other}
    return ", ".join(f"{count:,} {what}" for what, count in counts.items() if count)
