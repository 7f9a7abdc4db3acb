"""Tar shards are trained on like any other set: the same samples, labels and order, local or from the Hub."""

import io
import json
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hub import Hub
from program import ledger, run, train
from shards import draw, encode

from errors import DataError, UsageError
from stream.dataset import HuggingFaceImageNetDataset

pytestmark = pytest.mark.usefixtures("small_model")

CLASSES, SHARDS, ROWS = 4, 3, 20
FLAGS = ("--model", "resnet18", "--image_size", 33, "--batch_size", 16, "--epochs", 1, "--ledger")


def make_shard(path: Path, labels: list[int], number: int, kind: str = "cls") -> None:
    rng = np.random.default_rng(number)
    with tarfile.open(path, "w") as archive:
        for row, label in enumerate(labels):
            told = {"cls": str(label), "json": json.dumps({"label": label})}[kind].encode()
            for suffix, data in (("jpg", encode(draw(label, CLASSES, (40, 60), rng))), (kind, told)):
                member = tarfile.TarInfo(f"{number:03d}_{row:05d}.{suffix}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))


def make_set(folder: Path, kind: str = "cls", with_lengths: bool = False) -> Path:
    """Shards of 20 images for training and one for validation."""
    folder.mkdir(parents=True)
    labels = np.random.default_rng(0).integers(0, CLASSES, (SHARDS + 1, ROWS)).tolist()
    names = [f"train-{number:04d}.tar" for number in range(SHARDS)] + ["validation-0000.tar"]
    for number, name in enumerate(names):
        make_shard(folder / name, labels[number], number, kind)
    if with_lengths:
        split = {"filenames": names, "shard_lengths": [ROWS] * len(names)}
        (folder / "_info.json").write_text(json.dumps({"splits": {"all": split}}))
    return folder


def open_split(folder: Path, **options: int) -> HuggingFaceImageNetDataset:
    return HuggingFaceImageNetDataset.open(str(folder), split=["train"], num_classes=options.get("num_classes"))


@pytest.mark.parametrize("kind", ["cls", "json"])
def test_every_sample_of_a_shard_has_its_image_and_label(tmp_path: Path, kind: str) -> None:
    dataset = open_split(make_set(tmp_path / "set", kind))
    labels = np.random.default_rng(0).integers(0, CLASSES, (SHARDS + 1, ROWS))
    assert (len(dataset), dataset.block_rows.tolist()) == (SHARDS * ROWS, [ROWS] * SHARDS)
    assert dataset.classes == [str(number) for number in range(CLASSES)]
    for number in range(SHARDS):
        block, rng = dataset.read_block(number), np.random.default_rng(number)
        assert block.labels.tolist() == labels[number].tolist()
        assert block.images.to_pylist() == [
            encode(draw(label, CLASSES, (40, 60), rng)) for label in labels[number].tolist()
        ]


def test_an_index_with_lengths_spares_the_reading_but_not_the_number_of_classes(tmp_path: Path) -> None:
    folder = make_set(tmp_path / "set", with_lengths=True)
    with pytest.raises(DataError, match="--num_classes"):
        open_split(folder)
    dataset = open_split(folder, num_classes=CLASSES)
    assert (len(dataset), dataset.estimated_labels()) == (SHARDS * ROWS, None)


def test_a_wrong_index_and_a_label_that_is_no_class_are_refused(tmp_path: Path) -> None:
    folder = make_set(tmp_path / "set", with_lengths=True)
    make_shard(folder / "train-0001.tar", [1] * (ROWS - 1), 1)
    make_shard(folder / "train-0002.tar", [CLASSES] * ROWS, 2)
    dataset = open_split(folder, num_classes=CLASSES)
    with pytest.raises(DataError, match=r"train-0001\.tar has 19 samples and not 20"):
        dataset.read_block(1)
    with pytest.raises(DataError, match=r"train-0002\.tar has the label 4"):
        dataset.read_block(2)


def test_what_a_set_of_its_kind_has_no_use_for_is_refused(tmp_path: Path, image_set: Path) -> None:
    with pytest.raises(UsageError, match="tells its classes, as only a WebDataset may not; leave out --num_classes"):
        open_split(image_set, num_classes=CLASSES)
    folder = make_set(tmp_path / "set")
    with pytest.raises(UsageError, match="is a WebDataset, which has no columns; leave out --image_column"):
        HuggingFaceImageNetDataset.open(str(folder), split=["train"], label_column="cls")


def test_a_truncated_shard_is_named(tmp_path: Path) -> None:
    folder = make_set(tmp_path / "set", with_lengths=True)
    path = folder / "train-0000.tar"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(DataError, match=r"train-0000\.tar"):
        open_split(folder, num_classes=CLASSES).read_block(0)


@pytest.mark.slow
def test_a_set_on_the_hub_trains_as_the_same_one_on_disk(hub_port: int, tmp_path: Path) -> None:
    folder = make_set(tmp_path / "hub" / "datasets" / "someone" / "tars")
    train("--dataset", "hf", "--dataset_name", folder, *FLAGS, "--run_dir", tmp_path / "local")
    with Hub(tmp_path / "hub", port=hub_port) as hub:
        flags = ("--dataset", "hf", "--dataset_name", "someone/tars", *FLAGS, "--cache_dir", tmp_path / "cache")
        train(*flags, "--run_dir", tmp_path / "first")
        since = len(hub.requests)
        train(*flags, "--run_dir", tmp_path / "second")
        assert not [request for request in hub.requests[since:] if request.range]
    assert ledger(tmp_path / "local") == ledger(tmp_path / "first") == ledger(tmp_path / "second")


def test_tar_files_that_hold_no_images_are_one_line(tmp_path: Path) -> None:
    folder = make_set(tmp_path / "set")
    for path in folder.glob("train-*"):
        path.write_bytes(b"nothing")
    done = run("--dataset", "hf", "--dataset_name", folder, *FLAGS, "--run_dir", tmp_path / "run")
    assert (done.status, done.err.count("\n")) == (3, 1), done.err
    assert re.search(r"cannot read \S+/train-000[01]\.tar", done.err), done.err
