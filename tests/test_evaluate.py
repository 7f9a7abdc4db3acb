"""evaluate.py says of a run what training said of it, finds the classes of other data, and refuses in one line."""

import csv
import errno
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from program import ROOT, Outcome, environment, results, run, snapshot_path, start, train, wait
from torchvision import models

import evaluate
from results import report
from training import sources

pytestmark = pytest.mark.usefixtures("small_model")

MACRO = ["macro_precision", "macro_recall", "macro_f1"]
KEYS = ["images", "top1", "top5", "loss", *MACRO, "ece", "images_per_s", "classes"]
COLOURS = {"ant": (200, 30, 30), "bee": (30, 200, 30), "cat": (30, 30, 200)}
FLAGS = ("--image_size", 32, "--model", "resnet18", "--batch_size", 8, "--epochs", 3, "--num_workers", 0)


def door(*arguments: object) -> Outcome:
    return run(*arguments, entry=evaluate.main)


def evaluated(*arguments: object) -> tuple[Outcome, dict[str, Any]]:
    """An evaluation that must succeed, and its evaluation.json."""
    done = door(*arguments)
    assert done.status == 0, done.err
    (folder,) = re.findall("^wrote     (.*): evaluation.json", done.out, re.MULTILINE)
    return done, json.loads((Path(folder) / "evaluation.json").read_text())


def refused(status: int, *arguments: object) -> str:
    done = door(*arguments)
    assert (done.status, done.err.count("\n")) == (status, 1), done.err
    assert done.err.startswith("error: ")
    return done.err


def paint(folder: Path, names: tuple[str, ...], each: int, seed: int = 0) -> Path:
    """Noisy images in the colour of their class."""
    rng = np.random.default_rng(seed)
    for number, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        colour = COLOURS.get(name) or [*COLOURS.values()][number % 3]
        for image in range(each):
            pixels = np.clip(rng.normal(colour, 60, (32, 32, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{image}.png")
    return folder


@pytest.fixture(scope="module")
def digits(small_model: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("evaluate") / "digits"
    flags = ("--max_samples", 64, "--batch_size", 16, "--epochs", 3, "--ema_decay", 0.5, "--run_dir", folder)
    train(*flags, "--save_best", "--num_workers", 0)
    yield folder
    shutil.rmtree(folder.parent)


@pytest.fixture(scope="module")
def colours(small_model: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """set/ with three classes, and run/ trained on it."""
    folder = tmp_path_factory.mktemp("colours")
    paint(folder / "set" / "train", ("ant", "bee", "cat"), 16)
    paint(folder / "set" / "val", ("ant", "bee", "cat"), 4, seed=1)
    train("--dataset", "imagefolder", "--data_dir", folder / "set", *FLAGS, "--run_dir", folder / "run")
    yield folder
    shutil.rmtree(folder)


def save_weights(path: Path, classes: int) -> Path:
    """A file with the weights of the fixture's small model, which needs a --model to be known."""
    torch.manual_seed(0)
    torch.save(sources.build_model(classes, 224, "resnet18").state_dict(), path)
    return path


@pytest.fixture(scope="module")
def weights(small_model: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_weights(tmp_path_factory.mktemp("weights") / "model.pth", 1000)


def test_a_run_on_its_own_set_gives_the_numbers_of_its_last_row(digits: Path) -> None:
    row = results(digits)[-1]
    done, told = evaluated(digits, "--which", "last")
    assert [*told][: len(KEYS)] == KEYS
    assert (told["top1"], told["top5"]) == (float(row["val_top1"]), float(row["val_top5"]))
    assert told["loss"] == pytest.approx(float(row["val_loss"]), rel=1e-5)
    assert told["data"]["own"]
    lines = done.out.splitlines()
    first = next(line for line in lines if line.startswith("val loss"))
    assert re.fullmatch(r"val loss \d\.\d{4}  top1 [\d.]+% \(\d+ of 64\)  top5 [\d.]+% \(\d+\)", first)
    again = train("--resume_from", digits, "--evaluate").out.splitlines()
    assert first in again
    folder = digits / "evaluation" / "digits-validation"
    pictures = {"confusion.png", "reliability.png", "classes.png", "hardest.png"}
    assert {path.name for path in folder.iterdir()} == {
        *("evaluation.json", "confusion.csv", "predictions.csv"),
        *pictures,
    }
    with open(folder / "predictions.csv", newline="") as file:
        rows = [*csv.DictReader(file)]
    assert sum(row["label"] == row["prediction"] for row in rows) == told["top1"] * 64
    assert len(rows) == told["images"] == sum(entry["images"] for entry in told["classes"]) == 64


def test_each_snapshot_of_a_run_can_be_chosen_and_its_average(digits: Path, tmp_path: Path) -> None:
    rows = results(digits)
    for row in rows:
        _, told = evaluated(digits, "--which", row["step"], "--out", tmp_path / row["step"])
        assert told["loss"] == pytest.approx(float(row["val_loss"]), rel=1e-5)
    _, told = evaluated(snapshot_path(digits, int(rows[-1]["step"])), "--which", "ema", "--out", tmp_path / "ema")
    assert told["loss"] == pytest.approx(float(rows[-1]["ema_loss"]), rel=1e-5)
    _, told = evaluated(digits, "--out", tmp_path / "best")
    assert told["top1"] == max(float(row["ema_top1"]) for row in rows)


def test_a_temperature_is_fitted_on_request(digits: Path, tmp_path: Path) -> None:
    done, told = evaluated(digits, "--temperature", "--out", tmp_path)
    assert told["temperature"]["images"] == 64
    assert told["temperature"]["loss_after"] <= told["temperature"]["loss_before"] + 1e-9
    assert told["temperature"]["ece_before"] == pytest.approx(told["ece"], abs=1e-6)
    assert "divides the logits best" in done.out


# ---- a run's own data, and other data --------------------------------------------------------------------------------


def test_a_run_whose_data_changed_is_refused_unless_the_data_is_named(colours: Path, tmp_path: Path) -> None:
    copy, data = Path(shutil.copytree(colours / "run", tmp_path / "run")), colours / "set"
    _, own = evaluated(copy)
    moved = Path(shutil.copytree(data, tmp_path / "moved"))
    _, told = evaluated(copy, "--data_dir", moved)
    assert told["data"]["own"]
    assert told["loss"] == own["loss"]
    (moved / "val" / "ant" / "0.png").unlink()
    shutil.rmtree(moved / "train")
    done, told = evaluated(copy, "--data_dir", moved)
    assert "not the run's own: 11 validation images, not 12 (1 removed)" in done.out
    assert not told["data"]["own"]
    hidden = data.rename(tmp_path / "hidden")
    shutil.copytree(moved, data)
    try:
        text = refused(2, copy)
        assert "11 validation images, not 12 (1 removed)" in text
        assert "--dataset, --data_dir or --val_split" in text
        (data / "val" / "bee").rename(data / "val" / "fox")
        assert "class 1 is bee there and cat here" in refused(2, copy)
        assert "fox, which the model has not" in refused(3, copy, "--data_dir", data)
    finally:
        shutil.rmtree(data)
        hidden.rename(data)


def test_other_data_is_matched_by_name_and_a_subset_restricts_the_answers(colours: Path, tmp_path: Path) -> None:
    part = paint(tmp_path / "part", ("cat", "bee"), 5, seed=2)
    flags = (colours / "run", "--dataset", "imagefolder", "--data_dir", part)
    done, told = evaluated(*flags, "--out", tmp_path / "subset")
    assert "subset    only the 2 of these classes" in done.out
    assert [entry["name"] for entry in told["classes"]] == ["bee", "cat"]
    assert (told["images"], told["data"]["restricted"]) == (10, True)
    done, every = evaluated(*flags, "--all_classes", "--out", tmp_path / "all")
    assert "subset" not in done.out
    assert [entry["name"] for entry in every["classes"]] == ["ant", "bee", "cat"]
    assert every["top1"] <= told["top1"]
    assert every["loss"] >= told["loss"]


def test_another_split_of_a_runs_data_is_evaluated(colours: Path, tmp_path: Path) -> None:
    _, told = evaluated(colours / "run", "--val_split", "train", "--out", tmp_path / "out")
    assert (told["images"], told["data"]["split"]) == (48, "train")


def test_images_that_cannot_be_read_do_not_count_and_are_told(colours: Path, tmp_path: Path) -> None:
    data = paint(tmp_path / "set", ("ant", "bee", "cat"), 4, seed=1)
    (data / "bee" / "2.png").write_bytes(b"\x89PNG\r\n\x1a\n no more")
    done, told = evaluated(colours / "run", "--dataset", "imagefolder", "--data_dir", data, "--out", tmp_path / "out")
    assert (told["images"], told["unreadable"]) == (11, 1)
    assert "bad       1 images cannot be read" in done.out


def test_a_held_out_share_is_evaluated_without_what_was_trained_on(tmp_path: Path) -> None:
    paint(tmp_path / "set", ("ant", "bee", "cat"), 20)
    flags = ("--dataset", "imagefolder", "--data_dir", tmp_path / "set", "--val_share", 0.2, *FLAGS, "--epochs", 1)
    train(*flags, "--run_dir", tmp_path / "run")
    _, told = evaluated(tmp_path / "run")
    assert (told["images"], told["data"]["own"]) == (12, True)
    assert told["top1"] == float(results(tmp_path / "run")[-1]["val_top1"])


# ---- models of others ------------------------------------------------------------------------------------------------


def test_imagenets_relatives_are_evaluated_by_number_and_id(weights: Path, tmp_path: Path) -> None:
    flags = (weights, "--model", "resnet18", "--eval_size", 64, "--num_workers", 0)
    numbered = paint(tmp_path / "v2", ("0", "999", "17"), 2)
    done, told = evaluated(*flags, "--dataset", "imagenet_v2", "--data_dir", numbered, "--out", tmp_path / "out v2")
    assert [entry["name"] for entry in told["classes"]] == ["tench", "jay", "toilet tissue"]
    assert "subset    only the 3 of these classes" in done.out
    named = paint(tmp_path / "a", ("n01498041", "n01440764"), 2)
    _, told = evaluated(
        *flags, "--dataset", "imagenet_a", "--data_dir", named, "--all_classes", "--out", tmp_path / "out a"
    )
    assert len(told["classes"]) == 1000
    assert [entry["name"] for entry in told["classes"] if entry["images"]] == ["tench", "stingray"]
    done = run("--dataset", "imagenet_a", "--data_dir", named, *FLAGS)
    assert (done.status, done.err.count("\n")) == (2, 1), done.err
    assert "is there to evaluate on" in done.err


def test_real_labels_decide_what_is_right(weights: Path, tmp_path: Path) -> None:
    folder = paint(tmp_path / "set", ("n01440764",), 3)
    for number, path in enumerate(sorted(folder.glob("*/*.png")), 1):
        path.rename(path.with_name(f"ILSVRC2012_val_{number:08d}.png"))
    (tmp_path / "real.json").write_text(json.dumps([[*range(1000)], [], [5]] + [[0]] * 49_997))
    flags = (
        weights,
        "--model",
        "resnet18",
        "--eval_size",
        64,
        "--num_workers",
        0,
        "--dataset",
        "imagefolder",
        "--data_dir",
        folder,
    )
    done, told = evaluated(*flags, "--real_labels", tmp_path / "real.json", "--out", tmp_path / "out")
    assert (told["images"], told["unlabelled"]) == (2, 1)
    assert told["top1"] >= 0.5
    assert "no label  1 images have no ReaL label" in done.out


def test_a_model_without_names_takes_as_many_classes_in_their_order_aloud(tmp_path: Path) -> None:
    save_weights(tmp_path / "model.pth", 3)
    data = paint(tmp_path / "set", ("ant", "bee", "cat"), 2)
    flags = (
        "--model",
        "resnet18",
        "--eval_size",
        64,
        "--num_workers",
        0,
        "--dataset",
        "imagefolder",
        "--data_dir",
        data,
    )
    done, told = evaluated(tmp_path / "model.pth", *flags, "--out", tmp_path / "out")
    assert "by their order, as the model does not name its own" in done.out
    assert [entry["name"] for entry in told["classes"]] == ["ant", "bee", "cat"]
    shutil.rmtree(data / "cat")
    assert "3 classes without names" in refused(3, tmp_path / "model.pth", *flags)


def test_bad_input_is_refused_in_one_line(digits: Path, colours: Path, weights: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "splits" / "train" / "a").mkdir(parents=True)
    (tmp_path / "splits" / "test9" / "a").mkdir(parents=True)
    folder = ("--dataset", "imagefolder", "--data_dir")
    for status, arguments, words in [
        (2, (), "SOURCE"),
        (3, (tmp_path / "none",), "there is no"),
        (2, ("https://example.com/x",), "is a URL"),
        (2, (weights, "--model", "resnet18"), "--dataset"),
        (2, (weights,), "--model"),
        (2, (digits, "--which", "worst"), "--which worst"),
        (5, (digits, "--which", "7"), "no snapshot of step 7"),
        (2, (digits, "--epochs", "3"), "--epochs"),
        (2, (digits, "--out", tmp_path / "file" / "x"), "--out"),
        (3, (digits, *folder, tmp_path / "nowhere"), "is not a folder"),
        (3, (digits, *folder, tmp_path / "splits", "--val_split", "val"), "no folder val"),
        (3, (digits, *folder, colours / "set"), "the class ant, which the model has not"),
        (2, (digits, "--dataset", "imagenet_a"), "--data_dir"),
        (2, (digits, "--eval_size", 0), "--eval_size"),
        (3, (digits, "--real_labels", tmp_path / "file"), "ReaL"),
        (2, (digits, "--device", "abacus"), "--device abacus"),
    ]:
        text = refused(status, *arguments)
        assert words in text, (arguments, text)


def test_a_full_disk_ends_with_the_status_for_it(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, *parts: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(report, "write_durably", full)
    assert "No space left on device" in refused(5, digits, "--out", tmp_path / "out")


def test_help_needs_no_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; import evaluate; evaluate.main(['--help'])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "SOURCE" in done.stdout
    assert "--real_labels" in done.stdout


@pytest.mark.slow
def test_any_number_of_ranks_writes_the_same_files_and_counts_97_images_once(tmp_path: Path) -> None:
    """On one process the model is that of the others, not the fixture's small one."""
    data = paint(tmp_path / "set", ("ant", "bee", "cat"), 33)
    for number in (31, 32):
        (data / "cat" / f"{number}.png").unlink()
    torch.manual_seed(0)
    torch.save(models.resnet18(num_classes=3).state_dict(), tmp_path / "model.pth")
    given = ("--eval_size", 64, "--num_workers", 0, "--batch_size", 12, "--temperature")
    flags = (*given, "--dataset", "imagefolder", "--data_dir", data)
    told, files = [], []
    for ranks in (1, 2, 3):
        out = tmp_path / str(ranks)
        done = wait(start(tmp_path / "model.pth", *flags, "--out", out, ranks=ranks, door="evaluate.py"))
        assert done.status == 0, done.err
        assert done.out.count("val loss") == 1
        told.append({**json.loads((out / "evaluation.json").read_text()), "images_per_s": 0})
        files.append([(out / name).read_bytes() for name in ("confusion.csv", "predictions.csv", "hardest.png")])
    assert told[0]["images"] == 97
    assert told[0] == told[1] == told[2]
    assert files[0] == files[1] == files[2]
