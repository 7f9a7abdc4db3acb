"""No image has one label in training and another in validation or in another file: such sets are refused."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from program import run
from shards import class_names, make_imagenet_like
from test_webdataset import CLASSES, ROWS, make_set, make_shard

from stream.parquet import first_difference

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
        ("validation-*", SWAPPED, "class 0 is class 0 there and class 1 here"),
        ("validation-*", LONGER, "class 10 is none there and class 10 here"),
        ("train-00001*", SWAPPED, "class 0 is class 0 there and class 1 here"),
        ("train-00001*", class_names(9), "class 9 is class 9 there and none here"),
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
    if with_card and names is not SWAPPED:  # the card's names count, and no label of these images is beyond them
        assert done.status == 0, done.err
        return
    assert (done.status, done.err.count("\n")) == (3, 1), done.err
    assert problem in done.err
    assert pattern.partition("-")[0] in done.err
    assert not (tmp_path / "run").exists()


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
    assert f"class {CLASSES} is none there and {CLASSES} here" in done.err
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
