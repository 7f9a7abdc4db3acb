"""TensorBoard, Weights & Biases, trackio and MLflow, each working without a network or an account.

Their files go to `tracking/` in the run's folder, unless an environment variable of the tool's own names another place.
"""

import json
import logging
import math
import netrc
import os
import shlex
import time
import uuid
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from choices import TRACKERS
from errors import redact
from tracking.tracker import Tracker, tool
from tracking.tracker import describe as describe
from tracking.tracker import require_packages as require_packages

PROJECT = "imagenet1k"
BATCH = 1000  # numbers that MLflow takes at once


@TRACKERS.define("tensorboard")
class TensorBoard(Tracker):
    needs = ("tensorboard",)
    packages = ("tensorboard",)
    rewinds = True

    def start(self, config: dict[str, Any], run_dir: Path, run_id: str | None, step: int) -> str:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        self._values: dict[str, float] = {}
        folder = run_dir / "tracking" / "tensorboard"
        folder.mkdir(parents=True, exist_ok=True)
        now = time.time_ns()
        name = f"events.out.tfevents.{now // 10**9:010}.{now % 10**9:09}.{os.getpid()}"
        self._file = RecordWriter(open(folder / name, "wb"))  # noqa: SIM115 (closed in `finish`)
        self._write(step + 1, file_version="brain.Event:2")
        if run_id is not None:  # readers then drop what other files have from this step on
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._write(step + 1, session_log=start)
        self._text(step, "config", f"```\n{json.dumps(config, indent=2)}\n```")
        self._file.flush()
        return "tensorboard"

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self._values |= values
        summary = self._summary(value=[self._summary.Value(tag=tag, simple_value=x) for tag, x in values.items()])
        self._write(step, summary=summary)

    def picture(self, step: int, name: str, path: Path) -> None:
        data = path.read_bytes()
        width, height = (int.from_bytes(data[start : start + 4], "big") for start in (16, 20))
        image = self._summary.Image(height=height, width=width, colorspace=4, encoded_image_string=data)
        self._write(step, summary=self._summary(value=[self._summary.Value(tag=name, image=image)]))

    def flush(self) -> None:
        self._file.flush()

    def finish(self, report: Path | None, complete: bool) -> None:
        rows = [f"| {name} | {value:.6g} |" for name, value in self._values.items()]
        step = int(self._values.get("epoch/step", 0))
        self._text(step, "last figures", "\n".join(["| figure | value |", "| --- | --- |", *rows]))
        self._file.close()

    def _text(self, step: int, tag: str, text: str) -> None:
        from tensorboard.compat.proto import summary_pb2, tensor_pb2, types_pb2

        plugin = summary_pb2.SummaryMetadata.PluginData(plugin_name="text")
        value = self._summary.Value(
            tag=tag,
            metadata=summary_pb2.SummaryMetadata(plugin_data=plugin),
            tensor=tensor_pb2.TensorProto(dtype=types_pb2.DT_STRING, string_val=[text.encode()]),
        )
        self._write(step, summary=self._summary(value=[value]))

    def _write(self, step: int, **content: Any) -> None:
        self._file.write(self._event(wall_time=time.time(), step=step, **content).SerializeToString())

    @classmethod
    def view(cls, run_dir: Path) -> str:
        return tool("tensorboard", "--logdir", str(run_dir / "tracking" / "tensorboard"))


@TRACKERS.define("wandb")
class WeightsAndBiases(Tracker):
    needs = ("wandb",)
    packages = ("wandb",)

    def start(self, config: dict[str, Any], run_dir: Path, run_id: str | None, step: int) -> str:
        import wandb

        self._wandb, folder = wandb, run_dir / "tracking"
        folder.mkdir(parents=True, exist_ok=True)
        if "WANDB_DIR" in os.environ:
            folder = Path(os.environ["WANDB_DIR"])
        settings = wandb.Settings(
            silent=True,
            console="off",
            x_disable_meta=True,
            disable_git=True,
            save_code=False,
            x_save_requirements=False,
        )
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run_dir.name,
            id=run_id or uuid.uuid4().hex[:8],
            resume="allow" if run_id else None,
            mode=_wandb_mode()[0],  # type: ignore[arg-type]
            dir=str(folder),
            settings=settings,
        )
        self._run.config.update(config, allow_val_change=True)  # type: ignore[no-untyped-call]
        return str(self._run.id)

    def last_step(self, scalar: str) -> int | None:
        return self._run.starting_step - 1 if self._run.resumed else None

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def picture(self, step: int, name: str, path: Path) -> None:
        self._run.log({name: self._wandb.Image(str(path))}, step=max(step, self._run.step))

    def finish(self, report: Path | None, complete: bool) -> None:
        if report is not None:
            self._run.log(
                {"report": self._wandb.Html(report.read_text(encoding="utf-8"), inject=False)}, step=self._run.step
            )
        self._run.finish(exit_code=0 if complete else 1)
        self._wandb.teardown()

    @classmethod
    def view(cls, run_dir: Path) -> str:
        mode, why = _wandb_mode()
        folder = Path(os.environ.get("WANDB_DIR", run_dir / "tracking")) / "wandb"
        sync = f": {tool('wandb', 'sync', str(folder))}/offline-run-*" if mode == "offline" else ""
        return f"{mode} ({why}){sync}"

    @classmethod
    def mode(cls) -> str:
        return "{}: {}".format(*_wandb_mode())


def _wandb_mode() -> tuple[str, str]:
    """online, offline or disabled, and why. Without a key online mode would ask for one, and wait for it."""
    asked = os.environ.get("WANDB_MODE", "")
    if asked in ("offline", "dryrun", "disabled"):
        return "disabled" if asked == "disabled" else "offline", "as WANDB_MODE says"
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return "online", "a key is in the environment"
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    for path in filter(None, (os.environ.get("NETRC"), "~/.netrc", "~/_netrc")):
        try:
            if netrc.netrc(os.path.expanduser(path)).authenticators(host):
                return "online", f"a key is in {path}"
        except (OSError, netrc.NetrcParseError):
            continue
    return "offline", "no key is found; wandb login stores one"


@TRACKERS.define("trackio")
class Trackio(Tracker):
    needs = ("trackio",)
    packages = ("trackio",)

    def start(self, config: dict[str, Any], run_dir: Path, run_id: str | None, step: int) -> str:
        os.environ.setdefault("TRACKIO_DIR", str((run_dir / "tracking" / "trackio").resolve()))
        import trackio
        import trackio.run
        import trackio.utils

        for module in (trackio, trackio.run, trackio.utils):
            module.print = lambda *_, **__: None  # type: ignore[attr-defined]  # into the middle of a run's lines
        self._trackio = trackio
        self._project = os.environ.get("TRACKIO_PROJECT", PROJECT)
        self._run = trackio.init(
            self._project,
            name=run_id or run_dir.name,
            resume="must" if run_id else "never",
            config=config,
            embed=False,
        )
        return str(self._run.name)

    def last_step(self, scalar: str) -> int | None:
        from trackio.sqlite_storage import SQLiteStorage

        if os.environ.get("TRACKIO_SPACE_ID") or os.environ.get("TRACKIO_SERVER_URL"):  # which hold the run
            return None
        rows = SQLiteStorage.get_logs(self._project, self._run.name, run_id=self._run.id)
        return max((row["step"] for row in rows if scalar in row), default=0)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def picture(self, step: int, name: str, path: Path) -> None:
        self._run.log({name: self._trackio.Image(str(path))}, step=step)

    def finish(self, report: Path | None, complete: bool) -> None:
        if report is not None:
            self._run.log_artifact(str(report), name=f"report-{self._run.id}", type="report")
        self._run.finish()  # type: ignore[no-untyped-call]

    @classmethod
    def view(cls, run_dir: Path) -> str:
        folder = os.environ.get("TRACKIO_DIR") or run_dir / "tracking" / "trackio"
        project = os.environ.get("TRACKIO_PROJECT", PROJECT)
        return f"TRACKIO_DIR={shlex.quote(str(folder))} {tool('trackio', 'show', '--project', project)}"


@TRACKERS.define("mlflow")
class MLflow(Tracker):
    needs = ("mlflow", "sqlalchemy", "alembic")  # the last two for the store in the run's folder
    packages = ("mlflow-skinny", "sqlalchemy", "alembic")

    def start(self, config: dict[str, Any], run_dir: Path, run_id: str | None, step: int) -> str:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # what is raised is told, but in one line
        self._metric, self._waiting = Metric, list[Any]()
        own = run_dir.resolve() / "tracking" / "mlflow"
        own.mkdir(parents=True, exist_ok=True)
        self._client = MlflowClient(tracking_uri=os.environ.get("MLFLOW_TRACKING_URI") or _mlflow_store(own))
        elsewhere = bool(os.environ.get("MLFLOW_TRACKING_URI"))
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self._client.get_experiment_by_name(name)
        artifacts = None if elsewhere else (own / "artifacts").as_uri()
        experiment = found.experiment_id if found else self._client.create_experiment(name, artifact_location=artifacts)
        if run_id is None:
            self._id = self._client.create_run(experiment, run_name=run_dir.name).info.run_id
        else:
            self._id = run_id
            self._client.update_run(run_id, "RUNNING")
        known = self._client.get_run(self._id).data.params  # MLflow lets nobody change one
        params = [Param(key, str(value)) for key, value in _flat(config) if key not in known]
        for first in range(0, len(params), 100):
            self._client.log_batch(self._id, params=params[first : first + 100])
        return str(self._id)

    def last_step(self, scalar: str) -> int | None:
        return max((metric.step for metric in self._client.get_metric_history(self._id, scalar)), default=0)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        now = time.time_ns() // 10**6
        self._waiting += [self._metric(name, value, now, step) for name, value in values.items()]
        if len(self._waiting) >= BATCH:
            self.flush()

    def picture(self, step: int, name: str, path: Path) -> None:
        self._client.log_artifact(self._id, str(path), "plots")

    def flush(self) -> None:
        while self._waiting:
            self._client.log_batch(self._id, metrics=self._waiting[:BATCH])
            del self._waiting[:BATCH]

    def finish(self, report: Path | None, complete: bool) -> None:
        self.flush()
        if report is not None:
            self._client.log_artifact(self._id, str(report))
        self._client.set_terminated(self._id, "FINISHED" if complete else "KILLED")

    @classmethod
    def view(cls, run_dir: Path) -> str:
        if uri := os.environ.get("MLFLOW_TRACKING_URI"):
            return redact(uri)
        return shlex.join(
            ["uvx", "mlflow", "ui", "--backend-store-uri", _mlflow_store(run_dir / "tracking" / "mlflow")]
        )


def _mlflow_store(folder: Path) -> str:
    return f"sqlite:///{folder / 'mlflow.db'}"


def _flat(config: dict[str, Any], before: str = "") -> list[tuple[str, Any]]:
    """The values of nested dicts, with paths as names."""
    found: list[tuple[str, Any]] = []
    for name, value in config.items():
        found += _flat(value, f"{before}{name}/") if isinstance(value, dict) else [(f"{before}{name}", value)]
    return [(name, value) for name, value in found if not (isinstance(value, float) and math.isnan(value))]
