"""The documents' commands and code run as they are written, on small images and a Hub of this machine.

A command that needs more than that (several GPUs, the real Hub) has flags that exist.
"""

import os
import re
import runpy
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import tiny_cifar
from hub import Hub
from program import ROOT, run, train
from shards import draw, make_imagenet_like

import config
import evaluate
import export
import predict

GUIDES = sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))
SHOWN = ["README.md", *(guide for guide in GUIDES if guide != "docs/EXTENDING.md")]  # tests/test_extending.py runs that
DOORS: dict[str, Any] = {
    "main": lambda argv: config.parse("", "", argv),
    "run_lr_finder": lambda argv: config.parse("", "", argv),
    "evaluate": evaluate.parse,
    "predict": predict.parse,
    "export": export.parse,
}
NEEDS_MORE = re.compile(r"torchrun|--logdir|pytest|benchmarks/|microsoft/|resnet50\.pth")
SMALLER = {  # what is added to a command so that it takes seconds
    r"/main.* (imagenet1k|timm/|cifar10|--recipe|--data_dir)|finder.*imagenet": "--max_samples 32 --batch_size 16 "
    "--epochs 1 --warmup_epochs 0 --image_size 32 --eval_size 32 --model resnet20 --num_workers 0 --no_amp",
    "finder.*imagenet": "--max_samples 256 --lr_iter 32",
}


def commands(document: str) -> list[str]:
    """The lines of indented blocks that start something of ours, without their comments."""
    lines = re.findall(r"^    uv run .*$", (ROOT / document).read_text(), re.MULTILINE)
    return [re.split(r"  #| #|\.\.\.", line)[0].strip() for line in lines]


@pytest.mark.parametrize("document", SHOWN)
def test_every_command_has_flags_that_exist(document: str) -> None:
    found = [re.search(rf"\b({'|'.join(DOORS)})\.py(.*)", command) for command in commands(document)]
    front_doors = [match.groups() for match in found if match]
    assert front_doors
    for door, flags in front_doors:
        DOORS[door](shlex.split(flags.partition(" > ")[0]))


@pytest.fixture(scope="module")
def hub_of_the_documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hub")
    for name in ("ILSVRC/imagenet-1k", "timm/mini-imagenet"):
        make_imagenet_like(root, train=256, validation=16, classes=4, files=2, size=(40, 60), repo_id=name)
    return root


@pytest.fixture(scope="module")
def run_of_the_documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the photographs that were trained on, photos/, and the run, runs/NAME."""
    folder = tmp_path_factory.mktemp("documents")
    rng = np.random.default_rng(0)
    for number in range(36):
        path = folder / "photos" / f"class {number % 3}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), draw(number % 3, 3, (40, 60), rng))
    flags = ("--image_size", 64, "--num_workers", 0, "--scheduler", "trapezoid", "--ema_decay", 0.9, "--save_best")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train("--data_dir", "photos", "--model", "resnet18", *flags, "--epochs", 3, "--run_dir", "runs/NAME")
    return folder


@pytest.fixture
def place(
    hub_of_the_documents: Path,
    run_of_the_documents: Path,
    hub_port: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Path]:
    """A folder in which there is what the documents speak of, and a Hub."""
    shutil.copytree(run_of_the_documents, tmp_path, copy_function=os.link, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    shutil.copy("photos/class 0/0.jpg", "photo.jpg")
    tiny_cifar.adopt(tiny_cifar.write(tmp_path / "data")[1], monkeypatch.setattr)
    monkeypatch.setenv("HF_TOKEN", "hf_documents")
    with Hub(hub_of_the_documents, port=hub_port, token="hf_documents"):
        yield tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("document", SHOWN)
def test_every_offline_command_runs_as_written(document: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each as Python runs a program, but in this process; those of the README that a guide repeats with the guide."""
    repeated = {command for guide in GUIDES for command in commands(guide)} if document == "README.md" else set()
    offline = [command for command in commands(document) if command not in repeated and not NEEDS_MORE.search(command)]
    assert offline
    for name in {"ONE", "OTHER"} - set(re.findall(r"--run_dir runs/(\w+)", " ".join(offline))):
        shutil.copytree(place / "runs" / "NAME", place / "runs" / name, copy_function=os.link)
    for command in offline:
        script, *arguments = shlex.split(re.sub(r"uv run (--extra \w+ )?python ", "", command).partition(" > ")[0])
        more = " ".join(flags for pattern, flags in SMALLER.items() if re.search(pattern, f"/{script} {command}"))
        monkeypatch.setattr("sys.argv", [script, *arguments, *shlex.split(more)])
        done = run(entry=lambda _, script=script: run_program(ROOT / script))  # type: ignore[misc]
        assert done.status == 0, (command, done.err)


def run_program(path: Path) -> int:
    runpy.run_path(str(path), run_name="__main__")
    return 0


@pytest.mark.slow
def test_the_code_that_loads_exported_programs_runs(place: Path) -> None:
    shutil.copy(place / "photo.jpg", place / "image.jpg")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/EXPORTING.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    for form, suffix, code in (("onnx", "onnx", blocks[0]), ("torch_export", "pt2", blocks[1])):
        done = run("runs/NAME", "--to", form, "--out", form, entry=export.main)
        assert done.status == 0, done.err
        shutil.copy(place / form / f"model.{suffix}", place)
        told: dict[str, Any] = {}
        exec(compile(code, form, "exec"), told)
        assert told["probabilities"].shape == (3,)
        assert float(told["probabilities"].sum()) == pytest.approx(1, abs=1e-5)


def test_the_batches_of_a_run_can_be_had_as_the_guide_tells(capsys: pytest.CaptureFixture[str]) -> None:
    section = (ROOT / "docs/RECIPES.md").read_text().partition("## The batches of a run\n")[2]
    code = "\n".join(re.findall(r"^    (.*)$", section, re.MULTILINE))
    exec(compile(code, "RECIPES.md", "exec"), {})
    assert capsys.readouterr().out.splitlines() == ["torch.Size([64, 8, 8, 3]) torch.uint8 torch.int64"] * 2


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", *GUIDES])
def test_every_link_leads_somewhere(document: str) -> None:
    text = (ROOT / document).read_text()
    for target in re.findall(r"\]\((?!https?:)([^)#]*)#?[^)]*\)", text):
        assert not target or (ROOT / document).parent.joinpath(target).exists(), target
