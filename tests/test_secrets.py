"""A user's secrets turn up in nothing that a run writes, prints or sends elsewhere."""

import base64
import contextlib
import itertools
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from hub import Hub
from huggingface_hub import constants
from program import ROOT, TIMEOUT, Outcome, environment, run
from shards import REPO_ID, make_small_set

from errors import redact
from stream import ranges
from stream import retry as network
from stream.retry import Network

pytestmark = pytest.mark.usefixtures("small_model")

DIGITS: tuple[object, ...] = ("--max_samples", 16, "--batch_size", 16, "--num_workers", 0, "--epochs", 2)
IMAGES: tuple[object, ...] = ("--model", "resnet18", "--image_size", 16, "--batch_size", 8, "--epochs", 1)
STREAMED = (*IMAGES, "--num_workers", 1, "--network_patience", 0.08, "--stall_timeout", 5)


TOKEN = "hf_CANARYtokenCANARYtokenCANARYtoken00"
SECRETS = {
    "HF_TOKEN": TOKEN,
    "HUGGING_FACE_HUB_TOKEN": "hf_CANARYoldCANARYoldCANARYoldCANARY00",
    "WANDB_API_KEY": "CANARYwandb0123456789abcdef0123456789ab",
    "AWS_SECRET_ACCESS_KEY": "CANARYaws/0123456789+abcdefghijklmnopqr",
    "MY_SECRET": "CANARYgeneric",
    "HTTP_PROXY": "http://proxyuser:CANARYproxy@127.0.0.1:9",
}
REMOTE = "https://gituser:CANARYgit@example.invalid/repo.git"
SIGNATURE = "?signed"  # what the stand-in puts where the Hub puts the signature of a link to its storage

RUNS = """
import json, os, runpy, sys, traceback
import torch
from training import journal, step

def small(*arguments):
    model = build(*arguments)
    model.layer2, model.layer3, model.layer4 = [torch.nn.Identity()] * 3
    model.fc = torch.nn.Linear(model.conv1.out_channels, 10)
    return model

build, whole, step.build_model = step.build_model, journal.Journal.end_epoch, small
for crash, argv in json.loads(sys.argv[1]):
    journal.Journal.end_epoch = (lambda *_: {}["CRASH"]) if crash else whole
    sys.argv = ["main.py", *argv]
    try:
        runpy.run_path("main.py", run_name="__main__")
    except SystemExit as stop:
        print("STATUS", stop.code, flush=True)
    except Exception:
        traceback.print_exc()
        print("STATUS traceback", flush=True)
"""


def forms(secret: str) -> list[bytes]:
    """A secret without what may be told of it, and as it looks in a Basic authorisation."""
    bare = secret.partition("://")[2].partition("@")[0] or secret
    return [bare.rpartition(":")[2].removeprefix("hf_").encode(), base64.b64encode(bare.encode())]


def leaks(folder: Path, secrets: list[bytes], apart: Path | None = None) -> list[str]:
    """The files that have a secret in their name or anywhere in their bytes, but for the file `apart`."""
    found = []
    for path in folder.rglob("*"):
        content = path.read_bytes() if path.is_file() and path != apart else b""
        inside = str(path.relative_to(folder)).encode() + b"\n" + content
        found += [f"{path}: {secret!r}" for secret in secrets if secret in inside]
    return found


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """A clone of the program whose remote has a password in it."""
    folder = tmp_path / "program"
    folder.mkdir()
    for wing in (".", "stream", "training", "tracking", "results", "pages"):
        (folder / wing).mkdir(exist_ok=True)
        for path in (ROOT / wing).glob("*.py" if wing == "." else "*.*"):
            shutil.copy(path, folder / wing)
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@example.invalid", "-c", "commit.gpgsign=false"]
    for command in (["init"], ["remote", "add", "origin", REMOTE], ["add", "."], ["commit", "-m", "x"]):
        subprocess.run([*git, *command], cwd=folder, check=True, capture_output=True)
    return folder


def run_all(program: Path, home: Path, runs: list[tuple[bool, list[str]]]) -> Outcome:
    """Each run as `python main.py ...` would be, all in one process, with secrets in its environment."""
    own = {"HOME": home, "HF_HOME": home / "hf", "TMPDIR": home / "tmp", "MPLCONFIGDIR": home / "matplotlib"}
    (home / "tmp").mkdir(parents=True)
    env = environment(**{name: str(path) for name, path in own.items()}, **SECRETS, NO_PROXY="127.0.0.1")
    command = [sys.executable, "-c", RUNS, json.dumps(runs)]
    done = subprocess.run(command, cwd=program, env=env, capture_output=True, text=True, timeout=TIMEOUT)
    return Outcome(done.returncode, done.stdout, done.stderr)


def in_trouble() -> Callable[[str, str], int | None]:
    """What the Hub answers about sets that are named after their trouble; `late` has it once training is over."""
    asked = itertools.count(1)

    def fault(method: str, path: str) -> int | None:
        if "someone/late" in path and "validation" in path:
            return 503 if next(asked) > 2 else None  # a footer and the redirect to it come first
        if "someone/storage" in path and path.endswith(SIGNATURE):
            return 503
        return next((status for status in (401, 403, 404) if f"someone/s{status}" in path), None)

    return fault


def runs_of_every_kind() -> list[tuple[bool, list[str]]]:
    """Arguments of runs that end well, fail for want of data or, where it says so, crash; their exits are `EXITS`."""
    digits = list(map(str, DIGITS))
    streamed = ["--dataset", "imagenet1k", *map(str, STREAMED), "--cache_dir", "cache"]
    troubles = ("s401", "s403", "s404", "storage", "late")
    refused = [["--dataset", "hf", "--dataset_name", f"someone/{name}", *map(str, STREAMED)] for name in troubles]
    whole = [[*digits, "--run_dir", "digits"], [*streamed, "--run_dir", "streamed"], *refused, [*refused[0], "--debug"]]
    crashing = [[*digits, "--run_dir", "crashed"], [*streamed, "--debug", "--run_dir", "crashed_debug"]]
    return [*((False, argv) for argv in whole), *((True, argv) for argv in crashing)]


EXITS = ["0", "0", *["3"] * 5, *["traceback"] * 3]


@pytest.mark.slow
def test_no_secret_of_the_environment_or_the_git_remote_is_written_or_printed(
    program: Path, hub_port: int, tmp_path: Path
) -> None:
    for name in (REPO_ID, "someone/storage", "someone/late"):
        make_small_set(tmp_path / "hub", name)
    with Hub(tmp_path / "hub", port=hub_port, token=TOKEN, redirect=True, fault=in_trouble()):
        done = run_all(program, tmp_path / "home", runs_of_every_kind())
    assert [line.split()[1] for line in done.out.splitlines() if line.startswith("STATUS")] == EXITS, done.err
    assert done.err.count("KeyError: 'CRASH'") == 2
    assert "stopped by a failure of the data at step 1" in done.out
    secrets = [form for value in (*SECRETS.values(), REMOTE) for form in forms(value)]
    assert len(set(secrets)) == 2 * len(SECRETS) + 2
    assert leaks(tmp_path, secrets, apart=program / ".git" / "config") == []
    printed = (done.out + done.err).encode()
    assert [secret for secret in [*secrets, SIGNATURE.encode()] if secret in printed] == []
    launches = json.loads((program / "streamed" / "config.json").read_text())["launches"]
    assert len(launches[0]["git"].removesuffix("-dirty")) == 40


@pytest.mark.parametrize("text", ["--run_dir runs/hf_resnet50_baseline", "someone@example.com", "a/b@c: no such file"])
def test_names_that_look_like_secrets_are_left_alone(text: str) -> None:
    assert redact(text) == text


URL = "https://user:CANARYurl@example.invalid/set"
ON_THE_LINE: list[tuple[object, ...]] = [
    ("--dataset", "hf", "--dataset_name", URL),
    ("--dataset", "hf", "--dataset_name", "hf://user:CANARYurl@datasets/someone/set"),
    ("--dataset", "hf", "--dataset_name", "s3://KEY:CANARYurl@bucket/set"),
    ("--dataset", "hf", "--dataset_name", "someone/set", "--dataset_revision", URL),
    ("--dataset", "imagefolder", "--data_dir", URL),
    ("--use_pretrained", URL),
    ("--lr_from", URL),
    ("--resume_from", URL),
    ("--run_dir", URL),
    ("--cache_dir", URL),
    ("--model", URL),
    ("--hf_token", f"hf_{'CANARYurl' * 4}"),
    (f"--token=hf_{'CANARYurl' * 4}",),
]


@pytest.mark.parametrize("arguments", ON_THE_LINE, ids=lambda arguments: " ".join(map(str, arguments)))
def test_a_secret_on_the_command_line_is_neither_repeated_nor_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[object, ...]
) -> None:
    monkeypatch.setattr(network, "START_PATIENCE", 0.1)
    monkeypatch.chdir(tmp_path)
    done = run(*DIGITS, *arguments)
    assert "CANARY" not in done.out + done.err
    assert leaks(tmp_path, [b"CANARY"]) == []


@pytest.mark.parametrize("status", [None, 403, 500])
def test_a_password_in_the_hubs_address_is_not_printed(
    small_hub: Path, hub_port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int | None
) -> None:
    monkeypatch.setattr(network, "START_PATIENCE", 0.1)
    monkeypatch.setattr(network, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://user:CANARYurl@127.0.0.1:{hub_port}")
    with Hub(small_hub, port=hub_port, fault=lambda method, path: status) if status else contextlib.nullcontext():
        done = run("--dataset", "imagenet1k", *STREAMED, "--run_dir", tmp_path / "run")
    assert done.status == 3
    assert "CANARY" not in done.out + done.err
    assert not (tmp_path / "run").exists()


class _Storage(BaseHTTPRequestHandler):
    """Notes the headers of requests for files, and sends the client on to `elsewhere` or answers of four bytes those
    that are asked for. What the Hub's client asks for itself, it asks without a token.
    """

    elsewhere: str | None = None
    seen: list[dict[str, str]]

    def do_GET(self) -> None:
        first, _, last = self.headers.get("Range", "").removeprefix("bytes=").partition("-")
        data = b"abcd"[int(first or 0) : int(last or 3) + 1]
        if first:
            self.seen.append(dict(self.headers))
        if self.elsewhere:
            self.send_response(302)
            self.send_header("Location", self.elsewhere)
            self.send_header("Content-Length", "0")
        else:
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first or 0}-{last or 3}/4")
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(b"" if self.elsewhere else data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextlib.contextmanager
def storage(port: int, elsewhere: str | None = None) -> Iterator[Any]:
    handler: Any = type("Storage", (_Storage,), {"elsewhere": elsewhere, "seen": []})
    with HTTPServer(("127.0.0.1", port), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield server
        server.shutdown()


def test_the_token_goes_to_the_hub_and_not_to_where_it_keeps_its_files(
    hub_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with storage(0) as far, storage(hub_port, f"http://127.0.0.1:{far.server_port}/file?signed") as hub:
        data = ranges.HubFiles("someone/set", "0" * 40, ["x.parquet"], Network(5, 1)).read(0, 0, 4)
    assert bytes(data) == b"abcd"
    assert {TOKEN in str(seen) for seen in hub.RequestHandlerClass.seen} == {True}
    assert {TOKEN in str(seen) for seen in far.RequestHandlerClass.seen} == {False}
