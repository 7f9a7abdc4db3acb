"""Whatever a user can do wrong is one line that says what to do, the right status, and no trace."""

import math
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hub import Hub
from program import Outcome, assert_same_run, cut, ledger, run, snapshot_path, start, steps_kept, tensors, train, wait
from safetensors.torch import save_file

import run_lr_finder
from stream import retry as network

pytestmark = pytest.mark.usefixtures("small_model")

TOKEN = "hf_right"
SMALL = ("--max_samples", 48, "--batch_size", 16, "--num_workers", 0)
GATED = {"token": TOKEN, "gated": True}


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("run") / "digits"
    train(*SMALL, "--epochs", 2, "--ledger", "--run_dir", folder)
    yield folder
    shutil.rmtree(folder)


def assert_one_line(done: Outcome, status: int, *words: str) -> None:
    """One line on stderr, `error: ...`, with these words in it."""
    assert done.err.count("\n") == 1, done.err
    assert done.err.startswith("error: ")
    assert [word for word in words if word not in done.err] == [], done.err
    assert done.status == status


def assert_refused(folder: Path, status: int, words: tuple[str, ...], *arguments: object) -> None:
    """A run into `folder` fails with one line, and neither the folder nor anything half-written is there after it."""
    assert_one_line(run(*arguments, "--run_dir", folder), status, *words)
    assert not folder.exists()
    assert not list(folder.parent.rglob("*.tmp"))


BAD_ARGUMENTS: list[tuple[tuple[Any, ...], tuple[str, ...]]] = [
    (("--no_such_flag",), ("--no_such_flag",)),
    (("--epochs", 0), ("--epochs 0", "1")),
    (("--model", "resnet51"), ("resnet51", "resnet50")),
    (("--lr_from", "no_such.json"), ("--lr_from", "no_such.json", "run_lr_finder.py")),
    (("--batch_size", 1600), ("1600", "1437")),
    (("--max_samples", 48, "--batch_size", 64), ("64", "48")),
    (("--batch_size", 64, "--accumulate_steps", 3), ("64", "--accumulate_steps 3")),
    (("--batch_size", 16, "--accumulate_steps", 16), ("BatchNorm",)),
    (("--evaluate",), ("--evaluate", "--resume_from")),
    (("--device", "abacus"), ("abacus", "--device")),
    ((*SMALL, "--epochs", 1, "--override", "epochs=3"), ("--override", "--resume_from")),
]


def test_bad_arguments_are_refused_wherever_they_are_found_out(tmp_path: Path) -> None:
    """The flags alone are the business of test_config.py."""
    for arguments, words in BAD_ARGUMENTS:
        assert_refused(tmp_path / "run", 2, words, *arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_named(tmp_path: Path) -> None:
    assert_refused(tmp_path / "run", 2, ("--device", "cuda"), "--device", "cuda")


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--train_split", "tran"], 3, ["tran", "train, validation, test"]),
        (["--val_split", "vall"], 3, ["vall", "train, validation, test"]),
        (["--image_column", "picture"], 2, ["picture", "--image_column", "image"]),
        (["--image_column", "label"], 2, ["label", "--image_column", "image"]),
        (["--label_column", "class"], 2, ["class", "--label_column", "label"]),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else None,
)
def test_what_a_parquet_set_lacks_is_named(
    image_set: Path, tmp_path: Path, arguments: list[Any], status: int, words: list[str]
) -> None:
    flags = ("--dataset", "hf", "--dataset_name", image_set, "--model", "resnet18", "--image_size", 16)
    assert_refused(tmp_path / "run", status, tuple(words), *flags, "--batch_size", 64, "--epochs", 1, *arguments)


def make_image_folder(root: Path, classes: dict[str, list[str]]) -> Path:
    """An 8x8 image in each class of each split."""
    for split, names in classes.items():
        for name in names:
            (root / split / name).mkdir(parents=True)
            cv2.imwrite(str(root / split / name / "1.png"), np.zeros((8, 8, 3), np.uint8))
    return root


@pytest.mark.parametrize(
    ("classes", "words"),
    [
        ({}, ["train", "val"]),
        ({"train": ["a", "b"]}, ["val"]),
        ({"train": [], "val": []}, ["train"]),
        ({"train": ["a"], "val": ["a"]}, ["one class"]),
        ({"train": ["a", "b"], "val": ["a", "c"]}, ["class c", "training has not"]),
    ],
    ids=["nothing", "no val", "no classes", "one class", "other classes"],
)
def test_an_image_folder_of_no_use_is_refused(tmp_path: Path, classes: dict[str, list[str]], words: list[str]) -> None:
    root = make_image_folder(tmp_path / "photos", classes)
    for split in classes:
        (root / split).mkdir(parents=True, exist_ok=True)
    assert_refused(tmp_path / "run", 3, tuple(words), "--dataset", "imagefolder", "--data_dir", root)


def test_an_empty_class_folder_is_named(tmp_path: Path) -> None:
    root = make_image_folder(tmp_path / "photos", {"train": ["a", "b"], "val": ["a", "b"]})
    (root / "train" / "b" / "1.png").unlink()
    assert_refused(tmp_path / "run", 3, ("train", "b"), "--dataset", "imagefolder", "--data_dir", root)


def test_a_folder_without_parquet_files_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    flags = ("--dataset", "hf", "--dataset_name")
    assert_refused(tmp_path / "run", 3, (str(tmp_path / "empty"),), *flags, tmp_path / "empty")
    assert_refused(tmp_path / "run", 3, (str(tmp_path / "none"),), *flags, tmp_path / "none")


def test_a_damaged_parquet_file_is_named(image_set: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(image_set, tmp_path / "copy"))
    damaged = copy / "data" / "train-00003-of-00030.parquet"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    flags = ("--dataset", "hf", "--dataset_name", copy)
    assert_refused(tmp_path / "run", 3, (str(copy),), *flags)


def test_a_parquet_set_without_images_is_refused(image_set: Path, tmp_path: Path) -> None:
    table = pq.read_table(image_set / "data" / "validation-00000-of-00001.parquet")
    for split in ("train", "validation"):
        pq.write_table(table.select(["label"]).replace_schema_metadata(None), tmp_path / f"{split}.parquet")
    assert_refused(tmp_path / "run", 3, ("no column of images",), "--dataset", "hf", "--dataset_name", tmp_path)


@pytest.mark.parametrize(
    ("hub_is", "token", "dataset", "words"),
    [
        (GATED, None, "imagenet1k", ["ILSVRC/imagenet-1k", "licence", "HF_TOKEN"]),
        (GATED, "hf_wrong", "imagenet1k", ["refused the token", "HF_TOKEN"]),
        (GATED | {"accepted": False}, TOKEN, "imagenet1k", ["licence", "not accepted", "datasets/ILSVRC/imagenet-1k"]),
        (GATED, TOKEN, "no/such", ["no/such", "does not exist"]),
        ({}, None, "no/such", ["no/such", "does not exist"]),
        ({"token": TOKEN}, None, "imagenet1k", ["ILSVRC/imagenet-1k", "HF_TOKEN"]),
    ],
    ids=["no token", "refused token", "licence not accepted", "unknown set", "unknown set, open hub", "private"],
)
def test_a_set_that_the_hub_refuses_is_one_line(
    hub_root: Path,
    hub_port: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    hub_is: dict[str, Any],
    token: str | None,
    dataset: str,
    words: list[str],
) -> None:
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    flags = ["--dataset", dataset] if "/" not in dataset else ["--dataset", "hf", "--dataset_name", dataset]
    with Hub(hub_root, port=hub_port, **hub_is):
        assert_refused(tmp_path / "run", 3, tuple(words), *flags)


def test_a_revision_that_does_not_exist_is_named(hub_root: Path, hub_port: int, tmp_path: Path) -> None:
    with Hub(hub_root, port=hub_port):
        flags = ("--dataset", "imagenet1k", "--dataset_revision", "v9")
        assert_refused(tmp_path / "run", 3, ("--dataset_revision",), *flags)


@pytest.mark.slow
def test_what_is_wrong_ends_a_real_process_in_one_line_with_its_status(tmp_path: Path) -> None:
    assert_one_line(wait(start("--epochs", 0)), 2, "--epochs 0")
    offline = start("--dataset", "imagenet1k", "--run_dir", tmp_path / "run", HF_HUB_OFFLINE="1")
    assert_one_line(wait(offline), 3, "HF_HUB_OFFLINE", "ILSVRC/imagenet-1k")
    assert not (tmp_path / "run").exists()


def test_a_hub_out_of_reach_is_one_line(hub_port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "START_PATIENCE", 0.1)
    assert_refused(tmp_path / "run", 3, ("cannot reach", "ILSVRC/imagenet-1k"), "--dataset", "imagenet1k")


def test_a_snapshot_that_cannot_be_read_is_named(digits: Path, tmp_path: Path) -> None:
    for name in ("missing", "empty", "truncated", "foreign", "pickle"):
        (tmp_path / name).mkdir()
        path = tmp_path / name / "snapshot.safetensors"
        if name == "empty":
            path.write_bytes(b"")
        elif name == "truncated":
            path.write_bytes(snapshot_path(digits, 6).read_bytes()[:-1])
        elif name == "foreign":
            save_file({"model.fc.weight": torch.zeros(2)}, path, {"format": "pt"})
        elif name == "pickle":
            torch.save({"model": torch.zeros(2)}, path)
        assert_refused(tmp_path / "run", 5, (str(path),), "--resume_from", path)


def test_a_run_without_a_whole_snapshot_is_named(digits: Path, tmp_path: Path) -> None:
    assert_one_line(run("--resume_from", tmp_path), 5, str(tmp_path), "holds no run", "start anew")
    copy = tmp_path / "copy"
    (copy / "snapshots").mkdir(parents=True)
    for step in (3, 6):
        snapshot_path(copy, step).write_bytes(snapshot_path(digits, step).read_bytes()[:-step])
    done = run("--resume_from", copy)
    assert_one_line(done, 5, str(copy), snapshot_path(copy, 3).name, snapshot_path(copy, 6).name)


@pytest.mark.parametrize(
    "changed",
    [["--model", "resnet34"], ["--batch_size", 24], ["--epochs", 3], ["--seed", 1, "--lr", 0.5]],
    ids=lambda changed: " ".join(map(str, changed)),
)
def test_a_resume_with_other_settings_is_refused_with_a_table(digits: Path, tmp_path: Path, changed: list[Any]) -> None:
    copy = cut(digits, 3, tmp_path / "cut")
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    done = run("--resume_from", copy, *changed)
    first, *table = done.err.splitlines()
    assert done.status == 2
    assert first.startswith("error: ")
    assert {line.split()[0] for line in table} == set(changed[::2])
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before


def test_a_run_can_be_resumed_after_a_refusal(digits: Path, tmp_path: Path) -> None:
    copy = cut(digits, 3, tmp_path / "cut")
    assert run("--resume_from", copy, "--batch_size", 24).status == 2
    train("--resume_from", copy)
    assert_same_run(copy, digits)


def test_a_resume_may_insist_on_more_epochs(digits: Path, tmp_path: Path) -> None:
    copy = cut(digits, 3, tmp_path / "cut")
    train("--resume_from", copy, "--override", "epochs=3")
    assert [row["step"] for row in ledger(copy)] == list(range(1, 10))


def test_a_folder_that_holds_a_run_is_not_written_to(digits: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in digits.rglob("*")}
    for entry in (None, run_lr_finder.main):
        done = run(*SMALL, "--run_dir", digits, **({"entry": entry} if entry else {}))
        assert_one_line(done, 2, str(digits), "--resume_from", "--run_dir")
    assert {path: path.stat().st_mtime_ns for path in digits.rglob("*")} == before


@pytest.mark.parametrize("where", ["below a file", "/proc"])
def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, where: str) -> None:
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "run" if where == "below a file" else Path("/proc/no_such_run")
    assert_one_line(run(*SMALL, "--run_dir", folder), 2, str(folder), "--run_dir")


def test_a_full_disk_keeps_the_older_snapshots(digits: Path, tmp_path: Path) -> None:
    copy = cut(digits, 3, tmp_path / "cut")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, hard))
    try:
        done = run("--resume_from", copy)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_one_line(done, 5, snapshot_path(copy, 6).name, "resume")
    assert steps_kept(copy) == [3]
    assert not list(copy.rglob("*.tmp"))
    train("--resume_from", copy)
    assert_same_run(copy, digits)


def test_a_diverging_run_names_the_step(tmp_path: Path) -> None:
    done = run(*SMALL, "--epochs", 2, "--lr", 1e20, "--ledger", "--log_steps", 1, "--run_dir", tmp_path / "run")
    losses = [float.fromhex(row["loss"]) for row in ledger(tmp_path / "run")]
    first = [math.isfinite(loss) for loss in losses].index(False) + 1
    assert_one_line(done, 4, f"diverged at step {first}:", "the loss is", "learning rate", "norm", "--max_grad_norm")


def test_bad_steps_in_a_row_end_a_run_and_its_last_good_snapshot_stays(tmp_path: Path) -> None:
    flags = ("--max_samples", 320, "--batch_size", 16, "--epochs", 1, "--num_workers", 0, "--lr", 1e20, "--ledger")
    done = run(*flags, "--log_steps", 1, "--max_bad_steps", 3, "--run_dir", tmp_path / "run")
    assert done.status == 4
    losses = [float.fromhex(row["loss"]) for row in ledger(tmp_path / "run")]
    assert [math.isfinite(loss) for loss in losses[-4:]] == [True, False, False, False]
    assert len(losses) < 20
    done = run(*flags, "--snapshot_steps", 1, "--keep_snapshots", 1, "--run_dir", tmp_path / "kept")
    assert done.status == 4
    weights = tensors(snapshot_path(tmp_path / "kept", steps_kept(tmp_path / "kept")[-1]))
    assert [name for name, tensor in weights.items() if name.startswith("model") and not tensor.isfinite().all()] == []
