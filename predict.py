#!/usr/bin/env python3
"""Tell the classes of images with a trained model.

    python predict.py runs/NAME photo.jpg                         # a table: class names and probabilities
    python predict.py runs/NAME photos/ --csv classes.csv         # a folder of any size
    python predict.py runs/NAME 'photos/*.jpg' --json             # for programs, on stdout
    python predict.py runs/NAME photos/ --grid grid.png --heatmap # a picture, with what the classes were seen in
    python predict.py microsoft/resnet-50 photo.jpg               # any model source: see evaluate.py

Files that cannot be read are named on stderr and passed over. Exit status: 0 done; 2 bad arguments; 3 the images or the
weights are missing or cannot be read; 5 no usable snapshot, or no room to write.
"""

import argparse
import csv
import io
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import beforehand
from checks import require_effect
from config import Config, resolve
from errors import UsageError, complain, printable, run_front_door
from flags import add_switch, door_parser
from registry import load_extensions

if TYPE_CHECKING:
    from results.prediction import Prediction
    from training.predictor import Predictor

OWN = ("source", "images", "which", "model", "top", "json", "csv", "grid", "heatmap")
TAKEN = (
    *("eval_size", "eval_interpolation", "eval_crop_pct", "tta", "batch_size", "num_workers", "device"),
    *("amp", "amp_dtype", "network_patience"),
)
MOST_IN_GRID = 60


def main(argv: Sequence[str] | None = None) -> int:
    """The front door. Returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return run_front_door(lambda: _run(arguments), debug="--debug" in arguments)


def parse(argv: list[str]) -> dict[str, Any]:
    """The flags that were given, by name. Raises UsageError."""
    parser = door_parser(Config, "predict.py", __doc__ or "", TAKEN, "IMAGE|FOLDER|PATTERN...")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files, folders of them, or quoted patterns")
    group, unset = parser.add_argument_group("output"), argparse.SUPPRESS
    group.add_argument("--top", type=int, default=5, metavar="N", help="classes told of each image (default: 5)")
    file: dict[str, Any] = {"metavar": "FILE", "type": os.path.expanduser, "default": unset}
    add_switch(group, "json", "print one JSON list instead of a table")
    group.add_argument("--csv", help="also write image, rank, class, index, probability", **file)
    group.add_argument("--grid", help=f"also draw up to {MOST_IN_GRID} captioned images", **file)
    add_switch(group, "heatmap", "with --grid: show where the class is seen")
    given = vars(parser.parse_args(argv))
    if given["top"] < 1:
        raise UsageError(f"--top {given['top']} is too small; it must be at least 1")
    if given.get("heatmap") and "grid" not in given:
        raise UsageError("--heatmap is laid over the images of --grid FILE; give that too")
    if "grid" in given and Path(given["grid"]).suffix != ".png":
        raise UsageError(f"--grid {given['grid']} is a PNG picture; end its name with .png")
    return given


def _run(argv: list[str]) -> None:
    load_extensions()
    given = parse(argv)
    from results.places import find_images

    paths = find_images(given["images"])
    _require_places(given)
    beforehand.look_at_source(given)
    flags = {name: value for name, value in given.items() if name not in OWN}
    about_images = {"dataset": "imagefolder", "data_dir": ".", "streams": 1, "batch_size": 64} | flags
    asked = resolve(about_images)
    for line in require_effect(asked, flags):
        complain(line)
    patience = 60 * asked.network_patience
    from distributed import init
    from results.prediction import image_loader, predictions
    from training.predictor import build_predictor
    from training.sources import open_source

    source = open_source(given["source"], given.get("which"), given.get("model", "auto"), patience)
    config = resolve({name: value for name, value in source.settings.items() if value is not None} | about_images)
    predictor = build_predictor(source.build(), config, init(config.device))
    loader = image_loader(paths, config, predictor.device)
    found = predictions(predictor, loader, given["top"])
    classes = source.classes or [str(number) for number in range(source.count)]
    wanted = len(paths) if "csv" in given else MOST_IN_GRID if "grid" in given else 0
    kept: list[Prediction] = []
    count = 0
    for one in _told(found, classes, given):
        count += 1
        if count <= wanted:
            kept.append(one)
    if "csv" in given:
        _write_csv(kept, classes, Path(given["csv"]))
    if "grid" in given:
        _draw(predictor, kept[:MOST_IN_GRID], classes, config, Path(given["grid"]), bool(given.get("heatmap")))
        if count > MOST_IN_GRID:
            print(f"grid      the first {MOST_IN_GRID} of {count:,} images", file=sys.stderr)


def _require_places(given: dict[str, Any]) -> None:
    """Make the folders of the files that are to be written, before anything long. Raises UsageError."""
    from results.places import make_folder

    for name in given.keys() & {"csv", "grid"}:
        path = Path(given[name])
        if path.is_dir():
            raise UsageError(f"--{name} {printable(str(path))} is a folder; give a file")
        make_folder(path.parent, f"--{name}")


def _told(found: "Iterator[Prediction]", classes: Sequence[str], given: dict[str, Any]) -> "Iterator[Prediction]":
    """Print predictions as they come, and pass them on."""
    from results.prediction import as_json, as_line
    from stream.files import strict_json

    begun = False
    for one in found:
        if given.get("json"):
            print(",\n" if begun else "[", strict_json(as_json(one, classes)), sep="", end="", flush=True)
        else:
            print(as_line(one, classes), flush=True)
        begun = True
        yield one
    if given.get("json"):
        print("]")


def _write_csv(found: "Sequence[Prediction]", classes: Sequence[str], path: Path) -> None:
    from stream.files import write_durably

    text = io.StringIO()
    rows = csv.writer(text)
    rows.writerow(["image", "rank", "class", "index", "probability"])
    for one in found:
        for rank, (index, share) in enumerate(zip(one.indices, one.probabilities, strict=True), 1):
            rows.writerow([one.image, rank, classes[index], index, f"{share:.6f}"])
    try:
        data = text.getvalue().encode(errors="surrogateescape")
    except UnicodeEncodeError:  # a class is named by what is no character, and stands for no byte of a file's name
        data = text.getvalue().encode(errors="backslashreplace")
    write_durably(path, data)


def _draw(
    predictor: "Predictor",
    found: "Sequence[Prediction]",
    classes: Sequence[str],
    config: Config,
    path: Path,
    heatmap: bool,
) -> None:
    """Draw images with their captions; a picture that cannot be drawn is warned of."""
    import numpy as np
    import torch

    from results.grid import plot_predictions
    from results.heatmap import heatmaps
    from results.prediction import image_loader
    from visualization import drawn

    def draw() -> None:
        images: list[np.ndarray] = []
        maps: list[torch.Tensor] = []
        for batch in image_loader([Path(one.image) for one in found], config, predictor.device):
            if heatmap:
                likeliest = [found[number].indices[0] for number in batch.ids.tolist()]
                maps += heatmaps(predictor, batch.images, torch.tensor(likeliest, device=predictor.device)).cpu()
            images += [*batch.images.cpu().numpy()]
        plot_predictions(images, found, classes, path, maps)

    if drawn(draw, path.parent):
        print(f"grid      {printable(str(path))}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
