"""What flags and folders can tell is refused before torch is imported, by every door."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from program import run, snapshot_path, train

import beforehand
import ranks
from errors import UsageError

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = """
import contextlib, importlib, io, json, os, sys
found = []
for door, argv, environment in json.loads(sys.argv[1]):
    os.environ.update(environment)
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        status = importlib.import_module(door).main(argv)
    for name in environment:
        del os.environ[name]
    found.append((status, err.getvalue(), "torch" in sys.modules))
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a single step in all."""
    folder = tmp_path_factory.mktemp("run") / "digits"
    train("--max_samples", 64, "--epochs", 1, "--batch_size", 64, "--model", "resnet20", "--run_dir", folder)
    return folder


def cases(folder: Path, digits: Path) -> dict[str, tuple[int, str]]:
    """Doors with flags, the exit status of each and a part of what it says."""
    (folder / "file").write_text("x")
    (folder / "other").mkdir()
    (folder / "other" / "notes.txt").write_text("x")
    hf, png = "main --dataset hf --dataset_name", f"{folder}/no.png"
    return {
        "main --epochs 0": (2, "--epochs 0"),
        "main --amp_dtype bf16": (2, "it needs --amp"),
        "main --batch_size 64 --accumulate_steps 3": (2, "--accumulate_steps 3"),
        "main --batch_size 8 --streams 8 --mixup 0.2": (2, "--mixup"),
        "main --device abacus": (2, "abacus"),
        "main --auto_augment ra-x9": (2, "--auto_augment: 'ra-x9'"),
        "main --color_jitter 1,2,3,4": (2, "--color_jitter"),
        "main --dataset imagenet_v2 --data_dir .": (2, "evaluate.py"),
        f"main --data_dir {folder}/none": (3, f"{folder}/none is not a folder"),
        f"{hf} {folder}/none": (3, f"{folder}/none is no folder"),
        f"{hf} {folder}/file": (3, f"{folder}/file is no folder"),
        f"main --data_dir {folder} --val_labels {folder}/none": (3, "--val_labels"),
        f"main --class_weights {folder}/none": (2, "--class_weights"),
        f"main --lr_from {folder}/none": (2, "run_lr_finder.py"),
        f"main --lr_from {folder}/file": (2, "is not an lr_finder.json"),
        f"main --cache_dir {folder}/file {hf[5:]} a/b": (2, "--cache_dir"),
        f"main --use_pretrained {folder}/none.pth": (3, "there is no"),
        f"main --run_dir {folder}/file/run": (2, "cannot write"),
        "main --run_dir /proc/no_such_run": (2, "cannot write"),
        f"main --run_dir {digits}": (2, "already holds a run"),
        f"main --resume_from {folder}/none": (5, "cannot read snapshot"),
        "main --resume_from auto": (2, "--run_dir"),
        f"main --resume_from {digits} --epochs 9": (2, "--override epochs=9"),
        f"main --resume_from {digits} --override momentum=0.7": (2, "--momentum 0.7 has no effect"),
        f"main --run_dir {digits} --resume_from auto --epochs 9": (2, "--override epochs=9"),
        f"main --evaluate --resume_from {folder}/none": (3, "there is no"),
        f"run_lr_finder --data_dir {folder}/none": (3, "is not a folder"),
        f"evaluate {folder}/none.pth": (3, "there is no"),
        f"evaluate {digits} --data_dir {folder}/none": (3, "is not a folder"),
        f"evaluate {digits} --real_labels {folder}/none": (3, "--real_labels"),
        f"predict {digits} {png}": (3, "no.png"),
        f"predict {folder}/none {ROOT}/docs/layout.png": (3, "there is no"),
        f"predict {digits} {ROOT}/docs/layout.png --amp_dtype bf16": (2, "it needs --amp"),
        f"export {folder}/none --to onnx --out {folder}/out": (3, "there is no"),
        f"export {digits} --to timm --precision int8 --out {folder}/out": (2, "int8 is for --to onnx"),
        f"export {digits} --to timm --out {folder}/other": (2, "holds something else"),
        "main --extend_epochs 2": (2, "--resume_from RUN --extend_epochs N"),
        f"main --extend_epochs 2 --resume_from {digits}": (2, "goes with --scheduler trapezoid"),
        f"main --extend_epochs 2 --resume_from {digits} --override epochs=3": (2, "both tell the epochs"),
        f"main --extend_epochs 2 --resume_from {digits}/config.json": (2, "is no folder of one"),
        f"main --resume_from {folder}": (5, "holds no run"),
        f"main --resume_from {digits} --doctor": (2, "--doctor looks at the machine alone"),
        "main --lr_from=": (2, "--lr_from  cannot be read"),
        "RANK=1 main --doctor": (2, "RANK=1 is set with no WORLD_SIZE"),
        "WORLD_SIZE=2 main": (2, "without RANK, MASTER_ADDR, MASTER_PORT"),
    }


def test_what_flags_and_folders_tell_is_refused_before_torch_is_imported(digits: Path, tmp_path: Path) -> None:
    wanted = cases(tmp_path, digits)
    calls: list[tuple[str, list[str], dict[str, str]]] = []
    for line in wanted:
        words = line.split()
        environment = dict(words.pop(0).split("=") for _ in range("=" in words[0]))
        calls.append((words[0], words[1:], environment))
    command = [sys.executable, "-c", PROGRAM, json.dumps(calls)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = dict(zip(wanted, json.loads(done.stdout), strict=True))
    wrong = {
        line: told
        for line, told in found.items()
        if told[0] != wanted[line][0] or wanted[line][1] not in told[1] or told[1].count("\n") > 2 or told[2]
    }
    assert wrong == {}
    assert not (tmp_path / "out").exists()
    assert [line for line in os.listdir(tmp_path) if line not in ("file", "other")] == []


def test_a_run_of_one_step_trains_at_the_peak_of_its_schedule(digits: Path) -> None:
    assert json.loads((digits / "metrics.jsonl").read_text().splitlines()[0])["lr"] == pytest.approx(0.1)


def test_a_flag_that_changes_no_result_is_told_of_in_a_run(tmp_path: Path) -> None:
    flags = ("--max_samples", 64, "--epochs", 1, "--batch_size", 64, "--run_dir", tmp_path / "run")
    done = run(*flags, "--num_workers", 2)
    assert done.status == 0
    told = " ".join(done.out.split())
    assert (
        "note --num_workers 2 has no effect: it needs a dataset of image files, not one that is kept in memory" in told
    )


def test_settings_are_read_from_a_snapshot_without_torch(digits: Path, tmp_path: Path) -> None:
    saved = beforehand.saved_settings(digits)
    assert saved == beforehand.saved_settings(snapshot_path(digits, 1))
    assert saved is not None
    assert (saved["max_samples"], saved["dataset"]) == (64, "digits")
    (tmp_path / "damaged").write_bytes(b"\xff" * 99)
    os.mkfifo(tmp_path / "pipe")
    assert [beforehand.saved_settings(tmp_path / name) for name in ("damaged", "pipe")] == [None, None]
    assert beforehand.saved_settings(tmp_path) is None


# ---- what a launcher tells -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        (
            {"WORLD_SIZE": "2"},
            "WORLD_SIZE=2 is set without RANK, MASTER_ADDR, MASTER_PORT; start the ranks with torchrun",
        ),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "a"}, "without MASTER_PORT"),
        ({"RANK": "1"}, "RANK=1 is set with no WORLD_SIZE; "),
        ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "RANK=2 is set with WORLD_SIZE=2"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two is not a number from 1 on"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0 is not a number from 1 on"),
        ({"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE=0 is not"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK=-1 is not a number from 0 on"),
        ({}, ""),
        ({"RANK": "0"}, ""),
        ({"RANK": "0", "WORLD_SIZE": "1"}, ""),
        ({"WORLD_SIZE": ""}, ""),
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, ""),
    ],
)
def test_an_environment_that_is_set_by_half_is_refused(
    environment: dict[str, str], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    said: Any = ""
    try:
        ranks.require_whole()
    except UsageError as error:
        said = str(error)
    assert told in said
    assert bool(told) == bool(said)
