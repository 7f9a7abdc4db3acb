"""How long a user waits: for --help, for a first step, for one after a resume, and to hear that something is wrong.

    uv run python benchmarks/startup.py
    uv run python benchmarks/startup.py --only refusals

Each in a process of its own, in turn, once each in every round. The resumed run goes on from the middle of its second
epoch. The set that is streamed lies on this machine, in the form of ImageNet-1K, and is decoded by processes. What is
imported before a first step is told by Python's `-X importtime`, which slows all of it alike; what torch imports, then
or later, is torch's own. Refusals are of what flags and folders can tell; the last ones need PyTorch or the data, and
have no target.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from time import perf_counter

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
from shards import make_imagenet_like

from benchmarks.common import ROOT, installed_versions, record, spread_of

TARGET_HELP, TARGET_RESUME, TARGET_REFUSAL = 0.1, 1.1, 3.0  # seconds; over a fresh start; seconds
TARGET_IMPORTS = 1.0  # over the import of torch
IMPORTED = re.compile(r"import time: +(\d+) \| +(\d+) \| (\s*)(\S+)")  # microseconds alone, with what it imports; name
REFUSALS = {  # NONE is a path that is not there, RUN a run of digits
    "a value out of bounds": "main.py --epochs 0",
    "an unknown flag": "main.py --batch-size 64",
    "a flag without effect": "main.py --amp_dtype bf16",
    "a batch that passes cannot share": "main.py --batch_size 64 --accumulate_steps 3",
    "an unknown recipe": "main.py --recipe resnet50-a4",
    "an augmentation that is none": "main.py --auto_augment ra-x9",
    "a missing image folder": "main.py --data_dir NONE",
    "a missing folder of parquet files": "main.py --dataset hf --dataset_name NONE",
    "a missing file of weights": "main.py --use_pretrained NONE.pth",
    "a missing lr_finder.json": "main.py --lr_from NONE",
    "a missing file of class weights": "main.py --class_weights NONE",
    "a run folder that cannot be written": "main.py --run_dir /proc/no_such_run",
    "a run folder that is taken": "main.py --run_dir RUN",
    "a missing run to resume": "main.py --resume_from NONE",
    "a resume with other settings": "main.py --resume_from RUN --epochs 9",
    "ranks without a launcher": "WORLD_SIZE=2 main.py",
    "the finder: a missing image folder": "run_lr_finder.py --data_dir NONE",
    "evaluate.py: a missing source": "evaluate.py NONE.pth",
    "evaluate.py: a missing image folder": "evaluate.py RUN --data_dir NONE",
    "predict.py: a missing image": "predict.py RUN NONE.jpg",
    "export.py: a folder in use": "export.py RUN --to timm --out RUN",
}
LATER = {  # what only PyTorch or the data can tell
    "a GPU that is not there": "main.py --device cuda:99",
    "a batch larger than the set": "main.py --batch_size 1600",
}
SMALL = ("--max_samples", "320", "--batch_size", "32", "--epochs", "2", "--log_steps", "1", "--model", "resnet18")


@dataclass
class Row:
    """Seconds of each round; the target is of these, or of their ratio to the seconds of another row."""

    title: str
    target: float | None = None
    over: "Row | None" = None
    seconds: list[float] = field(default_factory=list)

    def __str__(self) -> str:
        ratio = target = ""
        judged = self.seconds
        if self.over is not None:
            judged = [a / b for a, b in zip(self.seconds, self.over.seconds, strict=True)]
            ratio = f"{spread_of(judged)} of: {self.over.title}"
        if self.target is not None:
            target = f"{self.target:g}: {'met' if median(judged) <= self.target else 'missed'}"
        return f"| {self.title} | {spread_of(self.seconds)} | {ratio} | {target} |"


def seconds_to(text: str, *arguments: str, options: tuple[str, ...] = ("-u",), errors: Path | None = None) -> float:
    """Until main.py, run by Python with `options`, prints a line with this text, of every step; then it is killed."""
    command = [sys.executable, *options, str(ROOT / "main.py"), "--verbose", *arguments]
    with open(errors or os.devnull, "w") as file:
        started = perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=file, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if text in line:
                    found = perf_counter() - started
                    process.kill()
                    return found
    raise SystemExit(f"main.py {' '.join(arguments)} never printed {text!r}")


def seconds_of_imports(told: str) -> tuple[float, float]:
    """Of what `-X importtime` told: the import of torch, and all that neither it nor another part of torch imports."""
    own = beyond = 0.0
    parents: list[str] = []  # the modules that import the one that a line is about, which lines behind it name
    for alone, together, indent, name in reversed(IMPORTED.findall(told)):
        del parents[len(indent) // 2 :]
        parents.append(name.partition(".")[0])
        if name == "torch":
            own = int(together) / 1e6
        if "torch" not in parents:
            beyond += int(alone) / 1e6
    return own, beyond


def seconds_to_refusal(line: str, none: Path, run: Path) -> float:
    """Until a front door that refuses has ended; SystemExit if it does not refuse in one line."""
    words = line.replace("NONE", str(none)).replace("RUN", str(run)).split()
    environment = dict(words.pop(0).split("=") for _ in range("=" in words[0]))
    started = perf_counter()
    command = [sys.executable, str(ROOT / words[0]), *words[1:]]
    done = subprocess.run(command, env={**os.environ, **environment}, cwd=none.parent, capture_output=True, text=True)
    found = perf_counter() - started
    if done.returncode not in (2, 3, 5) or not done.stderr.startswith("error: "):
        raise SystemExit(f"{line} is not refused: {done.stderr}")
    return found


def time_refusals(rounds: int, folder: Path) -> None:
    """Append the table of refusals to RESULTS.md."""
    trained = folder / "refusing"
    run("--max_samples", "64", "--epochs", "1", "--run_dir", str(trained))
    found: dict[str, list[float]] = {title: [] for title in (*REFUSALS, *LATER)}
    for _ in range(rounds):
        for title, line in (REFUSALS | LATER).items():
            found[title].append(seconds_to_refusal(line, folder / "none", trained))
    lines = ["| what is wrong | seconds: median (min to max) | target |", "| --- | --- | --- |"]
    for title, seconds in found.items():
        outcome = "met" if max(seconds) <= TARGET_REFUSAL else "missed"
        target = f"{TARGET_REFUSAL:g} s each time: {outcome}" if title in REFUSALS else ""
        lines.append(f"| {title} | {spread_of(seconds)} | {target} |")
    record("Time to a refusal", f"{rounds} rounds in turn.", "\n".join(lines), installed_versions())


def run(*arguments: str) -> None:
    subprocess.run([sys.executable, str(ROOT / "main.py"), *arguments], check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--rounds", type=int, default=7)
    flags.add_argument("--only", choices=("starts", "refusals"))
    given = flags.parse_args()
    with tempfile.TemporaryDirectory() as name:
        if given.only != "refusals":
            time_starts(given.rounds, Path(name))
        if given.only != "starts":
            time_refusals(given.rounds, Path(name))


def time_starts(rounds: int, folder: Path) -> None:
    """Append the table of starts to RESULTS.md."""
    streamed = make_imagenet_like(folder, train=320, validation=32)
    sets = {
        "digits": (),
        "a streamed set": ("--dataset", "hf", "--dataset_name", str(streamed), "--image_size", "32"),
    }
    help_row = Row("--help", TARGET_HELP)
    table = [help_row]
    for title, data in sets.items():
        run(*data, *SMALL, "--snapshot_steps", "15", "--keep_snapshots", "9", "--run_dir", str(folder / title))
        fresh, torch = Row(f"{title}: first step"), Row(f"{title}: import of torch")
        resumed = Row(f"{title}: first step after a resume", TARGET_RESUME, fresh)
        table += [fresh, resumed, torch, Row(f"{title}: other imports before a step", TARGET_IMPORTS, torch)]
    for number in range(rounds):
        help_row.seconds.append(seconds_to("usage", "--help"))
        for place, (title, data) in enumerate(sets.items()):
            fresh, resumed, torch, others = table[4 * place + 1 :][:4]
            new, told = folder / f"{title} {number}", folder / "importtime"
            fresh.seconds.append(seconds_to("  step ", *data, *SMALL, "--run_dir", f"{new}"))
            middle = folder / title / "snapshots" / "step-000000015.safetensors"
            copy = Path(f"{new} again") / "snapshots" / middle.name
            copy.parent.mkdir(parents=True)
            copy.write_bytes(middle.read_bytes())
            resumed.seconds.append(seconds_to("  step ", "--resume_from", str(copy)))
            timed = (*data, *SMALL, "--run_dir", f"{new} timed")
            seconds_to("  step ", *timed, options=("-u", "-X", "importtime"), errors=told)
            for row, seconds in zip((torch, others), seconds_of_imports(told.read_text()), strict=True):
                row.seconds.append(seconds)
    lines = ["| what | seconds | ratio: median (min to max) | target |", "| --- | --- | --- | --- |", *map(str, table)]
    record("Start-up", f"{rounds} rounds in turn.", "\n".join(lines), installed_versions())


if __name__ == "__main__":
    main()
