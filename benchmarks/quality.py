"""What --cache_format planes and jpeg do to pixels, and to the accuracy of small networks.

    uv run python benchmarks/quality.py                # crops of what is kept, against crops of the original
    uv run python benchmarks/quality.py --accuracy     # also trains on 64 pixels from each form, three seeds each

Crops are made with the same seeds. The edges of a training crop are whole pixels, and those of what is kept are other
ones, so crops whose edges lie between pixels, the same in both, are compared as well. Sharpness is the energy of a
Laplacian over that of the original's crops. The small networks get ImageNet's proportions: sides of 107 to 143 pixels,
as 375 to 500, a short side of 73 kept, as 256, and crops of 64, as 224. Half a ResNet-18 is trained on 1,200 images of
40 classes for 4 epochs, and evaluated on 1,000 that are kept likewise, and on these as originals.
"""

import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import cv2
import numpy as np
import torch
from PIL import Image

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
from shards import make_imagenet_like

from benchmarks.common import installed_versions, last_epoch, parser, record
from benchmarks.images import CLASSES, draw, encode
from benchmarks.stream import Traffic
from stream.images import decode, resize
from stream.kept import reduce
from stream.pipelines import centre_crop, resized_crop

SIZE = 224
Crop = Callable[[bytes, int], np.ndarray]  # an encoded image and its number -> uint8 (SIZE, SIZE, 3)
SEEDS = (0, 1, 2)
KEPT: dict[str, tuple[str, ...]] = {
    "original": ("--cache_format", "original"),
    "jpeg": ("--cache_format", "jpeg", "--cache_short_side", "73"),
    "planes": ("--cache_format", "planes", "--cache_short_side", "73"),
}
DATA = ("--dataset", "imagenet1k", "--num_workers", "0")
TRAINING = ("--model", "resnet18", "--image_size", "64", "--batch_size", "40", "--epochs", "4")


def uncoded(encoded: bytes, short_side: int) -> bytes:
    """What `reduce` makes, but without loss."""
    pixels = decode(encoded)
    height, width = (round(side * short_side / min(pixels.shape[:2])) for side in pixels.shape[:2])
    return bytes(cv2.imencode(".png", cv2.cvtColor(resize(pixels, height, width), cv2.COLOR_RGB2BGR))[1])


FORMS: tuple[tuple[str, int, Callable[[bytes, int], bytes]], ...] = (
    ("planes", 256, lambda encoded, short_side: reduce(encoded, short_side, as_planes=True)),
    ("jpeg", 256, reduce),
    ("pixels, without loss", 256, uncoded),
    ("jpeg", 400, reduce),
)


def crop_between_pixels(encoded: bytes, number: int) -> np.ndarray:
    """A random square in place, of 8 to 100 % of the largest one's area, whose edges are the same in any size."""
    image, rng = Image.fromarray(decode(encoded)), np.random.default_rng(number)
    side = min(image.size) * rng.uniform(0.08, 1) ** 0.5
    left, top = ((whole - side) * rng.random() for whole in image.size)
    box = (left, top, left + side, top + side)
    return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BILINEAR, box))


def crops() -> dict[str, Crop]:
    train, evaluation = resized_crop(SIZE, "fast"), centre_crop(256, SIZE, "fast")
    return {
        "training": lambda encoded, number: train(encoded, (0, 0, number), False),
        "training, edges between pixels": crop_between_pixels,
        "evaluation": lambda encoded, number: evaluation(encoded, (0, 0, number), False),
    }


def pixels(files: list[bytes]) -> list[str]:
    from benchmarks.resize import energy

    rows = [
        "| kept as | short side | larger photographs | crop | mean difference, of 255 | root mean square | sharpness |"
    ]
    rows.append("|" + " --- |" * 7)
    sides = [min(decode(file).shape[:2]) for file in files]
    for form, short, keep in FORMS:
        kept = {number: keep(file, short) for number, file in enumerate(files) if sides[number] > short}
        for name, crop in crops().items():
            found = [crop(stored, number) for number, stored in kept.items()]
            originals = [crop(files[number], number) for number in kept]
            apart = np.array(found, float) - np.array(originals, float)
            figures = f"{np.abs(apart).mean():.1f} | {np.square(apart).mean() ** 0.5:.1f}"
            sharpness = f"{energy(found) / energy(originals):.2f}"
            rows.append(f"| {form} | {short} | {len(kept)} | {name} | {figures} | {sharpness} |")
    return rows


def accuracies(folder: Path) -> list[str]:
    """Top-1 after the last epoch, in %, by what is kept: of images kept likewise, and of originals.

    What it imports reads HF_ENDPOINT.
    """
    import evaluate
    import main as program
    from benchmarks.resize import half
    from training import sources, step

    step.build_model = sources.build_model = half(step.build_model)  # type: ignore[assignment]
    found: dict[str, list[tuple[float, float]]] = {form: [] for form in KEPT}
    for seed in SEEDS:
        for form, flags in KEPT.items():
            run = folder / f"{form} {seed}"
            own = ("--cache_dir", str(folder / form), "--seed", str(seed), "--run_dir", str(run))
            assert program.main([*DATA, *TRAINING, *flags, *own]) == 0
            of_kept = float(last_epoch(run)["val_top1"])
            given = [str(run), "--which", "last", *DATA, "--out", str(run / "originals")]
            assert evaluate.main(given) == 0
            of_originals = json.loads((run / "originals" / "evaluation.json").read_text())["top1"]
            found[form].append((100 * of_kept, 100 * of_originals))
    rows = ["| trained on | evaluated on | top-1 of seeds 0, 1, 2 | mean | above original, of each seed |"]
    rows.append("| --- | --- | --- | --- | --- |")
    for form, pairs in found.items():
        for column, seen in enumerate(dict.fromkeys((form, "original"))):
            ours = [pair[column] for pair in pairs]
            gains = ", ".join(f"{one - pair[0]:+.1f}" for one, pair in zip(ours, found["original"], strict=True))
            rows.append(f"| {form} | {seen} | {', '.join(f'{one:.1f}' for one in ours)} | {mean(ours):.1f} | {gains} |")
    return rows


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--accuracy", action="store_true")
    flags.set_defaults(images=96)
    given = flags.parse_args()
    torch.set_num_threads(1)
    trained: list[str] = []
    if given.accuracy:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            make_imagenet_like(folder, train=1200, validation=1000, test=0, classes=40, size=(107, 143))
            traffic = Traffic(folder)
            os.environ |= {**traffic.env, "HF_HOME": str(folder / "hf")}
            trained = ["", *accuracies(folder)]
            traffic.close()
    rng = np.random.default_rng(0)
    rows = pixels([encode(draw(number % CLASSES, rng)) for number in range(given.images)])
    set_up = f"Crops of {SIZE} pixels of those of {given.images} photographs that are larger than what is kept."
    record("What a cache keeps of pixels and of accuracy", set_up, "\n".join(rows + trained), installed_versions())


if __name__ == "__main__":
    main()
