"""The program can be tried without a token or a network, on a set that looks like ImageNet-1K to all of it."""

import json
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hub import Hub
from huggingface_hub import constants
from program import results, run, steps_kept, train
from shards import make_imagenet_like, to_table

from config import resolve
from preprocess import get_data_loaders
from stream import synthetic as dummy
from stream.dataset import HuggingFaceImageNetDataset
from stream.images import decode

SMALL = ("--model", "resnet18", "--image_size", 33, "--max_samples", 64, "--batch_size", 32, "--epochs", 1)
DUMMY = ("--dataset", "imagenet1k", "--dummy_data")
FEW = {"train": 96, "validation": 64}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of the Hub's clients with nothing in it, in which fewer images will be generated."""
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(dummy, "IMAGES", FEW)
    return tmp_path / "home"


@pytest.fixture
def without_network(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The addresses that anything tried to reach; all are refused."""
    asked: list[Any] = []

    def refuse(self: socket.socket, address: Any) -> None:
        asked.append(address)
        raise ConnectionRefusedError(address)

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *rest, **more: refuse(None, host))  # type: ignore[arg-type]
    return asked


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rows_of(folder: Path, split: str) -> pa.Table:
    return pa.concat_tables(pq.read_table(path) for path in sorted(folder.glob(f"data/{split}-*")))


# ---- the program -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("home")
def test_generated_images_come_in_batches_with_no_token_and_no_network(without_network: list[Any]) -> None:
    given = {"dataset": "imagenet1k", "dummy_data": True, "image_size": 33, "batch_size": 32, "num_workers": 0}
    data = get_data_loaders(resolve(given), torch.device("cpu"))
    assert [len(batch.ids) for batch in data.train] == [32] * 3
    assert sorted(number for batch in data.val for number in batch.ids.tolist()) == list(range(64))
    assert data.classes == [f"generated {number}" for number in range(1000)]
    assert data.revision is None
    assert without_network == []


@pytest.mark.slow
@pytest.mark.usefixtures("home")
def test_generated_images_train_through_the_front_door_with_no_token_and_no_network(
    tmp_path: Path, without_network: list[Any]
) -> None:
    done = train(*DUMMY, *SMALL, "--num_workers", 0, "--run_dir", tmp_path / "run")
    assert without_network == []
    assert steps_kept(tmp_path / "run") == [2]
    assert [row["step"] for row in results(tmp_path / "run")] == ["2"]
    lines = done.out.splitlines()
    assert any(line.startswith("images    generated images: 64 for training, ") for line in lines)
    assert "classes   1,000: generated 0 ... generated 999" in lines


def test_without_the_flag_a_missing_token_is_named(tmp_path: Path, hub_port: int) -> None:
    make_imagenet_like(tmp_path, train=20, validation=10, size=(8, 12))
    with Hub(tmp_path, port=hub_port, token="hf_right", gated=True):
        done = run("--dataset", "imagenet1k", *SMALL, "--run_dir", tmp_path / "run")
    assert done.status == 3
    assert done.err.startswith("error: ILSVRC/imagenet-1k needs a token")
    assert done.err.count("\n") == 1
    assert "HF_TOKEN" in done.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("dataset", [[], ["--dataset", "cifar10"], ["--dataset", "hf", "--dataset_name", "a/b"]])
def test_generated_images_in_place_of_another_dataset_are_refused(
    tmp_path: Path, home: Path, dataset: list[str]
) -> None:
    done = run(*dataset, "--dummy_data", "--run_dir", tmp_path / "run")
    assert done.status == 2
    assert done.err.startswith("error: ")
    assert done.err.count("\n") == 1
    assert "--dummy_data" in done.err
    assert "--dataset imagenet1k" in done.err
    assert not home.exists()
    assert not (tmp_path / "run").exists()


# ---- the set ---------------------------------------------------------------------------------------------------------


def test_the_schema_is_that_of_imagenet(home: Path) -> None:
    expected = to_table([], np.zeros(0, np.int64), "", dummy.CLASSES).schema
    paths = list(dummy.make_dummy_data().glob("data/*"))
    assert len(paths) == sum(dummy.FILES.values())
    for path in paths:
        schema = pq.read_schema(path)
        assert schema.equals(expected)
        assert features_of(schema) == features_of(expected)


def features_of(schema: pa.Schema) -> Any:
    """What the metadata says to `datasets`, but for how the classes are called."""
    info = json.loads(schema.metadata[b"huggingface"])
    names = info["info"]["features"]["label"].pop("names")
    return info, len(names), len(set(names))


def test_every_image_can_be_decoded_and_every_label_is_a_class(home: Path) -> None:
    folder = dummy.make_dummy_data()
    for split, count in FEW.items():
        table = rows_of(folder, split)
        assert table.num_rows == count
        assert all(0 <= label < dummy.CLASSES for label in table["label"].to_pylist())
        images = [decode(row["bytes"]) for row in table["image"].to_pylist()]
        assert {image.shape[2] for image in images} == {3}
        assert {image.dtype for image in images} == {np.dtype(np.uint8)}
        assert len({image.shape for image in images}) > count // 2


def test_the_streaming_dataset_finds_both_splits_and_their_classes(home: Path) -> None:
    folder = str(dummy.make_dummy_data())
    for split, count in FEW.items():
        dataset = HuggingFaceImageNetDataset.open(folder, split=[split])
        assert (len(dataset), len(dataset.classes), dataset.revision) == (count, dummy.CLASSES, None)


def test_it_is_made_once(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = dummy.make_dummy_data()
    before = {path: path.stat().st_mtime_ns for path in home.rglob("*")}
    monkeypatch.setattr(dummy, "_write_split", None)
    assert dummy.make_dummy_data() == folder
    assert {path: path.stat().st_mtime_ns for path in home.rglob("*")} == before


def test_it_is_the_same_wherever_it_is_made(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = contents(dummy.make_dummy_data())
    np.random.seed(1)
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "other"))
    assert contents(dummy.make_dummy_data()) == first


def test_a_process_that_comes_second_takes_what_the_first_made(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_split = dummy._write_split

    def write_while_another_is_faster(folder: Path, split: str, rng: np.random.Generator) -> None:
        write_split(folder, split, rng)
        other = home / "imagenet1k" / "dummy-1" / "data"
        other.mkdir(parents=True, exist_ok=True)
        (other / f"{split}.txt").write_text("the other's")

    monkeypatch.setattr(dummy, "_write_split", write_while_another_is_faster)
    folder = dummy.make_dummy_data()
    assert contents(folder) == {"data/train.txt": b"the other's", "data/validation.txt": b"the other's"}
    assert list(folder.parent.iterdir()) == [folder]


def test_what_fails_half_way_is_not_taken_for_the_set_and_not_left_behind(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(folder: Path, split: str, rng: np.random.Generator) -> None:
        folder.mkdir()
        (folder / "half").write_bytes(b"half")
        raise OSError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(dummy, "_write_split", fail)
        with pytest.raises(OSError, match="no room"):
            dummy.make_dummy_data()
    assert contents(home) == {}
    assert len(rows_of(dummy.make_dummy_data(), "train")) == FEW["train"]


def test_images_of_a_class_are_more_alike_than_those_of_others() -> None:
    """The mean colour alone tells classes apart, or nothing could be learned."""
    rng = np.random.default_rng(0)

    def colour(label: int) -> np.ndarray:
        return np.asarray(decode(dummy.draw(label, rng)).mean((0, 1)))

    colours = np.array([[colour(label) for _ in range(4)] for label in range(10)])
    within = np.linalg.norm(colours - colours.mean(1, keepdims=True), axis=-1).mean()
    between = np.linalg.norm(colours.mean(1) - colours.mean((0, 1)), axis=-1).mean()
    assert between > 2 * within


def test_whoever_may_read_its_place_may_read_it(home: Path) -> None:
    folder = dummy.make_dummy_data()
    assert folder.stat().st_mode == folder.parent.stat().st_mode


def test_the_whole_set_has_room_for_a_usual_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    folder = str(dummy.make_dummy_data())
    train_set, val_set = (HuggingFaceImageNetDataset.open(folder, split=[split]) for split in dummy.IMAGES)
    assert (len(train_set), len(val_set)) == (1024, 256)
