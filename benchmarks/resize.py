"""What antialiasing the random crop costs, how sharp it leaves an image, and what it does to accuracy.

    uv run python benchmarks/resize.py                # cost and sharpness of each way to resize a crop
    uv run python benchmarks/resize.py --accuracy     # also trains small networks on 33 pixels, three seeds each way

Sharpness is the energy of a Laplacian over that of cv2's area averaging.
"""

import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import cv2
import numpy as np
import sklearn.datasets
import torch
from PIL import Image
from torch import nn

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
from shards import make_imagenet_like

import main as program
from benchmarks.common import installed_versions, last_epoch, parser, record
from benchmarks.images import make_images
from config import resolve
from preprocess import train_transform
from stream import images
from training import step

Resize = Callable[[np.ndarray, int, int], np.ndarray]
SIZES = (224, 128, 64)
SEEDS = (0, 1, 2)
TRAINING = ("--model", "resnet18", "--image_size", "33", "--batch_size", "40", "--num_workers", "0", "--epochs", "4")


def with_cv2(interpolation: int) -> Resize:
    return lambda image, height, width: cv2.resize(image, (width, height), interpolation=interpolation)


def pillow(image: np.ndarray, height: int, width: int) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


WAYS: dict[str, Resize] = {
    "cv2's bilinear, as before": with_cv2(cv2.INTER_LINEAR),
    "ours": images.resize,
    "cv2's area": with_cv2(cv2.INTER_AREA),
    "Pillow's bilinear, antialiased": pillow,
}


def crops_of(files: list[bytes], size: int) -> list[np.ndarray]:
    """The regions that the training transform cuts out of photographs, each uint8 (H, W, 3)."""
    found: list[np.ndarray] = []

    def keep(image: np.ndarray, height: int, width: int) -> np.ndarray:
        found.append(np.ascontiguousarray(image))
        return np.zeros((height, width, 3), np.uint8)

    resize = images.resize
    images.resize = keep  # type: ignore[assignment]
    transform = train_transform(resolve({"dataset": "imagenet1k", "image_size": size}))
    for number, file in enumerate(files):
        transform(file, (0, 0, number))
    images.resize = resize
    return found


def energy(made: list[np.ndarray]) -> float:
    return mean(float(np.square(cv2.Laplacian(image.astype(np.float32), cv2.CV_32F)).mean()) for image in made)


def measure(files: list[bytes], rounds: int) -> list[str]:
    rows = [
        "| pixels | resized by | us a crop: median (min to max) | sharpness | mean difference from Pillow's, of 255 |"
    ]
    rows.append("| --- | --- | --- | --- | --- |")
    for size in SIZES:
        crops, times = crops_of(files, size), {name: list[float]() for name in WAYS}
        for _ in range(rounds):
            for name, resize in WAYS.items():
                started = time.process_time()
                for crop in crops:
                    resize(crop, size, size)
                times[name].append((time.process_time() - started) / len(crops) * 1e6)
        made = {name: [resize(crop, size, size) for crop in crops] for name, resize in WAYS.items()}
        area, reference = energy(made["cv2's area"]), np.array(made["Pillow's bilinear, antialiased"], float)
        for name, took in times.items():
            far = np.abs(np.array(made[name], float) - reference).mean()
            spread = f"{median(took):,.0f} ({min(took):,.0f} to {max(took):,.0f})"
            rows.append(f"| {size} | {name} | {spread} | {energy(made[name]) / area:.2f} | {far:.2f} |")
    return rows


def write_digits(folder: Path) -> None:
    """Every other one of scikit-learn's digits, at 96 pixels with a camera's noise, in class folders."""
    digits, rng = sklearn.datasets.load_digits(), np.random.default_rng(0)
    for number, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        large = cv2.resize(image * (255 / 16), (96, 96), interpolation=cv2.INTER_CUBIC)
        if number % 2:
            continue
        path = folder / ("val" if number % 6 == 0 else "train") / str(label) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), np.clip(large + rng.normal(0, 40, large.shape), 0, 255).astype(np.uint8))


def half(build: Callable[..., Any]) -> Callable[..., Any]:
    """A `build_model` for the first half of a ResNet-18, which learns this in seconds."""

    def built(*arguments: Any) -> Any:
        model = build(*arguments)
        model.layer3 = model.layer4 = nn.Identity()
        model.fc = nn.Linear(128, model.fc.out_features)
        return model

    return built


def accuracies(folder: Path) -> list[str]:
    """Validation top-1 after the last epoch, in %, by set and way to resize."""
    step.build_model = half(step.build_model)  # type: ignore[assignment]
    photographs = make_imagenet_like(
        folder / "photographs", train=800, validation=400, test=0, classes=40, size=(160, 320)
    )
    write_digits(folder / "digits")
    sets = {
        "crops of photographs": ("--dataset", "hf", "--dataset_name", str(photographs)),
        "digits of 96 pixels": ("--dataset", "imagefolder", "--data_dir", str(folder / "digits")),
    }
    rows = ["| set | resized by | top-1 of seeds 0, 1, 2 | mean |", "| --- | --- | --- | --- |"]
    for name, flags in sets.items():
        for way in ("cv2's bilinear, as before", "ours"):
            found = []
            for seed in SEEDS:
                run = folder / f"{name} {way} {seed}"
                images.resize = WAYS[way]  # type: ignore[assignment]
                assert program.main([*flags, *TRAINING, "--seed", str(seed), "--run_dir", str(run)]) == 0
                found.append(100 * float(last_epoch(run)["val_top1"]))
            rows.append(f"| {name} | {way} | {', '.join(f'{top1:.1f}' for top1 in found)} | {mean(found):.1f} |")
    return rows


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--accuracy", action="store_true")
    flags.set_defaults(images=256)
    given = flags.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_images(folder, given.images)
        rows = measure([path.read_bytes() for path in sorted(folder.rglob("*.jpg"))], given.rounds)
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        if given.accuracy:
            rows += ["", *accuracies(folder)]
    set_up = f"Random crops of {given.images} photographs, {given.rounds} rounds in turn, one core."
    record("Resizing random crops", set_up, "\n".join(rows), installed_versions())


if __name__ == "__main__":
    main()
