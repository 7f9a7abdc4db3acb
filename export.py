#!/usr/bin/env python3
"""Export a trained model to other libraries, checked against the model before it is called done.

    python export.py runs/NAME --to transformers --out exported        # AutoModelForImageClassification loads it
    python export.py runs/NAME --to timm --out exported                # timm.create_model("local-dir:exported")
    python export.py runs/NAME --to torchvision --out exported         # safetensors with torchvision's names
    python export.py runs/NAME --to onnx --out exported                # any image in, probabilities out
    python export.py runs/NAME --to onnx --precision int8 --out exported
    python export.py runs/NAME --to timm --out exported --push_to_hub NAME/MODEL --dry_run

SOURCE is a run folder, a snapshot, a folder exported before, a transformers or timm folder or Hub id, or a file of
weights. Exit status: 0 done; 1 the export does not compute what the model does; 2 bad arguments; 3 source missing, or
the Hub unreachable or refusing; 5 no usable snapshot, or no room to write.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import beforehand
from config import Config
from errors import UsageError, printable, run_front_door
from flags import add_switch, door_parser
from registry import load_extensions

FORMATS = ("transformers", "timm", "torchvision", "onnx", "torch_export")


def main(argv: Sequence[str] | None = None) -> int:
    """The front door. Returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return run_front_door(lambda: _run(arguments), debug="--debug" in arguments)


def parse(argv: list[str]) -> argparse.Namespace:
    """The flags. Raises UsageError."""
    made = door_parser(Config, "export.py", __doc__ or "", operands="--to FORMAT --out DIR")
    group = made.add_argument_group("export")
    group.add_argument("--to", required=True, choices=FORMATS, help="the library that is to load it")
    text = "the folder to write; an earlier export is replaced"
    group.add_argument("--out", required=True, metavar="DIR", type=os.path.expanduser, help=text)
    group.add_argument(
        "--precision", default="fp32", choices=("fp32", "fp16", "int8"), help="of the weights; int8 is for onnx"
    )
    group.add_argument("--license", metavar="ID", help="licence of the weights, for the card, such as apache-2.0")
    group.add_argument("--push_to_hub", metavar="ID", help="send the export to this repository of the Hub")
    add_switch(group, "private", "make that repository private", default=False)
    add_switch(group, "dry_run", "tell what would be sent, and send nothing", default=False)
    return made.parse_args(argv)


def _run(argv: list[str]) -> None:
    load_extensions()
    given = parse(argv)
    if given.private and not given.push_to_hub:
        raise UsageError("--private goes with --push_to_hub")
    out = Path(given.out)
    if out.exists() and Path(given.source).exists() and out.samefile(given.source):
        raise UsageError("--out is the source itself; give another folder")

    beforehand.look_at_source(vars(given))
    from results import publishing
    from results.places import require_free, require_precision

    if given.push_to_hub:
        publishing.require_repo_id(given.push_to_hub)
    require_free(out)
    require_precision(given.to, given.precision)
    from results.exporting import export
    from results.formats import Order, require_place
    from training.sources import open_source

    source = open_source(given.source, getattr(given, "which", None), getattr(given, "model", "auto"))
    require_place(source, given.to, given.precision)
    print(f"source    {printable(source.told)}", flush=True)
    order = Order(source, given.to, out, given.precision, given.license, given.push_to_hub)
    export(order, lambda line: print(line, flush=True))
    print(f"exported  {out}: {', '.join(sorted(path.name for path in out.iterdir()))}", flush=True)
    if given.dry_run:
        print(*publishing.describe(out, given.push_to_hub), sep="\n")
    elif given.push_to_hub:
        print(f"pushed    {publishing.push(out, given.push_to_hub, given.private)}")


if __name__ == "__main__":
    sys.exit(main())
