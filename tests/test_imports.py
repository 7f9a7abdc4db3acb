"""What a run has not imported when its first step is taken, because others need it, or later moments."""

import subprocess
import sys
from pathlib import Path

from program import ROOT, TIMEOUT, environment

NEEDED_LATER = {"matplotlib", "onnx", "onnxruntime", "sklearn", "tensorboard", "timm", "torchvision", "transformers"}
OF_STREAMS = {"datasets", "pandas", "albumentations", "scipy"}
PROGRAM = """
import sys
import train
from main import main

def first(run, *rest):
    next(iter(run.data.train))
    print("there:", *sorted({name.partition(".")[0] for name in sys.modules} & set(HEAVY)))
    sys.exit()

HEAVY, arguments = sys.argv[1].split(","), sys.argv[2:]
train.train_epoch = first
main(arguments)
"""


def there(*arguments: str) -> set[str]:
    """The heavy packages that main.py has imported when its first batch is there."""
    heavy = ",".join(NEEDED_LATER | OF_STREAMS)
    command = [sys.executable, "-c", PROGRAM, heavy, *arguments, "--model", "resnet18", "--batch_size", "16"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=TIMEOUT)
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("there:"))
    return set(line.split()[1:])


def test_a_run_on_digits_imports_no_library_but_its_own(tmp_path: Path) -> None:
    assert there("--max_samples", "64", "--run_dir", str(tmp_path / "run")) == set()


def test_a_streamed_run_imports_no_library_that_later_moments_need(image_set: Path, tmp_path: Path) -> None:
    data = ("--dataset", "hf", "--dataset_name", str(image_set), "--image_size", "32", "--max_samples", "64")
    assert there(*data, "--num_workers", "1", "--run_dir", str(tmp_path / "run")) & NEEDED_LATER == set()
