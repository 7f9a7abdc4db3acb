"""Ranks under torchrun see what one process sees: the same batches, the same counts, and each other's signals."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import tiny_cifar
from program import (
    ROOT,
    TIMEOUT,
    assert_same_run,
    children,
    cut,
    environment,
    ledger,
    results,
    run,
    snapshot_path,
    start,
    steps_kept,
    train,
    until,
    wait,
    wait_for,
)

import distributed
import errors
import main
import preflight
import run_lr_finder
from training import step
from training.signals import ECHO_SECONDS

pytestmark = pytest.mark.slow

MODEL = ("--model", "resnet18", "--image_size", 33, "--epochs", 2, "--num_workers", 1)
LOGS = ("--ledger", "--snapshot_steps", 3, "--keep_snapshots", 9, "--log_steps", 1)
FLAGS = ("--batch_size", 12, "--streams", 6, "--block_mb", 1, *MODEL, *LOGS)
FILES_KEPT = 4
SIGNALS_SENT = 5  # at start-up, in steps, during a save, and one of them twice
STEP_LINE = re.compile(r"epoch (\d)/2  step (\d)/6")


@pytest.fixture(scope="module")
def data(image_set: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[object, ...]:
    """80 images to train on, and all 97 to evaluate on: a number that no number of ranks or batch divides."""
    few = Path(shutil.copytree(image_set, tmp_path_factory.mktemp("few") / "set"))
    for path in (few / "data").glob("train-*"):
        if int(path.name[6:11]) >= FILES_KEPT:
            path.unlink()
    return "--dataset", "hf", "--dataset_name", few


@pytest.fixture(scope="module")
def one_rank(data: tuple[object, ...], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("ranks") / "one"
    train(*data, *FLAGS, "--run_dir", folder)
    yield folder
    shutil.rmtree(folder.parent)


@pytest.fixture(scope="module")
def two_ranks(data: tuple[object, ...], one_rank: Path) -> Path:
    folder = one_rank.parent / "two"
    done = wait(start(*data, *FLAGS, "--run_dir", folder, ranks=2))
    assert done.status == 0, done.err
    assert done.out.count("epoch 1/2  train loss") == 1
    return folder


def ids(folder: Path) -> list[tuple[int, int, str]]:
    return [(row["step"], row["epoch"], row["ids"]) for row in ledger(folder)]


def counts(printed: str) -> tuple[str, ...]:
    """correct1, images and correct5 of the line that --evaluate prints."""
    match = re.search(r"top1 .*% \((\d+) of (\d+)\)  top5 .*% \((\d+)\)", printed)
    assert match, printed
    return match.groups()


def test_two_ranks_train_on_the_batches_of_one(one_rank: Path, two_ranks: Path, tmp_path: Path) -> None:
    assert ids(two_ranks) == ids(one_rank)
    assert len({row[2] for row in ids(two_ranks)}) == len(ledger(two_ranks))
    assert [row["lr"] for row in ledger(two_ranks)] == [row["lr"] for row in ledger(one_rank)]
    assert [row["epoch"] for row in results(two_ranks)] == ["1", "2"]


def test_ranks_whose_streams_differ_in_length_make_the_same_steps(tmp_path: Path) -> None:
    """Of 127 digits the second rank's streams have 64, a batch more than the first one's 63."""
    flags = ("--max_samples", 127, "--batch_size", 64, "--epochs", 2, "--run_dir", tmp_path / "run")
    done = wait(start(*flags, ranks=2))
    assert done.status == 0, done.err
    assert [row["step"] for row in results(tmp_path / "run")] == ["1", "2"]


def test_a_run_goes_from_one_rank_to_two_and_back_on_the_same_batches(one_rank: Path, tmp_path: Path) -> None:
    on_two = cut(one_rank, 3, tmp_path / "two")
    done = wait(start("--resume_from", on_two, ranks=2))
    assert done.status == 0, done.err
    assert "ranks     2, 1 before: the same global batches, but BatchNorm sees 6 images at once" in done.out
    assert ids(on_two) == ids(one_rank)
    on_one = cut(on_two, 9, tmp_path / "one")
    assert "ranks     1, 2 before" in train("--resume_from", on_one).out
    assert ids(on_one) == ids(one_rank)


def test_evaluation_counts_every_image_once_on_any_number_of_ranks(one_rank: Path) -> None:
    flags = ("--resume_from", one_rank, "--evaluate")
    alone = counts(train(*flags).out)
    assert alone[1] == "97"
    for ranks in (2, 3):
        done = wait(start(*flags, ranks=ranks))
        assert done.status == 0, done.err
        assert counts(done.out) == alone


def test_a_run_of_two_ranks_goes_on_as_if_nothing_happened(two_ranks: Path, tmp_path: Path) -> None:
    copy = cut(two_ranks, 3, tmp_path / "cut")
    done = wait(start("--resume_from", copy, ranks=2))
    assert done.status == 0, done.err
    assert_same_run(copy, two_ranks)


def kill_a_rank(process: "subprocess.Popen[str]", folder: Path, rng: random.Random) -> None:
    """Once the ranks have written a snapshot; they are gone when it returns, and torchrun may have started others."""
    wait_for(snapshot_path(folder, max(steps_kept(folder), default=0) + 2), process)
    ranks = children(process)
    time.sleep(rng.uniform(0, 0.05))
    os.kill(rng.choice(ranks), signal.SIGKILL)
    until(lambda: not {*ranks} & {*children(process)})


def test_a_rank_killed_three_times_under_torchrun_changes_nothing(
    data: tuple[object, ...], two_ranks: Path, tmp_path: Path
) -> None:
    folder, rng = tmp_path / "killed", random.Random(0)
    line = (*data, *FLAGS, "--snapshot_steps", 2, "--run_dir", folder, "--resume_from", "auto")
    process = start(*line, ranks=2, restarts=3)
    for _ in range(3):
        kill_a_rank(process, folder, rng)
    done = wait(process)
    assert done.status == 0, done.err
    assert len(re.findall("^resumed ", done.out, re.MULTILINE)) == 3
    assert_same_run(folder, two_ranks)


def two_processes(code: str, stderr: int | None = None) -> list[str]:
    """What two processes that another launcher than torchrun started print."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1]), "WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env=environment(**meeting, RANK=rank),
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
        for rank in "01"
    ]
    return [rank.communicate(timeout=TIMEOUT)[0] for rank in ranks]


def test_ranks_that_another_launcher_started_find_each_other() -> None:
    code = "import distributed as d; d.init('cpu'); print(d.rank(), d.world_size(), d.largest_over_ranks(d.rank()))"
    assert two_processes(code) == ["0 2 1\n", "1 2 1\n"]


def test_ranks_that_do_not_agree_say_in_what() -> None:
    code = """
import distributed as d, errors

d.init("cpu")
d.require_agreement({"the steps": 7, "the classes": ["a", "b"]})
try:
    d.require_agreement({"the steps": 7, "the classes": ["a", "b"][:: 1 - 2 * d.rank()]}, errors.DataError)
except errors.DataError as error:
    print(error)
"""
    line = "the ranks differ in the classes: ['a', 'b'] on rank 0, ['b', 'a'] on rank 1; start all"
    assert [told.startswith(line) for told in two_processes(code)] == [True, True]


def test_ranks_with_other_flags_are_refused_before_they_wait_for_each_other(tmp_path: Path) -> None:
    code = f"import os, main; main.main(['--epochs', os.environ['RANK'], '--run_dir', {str(tmp_path / 'run')!r}])"
    code = code.replace("os.environ['RANK']", "str(1 + int(os.environ['RANK']))")
    told = two_processes(code, stderr=subprocess.STDOUT)
    line = "error: the ranks differ in --epochs: 1 on rank 0, 2 on rank 1; "
    assert sorted(text.count(line) for text in told) == [0, 1]
    assert not (tmp_path / "run").exists()


def test_cifar_that_is_missing_is_downloaded_once_while_the_other_ranks_wait(tmp_path: Path) -> None:
    _, facts = tiny_cifar.write(tmp_path / "made")
    (tmp_path / "served").mkdir()
    tiny_cifar.pack(tmp_path / "made", facts, tmp_path / "served" / "cifar.tgz")
    asked = []

    class Slow(SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            time.sleep(2)
            with contextlib.suppress(BrokenPipeError):
                super().do_GET()

        def log_message(self, *words: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Slow, directory=tmp_path / "served")) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        facts["CIFAR10"]["url"] = f"http://127.0.0.1:{server.server_port}/cifar.tgz"
        (tmp_path / "facts.json").write_text(json.dumps(facts))
        call = f"load_in_a_rank({str(tmp_path / 'data')!r}, {str(tmp_path / 'facts.json')!r})"
        told = two_processes(f"import sys; sys.path.append('tests'); import tiny_cifar; tiny_cifar.{call}")
        server.shutdown()
    assert [text.splitlines()[-1:] for text in told] == [["[20, 4]"], ["[20, 4]"]]
    assert len(asked) == 2  # torchvision asks where a file lies before it fetches it


def test_a_rank_waits_for_one_whose_patience_with_the_network_ends_first() -> None:
    """The network has 2 s here, after which the rank that waits for it would say so and end them all."""
    code = """
import time, distributed as d

d.MARGIN = 6.0
d.init("cpu", patience=2.0)
d.largest_over_ranks(0)
time.sleep(4 * d.rank())
print(d.largest_over_ranks(d.rank()), d.mean_over_ranks(d.torch.ones(1)).item())
"""
    assert two_processes(code) == ["1 1.0\n", "1 1.0\n"]


def test_the_ranks_patience_is_the_networks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[float] = []

    def init(device: str, patience: float) -> None:
        asked.append(patience)
        raise errors.UsageError("enough")

    monkeypatch.setattr(distributed, "init", init)
    for entry in (main.main, run_lr_finder.main):
        assert run("--network_patience", 90, "--run_dir", tmp_path / "run", entry=entry).status == 2
    assert asked == [5400.0, 5400.0]


@pytest.mark.parametrize("entry", [main.main, run_lr_finder.main], ids=["main.py", "run_lr_finder.py"])
def test_one_rank_looks_the_data_over(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, entry: Callable[[Sequence[str]], int]
) -> None:
    """A rank prints what rank 0 gives it, and does not look for itself."""

    def refuse(*_: object, **options: object) -> list[str]:
        raise errors.UsageError("looked over")

    monkeypatch.setattr(preflight, "describe_data", refuse)
    monkeypatch.setattr(distributed, "from_rank0", lambda make: ["rank 0 told this"])
    monkeypatch.setattr(step, "build_training", refuse)
    done = run("--run_dir", tmp_path / "run", entry=entry)
    assert "rank 0 told this" in done.out
    assert done.status == 2


def test_no_thread_of_gloo_is_left_to_abort_a_process_that_ends() -> None:
    code = """
import atexit, pathlib, torch, distributed as d

def threads():
    return sum(path.read_text().startswith("pt_gloo") for path in pathlib.Path("/proc/self/task").glob("*/comm"))

atexit.register(lambda: print(threads()))
d.init("cpu")
d.largest_over_ranks(d.rank()), d.mean_over_ranks(torch.ones(1)), d.copy_from_rank0([torch.ones(1)])
print(threads() > 0)
"""
    assert two_processes(code) == ["True\n0\n", "True\n0\n"]


def signal_torchrun(process: "subprocess.Popen[str]", folder: Path, rng: random.Random, in_a_save: bool) -> None:
    """SIGTERM or SIGINT at start-up, after some snapshots, or while one is written."""
    before, enough = {*folder.glob("snapshots/step-*")}, rng.randint(0, 2)
    while process.poll() is None and len({*folder.glob("snapshots/step-*.safetensors")} - before) < enough:
        time.sleep(0.002)
    while in_a_save and process.poll() is None and not list(folder.glob("snapshots/*.tmp")):
        time.sleep(0.0005)
    time.sleep(0 if in_a_save else rng.uniform(0, 0.3 if enough else 6))
    process.send_signal(rng.choice([signal.SIGTERM, signal.SIGINT]))


def test_signals_to_torchrun_repeat_no_step_and_change_nothing(
    data: tuple[object, ...], two_ranks: Path, tmp_path: Path
) -> None:
    rng, folder = random.Random(0), tmp_path / "run0"
    for number in range(SIGNALS_SENT):
        line = (*data, *FLAGS, "--snapshot_steps", 2, "--verbose", "--run_dir", folder, "--resume_from", "auto")
        process = start(*line, ranks=2)
        signal_torchrun(process, folder, rng, in_a_save=number % 4 == 1)
        if number % 4 == 3:
            time.sleep(ECHO_SECONDS + 0.2)
            process.send_signal(signal.SIGTERM)
        done = wait(process)
        printed = [6 * (int(epoch) - 1) + int(step) for epoch, step in STEP_LINE.findall(done.out)]
        assert max(printed, default=0) <= max(steps_kept(folder), default=0)
        stopped = re.search("stopped by SIG(TERM|INT) at step|stopped at once by SIG(TERM|INT)", done.out + done.err)
        assert "done " in done.out or not printed or stopped
        if "done " in done.out or number == SIGNALS_SENT - 1:
            train_on = wait(start(*line, ranks=2))
            assert train_on.status == 0, train_on.err
            assert_same_run(folder, two_ranks)
            folder = tmp_path / f"run{number}"


def test_ranks_that_cannot_share_the_streams_are_refused(tmp_path: Path) -> None:
    done = wait(start("--streams", 3, "--batch_size", 48, "--run_dir", tmp_path / "run", ranks=2))
    told = [line for line in done.err.splitlines() if line.startswith(("error:", "stopped by"))]
    assert told == ["error: --streams 3 is not divisible by 2 ranks; give --streams a multiple of 2"]
    assert re.search(r"exitcode\s*: 2\b", done.err)
    assert 'main.py", line' not in done.err
    assert not (tmp_path / "run").exists()


OF_ONE_RANK = """
import os, signal, sys
import distributed as d
import errors

def work():
    d.init("cpu")
    d.largest_over_ranks(0)
    if d.rank() == 1:
        {}
    d.largest_over_ranks(0)

sys.exit(errors.run_front_door(work, debug=False))
"""


@pytest.mark.parametrize(
    ("what", "line"),
    [
        ("raise errors.DataError('no room on this node; make some')", "error: no room on this node; make some"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "error: another rank has ended; what it said, or the kernel's log, "),
    ],
    ids=["an error", "a kill"],
)
def test_what_ends_one_rank_is_one_line_in_all_and_no_traceback(what: str, line: str) -> None:
    told = "".join(two_processes(OF_ONE_RANK.format(what), stderr=subprocess.STDOUT))
    assert told.count("error: ") == told.count(line) == 1, told
    assert "Traceback" not in told
    assert "gloo" not in told


def test_an_error_that_only_a_later_rank_has_is_told_though_nothing_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr(errors.time, "sleep", waited.append)
    for name, value in {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        done = run("--epochs", 0)
        assert (done.status, done.err) == (2, "error: --epochs 0 is too small; it must be at least 1\n")
    assert waited == [errors.ENDED_WITHIN]
