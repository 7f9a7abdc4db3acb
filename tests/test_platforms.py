"""A system that lacks what only Linux has trains all the same; one that lacks more, as Windows does, says so in a line.

What a system lacks is taken away from processes on Linux, before anything else is imported there.
"""

import subprocess
import sys
from pathlib import Path

import pytest
from program import ROOT, TIMEOUT, environment, results, run

DOORS = ("main", "run_lr_finder", "evaluate", "predict", "export")
LINUX_ONLY = (
    "os.memfd_create",
    "os.sched_getaffinity",
    "os.posix_fadvise",
    "signal.SIGPWR",
    "/dev/shm",
    "/proc",
    "/sys",
)
NOT_NEEDED = (*LINUX_ONLY, "signal.SIGHUP", "signal.SIGUSR1", "signal.SIGUSR2", "termios", "pty")
NEEDED = ("os.fork", "os.register_at_fork", "os.O_NOFOLLOW", "os.O_NONBLOCK", "fcntl", "resource")
WINDOWS = (
    *NOT_NEEDED,
    *NEEDED,
    "os.getuid",
    "os.sysconf",
    "os.statvfs",
    "signal.SIGPIPE",
    "signal.SIGKILL",
    "select.poll",
)
REFUSAL = "error: this system has no {}, without which nothing runs here; use Linux or macOS, on Windows WSL\n"
HIDING = """
import os, select, signal, sys

def refuse(event, arguments):
    if event in ("open", "os.listdir", "os.scandir") and str(arguments[0]).startswith(folders):
        raise FileNotFoundError(2, "hidden", arguments[0])

folders = tuple(name for name in HIDDEN if name.startswith("/"))
for name in HIDDEN:
    module, _, attribute = name.partition(".")
    if attribute:
        delattr(sys.modules[module], attribute)
    elif name not in folders:
        sys.modules[name] = None
sys.addaudithook(refuse)
"""


def without(hidden: tuple[str, ...], code: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    """A process, and all that it starts, on a system without these names and folders."""
    (folder / "sitecustomize.py").write_text(f"HIDDEN = {hidden!r}\n{HIDING}")
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment(PYTHONPATH=str(folder)),
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )


@pytest.mark.slow
def test_digits_train_without_what_only_some_systems_have(tmp_path: Path) -> None:
    flags = ["--epochs", "1", "--max_samples", "160", "--num_workers", "1", "--run_dir", str(tmp_path / "run")]
    code = f"import {', '.join(DOORS)}, sys; sys.exit(main.main({flags}))"
    done = without(NOT_NEEDED, code, tmp_path)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
    assert len(results(tmp_path / "run")) == 1


def test_every_door_refuses_windows_in_one_line(tmp_path: Path) -> None:
    code = f"import {', '.join(DOORS)}; print(*(door.main([]) for door in ({', '.join(DOORS)})))"
    done = without(WINDOWS, code, tmp_path)
    assert (done.stdout, done.stderr) == ("2 2 2 2 2\n", REFUSAL.format("os.fork") * len(DOORS))


@pytest.mark.parametrize("name", NEEDED)
def test_a_system_that_lacks_one_thing_is_refused_by_its_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, _, attribute = name.partition(".")
    if attribute:
        monkeypatch.delattr(module + "." + attribute)
    else:
        monkeypatch.setitem(sys.modules, module, None)
    done = run("--epochs", 0)
    assert (done.status, done.out, done.err) == (2, "", REFUSAL.format(name))
