"""A run goes on, and is the same, whatever becomes of the streams that it prints to and of the shell around it.

tests/shell_sweep.py tries more shells.
"""

import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from program import ROOT, TIMEOUT, assert_same_run, environment, results, train, wait_for
from shell_sweep import FLAGS, SHELLS, in_shell

SOME = ("reader leaves after a line", "all three closed", "output on a full disk", "no home, no terminal")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    train(*FLAGS, "--run_dir", folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("how", SOME)
def test_a_run_is_the_same_whatever_reads_it(how: str, undisturbed: Path, tmp_path: Path) -> None:
    assert in_shell(SHELLS[how], tmp_path) == 0
    assert_same_run(undisturbed, tmp_path / "run")


@pytest.mark.slow
def test_what_nobody_reads_is_in_the_folder_of_the_run(tmp_path: Path) -> None:
    assert in_shell(SHELLS["reader leaves after a line"], tmp_path) == 0
    told = (tmp_path / "run" / "console.log").read_text()
    assert told.count("epoch ") >= 3
    assert f"{float(results(tmp_path / 'run')[-1]['val_top1']):.2%}" in told
    assert "done      run" in told


def on_a_terminal(tmp_path: Path, before: Callable[[], object] = lambda: None) -> tuple["subprocess.Popen[bytes]", int]:
    """A run that trains for long on a terminal of its own, and the other end of that terminal."""
    ours, theirs = pty.openpty()
    flags = ("--max_samples", "128", "--epochs", "500", "--run_dir", str(tmp_path / "run"))
    command = [sys.executable, str(ROOT / "main.py"), *flags]
    process = subprocess.Popen(
        command,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environment(),
        preexec_fn=before,
        start_new_session=True,
    )
    os.close(theirs)
    return process, ours


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR2])
def test_a_closed_terminal_and_a_clusters_signal_leave_a_snapshot(number: signal.Signals, tmp_path: Path) -> None:
    process, terminal = on_a_terminal(tmp_path)
    wait_for(tmp_path / "run" / "results.csv", process)  # type: ignore[arg-type]
    os.close(terminal)  # nothing can be printed any more
    process.send_signal(number)
    assert process.wait(TIMEOUT) == 128 + number
    assert list((tmp_path / "run" / "snapshots").glob("step-*"))
    assert "stopped by" in (tmp_path / "run" / "console.log").read_text()


@pytest.mark.slow
def test_under_nohup_a_run_goes_on_without_its_terminal(tmp_path: Path) -> None:
    process, terminal = on_a_terminal(tmp_path, before=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    wait_for(tmp_path / "run" / "results.csv", process)  # type: ignore[arg-type]
    os.close(terminal)
    process.send_signal(signal.SIGHUP)
    seen = len(results(tmp_path / "run"))
    while len(results(tmp_path / "run")) < seen + 3:
        assert process.poll() is None
    process.terminate()
    assert process.wait(TIMEOUT) == 143


def test_a_program_whose_product_is_its_output_still_ends_with_its_reader() -> None:
    code = "import output; output.last(); print('x' * 100000, flush=True)"
    done = subprocess.run(
        ["bash", "-c", f'"{sys.executable}" -c "{code}" | true; exit ${{PIPESTATUS[0]}}'],
        cwd=ROOT,
        capture_output=True,
        timeout=60,
    )
    assert done.returncode != 0
