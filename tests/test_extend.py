"""A run extended from the start of its cooldown is the run that was planned longer, bit for bit."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from program import assert_same_run, cut, ledger, run, steps_kept, tensors, train

from beforehand import BEST, COOLDOWN
from training.snapshot import encode, read

pytestmark = pytest.mark.usefixtures("small_model")

EPOCH = 3  # steps
PLAN = ("--scheduler", "trapezoid", "--warmup_epochs", 1)
SMALL = ("--max_samples", 48, "--batch_size", 16, "--ledger", "--keep_snapshots", 2, "--num_workers", 0, "--save_best")
FLAGS = (*SMALL, *PLAN, "--ema_decay", 0.9)
END, MIDDLE = 0.2, 0.25  # cooldowns of 10 epochs that begin at the end of an epoch, at 24, and amid one, at 22


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("planned")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def ten(folders: Path) -> Path:
    train(*FLAGS, "--cooldown", MIDDLE, "--epochs", 10, "--run_dir", folders / "ten")
    return folders / "ten"


@pytest.fixture(scope="module")
def fifteen(folders: Path) -> Path:
    train(*FLAGS, "--cooldown", MIDDLE, "--epochs", 15, "--run_dir", folders / "fifteen")
    return folders / "fifteen"


def kept_at(folder: Path) -> int:
    return int(read(folder / "snapshots" / COOLDOWN).state["step"])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(*arguments: object) -> str:
    done = run(*arguments)
    assert (done.status, done.err.count("\n")) == (2, 1), done.err
    return done.err


def test_ten_epochs_extended_to_fifteen_are_fifteen_and_the_finished_run_stays_whole(
    ten: Path, fifteen: Path, tmp_path: Path
) -> None:
    source, run = cut(ten, 30, tmp_path / "ten"), tmp_path / "run"
    (source / "data").mkdir()
    (source / "data" / "list").write_text("files")
    (source / "unreadable.csv").write_text("image,reason,epoch\na.jpg,empty,8\nb.jpg,empty,9\n")
    before = contents(source)
    done = train("--resume_from", source, "--extend_epochs", 5, "--run_dir", run)
    assert "cooldown.safetensors: step 22, epoch 8" in done.out
    assert_same_run(run, fifteen)
    assert read(run / "snapshots" / BEST).state["step"] > 22
    assert (kept_at(source), kept_at(fifteen), kept_at(run)) == (22, 34, 34)
    assert contents(source) == before
    assert len(json.loads((run / "config.json").read_text())["launches"]) == 2
    assert (run / "data" / "list").read_text() == "files"
    assert (run / "unreadable.csv").read_text() == "image,reason,epoch\na.jpg,empty,8\n"


def test_a_cooldown_that_begins_where_an_epoch_ends_is_extended_into_a_folder_named_after_the_run(
    tmp_path: Path,
) -> None:
    """And twice."""
    flags = (*FLAGS, "--cooldown", END)
    train(*flags, "--epochs", 10, "--run_dir", tmp_path / "ten")
    train("--resume_from", tmp_path / "ten", "--extend_epochs", 2)
    train("--resume_from", tmp_path / "ten-12_epochs", "--extend_epochs", 3)
    train(*flags, "--epochs", 15, "--run_dir", tmp_path / "fifteen")
    assert_same_run(tmp_path / "ten-12_epochs-15_epochs", tmp_path / "fifteen")
    assert kept_at(tmp_path / "ten") == 8 * EPOCH
    assert "already holds a run" in refused("--resume_from", tmp_path / "ten", "--extend_epochs", 2)


def test_an_extension_goes_on_after_kills_before_and_in_its_own_cooldown(
    ten: Path, fifteen: Path, tmp_path: Path
) -> None:
    """The first cut is of the run to extend, in its cooldown; of the extension, before its first epoch ended."""
    killed = cut(ten, 27, tmp_path / "killed")
    assert steps_kept(killed) == [27]
    train("--resume_from", killed, "--extend_epochs", 5, "--keep_snapshots", 99, "--run_dir", tmp_path / "whole")
    assert steps_kept(tmp_path / "whole")[:2] == [22, 24]
    for step in (22, 39):
        copy = cut(tmp_path / "whole", step, tmp_path / f"cut{step}")
        train("--resume_from", copy)
        assert_same_run(copy, fifteen)


@pytest.mark.slow
def test_a_stream_is_extended_in_mid_epoch(image_set: Path, tmp_path: Path) -> None:
    data = ("--dataset", "hf", "--dataset_name", image_set, "--model", "resnet18", "--image_size", 33, "--block_mb", 1)
    flags = (*data, *FLAGS, "--cooldown", 0.3)
    train(*flags, "--epochs", 3, "--run_dir", tmp_path / "three")
    train("--resume_from", tmp_path / "three", "--extend_epochs", 2, "--run_dir", tmp_path / "run")
    train(*flags, "--epochs", 5, "--run_dir", tmp_path / "five")
    assert kept_at(tmp_path / "three") == 6
    assert_same_run(tmp_path / "run", tmp_path / "five")


def test_the_snapshot_before_the_cooldown_is_not_pruned_and_has_not_cooled(ten: Path) -> None:
    assert steps_kept(ten) == [27, 30]
    rates = [float.fromhex(row["lr"]) for row in ledger(ten)]
    assert len(set(rates[EPOCH - 1 : 22])) == 1
    assert rates[22] == rates[21] > rates[23]
    held = read(ten / "snapshots" / COOLDOWN)
    assert held.tensors.keys() == tensors(ten / "snapshots" / "step-000000030.safetensors").keys()


def test_going_back_behind_the_cooldown_drops_its_snapshot(ten: Path, tmp_path: Path) -> None:
    train(*FLAGS, "--cooldown", MIDDLE, "--epochs", 3, "--keep_snapshots", 9, "--run_dir", tmp_path / "run")
    assert kept_at(tmp_path / "run") == 7
    done = train("--resume_from", tmp_path / "run" / "snapshots" / "step-000000006.safetensors")
    assert "dropped   cooldown.safetensors, a later step of the same run" in done.out
    assert kept_at(tmp_path / "run") == 7


def test_what_cannot_be_extended_is_refused_in_a_line_that_says_why(ten: Path, tmp_path: Path) -> None:
    more = ("--extend_epochs", 5)
    assert "--resume_from" in refused(*more)
    assert "--resume_from RUN" in refused(*more, "--resume_from", "auto", "--run_dir", ten)
    assert "epochs=" in refused(*more, "--resume_from", ten, "--override", "epochs=12")
    train(*SMALL, "--epochs", 2, "--run_dir", tmp_path / "onecycle")
    text = refused(*more, "--resume_from", tmp_path / "onecycle")
    assert "--scheduler onecycle" in text
    assert "--override epochs=7" in text
    text = refused(*more, "--resume_from", ten, "--override", "scheduler=cosine")
    assert "--scheduler cosine" in text


def test_a_run_without_a_snapshot_at_its_cooldown_is_refused_with_the_reason(tmp_path: Path) -> None:
    more = ("--extend_epochs", 5)
    train(*SMALL, *PLAN, "--epochs", 3, "--keep_snapshots", 9, "--run_dir", tmp_path / "run")
    early = cut(tmp_path / "run", 3, tmp_path / "early")
    for folder in (tmp_path / "run", early):
        (folder / "snapshots" / COOLDOWN).unlink()
    text = refused(*more, "--resume_from", early)
    assert "step 7" in text
    assert "step 3" in text
    assert "--override epochs=8" in text
    text = refused(*more, "--resume_from", tmp_path / "run")
    assert "removed" in text
    train(*SMALL, *PLAN, "--epochs", 2, "--cooldown", 1, "--run_dir", tmp_path / "all")
    assert "--cooldown 1" in refused(*more, "--resume_from", tmp_path / "all")


def test_a_past_that_depends_on_the_length_of_the_run_is_refused_by_name(ten: Path, tmp_path: Path) -> None:
    copy = cut(ten, 30, tmp_path / "copy")
    held = read(ten / "snapshots" / COOLDOWN)
    state: dict[str, Any] = held.state | {
        "config": held.state["config"] | {"progressive_size": "32:0,64:0.5", "image_size": 64}
    }
    (copy / "snapshots" / COOLDOWN).unlink()
    (copy / "snapshots" / COOLDOWN).write_bytes(b"".join(encode(held.tensors, state)))
    assert "--progressive_size" in refused("--resume_from", copy, "--extend_epochs", 5)


def test_a_damaged_snapshot_of_the_cooldown_extends_nothing(ten: Path, tmp_path: Path) -> None:
    copy = cut(ten, 30, tmp_path / "copy")
    path = copy / "snapshots" / COOLDOWN
    data = bytearray(path.read_bytes())
    path.unlink()
    data[-1] ^= 1
    path.write_bytes(data)
    done = run("--resume_from", copy, "--extend_epochs", 5)
    assert done.status == 5
    assert "cooldown.safetensors is damaged" in done.err
