"""What a run says while it trains: a live bar on a terminal, plain lines with the time elsewhere; its last lines."""

import csv
import os
import shlex
import shutil
import signal
import string
import sys
import textwrap
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tqdm import tqdm

import distributed
from beforehand import BEST, step_files
from config import Config
from defaults import FEWEST_FOR_TOP5
from distributed import print0
from machine import program
from stream.files import read_small
from units import as_rate, duration

WIDEST = 160  # columns of a line in a log file
STEP_LINES = 60  # of a whole run in a log file
STEP_SECONDS = 60.0  # between two of them
INDENT = " " * 10  # under which a long line goes on
DETAILS = ("revision ", "blocks ", "streams ")  # lines of the header that --verbose shows
PLAIN = f"{string.ascii_letters}{string.digits}/_-.=".encode()  # bytes that need no quoting
WIDE = 120  # columns of a terminal that has room for all numbers beside the bar


def on_terminal() -> bool:
    """Whether somebody watches what is printed."""
    return sys.stdout.isatty()


def columns() -> int:
    """The width that lines should have."""
    return shutil.get_terminal_size().columns if on_terminal() else WIDEST


def header(lines: Iterable[str], config: Config) -> None:
    """Print lines before training, folded to the width there is, without those that only --verbose shows."""
    for line in lines:
        if config.verbose or not line.startswith(DETAILS):
            print0(
                *textwrap.wrap(
                    line, columns(), subsequent_indent=INDENT, break_on_hyphens=False, break_long_words=False
                ),
                sep="\n",
            )


class Console:
    """The display of a run's epochs on rank 0; other ranks have one that is silent.

    A log file gets STEP_LINES lines of steps at most, one in STEP_SECONDS; `verbose` one each time numbers arrive.
    """

    def __init__(self, config: Config, steps: int, classes: int, speaks: bool) -> None:
        self._steps = steps
        self._epochs = config.epochs
        self._speaks = speaks
        self._verbose, self._quiet = config.verbose, config.quiet
        self._shows_top5 = classes >= FEWEST_FOR_TOP5
        self._apart = -(-config.epochs * steps // STEP_LINES)
        self._shown = (0, time.monotonic())
        self._epoch_seconds = 0.0  # of the last whole epoch, its evaluation included
        self._bar: tqdm[Any] | None = None
        self._wait: threading.Timer | None = None

    def start_epoch(self, epoch: int, done: int) -> None:
        """Show epoch number `epoch` (from 1), of whose steps `done` are completed."""
        self._epoch = epoch
        self._title = f"epoch {epoch:>{len(str(self._epochs))}}/{self._epochs}"
        if not self._speaks or self._quiet or not on_terminal():
            return
        form = self._form("")
        shown: dict[str, Any] = {"desc": self._title, "file": sys.stdout, "leave": False}
        self._bar = tqdm(total=self._steps, initial=done, bar_format=form, ncols=columns(), **shown)

    def waits_for(self, text: str) -> None:
        """Tell on a line what the run waits for, if that takes longer than a moment. `over` ends it."""
        self.over()
        if self._speaks and not self._quiet:
            self._wait = threading.Timer(distributed.WAIT_SECONDS, lambda: self._say(f"wait      {text}"))
            self._wait.daemon = True
            self._wait.start()

    def over(self) -> None:
        """What the run waited for has come."""
        if self._wait is not None:
            self._wait.cancel()
            self._wait = None

    def tick(self) -> None:
        """Move the bar by a step, whose numbers come later."""
        if self._bar is not None:
            self._bar.update()

    def steps(self, row: dict[str, Any], done: int, seconds: float, waiting: float) -> None:
        """Show the numbers of a step: `loss, top1, lr, momentum, images_per_s`.

        `done` steps of the epoch took `seconds`, of which the share `waiting` went by without data.
        """
        if not self._speaks or self._quiet:
            return
        left = (self._steps - done) * seconds / max(1, done)
        whole = self._epoch_seconds or left + seconds
        run = left + (self._epochs - self._epoch) * whole
        if self._bar is not None:
            self._bar.ncols = columns()  # a window may have been resized
            self._bar.bar_format = self._form(self._beside_bar(row, waiting, left, run))
            self._bar.refresh()
        elif self._is_due(row["step"], is_last=done == self._steps):
            self._say(
                f"{self._title}  step {done}/{self._steps}  loss {row['loss']:.4f}  top1 {row['top1']:6.2%}  "
                f"lr {row['lr']:.3g}  momentum {row['momentum']:.3f}  {as_rate(row['images_per_s'])} images/s  "
                f"data {waiting:.0%}  left {duration(left)}, run {duration(run)}"
            )

    def _form(self, beside: str) -> str:
        """The bar with a text beside it; tqdm's own place for that begins with a comma."""
        return f"{{desc}}  {'{n_fmt}/{total_fmt} ' if columns() >= WIDE else ''}|{{bar}}| {beside}"

    def _beside_bar(self, row: dict[str, Any], waiting: float, left: float, run: float) -> str:
        rate = as_rate(row["images_per_s"])
        if columns() >= WIDE:
            return (
                f"loss {row['loss']:.4f}  top1 {row['top1']:.2%}  lr {row['lr']:.3g}  "
                f"{rate} images/s  data {waiting:.0%}  left {duration(left)}, run {duration(run)}"
            )
        speed = f"{rate}/s  data {waiting:.0%}"
        return f"loss {row['loss']:.3f}  lr {row['lr']:.2g}  {speed}  {duration(left)}, {duration(run)}"

    def _is_due(self, step: int, is_last: bool) -> bool:
        """Whether a log file gets a line of this step. The last of an epoch has that of the epoch."""
        if self._verbose:
            return True
        before, at = self._shown
        due = step // self._apart > before // self._apart and time.monotonic() - at >= STEP_SECONDS and not is_last
        if due:
            self._shown = step, time.monotonic()
        return due

    def end_epoch(self, result: dict[str, Any], is_best: bool) -> None:
        """Show an epoch's line, the row of results.csv, without what does not fit on a narrow terminal."""
        self.close()
        self._epoch_seconds = result["seconds"]
        if not self._speaks:
            return
        parts = [  # and how soon each is left out; the title never is
            (self._title, 0),
            (f"train loss {result['train_loss']:.4f} top1 {result['train_top1']:7.2%}", 3),
            (f"val loss {result['val_loss']:.4f} top1 {result['val_top1']:7.2%}", 0),
            (f"top5 {result['val_top5']:7.2%}" if self._shows_top5 else "", 4),
            (f"ema top1 {result['ema_top1']:7.2%}" if "ema_top1" in result else "", 1),
            (f"{as_rate(result['images_per_s']):>7} images/s", 2),
            (f"{duration(result['seconds']):>7}", 2),
            ("best" if is_best else "", 1),
        ]
        stamp = len(_stamp())
        for most in (4, 3, 2, 1, 0):
            line = "  ".join(text for text, rank in parts if text and rank <= most)
            if len(line) + stamp <= columns():
                break
        self._say(line)

    def close(self) -> None:
        """Remove the bar from the terminal."""
        self.over()
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _say(self, line: str) -> None:
        if self._bar is not None:
            self._bar.clear()
        print0(f"{_stamp()}{line}", always=True)


def _stamp() -> str:
    """The time, before a line of a log file."""
    return "" if on_terminal() else time.strftime("%m-%d %H:%M:%S  ")


def plan_lines(config: Config, steps: int, folder: Path) -> list[str]:
    """How much will be trained, what is logged, and how to stop and go on."""
    stops = "Ctrl-C" if signal.getsignal(signal.SIGINT) != signal.SIG_IGN else "SIGTERM"  # as a script's background job
    often = f", and every {config.snapshot_steps} steps" if config.snapshot_steps else ""
    lines = [
        f"plan      {config.epochs} epoch{'s' * (config.epochs > 1)} x {steps:,} steps of {config.batch_size} images = "
        f"{config.epochs * steps:,} steps; a snapshot after each epoch{often}",
        f"stop      {stops}: it writes a snapshot, and {resume_command(folder)} goes on",
    ]
    if not on_terminal() and not config.verbose:
        lines.append(
            f"log       a line an epoch, and at most {STEP_LINES} of steps; --verbose: every {config.log_steps} steps"
        )
    return lines


def last_lines(config: Config, folder: Path) -> list[str]:
    """Of a run that is over: its best epoch, the file that has it, and the commands that come next."""
    lines, source = [], [str(folder)]
    if best := _best_epoch(folder):
        judged, figures = best
        source += _which(folder, judged)
        lines.append(f"best      epoch {judged['epoch']}: {figures}; {_file_of(folder, judged)}")
    if config.scheduler == "trapezoid":
        lines.append(f"extend    {resume_command(folder)} --extend_epochs {max(1, config.epochs // 2)}")
    return [
        *lines,
        f"next      {command('evaluate.py', *source)}",
        f"next      {command('predict.py', *source[:1], 'IMAGE', *source[1:])}",
        f"next      {command('export.py', *source, '--to', 'onnx', '--out', folder / 'onnx')}",
    ]


def _best_epoch(folder: Path) -> tuple[dict[str, str], str] | None:
    """The row of results.csv with the highest accuracy, and its figures in words."""
    try:
        rows = list(csv.DictReader(read_small(folder / "results.csv", most=2**32).decode().splitlines()))
        name = "ema_top1" if rows and rows[0].get("ema_top1") else "val_top1"
        row = max(rows, key=lambda row: float(row[name] or -1))
        loss = float(row[name.replace("top1", "loss")])
        return row, f"{name} {float(row[name]):.2%}, {name.replace('top1', 'loss')} {loss:.4f}"
    except (OSError, ValueError, LookupError, TypeError, csv.Error):
        return None


def _which(folder: Path, row: dict[str, str]) -> list[str]:
    """The flag that chooses the weights of an epoch, where they are kept and not what is chosen without it."""
    earlier = step_files(folder / "snapshots")[:-1]
    is_earlier = f"step-{int(row['step']):09d}" in [path.stem for path in earlier]
    return ["--which", row["step"]] if is_earlier and not (folder / "snapshots" / BEST).exists() else []


def _file_of(folder: Path, row: dict[str, str]) -> str:
    """Where the weights of an epoch are, or the newest ones if they are not kept."""
    kept = step_files(folder / "snapshots")
    if (folder / "snapshots" / BEST).exists():
        return str(folder / "snapshots" / BEST)
    if own := [path for path in kept if path.stem == f"step-{int(row['step']):09d}"]:
        return str(own[0])
    newest = max(kept, key=lambda path: path.name, default=None)
    return f"its snapshot is gone (--save_best keeps it), the newest is {newest}"


def resume_command(folder: Path) -> str:
    """The command that goes on with a run, as it is to be typed in this folder."""
    return command("main.py", "--resume_from", folder, ranks=distributed.world_size())


def command(script: str, *arguments: object, ranks: int = 1) -> str:
    """A command line that starts one of the front doors as this process was started."""
    root = Path(__file__).resolve().parent.parent
    path = script if Path.cwd() == root else str(root / script)
    launcher = shlex.join(program("python"))
    if ranks > 1:
        nodes, each = os.environ.get("GROUP_WORLD_SIZE", "1"), os.environ.get("LOCAL_WORLD_SIZE", str(ranks))
        several = f" --nnodes {nodes}" if nodes != "1" else ""
        launcher = f"{launcher} -m torch.distributed.run{several} --nproc_per_node {each}"
        launcher = launcher.replace("python -m torch.distributed.run", "torchrun")
    return f"{launcher} {' '.join(_quoted(str(argument)) for argument in (path, *arguments))}"


def _quoted(argument: str) -> str:
    """An argument for bash and zsh; of one that the output cannot show as it is, the bytes in octal."""
    try:
        argument.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        pass
    else:
        if argument.isprintable():
            return shlex.quote(argument)
    shown = (chr(byte) if byte in PLAIN else f"\\{byte:03o}" for byte in os.fsencode(argument))
    return f"$'{''.join(shown)}'"
