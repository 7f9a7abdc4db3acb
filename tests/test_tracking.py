"""A run's logs hold each step and epoch once, in the promised columns, however often the run was killed."""

import csv
import hashlib
import json
import math
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from config import resolve
from errors import UsageError
from training.logs import RESULT_COLUMNS, RunLogs, Stopwatch, ledger_row, open_run_folder

COLUMNS = "epoch,step,train_loss,train_top1,val_loss,val_top1,val_top5,lr,images_per_s,seconds"
LOGS = ("metrics.jsonl", "ledger.jsonl", "results.csv")


def step_row(step: int, epoch: int = 1, ids: Any = (3, 1, 2)) -> dict[str, Any]:
    numbers = {"loss": 0.1 * step, "top1": 0.5, "lr": 0.1, "momentum": 0.9, "skipped": False}
    return {"step": step, "epoch": epoch, **numbers, "ids": np.array(ids)}


def epoch_row(epoch: int, step: int) -> dict[str, Any]:
    values = dict.fromkeys(RESULT_COLUMNS, 0.25)
    return values | {"epoch": epoch, "step": step, "correct1": 1, "correct5": 2, "images": 4}


def log_epochs(logs: RunLogs, first: int, last: int, steps: int = 4) -> None:
    """Epochs `first` to `last`, of `steps` steps each, as training logs them: some steps at a time."""
    for epoch in range(first, last + 1):
        rows = [step_row((epoch - 1) * steps + step, epoch) for step in range(1, steps + 1)]
        logs.log_steps(rows[:3])
        logs.log_steps(rows[3:])
        logs.end_epoch(epoch_row(epoch, epoch * steps))


def contents(folder: Path) -> dict[str, str]:
    return {name: (folder / name).read_text() for name in LOGS}


def steps_of(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def epochs_of(folder: Path) -> list[int]:
    with open(folder / "results.csv", newline="") as file:
        return [int(row["epoch"]) for row in csv.DictReader(file)]


# ---- the ledger ------------------------------------------------------------------------------------------------------


def test_a_ledger_row_is_exactly_what_other_programs_rely_on() -> None:
    row = step_row(7, 2, ids=[1, 256, -1, 2**40]) | {"loss": 0.1, "lr": 0.4, "skipped": True}
    little_endian = b"".join(number.to_bytes(8, "little", signed=True) for number in (1, 256, -1, 2**40))
    assert ledger_row(row) == {
        "step": 7,
        "epoch": 2,
        "ids": hashlib.sha256(little_endian).hexdigest(),
        "loss": "0x1.999999999999ap-4",
        "lr": "0x1.999999999999ap-2",
        "skipped": True,
    }


def test_a_ledger_row_tells_the_order_of_its_ids_and_the_last_bit_of_its_floats() -> None:
    row = step_row(1)
    for other in (row | {"ids": np.array([1, 3, 2])}, row | {"loss": np.nextafter(row["loss"], 1)}):
        assert ledger_row(other) != ledger_row(row)
    same = row | {"ids": row["ids"].astype(">i8"), "loss": np.float64(row["loss"])}
    assert ledger_row(same) == ledger_row(row)


@pytest.mark.parametrize("ledger", [True, False])
def test_the_ledger_is_written_only_on_request_and_ids_stay_out_of_the_metrics(tmp_path: Path, ledger: bool) -> None:
    log_epochs(RunLogs(tmp_path, ledger), 1, 1)
    assert (tmp_path / "ledger.jsonl").exists() is ledger
    metrics = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    expected = [{key: value for key, value in step_row(step).items() if key != "ids"} for step in range(1, 5)]
    assert metrics == expected


# ---- results.csv -----------------------------------------------------------------------------------------------------


def test_results_have_one_header_and_a_row_an_epoch_in_the_promised_columns(tmp_path: Path) -> None:
    log_epochs(RunLogs(tmp_path, False), 1, 2)
    log_epochs(RunLogs(tmp_path, False), 3, 3)
    lines = (tmp_path / "results.csv").read_text().splitlines()
    assert lines[0] == COLUMNS
    assert lines[1:] == [f"{epoch},{4 * epoch}" + ",0.25" * 8 for epoch in (1, 2, 3)]


def test_results_keep_every_digit(tmp_path: Path) -> None:
    logs = RunLogs(tmp_path, False)
    logs.end_epoch(epoch_row(1, 1) | {"val_loss": 0.1 + 0.2})
    with open(tmp_path / "results.csv", newline="") as file:
        assert float(next(csv.DictReader(file))["val_loss"]) == 0.1 + 0.2


# ---- rewind ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("step", "epoch"), [(0, 0), (1, 0), (4, 1), (6, 1), (7, 1), (8, 2), (12, 3)])
def test_a_run_rewound_and_gone_on_with_has_the_logs_of_one_never_stopped(
    tmp_path: Path, step: int, epoch: int
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
        log_epochs(RunLogs(folder, ledger=True), 1, 3)
    logs = RunLogs(killed, ledger=True)
    logs.rewind(step, epoch)
    assert steps_of(killed / "metrics.jsonl") == steps_of(killed / "ledger.jsonl") == list(range(1, step + 1))
    assert epochs_of(killed) == list(range(1, epoch + 1))
    for number in range(epoch + 1, 4):
        rows = [step_row(s, number) for s in range(max(step, 4 * number - 4) + 1, 4 * number + 1)]
        logs.log_steps(rows)
        logs.end_epoch(epoch_row(number, 4 * number))
    assert contents(killed) == contents(whole)


def test_rewinding_twice_or_to_the_end_changes_nothing(tmp_path: Path) -> None:
    logs = RunLogs(tmp_path, ledger=True)
    log_epochs(logs, 1, 2)
    before = contents(tmp_path)
    logs.rewind(8, 2)
    logs.rewind(8, 2)
    assert contents(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(LOGS)


@pytest.mark.parametrize("name", LOGS)
def test_a_line_that_a_kill_left_half_written_is_dropped(tmp_path: Path, name: str) -> None:
    logs = RunLogs(tmp_path, ledger=True)
    log_epochs(logs, 1, 2)
    before = contents(tmp_path)
    last = before[name].splitlines(keepends=True)[-1]
    for cut in range(1, len(last)):
        (tmp_path / name).write_bytes(before[name].encode()[:-cut])
        logs.rewind(7, 1)
        assert steps_of(tmp_path / "metrics.jsonl") == list(range(1, 8))
        assert steps_of(tmp_path / "ledger.jsonl") == list(range(1, 8))
        assert epochs_of(tmp_path) == [1]
        for log, text in before.items():
            (tmp_path / log).write_bytes(text.encode())


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_a_header_cut_short_is_written_anew(tmp_path: Path, cut: int) -> None:
    (tmp_path / "results.csv").write_text(COLUMNS[:-cut])
    logs = RunLogs(tmp_path, ledger=False)
    logs.rewind(0, 0)
    log_epochs(logs, 1, 1)
    assert (tmp_path / "results.csv").read_text().splitlines()[0] == COLUMNS
    assert epochs_of(tmp_path) == [1]


@pytest.mark.parametrize("junk", [b"\x00" * 64 + b"\n", b"\xff\xfe\n", b'{"step": \n'])
@pytest.mark.parametrize("name", ["metrics.jsonl", "ledger.jsonl"])
def test_a_line_that_a_crash_filled_with_rubbish_does_not_stop_the_resume(
    tmp_path: Path, name: str, junk: bytes
) -> None:
    logs = RunLogs(tmp_path, ledger=True)
    log_epochs(logs, 1, 1)
    with open(tmp_path / name, "ab") as file:
        file.write(junk)
    logs.rewind(4, 1)
    assert steps_of(tmp_path / name) == [1, 2, 3, 4]


def test_rewinding_a_new_run_writes_nothing(tmp_path: Path) -> None:
    RunLogs(tmp_path, ledger=True).rewind(0, 0)
    assert list(tmp_path.iterdir()) == []


def test_a_number_that_is_not_finite_is_null_and_a_norm_that_was_not_asked_for_is_left_out(tmp_path: Path) -> None:
    logs = RunLogs(tmp_path, ledger=False)
    lost = step_row(1) | {"loss": math.nan, "grad_norm": math.inf}
    logs.log_steps([lost, step_row(2) | {"grad_norm": math.nan}])
    first, second = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert first["loss"] is first["grad_norm"] is None
    assert "grad_norm" not in second
    assert second["loss"] == step_row(2)["loss"]


# ---- other ranks -----------------------------------------------------------------------------------------------------


def test_the_other_ranks_neither_write_nor_print(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    logs = RunLogs(None, ledger=True)
    logs.rewind(0, 0)
    log_epochs(logs, 1, 2)
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


# ---- the run's folder ------------------------------------------------------------------------------------------------


def test_config_json_holds_the_settings_and_every_launch(tmp_path: Path) -> None:
    config = resolve({"run_dir": str(tmp_path / "run"), "seed": 3})
    with open_run_folder(config, None, ["--seed", "3"]) as folder:
        pass
    with open_run_folder(config, folder, ["--resume_from", str(folder)]):
        pass
    record = json.loads((folder / "config.json").read_text())
    assert record["config"] == json.loads(json.dumps(asdict(config)))
    first, second = record["launches"]
    assert "--seed 3" in first["command"]
    assert "--resume_from" in second["command"]
    assert first["packages"]["torch"] == second["packages"]["torch"]
    assert (folder / "snapshots").is_dir()


def test_a_new_run_never_moves_into_a_folder_with_snapshots(tmp_path: Path) -> None:
    config = resolve({"run_dir": str(tmp_path)})
    with open_run_folder(config, None, []):
        (tmp_path / "snapshots" / "step-000000001.safetensors").touch()
    with pytest.raises(UsageError, match=r"--resume_from .* --run_dir"), open_run_folder(config, None, []):
        pass
    with open_run_folder(config, tmp_path, []) as folder:
        assert folder == tmp_path


def test_a_folder_at_work_is_refused_and_a_dead_process_is_not_in_the_way(tmp_path: Path) -> None:
    config = resolve({"run_dir": str(tmp_path)})
    holder = "import fcntl, os, sys, time; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX)"
    command = [
        sys.executable,
        "-c",
        f"{holder}; print(os.getpid(), file=f, flush=True); print(flush=True); time.sleep(60)",
    ]
    with subprocess.Popen([*command, str(tmp_path / "lock")], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(UsageError, match=f"at work in another process \\({process.pid}\\)"):
            open_run_folder(config, None, []).__enter__()
        process.kill()
    with open_run_folder(config, None, []) as folder:
        assert (folder / "config.json").exists()


def test_a_folder_that_cannot_be_made_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="--run_dir") as refusal:
        open_run_folder(resolve({"run_dir": str(tmp_path / "file" / "run")}), None, []).__enter__()
    assert "\n" not in str(refusal.value)


def test_two_runs_of_one_second_have_two_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda *_: "20260102-030405")
    names = []
    for _ in range(3):
        with open_run_folder(resolve({}), None, ()) as folder:
            names.append(str(folder))
    assert names == [f"runs/digits-20260102-030405{end}" for end in ("", "-2", "-3")]


def test_a_stopwatch_goes_on_from_an_earlier_process() -> None:
    first, second = Stopwatch(100.0), Stopwatch()
    assert first.seconds() >= 100.0 > second.seconds() >= 0.0
