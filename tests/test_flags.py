"""Flags without effect are refused or told, what was meant is guessed, ~ is a home, and shells complete flags."""

import argparse
import contextlib
import dataclasses
import io
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

import config as configuration
import evaluate
import export
import predict
from checks import require_effect
from choices import SCHEDULES
from config import Config, parse, resolve, resume
from errors import UsageError
from flags import parser_of
from results.settings import evaluation_settings
from training.sources import Source

ROOT = Path(__file__).resolve().parent.parent
HUB = "--dataset imagenet1k"
FOLDER = "--dataset imagefolder --data_dir photos"
REFUSED = {  # flags without effect that would change the result, and what they need
    "--amp_dtype bf16": "--amp",
    "--ema_every 4": "--ema_decay",
    "--bce_threshold 0.2": "--loss bce",
    "--num_classes 10": "--dataset imagenet1k or hf",
    f"{FOLDER} --num_classes 10": "--dataset imagenet1k or hf",
    "--train_split train2": "--dataset imagenet1k or imagefolder or hf",
    "--dataset cifar10 --val_split test": "--dataset imagenet1k or imagefolder or hf",
    "--image_column picture": "--dataset imagenet1k or hf",
    f"{FOLDER} --label_column class": "--dataset imagenet1k or hf",
    "--dataset_revision v2": "a dataset of the Hub",
    f"{HUB} --dummy_data --dataset_revision v2": "a dataset of the Hub",
    "--shuffle_window 9": "a dataset that is streamed",
    f"{FOLDER} --block_mb 4": "a dataset that is streamed",
    "--crop fixed": "a dataset of image files",
    "--dataset mnist --train_interpolation bicubic": "a dataset of image files",
    f"{HUB} --crop fixed --train_interpolation bicubic": "--crop resized",
    "--eval_interpolation bicubic": "a dataset of image files",
    "--eval_crop_pct 0.9": "a dataset of image files",
    "--model timm:resnet18 --blurpool": "a model of this program's own",
    "--model torchvision:resnet18 --drop_path 0.1": "a model of this program's own or timm's",
    "--use_pretrained x.pth --zero_init_gamma": "no --use_pretrained",
    "--optimizer adamw --no_nesterov": "--optimizer sgd",
    "--momentum 0.8": "--onecycle_fixed_momentum or another --scheduler",
    "--schedule_per epoch": "--scheduler cosine or linear or step or trapezoid",
    "--scheduler cosine --warmup_start 0.1": "--warmup_epochs",
    "--warmup_epochs 1 --warmup_overlaps": "--scheduler cosine or linear or step or trapezoid",
    "--min_lr 0.01": "--scheduler cosine or linear or trapezoid",
    "--scheduler step --min_lr 0.01": "--scheduler cosine or linear or trapezoid",
    "--cooldown 0.5": "--scheduler trapezoid",
    "--step_size 2": "--scheduler step",
    "--scheduler step --milestones 3 --step_size 2": "no --milestones",
    "--scheduler cosine --milestones 3": "--scheduler step",
    "--gamma 0.5": "--scheduler step",
    "--warmup_epochs 1 --onecycle_pct_start 0.2": "no --warmup_epochs",
    **{
        f"--scheduler cosine --onecycle_{flag}": "--scheduler onecycle"
        for flag in ("pct_start 0.2", "div_factor 9", "final_div_factor 9", "anneal_strategy linear", "three_phase")
    },
    "--scheduler cosine --onecycle_fixed_momentum": "--scheduler onecycle",
    "--onecycle_fixed_momentum --onecycle_base_momentum 0.7": "no --onecycle_fixed_momentum",
    "--scheduler step --onecycle_max_momentum 0.9": "--scheduler onecycle",
}
TOLD = {  # those that change no result
    "--num_workers 2": "a dataset of image files",
    "--max_bad_fraction 0.5": "a dataset of image files",
    f"{FOLDER} --cache_dir cache": "a dataset that is streamed",
    "--stall_timeout 5": "a dataset of the Hub",
    f"{FOLDER} --no_streaming": "a dataset of the Hub",
    **{
        f"--{flag}": "--find_lr or --lr auto"
        for flag in ("lr_start 0.1", "lr_end 1", "lr_iter 50", "lr_step_mode linear", "lr_smooth_f 0.5", "lr_val 9")
    },
    "--lr_diverge_th 3": "--find_lr or --lr auto",
}
NEEDY = {item.name for item in dataclasses.fields(Config) if item.metadata["needs"] is not None}


def given(line: str) -> Mapping[str, Any]:
    return parse("main.py", "", line.split())


def told(line: str) -> list[str]:
    return require_effect(resolve(given(line)), given(line))


def refusal(call: Callable[[], object]) -> str:
    """What is said against a call, nothing if it is taken."""
    try:
        call()
    except UsageError as error:
        return str(error)
    return ""


# ---- flags without effect --------------------------------------------------------------------------------------------


def test_a_flag_without_effect_is_refused_with_what_it_needs() -> None:
    found = {line: refusal(lambda line=line: told(line)) for line in REFUSED}  # type: ignore[misc]
    wrong = {line: text for line, text in found.items() if REFUSED[line] not in text or "no effect: it" not in text}
    assert wrong == {}
    assert [text for text in found.values() if "\n" in text] == []


def test_a_flag_that_only_changes_how_a_run_goes_is_told_of() -> None:
    found = {line: told(line) for line in TOLD}
    assert {line: lines for line, lines in found.items() if len(lines) != 1 or TOLD[line] not in lines[0]} == {}


def test_every_flag_that_needs_something_is_in_these_tables() -> None:
    tried = {word[2:] for line in (*REFUSED, *TOLD) for word in line.split() if word.startswith("--")}
    assert NEEDY - {name.removeprefix("no_") for name in tried} - tried == set()


@pytest.mark.parametrize(
    "line",
    [
        "--amp --amp_dtype bf16",
        "--amp_dtype auto --gamma 0.1 --train_split train --momentum 0.9",
        "--ema_decay 0.9 --ema_every 2",
        f"{HUB} --crop fixed --eval_interpolation bicubic --num_workers 3 --cache_dir c --dataset_revision v2",
        f"{FOLDER} --train_split a --val_split b --train_interpolation bicubic",
        "--scheduler step --gamma 0.5 --step_size 3 --momentum 0.8 --schedule_per epoch",
        "--scheduler trapezoid --min_lr 0.01 --cooldown 0.5 --warmup_epochs 1 --warmup_start 0.1",
        "--onecycle_fixed_momentum --momentum 0.8",
        "--lr auto --lr_iter 50",
        "--find_lr --lr_end 1",
        "--optimizer adamw --nesterov",
    ],
)
def test_a_flag_with_an_effect_and_a_default_that_is_given_need_nothing(line: str) -> None:
    assert told(line) == []


def test_a_registered_schedule_may_read_any_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCHEDULES._names, "own", None)
    assert told("--scheduler own --gamma 0.5 --min_lr 0.1 --cooldown 0.5 --schedule_per epoch") == []


def test_a_resume_is_asked_only_about_what_it_changes() -> None:
    before = dataclasses.asdict(resolve({"gamma": 0.5, "scheduler": "step"})) | {"scheduler": "onecycle"}
    same = given("--gamma 0.5 --log_steps 7")
    assert require_effect(resume(before, same), same, before) == []
    changed = {"override": ["amp_dtype=bf16"]} | configuration.overrides({"override": ["amp_dtype=bf16"]})
    with pytest.raises(UsageError, match="--amp_dtype bf16 has no effect: it needs --amp; "):
        require_effect(resume(before, {"override": ["amp_dtype=bf16"]}), changed, before)


def test_what_an_evaluation_does_not_use_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    line = given("--evaluate --resume_from runs/x --epochs 3 --lr 0.1 --batch_size 8 --device cpu --image_size 9")
    own = evaluate.flags_of_main(line, "runs/x")
    assert {"batch_size", "device"} <= own.keys()
    assert capsys.readouterr().out == "note      --epochs, --lr, --image_size: not used in an evaluation\n"
    assert evaluate.flags_of_main(given("--evaluate --resume_from x --model resnet18"), "x")["model"] == "resnet18"


def test_a_folder_that_is_given_is_the_one_that_is_evaluated() -> None:
    settings = {"image_size": 8, "eval_size": 8}
    for config in (None, resolve({}), resolve({"dataset": "imagefolder", "data_dir": "photos"})):
        source = Source("x", "resnet20", {}, ["a", "b"], settings, config=config)
        found = evaluation_settings(source, {"data_dir": "others"})
        assert (found.dataset, found.data_dir) == ("imagefolder", "others")
        found = evaluation_settings(source, {"dataset_name": "a/b"})
        assert (found.dataset, found.dataset_name) == ("hf", "a/b")
    kept = Source("x", "resnet20", {}, ["a", "b"], settings, config=resolve({"dataset": "cifar10"}))
    assert evaluation_settings(kept, {"data_dir": "others"}).dataset == "cifar10"


# ---- what was meant --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "meant"),
    [
        *((f"{told} 64", "did you mean --batch_size?") for told in ("--batch-size", "--batchSize", "--BATCH_SIZE")),
        *(
            (f"{told} 64", "did you mean --batch_size?")
            for told in ("\N{EN DASH}batch_size", "\N{EM DASH}batch-size", "-batch_size")
        ),
        ("batch_size=64", "did you mean --batch_size?"),
        ("--learning-rate 0.1", "did you mean --lr?"),
        ("--workers 3", "did you mean --num_workers?"),
        ("--no-amp", "did you mean --no_amp?"),
        ("--lr 0,1", "did you mean 0.1?"),
        ("--weight_decay 5e-4, ", "see --help"),
        ("--epochs 1e2", "did you mean 100?"),
        ("--max_samples 1,024", "did you mean 1024?"),
        ("--epochs 1.5", "invalid int value: '1.5'; see --help"),
        ("--amp false", "--amp takes no value, and false is given; --no_amp turns it off"),
        ("--amp=False", "--no_amp turns it off"),
        ("--amp true --epochs 3", "--amp alone turns it on"),
        ("--no_amp 1", "--no_amp alone turns it on"),
        ("--no_streaming false", "--streaming turns it off"),
    ],
)
def test_what_was_meant_is_named(line: str, meant: str) -> None:
    assert meant in refusal(lambda: given(line))


@pytest.mark.parametrize("words", [[""], [" "], ["--amp", ""], ["x", ""]])
def test_an_empty_word_is_refused_in_one_line(words: list[str]) -> None:
    assert "unrecognized arguments" in refusal(lambda: parse("main.py", "", words))


def test_every_flag_without_a_value_has_its_opposite_in_every_door() -> None:
    flags = [item.name for item in dataclasses.fields(Config) if item.default in (True, False) and item.type is bool]
    assert {"amp", "no_streaming", "evaluate", "nesterov"} <= {*flags}
    for name in flags:
        other = name.removeprefix("no_") if name.startswith("no_") else f"no_{name}"
        assert given(f"--{name} --{other}")[name] is False
        assert given(f"--{other} --{name}")[name] is True
    assert not evaluate.parse(["x", "--temperature", "--no_temperature"])["temperature"]
    assert not evaluate.parse(["x", "--all_classes", "--no_all_classes"])["all_classes"]
    assert not predict.parse(["x", "a.jpg", "--json", "--no_json", "--heatmap", "--no_heatmap"])["json"]
    pushed = export.parse(["x", "--to", "onnx", "--out", "y", "--private", "--no_private", "--dry_run", "--no_dry_run"])
    assert (pushed.private, pushed.dry_run) == (False, False)
    with pytest.raises(UsageError, match="--json takes no value, and false is given; --no_json turns it off"):
        predict.parse(["x", "a.jpg", "--json", "false"])


# ---- the home folder -------------------------------------------------------------------------------------------------


def test_a_tilde_is_the_home_folder_wherever_a_path_is_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.toml").write_text('cache_dir = "~/cache"\n')
    here = str(tmp_path / "x")
    paths = ("data_dir", "run_dir", "resume_from", "cache_dir", "lr_from", "class_weights", "val_labels")
    for name in (*paths, "use_pretrained", "dataset_name"):
        assert given(f"--{name}=~/x")[name] == here
    assert given("--compare ~/x y")["compare"] == [here, "y"]
    assert given("--recipe ~/mine.toml")["cache_dir"] == str(tmp_path / "cache")
    assert configuration.overrides({"override": ["dataset_name=~/x"]}) == {"dataset_name": here}
    assert {"source": here, "out": here, "real_labels": here} == evaluate.parse(
        ["~/x", "--out=~/x", "--real_labels=~/x"]
    )
    found = predict.parse(["~/x", "a.jpg", "--csv=~/x", "--grid=~/x.png"])
    assert (found["source"], found["csv"], found["grid"]) == (here, here, f"{here}.png")
    assert export.parse(["~/x", "--to", "onnx", "--out=~/x"]).out == here


# ---- completion ------------------------------------------------------------------------------------------------------


def test_bash_completes_flags_choices_and_files() -> None:
    cases = {
        "--onecycle_p": {"--onecycle_pct_start"},
        "--no_nes": {"--no_nesterov"},
        "--stream": {"--streaming", "--streams"},
        "--amp --scheduler c": {"cosine"},
        "--recipe resnet50-a": {"resnet50-a1", "resnet50-a2", "resnet50-a3"},
        "--device c": {"cpu", "cuda"},
        "--data_dir reci": {"recipe.py", "recipes"},
        "--val_split rec": set(),
        "--help_al": {"--help_all"},
    }
    program = """eval "$("$0" main.py --print_completion bash)"
        try() { COMP_WORDS=(main.py "$@"); COMP_CWORD=$#; COMPREPLY=(); _shtab_main_py; echo "${COMPREPLY[@]}"; }
        """ + "; ".join(f"try {case}" for case in cases)
    done = subprocess.run(["bash", "-c", program, sys.executable], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert dict(zip(cases, map(set, map(str.split, done.stdout.splitlines())), strict=True)) == cases, done.stderr


@pytest.mark.parametrize("parse", [evaluate.parse, predict.parse, export.parse], ids=["evaluate", "predict", "export"])
def test_other_doors_complete_their_flags_too(parse: Callable[[list[str]], Any]) -> None:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit):
        parse(["--print_completion", "bash"])
    assert "best last ema" in printed.getvalue().replace("'", " ").replace("  ", " ")
    assert "--no_debug" in printed.getvalue()


def test_a_parser_leaves_no_path_without_files_to_complete() -> None:
    parser = parser_of(Config, "main.py", "")
    paths = {action.dest for action in parser._actions if action.type is os.path.expanduser}
    assert {action.metavar for action in parser._actions if action.dest in paths} <= {"PATH", "RUN"}
    assert argparse.SUPPRESS not in paths
