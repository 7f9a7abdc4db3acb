"""How long a user waits: for --help, for the first step of a run, and for the first step after a resume.

    uv run python benchmarks/startup.py

Each in a process of its own, in turn, once each in every round. The resumed run goes on from the middle of its second
epoch. The set that is streamed lies on this machine, in the form of ImageNet-1K, and is decoded by processes.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
from shards import make_imagenet_like

from benchmarks.common import ROOT, installed_versions, record, spread_of

TARGET_HELP, TARGET_RESUME = 0.5, 1.1  # seconds; and over a fresh start
SMALL = ("--max_samples", "320", "--batch_size", "32", "--epochs", "2", "--log_steps", "1", "--model", "resnet18")


def seconds_to(text: str, *arguments: str) -> float:
    """Until main.py prints a line with this text; then it is killed."""
    started = perf_counter()
    command = [sys.executable, "-u", str(ROOT / "main.py"), *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if text in line:
                found = perf_counter() - started
                process.kill()
                return found
    raise SystemExit(f"main.py {' '.join(arguments)} never printed {text!r}")


def run(*arguments: str) -> None:
    subprocess.run([sys.executable, str(ROOT / "main.py"), *arguments], check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--rounds", type=int, default=7)
    given = flags.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        streamed = make_imagenet_like(folder, train=320, validation=32)
        sets = {
            "digits": (),
            "a streamed set": ("--dataset", "hf", "--dataset_name", str(streamed), "--image_size", "64"),
        }
        found: dict[str, list[float]] = {"--help": []}
        for title, data in sets.items():
            run(*data, *SMALL, "--snapshot_steps", "15", "--keep_snapshots", "9", "--run_dir", str(folder / title))
            found |= {f"{title}: first step": [], f"{title}: first step after a resume": []}
        for number in range(given.rounds):
            found["--help"].append(seconds_to("usage", "--help"))
            for title, data in sets.items():
                fresh = seconds_to("  step ", *data, *SMALL, "--run_dir", str(folder / f"{title} {number}"))
                middle = folder / title / "snapshots" / "step-000000015.safetensors"
                copy = folder / f"{title} {number} again" / "snapshots" / middle.name
                copy.parent.mkdir(parents=True)
                copy.write_bytes(middle.read_bytes())
                resumed = seconds_to("  step ", "--resume_from", str(copy))
                found[f"{title}: first step"].append(fresh)
                found[f"{title}: first step after a resume"].append(resumed)
    record("Start-up", f"{given.rounds} rounds in turn.", rows(found), installed_versions())


def rows(found: dict[str, list[float]]) -> str:
    lines = ["| what | seconds | over a fresh start: median (min to max) | target |", "| --- | --- | --- | --- |"]
    fresh: list[float] = []
    for title, seconds in found.items():
        ratio = target = ""
        if title == "--help":
            target = f"{TARGET_HELP:g} s: {'met' if median(seconds) < TARGET_HELP else 'missed'}"
        elif title.endswith("resume"):
            ratios = [a / b for a, b in zip(seconds, fresh, strict=True)]
            ratio, target = (
                spread_of(ratios),
                f"{TARGET_RESUME:g}: {'met' if median(ratios) <= TARGET_RESUME else 'missed'}",
            )
        else:
            fresh = seconds
        lines.append(f"| {title} | {spread_of(seconds)} | {ratio} | {target} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
