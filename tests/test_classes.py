"""No image has one label in training and another in validation, in another file or in a model."""

import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from program import run, train
from shards import class_names, encode, make_imagenet_like
from test_image_folders import make_classes, put
from test_samples import write
from test_webdataset import CLASSES, ROWS, make_set, make_shard

from config import resolve
from errors import DataError
from open_data import _seated
from preprocess import get_data_loaders
from stream.dataset import HuggingFaceImageNetDataset
from stream.labels import first_difference

CPU = torch.device("cpu")
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
        ("validation-*", LONGER, "validation in {} has the class class 10, which training has not"),
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
    assert ("class 1 is class 1 there and other here" if with_card else problem.format(folder)) in done.err
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
    assert "classes   10: class 0, class 1, " in done.out


def test_a_validation_shard_with_a_label_beyond_the_training_classes_is_refused(tmp_path: Path) -> None:
    folder = make_set(tmp_path / "set")
    flags = ("--dataset", "hf", "--dataset_name", folder, *FLAGS, "--run_dir", tmp_path / "run")
    make_shard(folder / "validation-0000.tar", [CLASSES] * ROWS, 3)
    done = run(*flags)
    assert (done.status, done.err.count("\n")) == (3, 1), done.err
    assert f"has the class {CLASSES}, which training has not" in done.err
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


# ---- where training, validation and a model meet ---------------------------------------------------------------------


def relabel(names: Sequence[str]) -> Callable[[Path], None]:
    """Gives a parquet file these class names in their order, and its images the labels that keep their classes."""

    def change(path: Path) -> None:
        table = pq.read_table(path)
        told = json.loads(table.schema.metadata[b"huggingface"])
        before = told["info"]["features"]["label"]["names"]
        labels = [list(names).index(before[label]) for label in table["label"].to_pylist()]
        pq.write_table(table.set_column(1, "label", pa.array(labels)), path, row_group_size=20)
        rename(names)(path)

    return change


def test_validation_with_its_classes_in_another_order_is_mapped_by_name(tmp_path: Path) -> None:
    folder = make_parquet(tmp_path)
    before = pq.read_table(next(folder.glob("data/validation-*")))["label"].to_pylist()
    for path in folder.glob("data/validation-*"):
        relabel(class_names(10)[::-1])(path)
    data = get_data_loaders(resolve({"dataset": "hf", "dataset_name": str(folder), "batch_size": 8}), CPU)
    assert data.val.dataset.classes == class_names(10)
    assert data.val.dataset.all_labels().tolist() == before
    reader = data.val.dataset.reader([np.arange(20)])
    assert [reader.read(number)[1] for number in range(20)] == before
    reader.close()


@pytest.mark.parametrize("layout", ["folder", "parquet"])
def test_validation_may_lack_classes_and_which_is_told(tmp_path: Path, layout: str) -> None:
    given: dict[str, object] = {"batch_size": 8}
    if layout == "folder":
        make_classes(tmp_path / "train", names=("ant", "bee"))
        put(tmp_path / "train" / "aardvark" / "1.png")
        make_classes(tmp_path / "val", names=("ant", "bee"))
        given |= {"dataset": "imagefolder", "data_dir": str(tmp_path)}
        lacks, labels = "note      validation lacks 1 of the 3 classes: aardvark", [1] * 4 + [2] * 4
    else:
        folder = make_parquet(tmp_path)
        for path in folder.glob("data/validation-*"):
            table = pq.read_table(path)
            labels = [5 + label % 5 for label in table["label"].to_pylist()]
            narrow = [label - 5 for label in labels]
            pq.write_table(table.set_column(1, "label", pa.array(narrow)), path, row_group_size=20)
            rename(class_names(10)[5:])(path)
        given |= {"dataset": "hf", "dataset_name": str(folder)}
        lacks = "note      validation lacks 5 of the 10 classes: class 0, class 1, class 2, class 3, class 4"
    data = get_data_loaders(resolve(given), CPU)
    assert data.val.dataset.all_labels().tolist() == labels
    assert lacks in data.notes


def test_a_snapshot_is_evaluated_by_the_names_of_its_classes_and_not_resumed_in_another_order(tmp_path: Path) -> None:
    folder = make_parquet(tmp_path)
    flags = ("--dataset", "hf", "--dataset_name", folder, *FLAGS, "--epochs", 2, "--run_dir", tmp_path / "run")
    train(*flags, "--snapshot_steps", 1)
    (before,) = re.findall("val loss.*", train("--resume_from", tmp_path / "run", "--evaluate").out)
    last = max((tmp_path / "run" / "snapshots").glob("step-*"))
    for path in folder.glob("data/*"):
        relabel(class_names(10)[::-1])(path)
    again = run("--resume_from", tmp_path / "run", "--evaluate", "--override", "data=changed")
    assert re.findall("val loss.*", again.out) == [before]
    last.unlink()
    done = run("--resume_from", tmp_path / "run")
    assert (done.status, done.err.count("\n")) == (2, 1), done.err
    assert "class 0 is class 0 there and class 9 here" in done.err


@pytest.mark.parametrize(
    ("names", "seats"),
    [
        (("cat", "dog"), ("cat", "dog")),
        (("dog", "zebra"), ("zebra", "dog")),
        (("dog",), ("cat", "dog")),
        (("ant", "bee"), ("ant", "bee")),
        (("ant", "bee", "cat"), ("ant", "bee", "cat")),
    ],
)
def test_a_class_that_the_model_knows_keeps_its_number_when_another_is_renamed(
    names: tuple[str, ...], seats: tuple[str, ...]
) -> None:
    assert tuple(_seated(names, ("cat", "dog"))) == seats


def test_a_snapshot_is_not_evaluated_on_classes_that_it_does_not_know(tmp_path: Path) -> None:
    folder = make_parquet(tmp_path)
    train("--dataset", "hf", "--dataset_name", folder, *FLAGS, "--run_dir", tmp_path / "run")
    for path in folder.glob("data/*"):
        rename([*class_names(9), "unknown"])(path)
    done = run("--resume_from", tmp_path / "run", "--evaluate")
    assert (done.status, done.err.count("\n")) == (2, 1), done.err
    assert "class 9 is class 9 there and unknown here" in done.err


# ---- numbers as classes ----------------------------------------------------------------------------------------------


def numbered(folder: Path, form: str, train: list[int], val: list[int]) -> Path:
    """A set whose labels are these numbers."""
    folder.mkdir()
    images = [encode(np.full((9, 9, 3), number, np.uint8)) for number in range(max(len(train), len(val)))]
    for split, labels in (("train", train), ("validation", val)):
        if form == "tar":
            make_numbered_shard(folder / f"{split}-0.tar", labels, images)
        elif form == "csv":
            for number, image in enumerate(images):
                (folder / f"{number}.jpg").write_bytes(image)
            lines = [f"{number}.jpg,{label}" for number, label in enumerate(labels)]
            (folder / f"{split}.csv").write_text("\n".join(["file,label", *lines]))
        else:
            table = pa.table({"image": images[: len(labels)], "label": labels})
            pq.write_table(table, folder / f"{split}.parquet", write_statistics=form == "parquet")
    return folder


def make_numbered_shard(path: Path, labels: list[int], images: list[bytes]) -> None:
    write(
        path.parent,
        *(
            member
            for number, label in enumerate(labels)
            for member in ((f"{number}.jpg", images[number]), (f"{number}.cls", str(label).encode()))
        ),
        name=path.name,
    )


NUMBERS: dict[str, tuple[list[int], list[int], str]] = {
    "gaps, and more rows in validation": ([0, 1, 50, 50], [0, 1, 50] * 20, ""),
    "gaps, and fewer rows in validation": ([0, 1, 50] * 20, [50, 1, 0], "48"),
    "the last of those in training": ([0, 1, 2, 2], [1, 2, 2], ""),
    "the last of those from 1": ([1, 2, 3, 3], [2, 3], ""),
    "from 1 in both": ([1, 2, 3, 3], [1, 2, 3], ""),
    "from 1 in validation, with a gap": ([0, 1, 2, 4] * 2, [1, 4, 4, 4], "1"),
}


@pytest.mark.parametrize("form", ["parquet", "no statistics", "csv", "tar"])
@pytest.mark.parametrize("kind", NUMBERS)
def test_numbers_are_the_names_of_classes_in_training_and_validation(tmp_path: Path, form: str, kind: str) -> None:
    train, val, absent = NUMBERS[kind]
    folder = numbered(tmp_path / "set", form, train, val)
    data = get_data_loaders(resolve({"dataset": "hf", "dataset_name": str(folder), "batch_size": 2}), CPU)
    for part, labels in ((data.train.dataset, train), (data.val.dataset, val)):
        reader = part.reader([np.arange(len(part))])
        assert [part.classes[reader.read(number)[1]] for number in range(len(part))] == [*map(str, labels)]
        assert [part.classes[label] for label in part.all_labels()] == [*map(str, labels)]  # type: ignore[union-attr]
        reader.close()
    notes = "\n".join(data.notes)
    assert ("labels count from 1" in notes) == (min(train) == 1 and form != "no statistics")
    assert notes.count("classes are the") == 1
    if form != "no statistics" and absent:
        assert f"note      no image of {absent} of the {max(train) + 1} classes: " in notes
    else:
        assert "no image of" not in notes


def test_a_number_that_only_validation_has_is_refused(tmp_path: Path) -> None:
    folder = numbered(tmp_path / "set", "parquet", [0, 1, 2, 2], [0, 3, 1, 1])
    with pytest.raises(DataError, match="has the class 3, which training has not"):
        get_data_loaders(resolve({"dataset": "hf", "dataset_name": str(folder), "batch_size": 2}), CPU)


def test_classes_of_a_list_without_an_image_in_training_are_told(tmp_path: Path) -> None:
    folder = make_parquet(tmp_path)
    for path in folder.glob("data/*"):
        rename(LONGER)(path)
    data = get_data_loaders(resolve({"dataset": "hf", "dataset_name": str(folder), "batch_size": 8}), CPU)
    assert "note      no image of 1 of the 11 classes: class 10" in data.notes


def correct(*arguments: object) -> tuple[int, int]:
    """How many images an evaluation gets right, and of how many."""
    done = train(*arguments, "--evaluate", "--override", "data=changed")
    told = re.search(r"top1 .*?\((\d+) of (\d+)\)", done.out)
    assert told is not None
    return int(told[1]), int(told[2])


@pytest.mark.parametrize("whole", [False, True])
def test_a_snapshot_is_evaluated_on_a_few_images_of_one_class(tmp_path: Path, whole: bool) -> None:
    """Of two classes the model says one, so what is wrong of the one is right of the other."""
    make_classes(tmp_path / "set" / "train", each=8)
    make_classes(tmp_path / "set" / "val", each=2)
    flags = ("--dataset", "imagefolder", "--data_dir", tmp_path / "set", *FLAGS)
    train(*flags, "--run_dir", tmp_path / "run")
    right = 0
    for name in ("ant", "bee"):
        few = tmp_path / name
        make_classes(few / "val", each=3, names=("ant",))
        (few / "val" / "ant").rename(few / "val" / name)
        make_classes(few / "train", each=1, names=(name,) if whole else ("ant", "bee"))
        hits, images = correct("--resume_from", tmp_path / "run", "--data_dir", few)
        assert images == 3
        right += hits
    assert right == 3


def test_a_snapshot_is_evaluated_on_a_few_rows_of_one_class(tmp_path: Path) -> None:
    made = make_imagenet_like(tmp_path, train=32, validation=8, test=0, size=(20, 30), classes=2)
    folder, right = (tmp_path / "set"), 0
    shutil.copytree(made, folder)
    train("--dataset", "hf", "--dataset_name", folder, *FLAGS, "--run_dir", tmp_path / "run")
    few = make_imagenet_like(tmp_path / "few", train=6, validation=3, test=0, size=(20, 30), classes=1)
    for name in class_names(2):
        shutil.rmtree(folder)
        shutil.copytree(few, folder)
        (folder / "README.md").unlink()
        for path in folder.glob("data/*"):
            rename([name])(path)
        hits, images = correct("--resume_from", tmp_path / "run")
        assert images == 3
        right += hits
    assert right == 3


def test_what_is_trained_on_has_two_classes_and_a_batch(tmp_path: Path) -> None:
    make_classes(tmp_path / "set", each=5, names=("ant",))
    flags = ("--dataset", "imagefolder", "--data_dir", tmp_path / "set", "--val_share", 0.2, *FLAGS)
    done = run(*flags, "--run_dir", tmp_path / "run")
    assert (done.status, done.err.count("\n")) == (3, 1), done.err
    assert "has one class, ant, but a classifier needs two" in done.err
