"""Trains, kills the training with SIGKILL again and again, resumes it, and compares it with one that was left alone.

    uv run python tests/kill_sweep.py --kills 200

Half of the runs train on digits, half on a set that a Hub on this machine serves. Of five kills three come at random
instants and two inside the saving of a snapshot. Every tensor and every line of the logs must be the same.
"""

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from conftest import HUB_PORT
from hub import Hub
from killable import PLACES
from program import TIMEOUT, assert_same_run, environment
from shards import REPO_ID, make_imagenet_like

DIGITS: tuple[object, ...] = ("--max_samples", 160, "--batch_size", 16, "--epochs", 4, "--num_workers", 1, "--ledger")
DIGITS = (*DIGITS, "--snapshot_steps", 3, "--keep_snapshots", 2, "--log_steps", 1)
STREAMED = (*DIGITS, "--dataset", "hf", "--dataset_name", REPO_ID, "--model", "resnet18", "--image_size", 33)
STREAMED = (*STREAMED, "--block_mb", 1)
LONGEST_LIFE = 2.0  # seconds of training before a random kill


def start(*arguments: object, **env: str) -> "subprocess.Popen[str]":
    command = [sys.executable, str(Path(__file__).with_name("killable.py")), *map(str, arguments)]
    return subprocess.Popen(
        command, env=environment(**env), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process: "subprocess.Popen[str]") -> int:
    out, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode in (0, -9), out
    return process.returncode


def live_and_die(line: tuple[object, ...], rng: random.Random, inside: bool) -> bool:
    """One life of a run, and whether it ended in a kill: it may also have come to its end before."""
    if inside:
        return finish(start(*line, KILL_INSIDE=f"{rng.choice(PLACES)}:{rng.choice([1, 2])}")) == -9
    process = start(*line)
    assert process.stdout is not None
    for printed in process.stdout:
        if printed.startswith("schedule"):
            time.sleep(rng.uniform(0, LONGEST_LIFE))
            process.kill()
            break
    return finish(process) == -9


def sweep(flags: tuple[object, ...], folder: Path, kills: int, seed: int) -> int:
    """Kill runs `kills` times, compare each one that came to its end; returns how many did."""
    rng, killed, runs = random.Random(seed), 0, 0
    whole = folder / "whole"
    assert finish(start(*flags, "--run_dir", whole)) == 0
    while killed < kills:
        runs += 1
        line = (*flags, "--run_dir", folder / f"run{runs}", "--resume_from", "auto")
        while killed < kills and live_and_die(line, rng, inside=killed % 5 > 2):
            killed += 1
            print(f"kill {killed} of {kills}", flush=True)
        assert finish(start(*line)) == 0
        assert_same_run(folder / f"run{runs}", whole)
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_imagenet_like(folder / "hub", files=30, rows_per_group=10)
        with Hub(folder / "hub", port=HUB_PORT):
            streamed = sweep(STREAMED, folder / "streamed", given.kills // 2, given.seed)
        digits = sweep(DIGITS, folder / "digits", given.kills - given.kills // 2, given.seed)
    print(
        f"{given.kills} kills of {digits} runs on digits and {streamed} on the stream: every tensor and every log line "
        "equal to the run that was left alone"
    )


if __name__ == "__main__":
    main()
