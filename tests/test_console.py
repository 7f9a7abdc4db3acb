"""What a run says: plain lines in a log file, a bar that fits on a terminal, and commands that can be typed."""

import fcntl
import io
import json
import os
import pty
import re
import shlex
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import pytest
from program import ROOT, environment, metrics, run, snapshot_path, start, train, until, wait, wait_for

import config as configuration
import distributed
from config import resolve
from training import console
from training.console import Console, command, header, last_lines

STAMP = r"\d\d-\d\d \d\d:\d\d:\d\d  "
SMALL = ("--max_samples", 64, "--batch_size", 16, "--epochs", 2)


def step_row(step: int) -> dict[str, Any]:
    return {"step": step, "loss": 1.25, "top1": 0.5, "lr": 0.1, "momentum": 0.9, "images_per_s": 12345.6}


def epoch_row(epoch: int, **more: float) -> dict[str, Any]:
    losses = {"train_loss": 1.2345, "train_top1": 0.5, "val_loss": 12.3456, "val_top1": 1.0, "val_top5": 1.0}
    return losses | {"epoch": epoch, "images_per_s": 123456.0, "seconds": 3723.0} | more


def show_epochs(shown: Console, epochs: int, steps: int, every: int, **more: float) -> None:
    """A run whose numbers arrive `every` so many steps, a minute after the last ones."""
    for epoch in range(1, epochs + 1):
        shown.start_epoch(epoch, 0)
        for done in range(every, steps + 1, every):
            shown.tick()
            shown.steps(step_row((epoch - 1) * steps + done), done, 60.0 * done / every, 0.03)
        shown.end_epoch(epoch_row(epoch, **more), is_best=True)
    shown.close()


@pytest.fixture
def minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that is a minute later whenever it is asked."""
    now = [0.0]

    def later() -> float:
        now[0] += 60
        return now[0]

    monkeypatch.setattr(console.time, "monotonic", later)


# ---- a log file ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("minutes")
@pytest.mark.parametrize("more", [{}, {"ema_top1": 1.0}])
def test_the_log_of_ninety_epochs_is_short_plain_and_narrow(
    capsys: pytest.CaptureFixture[str], more: dict[str, float]
) -> None:
    settings = resolve({"dataset": "imagenet1k"})
    show_epochs(Console(settings, 5004, 1000, speaks=True), 90, 5004, 50, **more)
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert err == ""
    assert 90 + 40 < len(lines) < 200 - 30  # what comes before and after has room
    assert all(len(line) <= 160 and line.isprintable() for line in lines)
    assert all(re.match(f"{STAMP}epoch [ 1-9]\\d/90  ", line) for line in lines)
    assert len([line for line in lines if "train loss" in line and "top5" in line and line.endswith("best")]) == 90


def test_steps_that_come_quickly_have_no_lines_but_with_verbose(capsys: pytest.CaptureFixture[str]) -> None:
    for flags, count in (({}, 0), ({"verbose": True}, 8), ({"quiet": True}, 0)):
        show_epochs(Console(resolve({"epochs": 2} | flags), 20, 10, speaks=True), 2, 20, 5)
        lines = capsys.readouterr().out.splitlines()
        assert len([line for line in lines if "  step " in line]) == count
        assert len([line for line in lines if "val loss" in line]) == 2


def test_a_line_of_a_step_tells_rate_speed_waiting_and_the_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    shown = Console(resolve({"epochs": 3, "verbose": True}), 20, 10, speaks=True)
    shown.start_epoch(1, 0)
    shown.steps(step_row(5), 5, 10.0, 0.25)
    shown.end_epoch(epoch_row(1, seconds=60.0), is_best=False)
    shown.start_epoch(2, 0)
    shown.steps(step_row(25), 5, 10.0, 0.25)
    first, _, second = capsys.readouterr().out.splitlines()
    assert first.endswith(
        "epoch 1/3  step 5/20  loss 1.2500  top1 50.00%  lr 0.1  momentum 0.900  12,346 images/s  data 25%  "
        "left 30s, run 1m50s"
    )
    assert second.endswith("left 30s, run 1m30s")  # the last epoch took a minute, its evaluation included


@pytest.mark.parametrize(("classes", "told"), [(5, False), (6, True)])
def test_top5_of_few_classes_is_left_out(capsys: pytest.CaptureFixture[str], classes: int, told: bool) -> None:
    shown = Console(resolve({}), 20, classes, speaks=True)
    shown.start_epoch(1, 0)
    shown.end_epoch(epoch_row(1), is_best=False)
    assert ("top5" in capsys.readouterr().out) is told


def test_other_ranks_are_silent(capsys: pytest.CaptureFixture[str]) -> None:
    shown = Console(resolve({"verbose": True}), 20, 10, speaks=False)
    shown.waits_for("nothing")
    assert shown._wait is None
    show_epochs(shown, 2, 20, 5)
    assert capsys.readouterr() == ("", "")


def test_what_takes_long_is_told_of_and_what_does_not_is_not(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "WAIT_SECONDS", 0.05)
    with distributed.announced("for a moment"):
        pass
    with distributed.announced("for the index"):
        time.sleep(0.5)
    assert capsys.readouterr().out == "wait      for the index\n"


def test_a_long_line_of_the_header_is_folded_and_details_are_for_verbose(capsys: pytest.CaptureFixture[str]) -> None:
    lines = [f"memory    {'about so many bytes ' * 12}", "blocks    7", f"run       {'x' * 300}"]
    header(lines, resolve({}))
    told = capsys.readouterr().out.splitlines()
    assert [len(line) <= 160 for line in told] == [True, True, True, False]  # a path is not broken
    assert told[1].startswith(" " * 10)
    header(lines, resolve({"verbose": True}))
    assert "blocks    7" in capsys.readouterr().out


# ---- a terminal ------------------------------------------------------------------------------------------------------

SHOWN = """
import sys
sys.path[:0] = {paths!r}
from test_console import show_epochs
from config import resolve
from training.console import Console
show_epochs(Console(resolve({{"epochs": 90}}), 5004, 1000, speaks=True), 3, 5004, 417)
"""


def on_terminal(columns: int) -> str:
    """What a terminal so wide gets from three epochs."""
    main, side = pty.openpty()
    code = SHOWN.format(paths=[str(ROOT / "tests"), str(ROOT)])
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("4H", 40, columns, 0, 0))
    env = {name: value for name, value in environment().items() if name != "COLUMNS"}
    with subprocess.Popen([sys.executable, "-c", code], stdout=side, stderr=side, env=env, cwd=ROOT) as process:
        os.close(side)
        text = b""
        try:
            while piece := os.read(main, 65536):
                text += piece
        except OSError:  # the other side is closed
            pass
    os.close(main)
    assert process.returncode == 0, text.decode()
    return text.decode()


@pytest.mark.parametrize("columns", [80, 200])
def test_a_terminal_gets_a_bar_and_lines_that_fit(columns: int) -> None:
    drawn = [part for part in re.split(r"[\r\n]+", re.sub(r"\x1b\[\w+", "", on_terminal(columns))) if part.strip()]
    assert all(len(part) <= columns for part in drawn)
    bars = [part for part in drawn if "|" in part and "1.25" in part]
    assert bars
    for wanted in ("epoch ", "lr 0.1", "/s", "data 3%", "left " if columns > 80 else ", "):
        assert wanted in bars[-1], bars[-1]
    lines = [part for part in drawn if "val loss" in part]
    assert len(lines) == 3
    assert all(line.startswith("epoch ") and line.endswith("best") for line in lines)


# ---- a whole run -----------------------------------------------------------------------------------------------------


def test_quiet_leaves_the_epochs_and_the_end(tmp_path: Path) -> None:
    lines = train(*SMALL, "--quiet", "--run_dir", tmp_path / "run").out.splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["best", "next", "next", "next", "done"]
    assert all(re.match(f"{STAMP}epoch {number}/2  train loss", lines[number - 1]) for number in (1, 2))


def test_quiet_and_verbose_exclude_each_other() -> None:
    done = run("--quiet", "--verbose")
    assert (done.status, done.err.count("\n")) == (2, 1)


def test_the_header_is_short_and_says_what_will_happen(tmp_path: Path) -> None:
    lines = train(*SMALL, "--run_dir", tmp_path / "run").out.splitlines()
    before = lines[: next(number for number, line in enumerate(lines) if "epoch 1/2" in line)]
    before = [line for line in before if not line.startswith("wait ")]
    assert len(before) < 15
    assert before[0].startswith("start     ")
    assert "plan      2 epochs x 4 steps of 16 images = 8 steps; a snapshot after each epoch" in before
    assert f"run       {tmp_path / 'run'}" in before
    assert any(line.startswith("stop      Ctrl-C") and "--resume_from" in line for line in before)


def test_the_end_names_the_best_epoch_its_file_and_commands_that_exist(tmp_path: Path) -> None:
    folder = tmp_path / "my run"
    lines = train(*SMALL, "--save_best", "--scheduler", "trapezoid", "--run_dir", folder).out.splitlines()
    (best,) = (line for line in lines if line.startswith("best "))
    assert re.fullmatch(
        f"best      epoch [12]: val_top1 [\\d.]+%, val_loss [\\d.]+; {folder}/snapshots/best.safetensors", best
    )
    commands = [shlex.split(line.split(maxsplit=1)[1]) for line in lines if line.startswith(("next ", "extend "))]
    scripts = [next(Path(word) for word in words if word.endswith(".py")) for words in commands]
    assert [path.name for path in scripts] == ["main.py", "evaluate.py", "predict.py", "export.py"]
    configuration.parse("", "", commands[0][commands[0].index(str(scripts[0])) + 1 :])
    assert all(str(folder) in words for words in commands)
    assert all((ROOT / path.name).exists() for path in scripts)


def test_the_commands_choose_the_best_epoch_where_it_is_not_the_last(tmp_path: Path) -> None:
    (tmp_path / "snapshots").mkdir()
    for step in (4, 8):
        snapshot_path(tmp_path, step).touch()
    rows = ["epoch,step,val_loss,val_top1", "1,4,0.5,0.9", "2,8,0.6,0.8"]
    (tmp_path / "results.csv").write_text("\n".join(rows))
    *_, evaluate, predict, export = last_lines(resolve({}), tmp_path)
    assert evaluate.endswith(f"evaluate.py {tmp_path} --which 4")
    assert predict.endswith(f"predict.py {tmp_path} IMAGE --which 4")
    assert f"{tmp_path} --which 4 --to onnx" in export
    (tmp_path / "snapshots" / "best.safetensors").touch()
    assert not any("--which" in line for line in last_lines(resolve({}), tmp_path))


def test_a_run_without_logs_has_no_best_epoch(tmp_path: Path) -> None:
    assert [line.split()[0] for line in last_lines(resolve({}), tmp_path)] == ["next", "next", "next"]


@pytest.mark.slow
def test_the_command_that_resumes_works_as_it_is_printed(tmp_path: Path) -> None:
    folder = tmp_path / "my run"
    process = start(*SMALL, "--epochs", 200, "--snapshot_steps", 1, "--run_dir", folder)
    wait_for(folder / "metrics.jsonl", process)
    until(lambda: (folder / "results.csv").exists())
    process.send_signal(signal.SIGINT)
    stopped = wait(process)
    assert stopped.status == 130, stopped.err
    (line,) = (line for line in stopped.out.splitlines() if line.startswith("resume "))
    before = metrics(folder)[-1]["step"]
    typed = f"{line.removeprefix('resume').strip()} --early_stop 1"
    again = subprocess.run(typed, shell=True, env=environment(), capture_output=True, text=True, timeout=120)
    assert again.returncode == 0, again.stderr
    assert f": step {before}, epoch " in again.stdout


def test_under_torchrun_the_command_starts_as_many_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    monkeypatch.setattr(console, "program", lambda name: [name])
    assert command("main.py", "--resume_from", "a b", ranks=8) == (
        "torchrun --nnodes 2 --nproc_per_node 4 main.py --resume_from 'a b'"
    )
    assert command("main.py") == "python main.py"


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
@pytest.mark.parametrize("name", ["a b", "猫$x", "two\nlines1", "caf\udce9", "it's"])
def test_a_command_can_be_typed_whatever_the_folder_is_called_and_the_output_shows(
    name: str, encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding))
    typed = command("main.py", "--run_dir", name).encode(encoding).partition(b"--run_dir ")[2]
    echoed = subprocess.run(["bash", "-c", b"printf %s " + typed], env={"LC_ALL": "C"}, capture_output=True)
    assert echoed.stdout == os.fsencode(name)


def test_uv_is_called_only_where_it_finds_the_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UV", "uv")
    monkeypatch.setenv("UV_RUN_RECURSION_DEPTH", "1")
    monkeypatch.chdir(ROOT / "docs")
    assert command("main.py").startswith("uv run python ")
    monkeypatch.chdir(tmp_path)
    assert command("main.py").startswith(sys.executable)


# ---- records ---------------------------------------------------------------------------------------------------------


def test_config_json_holds_what_was_resolved_and_the_metrics_speed_and_norm(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(*SMALL, "--log_steps", 2, "--run_dir", folder)
    resolved = json.loads((folder / "config.json").read_text())["resolved"]
    assert resolved == {
        "lr": 0.025,
        "lr_source": "0.025 = 0.4 x 16 / 256 (measured here)",
        "steps_per_epoch": 4,
        "classes": 10,
        "ranks": 1,
        "model": "ResNet-20",
        "parameters": 272_474,
    }
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row.get("grad_norm", 0) > 0] == [2, 4, 6, 8]
    seconds = [row["seconds"] for row in rows]
    assert seconds == sorted(seconds)
    assert all(row["images_per_s"] > 0 for row in rows)
