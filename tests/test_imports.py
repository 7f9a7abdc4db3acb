"""What a run has not imported when its first step is taken, because others need it, or later moments."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from program import ROOT, TIMEOUT, environment
from shards import draw, encode

pytestmark = pytest.mark.slow

OF_STREAMS = {"datasets", "pandas", "scipy"}  # datasets imports the others
HEAVY = OF_STREAMS | {"albumentations", "matplotlib", "onnx", "onnxruntime", "sklearn", "tensorboard", "timm"}
HEAVY |= {"torchinfo", "torchvision", "transformers"}
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
    command = [sys.executable, "-c", PROGRAM, ",".join(HEAVY), *arguments, "--model", "resnet18", "--batch_size", "16"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=TIMEOUT)
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("there:"))
    return set(line.split()[1:])


def test_a_run_on_digits_has_imported_nothing_heavy_but_torch(tmp_path: Path) -> None:
    assert there("--max_samples", "64", "--run_dir", str(tmp_path / "run")) == set()


@pytest.mark.parametrize("kind", ["stream", "folder"])
def test_a_run_on_image_files_leaves_to_the_decoding_processes_what_only_they_need(
    kind: str, image_set: Path, tmp_path: Path
) -> None:
    data = ["--dataset", "hf", "--dataset_name", str(image_set)]
    if kind == "folder":
        for number in range(20):
            path = tmp_path / "photos" / "ab"[number % 2] / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode(draw(number, 10, (40, 50), np.random.default_rng(number))))
        data = ["--dataset", "imagefolder", "--data_dir", str(tmp_path / "photos")]
    found = there(*data, "--image_size", "32", "--num_workers", "1", "--run_dir", str(tmp_path / "run"))
    assert found - OF_STREAMS == set()
    assert ("datasets" in found) == (kind == "stream")


def test_an_evaluation_has_imported_no_optimiser_and_a_prediction_no_pictures() -> None:
    for module, none in (("results.evaluation", HEAVY - {"matplotlib"}), ("results.prediction", HEAVY)):
        program = f"import sys, {module}; print(sorted({none} & sys.modules.keys()))"
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT
        )
        assert done.stdout == "[]\n", (module, done.stderr)
