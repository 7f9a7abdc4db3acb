"""The finder answers with a rate that trains, in the form other programs read, and leaves no trace in the run."""

import csv
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from hub import Hub
from program import (
    assert_same_run,
    assert_same_tensors,
    cut,
    ledger,
    metrics,
    results,
    run,
    snapshot_path,
    tensors,
    train,
)
from purity import mishap

import lr_finder
import run_lr_finder

pytestmark = pytest.mark.usefixtures("small_model")

SMALL = ("--max_samples", 48, "--batch_size", 16, "--num_workers", 0, "--lr_iter", 40, "--lr_start", 1e-4)


def report(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((folder / "lr_finder" / "lr_finder.json").read_text())
    return loaded


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finder") / "run"
    done = run(*SMALL, "--run_dir", folder, entry=run_lr_finder.main)
    assert done.status == 0, done.err
    assert f"--lr_from {folder / 'lr_finder' / 'lr_finder.json'}" in done.out
    return folder


def test_the_commands_that_follow_leave_out_what_only_the_finder_takes() -> None:
    told = run_lr_finder._without_rate(
        ["--find_lr", "--lr_iter", "40", "--lr=auto", "--amp", "--lr_end=1", "--lr_from", "a.json", "--epochs", "3"]
    )
    assert told == ["--amp", "--epochs", "3"]


@pytest.mark.slow
def test_the_report_has_the_fields_that_others_rely_on(found: Path) -> None:
    told = report(found)
    assert {"suggested_lr", "method", "suggestions", "history", "config"} <= told.keys()
    assert told["suggested_lr"] == told["suggestions"][told["method"]]
    assert 1e-4 <= told["suggested_lr"] <= 10
    history = told["history"]
    assert list(history) == ["lr", "loss", "smoothed_loss"]
    assert 16 <= len(history["lr"]) == len(history["loss"]) == len(history["smoothed_loss"]) <= 40
    assert history["lr"] == sorted(history["lr"])
    assert (told["config"]["batch_size"], told["config"]["lr_iter"]) == (16, 40)
    with open(found / "lr_finder" / "lr_finder.csv", newline="") as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    assert rows == [dict(zip(history, values, strict=True)) for values in zip(*history.values(), strict=True)]
    assert (found / "lr_finder" / "lr_finder.png").exists()
    assert not list(found.rglob("*.safetensors"))


@pytest.mark.slow
def test_find_lr_is_the_same_as_the_other_front_door(found: Path, tmp_path: Path) -> None:
    done = run(*SMALL, "--lr=0.3", "--find_lr", "--run_dir", tmp_path / "run")
    assert done.status == 0, done.err
    one, other = report(found), report(tmp_path / "run")
    assert (one["history"], one["suggestions"]) == (other["history"], other["suggestions"])
    assert not (tmp_path / "run" / "results.csv").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "given", [("--lr", "0.3", "--find_lr"), ("--lr=auto",), ("--lr_from", "none.json", "--recipe", "recipe.toml")]
)
def test_the_commands_that_it_prints_train_at_its_rate(
    given: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.toml").write_text("lr = 0.7\nbatch_size = 32\nlabel_smoothing = 0.1\n")
    flags = (*SMALL, "--epochs", 1, "--run_dir", tmp_path / "run")
    done = run(*flags, *given, entry=run_lr_finder.main)
    assert done.status == 0, done.err
    for line in re.findall(r"(?:with|or) +(.*main\.py .*)", done.out):
        arguments = shlex.split(line.partition("main.py ")[2])
        shutil.rmtree(tmp_path / "run" / "snapshots", ignore_errors=True)
        train(*arguments)
        resolved = json.loads((tmp_path / "run" / "config.json").read_text())["resolved"]
        assert resolved["lr"] == pytest.approx(report(tmp_path / "run")["suggested_lr"], rel=5e-3)


@pytest.mark.parametrize(
    "given", [("--evaluate",), ("--override", "lr=1"), ("--extend_epochs", "2"), ("--compare", "a"), ("--doctor",)]
)
def test_what_the_next_command_could_not_run_with_is_refused(given: tuple[str, ...], tmp_path: Path) -> None:
    done = run(*SMALL, "--run_dir", tmp_path / "run", *given, entry=run_lr_finder.main)
    assert (done.status, done.err.count("\n"), given[0] in done.err) == (2, 1, True)


@pytest.mark.slow
def test_training_after_the_finder_is_training_without_it(found: Path, tmp_path: Path) -> None:
    flags = (*SMALL, "--epochs", 1, "--ledger")
    train(*flags, "--lr", "auto", "--run_dir", tmp_path / "auto")
    train(*flags, "--lr_from", found / "lr_finder" / "lr_finder.json", "--run_dir", tmp_path / "from")
    train(*flags, "--lr", repr(report(found)["suggested_lr"]), "--run_dir", tmp_path / "given")
    auto, by_file, given = (tmp_path / name for name in ("auto", "from", "given"))
    assert report(auto)["suggested_lr"] == report(found)["suggested_lr"]
    assert ledger(auto) == ledger(by_file) == ledger(given)
    assert results(auto) == results(by_file) == results(given)
    for other in (by_file, given):
        assert_same_tensors(tensors(snapshot_path(auto, 3)), tensors(snapshot_path(other, 3)))


@pytest.mark.slow
def test_a_constant_schedule_is_given_its_own_rate(found: Path, tmp_path: Path) -> None:
    source = found / "lr_finder" / "lr_finder.json"
    train(*SMALL, "--epochs", 1, "--scheduler", "cosine", "--lr_from", source, "--run_dir", tmp_path / "run")
    told = report(found)
    assert metrics(tmp_path / "run")[0]["lr"] == told["constant_lr"] < told["suggested_lr"]
    train(*SMALL, "--epochs", 1, "--scheduler", "cosine", "--lr", "auto", "--run_dir", tmp_path / "auto")
    assert metrics(tmp_path / "auto")[0]["lr"] == told["constant_lr"]


@pytest.mark.slow
@pytest.mark.parametrize("steps", [16, 17])
def test_the_shortest_sweeps_run_and_shorter_ones_are_refused(steps: int, tmp_path: Path) -> None:
    done = run(*SMALL, "--lr_iter", steps, "--run_dir", tmp_path / "run", entry=run_lr_finder.main)
    assert done.status in (0, 4), done.err
    assert len(report(tmp_path / "run")["history"]["lr"]) <= steps
    refused = run(*SMALL, "--lr_iter", 15, "--run_dir", tmp_path / "none", entry=run_lr_finder.main)
    assert (refused.status, (tmp_path / "none").exists()) == (2, False)
    assert "--lr_iter 15" in refused.err


@pytest.mark.slow
def test_validation_losses_judge_the_steps_when_asked_for(tmp_path: Path) -> None:
    flags = (*SMALL, "--lr_val", 20, "--run_dir")
    one = run(*flags, tmp_path / "one", entry=run_lr_finder.main)
    assert one.status in (0, 4), one.err
    run(*flags, tmp_path / "two", entry=run_lr_finder.main)
    assert report(tmp_path / "one")["history"] == report(tmp_path / "two")["history"]
    first = report(tmp_path / "one")["history"]["loss"]
    run(*SMALL, "--run_dir", tmp_path / "train", entry=run_lr_finder.main)
    assert first != report(tmp_path / "train")["history"]["loss"]
    assert abs(first[0] - first[1]) < 0.1  # the same images, at rates of 1e-4; BatchNorm still learns its statistics


@pytest.mark.slow
def test_a_training_loss_that_is_no_number_ends_the_sweep_whoever_judges(tmp_path: Path) -> None:
    with mishap("nan"):
        run(*SMALL, "--lr_val", 20, "--run_dir", tmp_path / "run", entry=run_lr_finder.main)
    assert "finite number" in report(tmp_path / "run")["stopped"]


@pytest.mark.slow
def test_a_sweep_over_a_stream_fetches_each_block_once_and_only_those_it_needs(
    hub_root: Path, hub_port: int, tmp_path: Path
) -> None:
    """32 steps of 8 images are 13 of 30 blocks of 20; on top come two windows of 20 and 8 blocks ahead."""
    flags = ("--dataset", "imagenet1k", "--image_size", 32, "--batch_size", 8, "--streams", 2, "--shuffle_window", 40)
    finder = (
        "--model",
        "resnet18",
        "--lr_iter",
        32,
        "--lr_start",
        1e-4,
        "--block_mb",
        1,
        "--run_dir",
        tmp_path / "run",
    )
    with (
        pytest.MonkeyPatch.context() as patch,
        Hub(hub_root, port=hub_port) as hub,
    ):
        patch.setattr(lr_finder, "SWEEP_STEPS", 16)
        patch.setattr("stream.block_reader.SMALL_THREADS", 8)
        done = run(*flags, *finder, entry=run_lr_finder.main)
        asked = [request for request in hub.requests if request.range and "/train-" in request.path]
    assert done.status in (0, 4), done.err
    blocks = [(request.path, request.range) for request in asked if not request.at_end]
    assert len(blocks) == len(set(blocks))
    assert 13 <= len(blocks) <= 13 + 4 + 8


@pytest.mark.slow
def test_the_plan_is_drawn_and_training_is_as_without_it(tmp_path: Path) -> None:
    flags = ("--max_samples", 48, "--batch_size", 16, "--num_workers", 0, "--epochs", 1, "--ledger")
    drawn = train(*flags, "--plot_schedule", "--run_dir", tmp_path / "drawn")
    train(*flags, "--run_dir", tmp_path / "plain")
    assert "plots/schedule.png" in drawn.out
    assert ledger(tmp_path / "drawn") == ledger(tmp_path / "plain")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["adamw", "lamb"])
def test_an_optimiser_with_betas_resumes_to_the_bit_and_its_beta_cycles(kind: str, tmp_path: Path) -> None:
    flags = ("--max_samples", 64, "--batch_size", 16, "--num_workers", 0, "--epochs", 2, "--optimizer", kind)
    more = (*flags, "--lr", 0.002, "--head_lr_scale", 3, "--ledger", "--snapshot_steps", 1, "--keep_snapshots", 20)
    train(*more, "--run_dir", tmp_path / "whole")
    train("--resume_from", cut(tmp_path / "whole", 3, tmp_path / "cut"))
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    assert len({row["momentum"] for row in metrics(tmp_path / "whole")}) > 3


@pytest.mark.slow
def test_another_optimiser_starts_its_moments_anew_on_a_resume(tmp_path: Path) -> None:
    flags = ("--max_samples", 64, "--batch_size", 16, "--num_workers", 0, "--epochs", 2, "--snapshot_steps", 1)
    for first, then in (("sgd", "adamw"), ("adamw", "sgd")):
        train(*flags, "--keep_snapshots", 20, "--optimizer", first, "--run_dir", tmp_path / first)
        copy = cut(tmp_path / first, 3, tmp_path / f"{first} cut")
        train("--resume_from", copy, "--override", f"optimizer={then}")
        assert len(metrics(copy)) == len(metrics(tmp_path / first))


def test_a_curve_that_never_falls_is_no_answer(tmp_path: Path) -> None:
    flags = ("--lr_start", 1e-9, "--lr_end", 1e-8, "--lr_iter", 16, "--run_dir", tmp_path / "run")
    done = run(*SMALL, *flags, entry=run_lr_finder.main)
    assert done.status == 4
    assert done.err.startswith("error: the finder suggests no learning rate: the loss never fell")
    assert done.err.count("\n") == 1
    assert report(tmp_path / "run")["suggested_lr"] is None
    again = run("--lr_from", tmp_path / "run" / "lr_finder" / "lr_finder.json", "--run_dir", tmp_path / "next")
    assert again.status == 2
    assert "holds no suggestion" in again.err


@pytest.mark.slow
def test_the_rate_that_is_found_trains_digits(tmp_path: Path) -> None:
    done = run("--run_dir", tmp_path / "finder", entry=run_lr_finder.main)
    assert done.status == 0, done.err
    source = tmp_path / "finder" / "lr_finder" / "lr_finder.json"
    train("--epochs", 5, "--lr_from", source, "--run_dir", tmp_path / "run")
    assert float(results(tmp_path / "run")[-1]["val_top1"]) >= 0.9
    assert max(row["lr"] for row in metrics(tmp_path / "run")) == pytest.approx(
        report(tmp_path / "finder")["suggested_lr"]
    )
