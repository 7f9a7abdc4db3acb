"""Every tracker gets what the logs hold, read back by its own client, and none can harm or hold up a run."""

import contextlib
import json
import math
import os
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from program import ROOT, TIMEOUT, cut, environment, ledger, metrics, run, start, train, until, wait
from test_secrets import SECRETS, forms, leaks

import tracking.clients  # registers them
from choices import TRACKERS
from tracking import runner
from tracking.clients import describe
from tracking.runner import scalars_of_epoch, scalars_of_step
from tracking.tracker import Tracker

pytestmark = pytest.mark.usefixtures("small_model")

SMALL: tuple[object, ...] = ("--max_samples", 48, "--batch_size", 16, "--num_workers", 0, "--log_steps", 2, "--ledger")
Rows = dict[int, dict[str, float]]  # numbers by their steps


def logged(folder: Path) -> Rows:
    """What metrics.jsonl and results.csv hold, as trackers should have it."""
    found: Rows = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        step, values = scalars_of_step(json.loads(line))
        assert step not in found
        found[step] = values
    names, *rows = [line.split(",") for line in (folder / "results.csv").read_text().splitlines()]
    for row in rows:
        step, values = scalars_of_epoch(dict(zip(names, row, strict=True)))
        found[step] |= values
    return found


# ---- a tracker of one's own ------------------------------------------------------------------------------------------


class Recorder(Tracker):
    """Keeps all that it is told, and misbehaves in one method, the `at`."""

    at = ""
    how = ""
    told: list[tuple[Any, ...]]

    def start(self, config: dict[str, Any], run_dir: Path, run_id: str | None, step: int) -> str:
        type(self).told = [("start", config, run_id, step)]
        self._misbehave("start")
        return "the run"

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self.told.append(("scalars", step, values))
        self._misbehave("scalars")

    def picture(self, step: int, name: str, path: Path) -> None:
        self.told.append(("picture", name, path))
        self._misbehave("picture")

    def finish(self, report: Path | None, complete: bool) -> None:
        self.told.append(("finish", report and report.read_text()[:9], complete))
        self._misbehave("finish")

    def _misbehave(self, where: str) -> None:
        if where == self.at and self.how == "hangs":
            threading.Event().wait()  # for ever: one that went on would meddle with the tests after this one
        elif where == self.at and self.how == "raises":
            raise KeyError("https://user:CANARY@host/ is away\nthe second line")
        elif where == self.at and self.how == "exits":
            sys.exit(3)
        elif where == self.at and self.how == "finds the disk full":
            with open("/dev/full", "wb", buffering=0) as file:
                file.write(b"x")
        elif where == self.at and self.how == "stops the run" and len(told("scalars")) == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def told(what: str) -> list[tuple[Any, ...]]:
    return [row[1:] for row in Recorder.told if row[0] == what]


def rows_told() -> Rows:
    found: Rows = {}
    for step, values in told("scalars"):
        assert not found.get(step, {}).keys() & values.keys()
        found.setdefault(step, {}).update(values)
    return found


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> type[Recorder]:
    monkeypatch.setattr(TRACKERS, "_choices", {**TRACKERS._choices, "recorder": Recorder})
    monkeypatch.setattr(TRACKERS, "_names", {**TRACKERS._names, "recorder": None})
    return Recorder


@pytest.fixture(scope="module")
def untracked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("untracked") / "run"
    train(*SMALL, "--epochs", 3, "--run_dir", folder)
    return folder


def test_a_tracker_gets_every_row_the_pictures_the_settings_and_the_report(
    recorder: type[Recorder], tmp_path: Path
) -> None:
    done = train(*SMALL, "--epochs", 2, "--lr", "auto", "--track", "recorder", "--run_dir", tmp_path / "run")
    assert rows_told() == logged(tmp_path / "run")
    assert {name for name, _ in told("picture")} == {"plots/lr_finder", "plots/samples", "plots/curves"}
    assert all(path.exists() for _, path in told("picture"))
    ((config, run_id, step),) = told("start")
    assert (config["epochs"], config["resolved"]["classes"], run_id, step) == (2, 10, None, 0)
    assert told("finish") == [("<!doctype", True)]
    assert "track     recorder" in done.out
    assert json.loads((tmp_path / "run" / "tracking" / "recorder.json").read_text())["id"] == "the run"


def test_a_tracker_that_joins_on_a_resume_gets_what_it_missed_and_one_that_was_there_gets_it_once(
    recorder: type[Recorder], untracked: Path, tmp_path: Path
) -> None:
    late = cut(untracked, 6, tmp_path / "late")
    train("--resume_from", late, "--track", "recorder")
    assert rows_told() == logged(late)
    train(*SMALL, "--epochs", 3, "--track", "recorder", "--run_dir", tmp_path / "run")
    again = cut(tmp_path / "run", 3, tmp_path / "again")
    train("--resume_from", again)
    assert told("start")[0][1] == "the run"
    assert rows_told() == {}  # they are the same numbers
    train("--resume_from", cut(tmp_path / "run", 3, tmp_path / "other"), "--override", "weight_decay=0.1")
    assert told("start")[0][1] is None  # and these are not
    assert rows_told() == logged(tmp_path / "other")
    train("--resume_from", cut(tmp_path / "run", 3, tmp_path / "none"), "--track", "")
    assert rows_told() == logged(tmp_path / "other")


TROUBLES = [
    *(("hangs", at) for at in ("start", "scalars", "finish")),
    *(("raises", at) for at in ("start", "scalars", "picture", "finish")),
    *(("exits", "start"), ("finds the disk full", "scalars")),
]


@pytest.mark.parametrize(("how", "at"), TROUBLES)
def test_a_tracker_that_fails_or_hangs_costs_one_line_and_nothing_of_the_run(
    recorder: type[Recorder], untracked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str, how: str
) -> None:
    monkeypatch.setattr(recorder, "at", at)
    monkeypatch.setattr(recorder, "how", how)
    monkeypatch.setattr(runner, "FINISH_SECONDS", 0.3)
    monkeypatch.setattr("errors._is_abandoned", False)
    done = train(*SMALL, "--epochs", 3, "--track", "recorder,tensorboard", "--run_dir", tmp_path / "run")
    (warning,) = [line for line in done.err.splitlines() if "recorder" in line]
    assert warning.startswith("warning: recorder has not ended" if how == "hangs" else "warning: recorder failed (")
    assert "CANARY" not in done.err
    assert "warning: tensorboard" not in done.err
    assert ledger(tmp_path / "run") == ledger(untracked)
    assert metrics(tmp_path / "run") == metrics(untracked)
    assert tensorboard_rows(tmp_path / "run") == in_single_precision(logged(tmp_path / "run"))


def test_a_tracker_that_hangs_gets_no_more_than_there_is_room_for(
    recorder: type[Recorder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("FINISH_SECONDS", 0.1), ("MOST_WAITING", 3)):
        monkeypatch.setattr(runner, name, value)
    monkeypatch.setattr(recorder, "at", "start")
    monkeypatch.setattr(recorder, "how", "hangs")
    monkeypatch.setattr("errors._is_abandoned", False)
    done = train(*SMALL, "--epochs", 4, "--track", "recorder", "--run_dir", tmp_path / "run")
    assert [" ".join(line.split()[2:5]) for line in done.err.splitlines() if "recorder" in line] == [
        "hangs or is",
        "has not ended",
    ]


def test_a_run_that_is_stopped_ends_its_trackers_as_incomplete(
    recorder: type[Recorder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder, "at", "scalars")
    monkeypatch.setattr(recorder, "how", "stops the run")
    done = run(*SMALL, "--epochs", 500, "--track", "recorder", "--run_dir", tmp_path / "run")
    assert done.status == 128 + signal.SIGTERM
    assert told("finish") == [("<!doctype", False)]


# ---- the choices -----------------------------------------------------------------------------------------------------


def test_an_unknown_tracker_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    done = run(*SMALL, "--track", "tensorboard,wandbb", "--run_dir", tmp_path / "run")
    assert done.status == 2
    assert (
        done.err == "error: --track has no choice wandbb; did you mean wandb? "
        "there are tensorboard, wandb, trackio, mlflow\n"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio", "mlflow"])
def test_a_missing_package_is_refused_before_training_with_the_command_that_installs_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "no_such_package").mkdir()  # as wandb leaves a folder wandb where it runs
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(TRACKERS[name], "needs", ("no_such_package",))
    done = run(*SMALL, "--track", name, "--run_dir", tmp_path / "run")
    packages = " ".join(TRACKERS[name].packages)
    assert (done.status, done.err) == (2, f"error: --track {name} needs a package; pip install {packages}\n")
    assert not (tmp_path / "run").exists()
    assert describe(name) == (False, f"{name} is not here: pip install {packages}")


def test_wandb_is_online_only_with_a_key_which_nobody_sees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_IDENTITY_TOKEN_FILE", "UV"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    kind = tracking.clients.WeightsAndBiases
    assert kind.mode().startswith("offline: no key")
    assert "wandb sync " in kind.view(tmp_path)
    for variable in ("UV", "UV_RUN_RECURSION_DEPTH"):
        monkeypatch.setenv(variable, "1")
    assert ": uv run wandb sync " in kind.view(tmp_path)
    monkeypatch.setenv("WANDB_API_KEY", "CANARY")
    assert kind.mode() == "online: a key is in the environment"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert kind.mode() == "offline: as WANDB_MODE says"
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.delenv("WANDB_MODE")
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password CANARY\n")
    assert kind.mode() == f"online: a key is in {tmp_path / 'netrc'}"
    assert "CANARY" not in kind.mode() + kind.view(tmp_path) + describe("wandb")[1]


# ---- what the clients read -------------------------------------------------------------------------------------------


def tensorboard_rows(folder: Path) -> Rows:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tracking" / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    found: Rows = {}
    for tag in events.Tags()["scalars"]:
        for event in events.Scalars(tag):
            assert tag not in found.get(event.step, {})
            found.setdefault(event.step, {})[tag] = event.value
    return found


def in_single_precision(rows: Rows) -> Rows:
    return {step: {name: float(np.float32(x)) for name, x in values.items()} for step, values in rows.items()}


def wandb_rows(folder: Path) -> Rows:
    """The history in the files of offline runs, a later file winning. They are LevelDB logs of wandb's messages."""
    from wandb.proto import wandb_internal_pb2

    found: Rows = {}
    for path in sorted(folder.glob("tracking/wandb/offline-run-*/*.wandb")):
        for message in _records(path.read_bytes()):
            record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
            record.ParseFromString(message)
            if record.WhichOneof("record_type") == "history":
                items = {item.nested_key[0] if item.nested_key else item.key: item for item in record.history.item}
                values = {name: json.loads(item.value_json) for name, item in items.items()}
                step = values.pop("_step", record.history.step.num)
                numbers = {name: x for name, x in values.items() if name.startswith(("step/", "epoch/"))}
                found.setdefault(step, {}).update(numbers)
    return {step: values for step, values in found.items() if values}


def _records(data: bytes) -> Iterator[bytes]:
    assert data[:4] == b":W&B"
    at, message = 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        message += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield message
            message = b""


TRACKIO_READER = """
import json, sys
from trackio import Api
from trackio.sqlite_storage import SQLiteStorage
(run,) = Api().runs("imagenet1k")
assert run.config["epochs"], run.config
print(json.dumps(SQLiteStorage.get_logs("imagenet1k", run.name)))
"""


def trackio_rows(folder: Path) -> Rows:
    env = environment(TRACKIO_DIR=str(folder / "tracking" / "trackio"))
    done = subprocess.run([sys.executable, "-c", TRACKIO_READER], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: Rows = {}
    for row in json.loads(done.stdout):
        numbers = {name: value for name, value in row.items() if name.startswith(("step/", "epoch/"))}
        assert not found.get(row["step"], {}).keys() & numbers.keys()
        if numbers:
            found.setdefault(row["step"], {}).update(numbers)
    return found


def mlflow_rows(folder: Path, run_id: str) -> Rows:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'tracking' / 'mlflow' / 'mlflow.db'}")
    found: Rows = {}
    for name in client.get_run(run_id).data.metrics:
        for metric in client.get_metric_history(run_id, name):
            assert name not in found.get(metric.step, {})
            found.setdefault(metric.step, {})[name] = metric.value
    return found


@pytest.mark.slow
def test_after_a_kill_and_a_resume_each_client_reads_the_logs_and_no_step_twice_and_no_secret(tmp_path: Path) -> None:
    folder, names = tmp_path / "a run", ("tensorboard", "wandb", "trackio")
    flags = (*SMALL[2:], "--max_samples", 160, "--epochs", 12, "--snapshot_steps", 7, "--track", ",".join(names))
    env: dict[str, Any] = SECRETS | {"HOME": str(tmp_path), "WANDB_MODE": "offline", "NO_PROXY": "127.0.0.1"}
    process = start(*flags, "--run_dir", folder, **env)
    try:
        until(lambda: process.poll() is not None or all((folder / f"tracking/{name}.json").exists() for name in names))
        until(lambda: process.poll() is not None or len(list(folder.glob("snapshots/*.safetensors"))) == 3)
        at_first = (folder / "metrics.jsonl").stat().st_size
        until(lambda: process.poll() is not None or (folder / "metrics.jsonl").stat().st_size > at_first + 2000)
    finally:
        process.kill()
        wait(process)
    assert process.returncode == -signal.SIGKILL
    done = wait(start("--resume_from", folder, **env))
    assert done.status == 0, done.err
    assert "warning" not in done.err
    expected = logged(folder)
    assert len(expected) == 120
    assert tensorboard_rows(folder) == in_single_precision(expected)
    for rows in (wandb_rows(folder), trackio_rows(folder)):
        assert without_times(rows) == without_times(expected)
    secrets = [form for value in SECRETS.values() for form in forms(value)]
    assert leaks(tmp_path, secrets) == []
    assert leaks(folder / "tracking", [str(ROOT).encode()]) == []


def without_times(rows: Rows) -> Rows:
    """Where a tracker keeps steps after the snapshot as they were before the kill, the clock alone differs."""
    return {
        step: {name: x for name, x in values.items() if not name.endswith(("seconds", "images_per_s"))}
        for step, values in rows.items()
    }


@pytest.mark.slow
def test_mlflow_goes_on_with_its_run_and_reads_the_logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow import MlflowClient

    whole = tmp_path / "whole"
    train(*SMALL, "--epochs", 3, "--track", "mlflow", "--run_dir", whole)
    note = json.loads((whole / "tracking" / "mlflow.json").read_text())
    assert note["steps"] == note["epochs"] == 9
    assert mlflow_rows(whole, note["id"]) == logged(whole)
    client = MlflowClient(tracking_uri=f"sqlite:///{whole / 'tracking' / 'mlflow' / 'mlflow.db'}")
    held = client.get_run(note["id"])
    assert (held.info.status, held.data.params["epochs"]) == ("FINISHED", "3")
    assert {item.path for item in client.list_artifacts(note["id"])} == {"plots", "report.html"}
    killed = cut(whole, 3, tmp_path / "killed")
    (killed / "tracking" / "mlflow.json").write_text(json.dumps(note | {"steps": 2, "epochs": 0}))  # of 30 s before
    train("--resume_from", killed)
    assert without_times(mlflow_rows(killed, note["id"])) == without_times(logged(killed))


HANGING = """
import atexit, sys, threading, time
import errors, main
from choices import TRACKERS
from tracking.tracker import Tracker

@TRACKERS.register("hanging")
class Hanging(Tracker):
    def start(self, config, run_dir, run_id, step):
        threading.Thread(target=time.sleep, args=(3600,)).start()
        atexit.register(time.sleep, 3600)
        return None

    def finish(self, report, complete):
        time.sleep(3600)

from tracking import runner
runner.FINISH_SECONDS = 0.5
errors.leave(lambda: main.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_the_process_ends_whatever_a_tracker_leaves_running(tmp_path: Path) -> None:
    flags = map(str, (*SMALL, "--epochs", 1, "--track", "hanging", "--run_dir", tmp_path / "run"))
    env = environment(PYTHONPATH=str(ROOT))
    done = subprocess.run(
        [sys.executable, "-c", HANGING, *flags], env=env, capture_output=True, text=True, timeout=TIMEOUT
    )
    assert (done.returncode, "warning: hanging has not ended" in done.stderr) == (0, True), done.stderr
    assert done.stdout.splitlines()[-1].startswith("done ")


def test_a_number_that_is_not_finite_is_left_out_and_so_are_counts() -> None:
    assert scalars_of_step({"step": 3, "loss": None, "lr": 0.1, "top1": math.nan}) == (3, {"step/lr": 0.1})
    assert scalars_of_epoch({"step": "4", "val_top1": "0.5", "ema_top1": "", "images": 9}) == (
        4,
        {"epoch/step": 4.0, "epoch/val_top1": 0.5},
    )


def test_tensorboard_has_the_pictures_and_texts_too(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(*SMALL, "--epochs", 1, "--track", "tensorboard", "--run_dir", tmp_path / "run")
    events = EventAccumulator(str(tmp_path / "run" / "tracking" / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["images"]) == {"plots/samples", "plots/curves"}
    assert events.Images("plots/curves")[0].encoded_image_string == (tmp_path / "run/plots/curves.png").read_bytes()
    texts = {tag: events.Tensors(tag)[-1].tensor_proto.string_val[0].decode() for tag in events.Tags()["tensors"]}
    assert '"epochs": 1' in texts["config/text_summary" if "config/text_summary" in texts else "config"]
    assert any("epoch/val_top1" in text for text in texts.values())


def test_what_is_in_the_way_of_the_trackers_files_costs_a_line_each(
    untracked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("errors._is_abandoned", False)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tracking").touch()
    done = train(*SMALL, "--epochs", 3, "--track", "tensorboard", "--run_dir", tmp_path / "run")
    with contextlib.suppress(IndexError):
        assert "warning: tensorboard failed" in done.err.splitlines()[0]
    assert done.err.count("\n") == 1
    assert ledger(tmp_path / "run") == ledger(untracked)
