"""No image has one label in training and another in validation or in another file: such sets are refused."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from program import run
from shards import class_names, make_imagenet_like
from test_webdataset import CLASSES, ROWS, make_set, make_shard

from stream.dataset import HuggingFaceImageNetDataset
from stream.labels import first_difference

FLAGS = ("--model", "resnet18", "--image_size", 33, "--batch_size", 16, "--epochs", 1, "--num_workers", 0)
SWAPPED = ["class 1", "class 0", *class_names(10)[2:]]
LONGER = [*class_names(10), "class 10"]


def rename(names: Sequence[str] | None) -> Callable[[Path], None]:
    """Gives a parquet file these class names; without names, no metadata at all."""

    def change(path: Path) -> None:
        table = pq.read_table(path)
        told = json.loads(table.schema.metadata[b"huggingface"])
        told["info"]["features"]["label"]["names"] = names
        pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(told)} if names else None), path)

    return change


def make_parquet(folder: Path, with_card: bool = False) -> Path:
    made = make_imagenet_like(folder, train=40, validation=20, test=0, files=2, size=(20, 30))
    if not with_card:
        (made / "README.md").unlink()
    return made


@pytest.mark.parametrize(
    ("pattern", "names", "problem"),
    [
        ("validation-*", LONGER, "class 10 is none there and class 10 here"),
        ("train-00001*", LONGER, "its class class 10 is not there"),
        ("train-00001*", ["class 1", "other", *class_names(10)[2:]], "its class other is not there"),
    ],
)
@pytest.mark.parametrize("with_card", [False, True])
def test_files_with_other_class_names_are_refused(
    tmp_path: Path, pattern: str, names: list[str], problem: str, with_card: bool
) -> None:
    folder = make_parquet(tmp_path, with_card)
    for path in folder.glob(f"data/{pattern}"):
        rename(names)(path)
    done = run("--dataset", "hf", "--dataset_name", folder, *FLAGS, "--run_dir", tmp_path / "run")
    if with_card and "other" not in names:  # the card's names count, and no label of these images is beyond them
        assert done.status == 0, done.err
        return
    assert (done.status, done.err.count("\n")) == (3, 1), done.err
    assert ("class 1 is class 1 there and other here" if with_card else problem) in done.err
    assert pattern.partition("-")[0] in done.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("with_card", [False, True])
@pytest.mark.parametrize("names", [SWAPPED, class_names(10)[::-1], class_names(10)[3:]])
def test_a_file_with_the_class_names_in_another_order_has_its_labels_by_name(
    tmp_path: Path, names: list[str], with_card: bool
) -> None:
    """The names may be fewer, too, as long as all of them are known; the cache does not mix them up."""
    folder = make_parquet(tmp_path, with_card)
    (path,) = folder.glob("data/train-00001*")
    stored = np.arange(20) % len(names)
    table = pq.read_table(path)
    pq.write_table(table.set_column(1, "label", pa.array(stored)), path, row_group_size=10)
    rename(names)(path)
    dataset = HuggingFaceImageNetDataset.open(str(folder), split=["train"], block_bytes=1)
    assert dataset.classes == class_names(10)
    labels = np.concatenate([dataset.read_block(number).labels for number in range(len(dataset.blocks))])
    first = pq.read_table(next(folder.glob("data/train-00000*")))["label"].to_pylist()
    assert [dataset.classes[label] for label in labels] == [
        *(f"class {label}" for label in first),
        *(names[label] for label in stored),
    ]
    shards = dataset._shards
    assert [label for block in dataset.blocks for label in shards.labels(block)] == labels.tolist()


@pytest.mark.parametrize("names", [[f"other {number}" for number in range(10)], None])
def test_a_card_may_name_the_classes_anew(tmp_path: Path, names: list[str] | None) -> None:
    folder = make_parquet(tmp_path, with_card=True)
    for path in folder.glob("data/*"):
        rename(names)(path)
    done = run("--dataset", "hf", "--dataset_name", folder, *FLAGS, "--run_dir", tmp_path / "run")
    assert done.status == 0, done.err
    assert "classes   10: class 0 ... class 9" in done.out


def test_a_validation_shard_with_a_label_beyond_the_training_classes_is_refused(tmp_path: Path) -> None:
    folder = make_set(tmp_path / "set")
    flags = ("--dataset", "hf", "--dataset_name", folder, *FLAGS, "--run_dir", tmp_path / "run")
    make_shard(folder / "validation-0000.tar", [CLASSES] * ROWS, 3)
    done = run(*flags)
    assert (done.status, done.err.count("\n")) == (3, 1), done.err
    assert f"{CLASSES} here" in done.err
    make_shard(folder / "validation-0000.tar", [0] * ROWS, 3)  # that not every class is evaluated is no reason
    assert run(*flags).status == 0


@pytest.mark.parametrize(
    ("ours", "theirs", "renamed", "expected"),
    [
        ("abc", "abc", False, None),
        ("abc", "abd", False, "class 2 is c there and d here"),
        ("abc", "abd", True, None),
        ("abc", "acb", True, "class 1 is b there and c here"),
        ("abca", "abcx", True, None),  # a name that two classes share, as ImageNet has, one of them renamed
        ("ab", "xa", True, "class 0 is a there and x here"),
    ],
)
def test_the_first_difference_is_told(ours: str, theirs: str, renamed: bool, expected: str | None) -> None:
    assert first_difference(ours, theirs, renamed) == expected
