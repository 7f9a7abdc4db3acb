"""unreadable.csv has a row for each unreadable image, once an epoch, whatever its name and whatever a kill left."""

import csv
from pathlib import Path

import pytest

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
