"""Names from data, in an ASCII shell with a notebook's MPLBACKEND: each door makes its pictures and pages of them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from program import ROOT, environment

NAMES = ["$x_$y", "$^$", "$\\frac{", "caf\xe9", "猫", "two\nlines", "\x1b[31mred", "\u202ertl", "<b>&\"'", "a" * 300]
DOORS = """
import io, json, os, sys
import numpy as np
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as Pillow

import evaluate, main, predict, run_lr_finder

names, trackers = json.loads(sys.argv[1]), sys.argv[2]
run = os.fsdecode(b"caf\\xe9 $x_$y/run")
os.makedirs(data := "$x_$y set")
os.makedirs(os.path.dirname(run))
def png(seed):
    held = io.BytesIO()
    Pillow.fromarray(np.random.default_rng(seed).integers(0, 255, (12, 12, 3), np.uint8)).save(held, "png")
    return {"bytes": held.getvalue(), "path": None}
features = Features({"image": Image(), "label": ClassLabel(names=names)})
labels = [*range(len(names))] * 4
for split in ("train", "validation"):
    held = Dataset.from_dict({"image": [png(seed) for seed in range(len(labels))], "label": labels}, features)
    held.to_parquet(f"{data}/{split}-0.parquet")
open(b"$x_$y set/\\xe9 $^$\\n.png", "wb").write(png(1)["bytes"])
small = ["--dataset", "hf", "--dataset_name", data, "--model", "resnet20", "--image_size", "16", "--batch_size", "16"]
small += ["--num_workers", "0", "--streams", "2"]
for door, *flags in (
    (main, *small, "--epochs", "1", "--plot_schedule", "--run_dir", run, "--track", trackers),
    (main, "--resume_from", run, "--override", "epochs=2"),
    (main, "--compare", run, run),
    (evaluate, run, "--temperature"),
    (predict, run, data, "--grid", run + "-grid.png", "--csv", run + "-told.csv"),
    (run_lr_finder, *small, "--lr_iter", "16", "--run_dir", run + "-finder"),
):
    print("STATUS", door.__name__, door.main(flags), flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline"])
def test_no_name_ends_a_door_or_keeps_a_picture_from_being_drawn(backend: str, tmp_path: Path) -> None:
    ascii_only = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    env = environment(**ascii_only, MPLBACKEND=backend, PYTHONPATH=str(ROOT))
    command = [sys.executable, "-c", DOORS, json.dumps(NAMES), "tensorboard"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, timeout=600)
    out, err = done.stdout.decode("ascii"), done.stderr.decode("ascii")
    statuses = [line.split()[2] for line in out.splitlines() if line.startswith("STATUS")]
    assert (done.returncode, statuses[:5]) == (0, ["0"] * 5), err
    assert statuses[5] in ("0", "4")  # noise may suggest no rate
    assert [line for line in err.splitlines() if "warning" in line or "Traceback" in line] == []
    pictures = {path.name for path in tmp_path.rglob("*.png") if path.stat().st_size > 1000}
    drawn = {"samples", "curves", "schedule", "confusion", "classes", "reliability", "hardest", "run-grid", "lr_finder"}
    assert {f"{name}.png" for name in drawn} - pictures == set()
    assert len({*tmp_path.rglob("report.html"), *tmp_path.rglob("compare.html")}) == 2
