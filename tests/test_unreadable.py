"""unreadable.csv has a row for each unreadable image, once an epoch, whatever its name and whatever a kill left."""

import csv
import os
from pathlib import Path

import pytest
from program import start, train, wait
from test_image_folders import make_classes, put

from training.logs import UnreadableLog
from training.state import Progress


def rows(path: Path) -> list[list[str]]:
    return list(csv.reader(path.read_text().split("\n")[:-1]))


@pytest.mark.parametrize(
    "name", ["a b,c.png", 'say "x".png', "\udcff.png", "new\nline.png", "sep\u2028.png", "größe.png"]
)
def test_any_name_is_one_row_and_is_known_again(tmp_path: Path, name: str) -> None:
    path, progress = tmp_path / "unreadable.csv", Progress(lr=0.1)
    for _ in range(2):
        log = UnreadableLog(path, progress)
        log(name, "bad\n data")
        log(name, "bad data")
    assert [row[1:] for row in rows(path)] == [["reason", "epoch"], ["bad data", "1"]]


@pytest.mark.parametrize("cut", ["b.png,no dec", "b.png,no,", "b.png", '"b', "b.png,no,1"])
def test_a_row_that_a_kill_cut_short_is_dropped_and_nothing_is_glued_to_it(tmp_path: Path, cut: str) -> None:
    path, progress = tmp_path / "unreadable.csv", Progress(lr=0.1)
    UnreadableLog(path, progress)("a.png", "bad")
    with open(path, "a") as file:
        file.write(cut)
    log = UnreadableLog(path, progress)
    log("a.png", "bad")
    log("b.png", "worse")
    assert rows(path) == [["image", "reason", "epoch"], ["a.png", "bad", "1"], ["b.png", "worse", "1"]]


def test_rows_of_epochs_that_a_resume_does_again_are_removed(tmp_path: Path) -> None:
    path, progress = tmp_path / "unreadable.csv", Progress(lr=0.1)
    log = UnreadableLog(path, progress)
    for epoch in range(3):
        progress.epoch = epoch
        log("a.png", "bad")
    progress.epoch = 1
    UnreadableLog(path, progress)
    assert [row[2] for row in rows(path)[1:]] == ["1", "2"]


def test_an_image_of_training_is_told_from_its_namesake_in_validation_after_a_resume_too(tmp_path: Path) -> None:
    for split in ("train", "val"):
        make_classes(tmp_path / "set" / split)
        (tmp_path / "set" / split / "ant" / "1.png").write_bytes(b"bad")
    flags = ("--dataset", "imagefolder", "--data_dir", tmp_path / "set", "--image_size", 33, "--model", "resnet18")
    run = tmp_path / "run"
    train(*flags, "--batch_size", 4, "--epochs", 1, "--num_workers", 0, "--run_dir", run)
    told = rows(run / "unreadable.csv")
    assert [(row[0], row[2]) for row in told[1:]] == [("train/ant/1.png", "1"), ("val/ant/1.png", "1")]
    (run / "unreadable.csv").write_text("image,reason,epoch\ntrain/ant/1.png,bad,1\n")
    UnreadableLog(run / "unreadable.csv", Progress(lr=0.1))("val/ant/1.png", "bad")
    assert [row[0] for row in rows(run / "unreadable.csv")[1:]] == ["train/ant/1.png", "val/ant/1.png"]


def test_no_name_of_a_class_ends_a_run_or_floods_the_console(tmp_path: Path) -> None:
    names = [b"$\\frac$", b"a$b^c$", b"new\nline", b"x" * 250, "\u732b".encode(), b"\xff caf\xe9"]
    for split in ("train", "val"):
        for name in names:
            put(tmp_path / "set" / split / os.fsdecode(name) / "0.png")
            put(tmp_path / "set" / split / os.fsdecode(name) / "1.png")
    flags = ("--dataset", "imagefolder", "--data_dir", tmp_path / "set", "--image_size", 33, "--model", "resnet18")
    more = ("--batch_size", 12, "--epochs", 1, "--num_workers", 0, "--run_dir", tmp_path / "run")
    done = wait(start(*flags, *more, PYTHONUTF8="1"))
    assert (done.status, done.err) == (0, "")
    assert "classes   6: $\\frac$ (2), " in done.out
    assert "\u732b (2)\n" in done.out
    assert "x" * 40 not in done.out
    assert (tmp_path / "run" / "plots" / "samples.png").exists()
