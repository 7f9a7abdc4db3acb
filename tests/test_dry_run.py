"""--dry_run does all but train: real steps, a plan from them, and no run folder."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from program import run, start, train, wait
from torch import nn

import dry_run
from config import parse, resolve
from dry_run import changed_settings, disk_line, rate_line
from model_resnet50 import build_model
from training import step
from training.layers import MOST_ROWS, layer_table

SMALL = ("--max_samples", 64, "--batch_size", 16, "--epochs", 2)
BUILD_MODEL = step.build_model
DUMMY = ("--dataset", "imagenet1k", "--dummy_data", "--image_size", 32, "--batch_size", 16, "--num_workers", 0)


@pytest.fixture
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Runs start in a folder in which nothing must be left."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dry_run, "STEPS", 2)


def settings(*argv: object) -> Any:
    return resolve(parse("main.py", "", [str(argument) for argument in argv]))


def line(out: str, topic: str) -> str:
    """The line of the plan that begins with a topic."""
    return next(text for text in reversed(out.splitlines()) if text.startswith(f"{topic:<10}"))


@pytest.mark.usefixtures("small_model", "few_steps")
def test_a_plan_is_printed_and_nothing_is_written(inside: Path) -> None:
    done = run("--dry_run", *SMALL, "--save_best")
    assert (done.status, done.err) == (0, "")
    assert list(inside.iterdir()) == []
    for topic in ("layers", "step", "schedule", "lr", "time", "memory", "disk", "settings", "dry run"):
        assert line(done.out, topic)
    assert "4 steps" in done.out  # an epoch of 64 images
    assert "for 2 epochs, 8 steps" in done.out
    assert line(done.out, "settings").split()[1:3] == ["--dataset", "digits"]
    assert "--max_samples 64" in line(done.out, "settings")
    assert re.search(r"newest 2, the best one, one more while the best one is replaced\)", line(done.out, "disk"))


@pytest.mark.slow
@pytest.mark.usefixtures("few_steps")
@pytest.mark.parametrize(
    "argv",
    [
        (*DUMMY, "--model", "timm:vit_tiny_patch16_224", "--max_samples", 64),
        (*DUMMY, "--model", "torchvision:mobilenet_v3_small", "--ema_decay", 0.9, "--max_samples", 64),
        (*DUMMY, "--model", "resnet18", "--progressive_size", "32:0,64:1", "--image_size", 64, "--max_samples", 64),
        ("--freeze_backbone", 1, "--lr", "auto", "--scheduler", "trapezoid", "--mixup", 0.2, *SMALL),
    ],
)
def test_any_model_and_set_can_be_rehearsed(
    argv: tuple[object, ...], inside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step, "build_model", BUILD_MODEL)
    done = run("--dry_run", *argv)
    assert (done.status, done.err) == (0, "")
    assert "no run folder was written" in done.out
    assert list(inside.iterdir()) == []


@pytest.mark.usefixtures("small_model", "few_steps")
def test_a_resume_is_rehearsed_from_its_step_and_stays_as_it_was(inside: Path) -> None:
    train(*SMALL, "--run_dir", "run", "--epochs", 1)
    before = {path: path.read_bytes() for path in inside.rglob("*") if path.is_file()}
    done = run("--dry_run", "--resume_from", "run", "--override", "epochs=3")
    assert done.status == 0, done.err
    assert "for 2 epochs, 8 steps" in done.out
    assert {path: path.read_bytes() for path in inside.rglob("*") if path.is_file()} == before
    assert "nothing left to do" in run("--dry_run", "--resume_from", "run").out


@pytest.mark.usefixtures("small_model", "few_steps")
def test_the_steps_are_those_of_training(inside: Path) -> None:
    done = train(*SMALL, "--epochs", 1, "--verbose", "--run_dir", "run", "--log_steps", 1)
    first = re.search(r"step 1/4  loss ([\d.]+)", done.out)
    assert first is not None
    assert f"loss {first[1]} in training" in line(run("--dry_run", *SMALL, "--epochs", 1).out, "step")


@pytest.mark.usefixtures("inside")
def test_no_other_door_than_training_is_rehearsed() -> None:
    import run_lr_finder

    refused = [
        run("--dry_run", "--evaluate"),
        run("--dry_run", "--find_lr"),
        run("--dry_run", entry=run_lr_finder.main),
    ]
    assert [(done.status, done.err.count("\n"), "--dry_run" in done.err) for done in refused] == [(2, 1, True)] * 3


@pytest.mark.slow
def test_under_torchrun_the_first_rank_prints(inside: Path) -> None:
    done = wait(start("--dry_run", *SMALL, "--device", "cpu", ranks=2))
    assert done.status == 0, done.err
    assert done.out.count("dry run ") == 1
    assert "passes of 8 images" in done.out
    assert list(inside.iterdir()) == []


@pytest.mark.usefixtures("small_model", "inside")
def test_a_step_that_is_too_slow_is_taken_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dry_run, "STEP_SECONDS", 0.0)
    monkeypatch.setattr(dry_run, "DATA_SECONDS", 0.0)
    done = run("--dry_run", *SMALL)
    assert "for the first step" in line(done.out, "time")


# ---- the plan --------------------------------------------------------------------------------------------------------


def test_the_highest_rate_is_found_wherever_it_is() -> None:
    text = rate_line(settings("--epochs", 10, "--lr", 0.1), 0.1, 5004, 0)
    assert text.startswith("0.004 at step 1, 0.1 at step 15,012, the highest, and ")
    assert text.endswith("at step 50,040, the last")
    warm = settings("--scheduler", "cosine", "--warmup_epochs", 2, "--epochs", 4, "--lr", 0.1)
    assert "0.1 at step 200, the highest" in rate_line(warm, 0.1, 100, 0)


def test_the_disk_counts_the_newest_the_one_being_written_and_the_kept_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dry_run, "free_bytes", lambda folder: 10**9)
    text = disk_line(settings("--save_best", "--scheduler", "trapezoid", "--epochs", 9), 10**8, 100, 0)
    assert "700.0 MB at most" in text
    assert "WARNING" not in text
    assert "WARNING" in disk_line(settings("--keep_snapshots", 20, "--snapshot_steps", 1), 10**8, 100, 0)
    assert "100.0 MB at most" in disk_line(settings("--epochs", 9), 10**8, 100, 850)


def test_only_changed_settings_are_told_as_flags() -> None:
    assert changed_settings(settings("--dry_run")) == ["--dataset digits"]
    argv = ("--dataset", "cifar10", "--no_nesterov", "--amp", "--lr", 0.2, "--data_dir", "photos")
    assert set(changed_settings(settings(*argv))) == {
        *("--dataset cifar10", "--data_dir photos", "--no_nesterov", "--amp", "--lr 0.2")
    }


# ---- the table of layers ---------------------------------------------------------------------------------------------


def cells(model: nn.Module, size: int, images: int = 2) -> dict[str, list[str]]:
    """The rows of the table by the names of the layers."""
    rows = [re.split(r"\s{2,}", text.strip()) for text in layer_table(model, size, images)[1:]]
    return {row[0]: row[1:] for row in rows}


def test_shapes_parameters_and_multiply_adds_of_resnet50_are_the_known_ones() -> None:
    table = cells(build_model(1000, 224, "resnet50", {}), 224)
    assert table["whole model"][1:4] == ["1000", "25,557,032", "4,089,184,256"]
    assert table["conv1"] == ["Conv2d", "64 x 112 x 112", "9,408", "118,013,952", "6.4"]
    assert table["layer4"][:3] == ["Sequential", "2048 x 7 x 7", "14,964,736"]
    assert table["fc"] == ["Linear", "1000", "2,049,000", "2,048,000", "0.0"]
    assert len(table) <= MOST_ROWS + 1


def test_a_linear_layer_on_tokens_counts_every_token() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches = nn.Conv2d(3, 8, 4, 4)
            self.mix = nn.Linear(8, 8, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.mix(self.patches(x).flatten(2).transpose(1, 2))  # type: ignore[no-any-return]

    assert cells(Tokens(), 16)["mix"] == ["Linear", "16 x 8", "64", f"{16 * 8 * 8:,}", "0.0"]


def test_the_table_leaves_the_model_alone() -> None:
    model = build_model(10, 32, "resnet18", {}).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    layer_table(model, 32, 4)
    assert model.training
    assert [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])] == []
