"""Trains, kills the training with SIGKILL again and again, resumes it, and compares it with one that was left alone.

    uv run python tests/kill_sweep.py --kills 200

Half of the runs train on digits, half on a set that a Hub on this machine serves. Of five kills three come at random
instants and two inside the saving of a snapshot. Every tensor and every line of the logs must be the same.
"""

import argparse
import random
import sys
import tempfile
from multiprocessing.context import ForkServerProcess
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from conftest import HUB_PORT
from hub import Hub
from killable import PLACES, start
from program import TIMEOUT, assert_same_run
from shards import REPO_ID, make_imagenet_like

DIGITS: tuple[object, ...] = ("--max_samples", 160, "--batch_size", 16, "--epochs", 4, "--num_workers", 1, "--ledger")
DIGITS = (*DIGITS, "--snapshot_steps", 3, "--keep_snapshots", 2, "--log_steps", 1)
DIGITS = (*DIGITS, "--ema_decay", 0.9, "--ema_every", 2, "--mixup", 0.2, "--cutmix", 1, "--random_erasing", 0.5)
DIGITS = (*DIGITS, "--auto_augment", "ta_wide", "--repeats", 2)
STREAMED = (*DIGITS, "--dataset", "hf", "--dataset_name", REPO_ID, "--model", "resnet18")
STREAMED = (*STREAMED, "--progressive_size", "32:0,64:0.5")
STREAMED = (*STREAMED, "--block_mb", 1)
LONGEST_LIFE = 1.5  # seconds before a random kill


def finish(process: ForkServerProcess, log: Path) -> int:
    """The exit status of a run that must end well, or by SIGKILL: then -9."""
    process.join(TIMEOUT)
    assert process.exitcode in (0, -9), log.read_text()
    return process.exitcode


def train(*arguments: object, log: Path) -> None:
    assert finish(start(*arguments, log=log), log) == 0


def live_and_die(line: tuple[object, ...], log: Path, rng: random.Random, inside: bool) -> bool:
    """One life of a run, and whether it ended in a kill: it may also have come to its end before."""
    if inside:
        return finish(start(*line, log=log, place=rng.choice(PLACES), time=rng.choice([1, 2])), log) == -9
    process = start(*line, log=log)
    process.join(rng.uniform(0, LONGEST_LIFE))
    process.kill()
    return finish(process, log) == -9


def sweep(flags: tuple[object, ...], folder: Path, kills: int, seed: int) -> int:
    """Kill runs `kills` times, compare each one that came to its end; returns how many did."""
    rng, killed, runs = random.Random(seed), 0, 0
    folder.mkdir(exist_ok=True)
    whole, log = folder / "whole", folder / "log"
    train(*flags, "--run_dir", whole, log=log)
    while killed < kills:
        runs += 1
        line = (*flags, "--run_dir", folder / f"run{runs}", "--resume_from", "auto")
        while killed < kills and live_and_die(line, log, rng, inside=killed % 5 > 2):
            killed += 1
            print(f"kill {killed} of {kills}", flush=True)
        train(*line, log=log)
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
