"""The trackers of a run, each in a thread of its own, for which training never waits."""

import contextlib
import csv
import heapq
import json
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from choices import TRACKERS
from distributed import announced
from errors import abandon, complain, printable, redact
from stream.files import read_small, write_durably
from tracking.tracker import Tracker

MOST_WAITING = 1000  # calls; what comes while as many wait is left out
FINISH_SECONDS = 20.0  # that the end of a run waits for trackers
NOTE_SECONDS = 30.0  # between two notes of how far a tracker has come
OF_STEPS = ("loss", "top1", "lr", "momentum", "images_per_s", "grad_norm")
DRAWN_BEFORE = ("lr_finder/lr_finder.png", "plots/schedule.png")  # before the trackers start
NOT_OF_EPOCHS = ("correct1", "correct5", "images")  # which results.csv leaves out

Scalars = tuple[int, dict[str, float]]


class Trackers:
    """What rank 0 tells about a run goes to all its trackers. None of its methods but `finish` waits or fails."""

    def __init__(self, names: Sequence[str], folder: Path) -> None:
        self._folder = folder
        self._names = names
        self._workers: list[_Worker] = []

    def lines(self) -> list[str]:
        """How to look at each."""
        return [f"track     {name}: {TRACKERS[name].view(self._folder)}".rstrip(": ") for name in self._names]

    def start(self, step: int, anew: bool) -> None:
        """Begin, or after a resume at `step` go on with what folder/tracking/ tells of.

        Where a tracker lacks earlier numbers, it gets them from the logs. `anew` makes a new run of one that cannot
        take back the steps after `step`: they will differ.
        """
        if self._names:
            import matplotlib.figure  # noqa: F401 (what a thread imports while another does may be half of it)
        self._workers = [_Worker(name, self._folder, step, anew) for name in self._names]
        for worker in self._workers:
            worker.start()

    def steps(self, rows: Sequence[dict[str, Any]]) -> None:
        """Log rows of metrics.jsonl."""
        if rows and self._workers:
            logged = [scalars_of_step(row) for row in rows]
            self._put(lambda worker: worker.log_steps(logged))

    def epoch(self, row: dict[str, Any]) -> None:
        """Log a row of results.csv."""
        if self._workers:
            logged = scalars_of_epoch(row)
            self._put(lambda worker: worker.log_epochs([logged]))

    def picture(self, path: Path, step: int) -> None:
        """Log a PNG file of the run at this step, if it is there."""
        name = f"plots/{path.stem}"
        if path.exists():
            self._put(lambda worker: worker.tracker.picture(step, name, path))

    def finish(self, report: Path, complete: bool) -> None:
        """End the trackers, and wait for them, but not for ever."""
        for worker in self._workers:
            worker.end(report if report.exists() else None, complete)
        until = time.monotonic() + FINISH_SECONDS
        with announced(f"for {', '.join(self._names)} to end, {FINISH_SECONDS:.0f} s at most"):
            for worker in self._workers:
                worker.join(max(0.0, until - time.monotonic()))
        for worker in self._workers:
            if worker.is_alive():
                worker.warn("has not ended in time; the run ends without it")
            if worker.is_alive() or worker.has_failed:
                abandon()

    def _put(self, call: "Callable[[_Worker], None]") -> None:
        for worker in self._workers:
            worker.put(call)


def scalars_of_step(row: dict[str, Any]) -> Scalars:
    """The step and the finite numbers of a row of metrics.jsonl."""
    return int(row["step"]), _finite({f"step/{name}": row.get(name) for name in OF_STEPS})


def scalars_of_epoch(row: dict[str, Any]) -> Scalars:
    """The same of a row of results.csv; its values may be text."""
    values = {f"epoch/{name}": float(value) for name, value in row.items() if name not in NOT_OF_EPOCHS and value != ""}
    return int(row["step"]), _finite(values)


def _finite(values: dict[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items() if value is not None and math.isfinite(value)}


class _Worker(threading.Thread):
    """The thread of one tracker; what it has logged is noted in tracking/NAME.json for a resume."""

    def __init__(self, name: str, folder: Path, step: int, anew: bool) -> None:
        super().__init__(name=f"track {name}", daemon=True)
        self.has_failed = False
        self.tracker: Tracker
        self._kind = name
        self._folder = folder
        self._note = folder / "tracking" / f"{name}.json"
        self._resumed_at = step
        self._anew = anew and not TRACKERS[name].rewinds
        self._calls = deque[Callable[[_Worker], None]]()
        self._change = threading.Condition()
        self._end: tuple[Path | None, bool] | None = None
        self._is_behind = False
        self._id: str | None = None
        self._logged = {"steps": 0, "epochs": 0}  # the last of which every number is logged
        self._settled = dict(self._logged)
        self._noted = 0.0

    def put(self, call: "Callable[[_Worker], None]") -> None:
        """Have the thread make a call, unless the tracker is off or too many calls wait."""
        with self._change:
            if self.has_failed:
                return
            if len(self._calls) < MOST_WAITING:
                self._calls.append(call)
                self._change.notify()
            elif not self._is_behind:
                self._is_behind = True
                self.warn("hangs or is slow; some of what it would get is left out")

    def end(self, report: Path | None, complete: bool) -> None:
        with self._change:
            self._end = report, complete
            self._change.notify()

    def warn(self, what: str) -> None:
        complain(f"warning: {self._kind} {what}")

    def run(self) -> None:
        try:
            self._work()
        except BaseException as error:  # a library may raise SystemExit too
            told = (str(error).strip() or type(error).__name__).splitlines()[0]
            with self._change:
                self.has_failed = True
                self._calls.clear()
            self.warn(f"failed ({printable(redact(told))[:200]}); the run goes on without it")

    def _work(self) -> None:
        self._begin()
        while (call := self._next()) is not None:
            call(self)
            if not self._calls:
                self.tracker.flush()
                self._write_note()
        report, complete = self._end or (None, False)
        self.tracker.flush()
        self.tracker.finish(report, complete)
        self._write_note(at_once=True)

    def _next(self) -> "Callable[[_Worker], None] | None":
        with self._change:
            while not self._calls and self._end is None:
                self._change.wait()
            return self._calls.popleft() if self._calls else None

    def _begin(self) -> None:
        """Start the tracker, find out what it holds, and log what it lacks of the steps before the resume."""
        note, step = self._read_note(), self._resumed_at
        known = None if self._anew else note.get("id")
        held = {kind: int(note.get(kind, 0)) if known else 0 for kind in self._logged}
        self.tracker = TRACKERS[self._kind]()
        if self.tracker.rewinds:
            held = {kind: min(last, step) for kind, last in held.items()}
        self._id = self.tracker.start(_config_of(self._folder), self._folder, known, min(held["steps"], step))
        if known and not self.tracker.rewinds:
            for kind, scalar in (("steps", "step/lr"), ("epochs", "epoch/lr")):
                told = self.tracker.last_step(scalar)
                held[kind] = held[kind] if told is None else told
        self._logged = held
        self._write_note(at_once=True)
        for path in (self._folder / name for name in DRAWN_BEFORE if not known):
            if path.exists():
                self.tracker.picture(step, f"plots/{path.stem}", path)
        if step:
            steps = _steps_logged(self._folder, held["steps"], step)
            epochs = _epochs_logged(self._folder, held["epochs"], step)
            parts = ((row, self.log_steps) for row in steps), ((row, self.log_epochs) for row in epochs)
            for row, log in heapq.merge(*parts, key=lambda part: part[0][0]):  # the step's before the epoch's
                log([row])

    def log_steps(self, rows: Sequence[Scalars]) -> None:
        for step, values in rows:
            if step > self._logged["steps"]:  # else an earlier launch logged the same numbers
                self.tracker.scalars(step, values)
                self._logged["steps"] = step

    def log_epochs(self, rows: Sequence[Scalars]) -> None:
        for step, values in rows:
            if step > self._logged["epochs"]:
                self.tracker.scalars(step, values)
                self._logged["epochs"] = step

    def _read_note(self) -> dict[str, Any]:
        with contextlib.suppress(OSError, ValueError):
            note = json.loads(read_small(self._note))
            return note if isinstance(note, dict) else {}
        return {}

    def _write_note(self, at_once: bool = False) -> None:
        """Note what is logged, or now and then what was so at the last note, for which a library has had the time."""
        now = time.monotonic()
        if at_once:
            self._settled = dict(self._logged)
        elif now - self._noted < NOTE_SECONDS:
            return
        self._note.parent.mkdir(exist_ok=True)
        write_durably(self._note, json.dumps({"id": self._id, **self._settled}).encode())
        most = self._logged["steps"] - 1  # of the last step the epoch's numbers may still come
        self._settled = {kind: min(last, most) for kind, last in self._logged.items()}
        self._noted = now


def _config_of(folder: Path) -> dict[str, Any]:
    """The settings of a run, what they came to and what it runs on, as its config.json has them."""
    told = json.loads(read_small(folder / "config.json"))
    launch = {name: value for name, value in told["launches"][-1].items() if name != "command"}
    found: dict[str, Any] = _redacted({**told["config"], "resolved": told.get("resolved", {}), "launch": launch})
    return found


def _redacted(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _redacted(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_redacted(part) for part in value]
    return redact(value) if isinstance(value, str) else value


def _steps_logged(folder: Path, after: int, upto: int) -> Iterator[Scalars]:
    """The rows of metrics.jsonl after one step, up to another."""
    if after >= upto or not os.path.lexists(folder / "metrics.jsonl"):
        return
    with open(folder / "metrics.jsonl", encoding="utf-8") as file:
        for line in file:
            row = json.loads(line) if line.endswith("\n") else {"step": upto + 1}  # training writes it at this moment
            if row["step"] > upto:
                return
            if row["step"] > after:
                yield scalars_of_step(row)


def _epochs_logged(folder: Path, after: int, upto: int) -> Iterator[Scalars]:
    """The same of results.csv."""
    if after >= upto or not os.path.lexists(folder / "results.csv"):
        return
    whole = read_small(folder / "results.csv", most=2**32).decode().rpartition("\n")[0]  # likewise
    for row in csv.DictReader(whole.splitlines()):
        if after < int(row["step"]) <= upto:
            yield scalars_of_epoch(row)
