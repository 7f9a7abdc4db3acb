"""Decodes damaged JPEGs, whole and in regions, in a process that must outlive them: `--files 20000` by hand.

    uv run python tests/jpeg_fuzz.py

Small photographs in all forms that libjpeg-turbo gets, with bytes changed anywhere or in the header, cut short, or with
parts put elsewhere: the same ones for the same seed.
"""

import argparse
import multiprocessing
import os
import sys
from collections import Counter
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path

import cv2
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from test_jpeg import OPTIONS, SUBSAMPLING, encode, part_of_a_photograph

from stream import jpeg
from stream.images import UnreadableImage
from stream.pictures import Picture

HEADER_BYTES = 700


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    found = bytearray(data)
    for _ in range(rng.integers(1, 8)):
        most = HEADER_BYTES if rng.random() < 0.5 else len(found)
        at = int(rng.integers(2, max(3, min(most, len(found)))))
        match rng.integers(4):
            case 0:
                found[at] = rng.integers(256)
            case 1:
                found[at] ^= 1 << rng.integers(8)
            case 2:
                start = int(rng.integers(len(found)))
                found[at:at] = found[start : start + int(rng.integers(64))]
            case 3:
                del found[at : at + int(rng.integers(1, 64 if rng.random() < 0.9 else len(found)))]
    return bytes(found) + (jpeg.END_OF_IMAGE if rng.random() < 0.5 else b"")


def decode_all(files: int, seed: int, done: "Synchronized[int]", told: "multiprocessing.Queue[Counter[str]]") -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # OpenCV's libjpeg prints what it thinks of each
    sound = [
        encode(part_of_a_photograph(97, 61), *options, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, sampling)
        for options in OPTIONS.values()
        for sampling in SUBSAMPLING.values()
    ]
    counts: Counter[str] = Counter()
    for number in range(files):
        rng = np.random.default_rng((seed, number))
        data = damaged(sound[number % len(sound)], rng)
        done.value = number
        counts["its planes can be read"] += jpeg.decode_planes(data) is not None
        try:
            picture = Picture(data)
            height, width = picture.shape[:2]
            picture.region(width // 3, height // 4, width // 3 + width // 2 + 1, height // 4 + height // 2 + 1, True)
            counts["a region can be read"] += 1
            _ = picture.pixels
            counts["the whole can be read"] += 1
        except UnreadableImage:
            counts["refused"] += 1
    told.put(counts)


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--files", type=int, default=20000)
    flags.add_argument("--seed", type=int, default=0)
    given = flags.parse_args()
    context = multiprocessing.get_context("spawn")
    done, told = context.Value("q", 0), context.Queue()
    process = context.Process(target=decode_all, args=(given.files, given.seed, done, told))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"file {done.value} of seed {given.seed} ended the process: {process.exitcode}")
    found = ", ".join(f"{count:,} {what}" for what, count in sorted(told.get().items()))
    print(f"{given.files:,} damaged files, decoded by {jpeg.library_path()}: {found}; no crash")


if __name__ == "__main__":
    main()
