"""--compare tells in what runs differ and what came of them, as text and as a page, and changes nothing."""

import subprocess
import sys
from pathlib import Path

import pytest
from logs_of_runs import write_logs
from program import run

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    monkeypatch.chdir(tmp_path)
    one = write_logs(tmp_path / "one", epochs=5, lr=0.1, amp=True)
    return one, write_logs(tmp_path / "<b>other", epochs=5, done=2, lr=0.2, seed=3)


def test_settings_that_differ_and_results_are_told_side_by_side(runs: tuple[Path, Path]) -> None:
    done = run("--compare", *runs)
    assert (done.status, done.err) == (0, "")
    rows = {line.split()[0]: line.split()[1:] for line in done.out.splitlines() if line and line[0] != " "}
    assert rows["lr"] == ["0.1", "0.2"]
    assert rows["amp"] == ["True", "False"]
    assert rows["seed"] == ["0", "3"]
    assert "epochs done" in done.out
    assert rows["epochs"] == ["done", "5", "of", "5", "2", "of", "5"]
    assert not {"momentum", "run_dir", "num_workers"} & rows.keys()
    assert "best top-1" in done.out
    page = Path("compare.html").read_text()
    assert "&lt;b&gt;other" in page
    assert "<b>" not in page
    assert page.count('<figure class="chart">') == 7
    assert ">minutes<" in page  # the longest run took 12.5


def test_the_speed_of_a_run_is_that_of_all_its_epochs(runs: tuple[Path, Path]) -> None:
    log = runs[0] / "results.csv"
    log.write_text(log.read_text().replace(",9000,", ",3000,", 1))
    rows = [line.split() for line in run("--compare", *runs).out.splitlines()]
    assert ["images/s", "6,429", "9,000"] in rows


def test_runs_of_the_same_settings_are_said_to_be(tmp_path: Path, runs: tuple[Path, Path]) -> None:
    same = write_logs(tmp_path / "same", epochs=5, lr=0.1, amp=True)
    assert "no setting differs" in run("--compare", runs[0], same).out


def test_a_run_without_an_epoch_is_compared_by_its_settings(tmp_path: Path, runs: tuple[Path, Path]) -> None:
    done = run("--compare", runs[0], write_logs(tmp_path / "new", done=0))
    assert done.status == 0, done.err
    assert "none yet" in done.out


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["one"], "two runs or more"),
        (["one", "nowhere"], "nowhere is not the folder of a run"),
        (["one", "--epochs", "3", "--compare", "one", "one"], "leave out --epochs"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_a_line(runs: tuple[Path, Path], flags: list[str], told: str) -> None:
    done = run("--compare", *flags)
    assert done.status == 2
    assert told in done.err
    assert done.err.count("\n") == 1
    assert not Path("compare.html").exists()


def test_broken_logs_are_refused_in_a_line(runs: tuple[Path, Path]) -> None:
    (runs[1] / "results.csv").write_text("epoch\nx\n")
    done = run("--compare", *runs)
    assert done.status == 2
    assert done.err.count("\n") == 1


def test_runs_are_compared_without_importing_torch(runs: tuple[Path, Path], tmp_path: Path) -> None:
    program = f"import sys, main; assert main.main(['--compare', *{list(map(str, runs))}]) == 0; "
    program += "assert not {'torch', 'matplotlib'} & sys.modules.keys()"
    environment = {"PYTHONPATH": str(ROOT), "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
