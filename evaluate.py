#!/usr/bin/env python3
"""Evaluate a trained model, on its run's own validation set or on any other images.

    python evaluate.py runs/NAME                                       # its own validation set
    python evaluate.py runs/NAME --which ema --temperature             # the averaged weights; calibrate them
    python evaluate.py runs/NAME --dataset imagefolder --data_dir set  # other images, whose classes go by name
    python evaluate.py microsoft/resnet-50 --dataset imagenet1k        # a model of the Hub
    python evaluate.py resnet50.pth --dataset imagenet_v2 --data_dir imagenetv2-matched-frequency-format-val
    python evaluate.py resnet50.pth --dataset imagefolder --data_dir imagenet --real_labels real.json
    torchrun --nproc_per_node 8 evaluate.py runs/NAME                  # the same figures, sooner

The figures are printed, and written to evaluation/DATA/ in the run's folder, or here for a model that is no run's:
evaluation.json, confusion.csv, predictions.csv and pictures. Exit status: 0 done; 2 bad arguments, or a run whose own
data changed; 3 data missing, unreachable or too corrupt, or of other classes than the model's; 5 no usable snapshot,
or no room for the files; 128 + signal after a signal.
"""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import beforehand
from checks import typed
from config import OTHER_DATA, Config, overrides
from errors import run_front_door
from flags import add_switch, door_parser
from registry import load_extensions
from results.settings import FLAGS

OF_MAIN = {"evaluate", "resume_from", "run_dir", "use_pretrained", "model", "override", "recipe", "debug", "quiet"}


def main(argv: Sequence[str] | None = None) -> int:
    """The front door. Returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return run_front_door(lambda: _run(arguments), debug="--debug" in arguments)


def _run(argv: list[str]) -> None:
    load_extensions()
    evaluate(parse(argv))


def parse(argv: list[str]) -> dict[str, Any]:
    """The flags that were given, by name, and `source`. Raises UsageError."""
    parser = door_parser(Config, "evaluate.py", __doc__ or "", FLAGS)
    group = parser.add_argument_group("evaluation")
    unset: dict[str, Any] = {"default": argparse.SUPPRESS}
    text = "folder for the files (default: evaluation/DATA in the run's folder, or here)"
    group.add_argument("--out", metavar="DIR", type=os.path.expanduser, help=text, **unset)
    text = "fit the temperature that calibrates the model best, and tell what it changes"
    add_switch(group, "temperature", text)
    text = "ImageNet's validation images: ReaL labels, a JSON list; a prediction among an image's labels is right"
    group.add_argument("--real_labels", metavar="FILE", type=os.path.expanduser, help=text, **unset)
    text = "let the model answer all of its classes where other data than its run's has only some of them"
    add_switch(group, "all_classes", text)
    return vars(parser.parse_args(argv))


def flags_of_main(given: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The flags of this door for `main.py --evaluate`, which evaluates the newest snapshot of a run."""
    own = {name: value for name, value in given.items() if name in FLAGS} | {"source": source}
    unused = typed(given).keys() - FLAGS - OF_MAIN - (set() if "resume_from" in given else {"image_size"})
    if unused:
        told = ", ".join(f"--{name}" for name in typed(given) if name in unused)
        print(f"note      {told}: not used in an evaluation", flush=True)
    if "model" in given:
        own["model"] = given["model"]
    if "resume_from" in given:
        own |= {"which": "last", "any_data": OTHER_DATA in given.get("override", ())}
        return own | {name: value for name, value in overrides(given).items() if name in FLAGS}
    if "image_size" in given:
        own.setdefault("eval_size", given["image_size"])
    return own


def evaluate(given: Mapping[str, Any]) -> None:
    """Evaluate the `source` among these flags, and tell and write what comes of it. Raises UserError, Interrupted."""
    beforehand.look_at_source(given, with_data=True)
    from results import evaluation

    evaluation.evaluate(given)


if __name__ == "__main__":
    sys.exit(main())
