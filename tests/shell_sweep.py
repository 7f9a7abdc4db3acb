"""Shells around a run, each of which takes something away from it; every run must be the undisturbed one.

uv run python tests/shell_sweep.py
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from program import ROOT, TIMEOUT, assert_same_run, environment

FLAGS = ("--max_samples", "128", "--epochs", "3", "--ledger", "--keep_snapshots", "9")
SHELLS = {  # what a shell makes of: main.py FLAGS
    "reader leaves after a line": "{} | head -1",
    "reader leaves at once": "{} | true",
    "errors into nothing": "{} 2>&-",
    "output into nothing": "{} >&-",
    "all three closed": "{} <&- >&- 2>&-",
    "output on a full disk": "{} >/dev/full 2>/dev/full",
    "unbuffered, reader leaves": "PYTHONUNBUFFERED=1 {} | head -1",
    "ASCII": "PYTHONIOENCODING=ascii LC_ALL=C {} >ascii.log",
    "a reader that is slow": "{} | (sleep 1; cat >/dev/null)",
    "no home, no terminal": "env -u HOME -u TERM setsid {} </dev/null >log 2>&1",
}


def in_shell(line: str, folder: Path) -> int:
    command = f"{sys.executable} {ROOT / 'main.py'} {' '.join(FLAGS)} --run_dir run; echo $? >&7"
    inner = f"sh -c '{command}'"
    with open(folder / "status", "w+") as status:
        os.set_inheritable(status.fileno(), True)
        script = f"exec 7>&{status.fileno()}; " + line.format(inner)
        subprocess.run(
            ["bash", "-c", script], cwd=folder, env=environment(), timeout=TIMEOUT, close_fds=False, capture_output=True
        )
        status.seek(0)
        return int(status.read())


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        undisturbed = Path(scratch) / "undisturbed"
        undisturbed.mkdir()
        assert in_shell("{}", undisturbed) == 0
        for number, (name, how) in enumerate(SHELLS.items()):
            folder = Path(scratch) / str(number)
            folder.mkdir()
            status = in_shell(how, folder)
            assert status == 0, (name, status)
            assert_same_run(undisturbed / "run", folder / "run")
            print(f"{name}: the same run", flush=True)


if __name__ == "__main__":
    main()
