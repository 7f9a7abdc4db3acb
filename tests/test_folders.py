"""What folders tell is read by their structure and not by their names, whoever reads them."""

import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_samples import write

from errors import DataError
from stream.dataset import HuggingFaceImageNetDataset
from stream.folders import class_name, layout_of, split_of
from stream.image_folders import open_image_folder

SETS: dict[str, dict[str, tuple[str | None, str | None]]] = {
    "plain": {"cat/1.jpg": (None, "cat"), "dog/2.jpg": (None, "dog")},
    "splits": {"train/cat/1.jpg": ("train", "cat"), "val/dog/1.jpg": ("validation", "dog")},
    "general names": {
        "train/data/1.jpg": ("train", "data"),
        "train/photos/1.jpg": ("train", "photos"),
        "train/dev/1.jpg": ("train", "dev"),
        "train/test/1.jpg": ("train", "test"),
        "val/images/1.jpg": ("validation", "images"),
        "val/train/1.jpg": ("validation", "train"),
    },
    "general names alone": {
        "data/1.jpg": (None, "data"),
        "image/1.jpg": (None, "image"),
        "test/1.jpg": (None, "test"),
        "dev/deeper/1.jpg": (None, "dev"),
    },
    "deeper folders": {"train/cat/siamese/1.jpg": ("train", "cat"), "train/dog/1.jpg": ("train", "dog")},
    "tiny-imagenet": {
        "tiny-imagenet-200/train/n01/images/1.JPEG": ("train", "n01"),
        "tiny-imagenet-200/train/n02/images/1.JPEG": ("train", "n02"),
        "tiny-imagenet-200/val/images/1.JPEG": ("validation", "images"),
        "tiny-imagenet-200/test/images/1.JPEG": ("test", "images"),
    },
    "wrappers": {"dataset/images/cat/1.jpg": (None, "cat"), "dataset/images/dog/1.jpg": (None, "dog")},
    "wrapper of splits": {
        "dev/preview.png": (None, None),
        "dev/train/cat/1.jpg": ("train", "cat"),
        "dev/train/1.jpg": ("train", None),
        "dev/val/cat/1.jpg": ("validation", "cat"),
    },
    "wrapper in splits": {
        "train/images/cat/1.jpg": ("train", "cat"),
        "train/images/dog/1.jpg": ("train", "dog"),
        "val/images/cat/1.jpg": ("validation", "cat"),
        "test/images/1.jpg": ("test", None),
    },
    "splits in splits": {
        "archive/seg_train/seg_train/cat/1.jpg": ("train", "cat"),
        "archive/seg_train/seg_train/dog/1.jpg": ("train", "dog"),
        "archive/seg_test/seg_test/dog/1.jpg": ("test", "dog"),
    },
    "one class a split": {"train/cat/1.jpg": ("train", "cat"), "val/cat/2.jpg": ("validation", "cat")},
    "one class": {"train/cat/1.jpg": ("train", "cat")},
    "one class with a folder": {"cat/1.jpg": (None, "cat"), "cat/more/2.jpg": (None, "cat")},
    "a folder beside": {
        "docs/1.jpg": (None, None),
        "top.png": (None, None),
        "train/cat/1.jpg": ("train", "cat"),
        "val/cat/1.jpg": ("validation", "cat"),
    },
    "years": {"train2017/cat/1.jpg": ("train", "cat"), "val2017/cat/1.jpg": ("validation", "cat")},
    "a test split without classes": {"train/cat/1.jpg": ("train", "cat"), "test/1.jpg": ("test", None)},
    "splits without classes": {"train/1.jpg": ("train", None), "test/1.jpg": ("test", None)},
    "splits in classes": {
        "cat/train/1.jpg": ("train", "cat"),
        "cat/val/1.jpg": ("validation", "cat"),
        "dog/train/1.jpg": ("train", "dog"),
    },
    "classes with a folder called as a split": {"cat/train/1.jpg": (None, "cat"), "dog/1.jpg": (None, "dog")},
    "points": {"./cat/1.jpg": (None, "cat"), "./dog/1.jpg": (None, "dog")},
    "zip in a wrapper": {
        "archive.zip/w/train/cat/1.jpg": ("train", "cat"),
        "archive.zip/w/val/dog/1.jpg": ("validation", "dog"),
    },
    "zips a split": {"train.zip/cat/1.jpg": ("train", "cat"), "val.zip/dog/1.jpg": ("validation", "dog")},
    "zips a class": {"cat.zip/1.jpg": (None, "cat"), "dog.zip/2.jpg": (None, "dog")},
    "zips a class with a folder": {"cat.zip/images/1.jpg": (None, "cat"), "dog.zip/images/2.jpg": (None, "dog")},
    "zips a class with its name": {"cat.zip/cat/1.jpg": (None, "cat"), "dog.zip/dog/2.jpg": (None, "dog")},
    "zips of parts": {
        "part1.zip/cat/1.jpg": (None, "cat"),
        "part2.zip/cat/2.jpg": (None, "cat"),
        "part2.zip/dog/2.jpg": (None, "dog"),
    },
    "accents": {"cafe\u0301/1.jpg": (None, "caf\u00e9"), "b/1.jpg": (None, "b")},
}


@pytest.mark.parametrize("kind", SETS)
def test_split_and_class_are_told_by_the_structure_of_folders(kind: str) -> None:
    layout = layout_of(SETS[kind])
    assert {path: (layout.split_of(path), layout.class_of(path)) for path in SETS[kind]} == SETS[kind]


def test_a_folder_that_may_be_a_split_or_a_class_is_refused() -> None:
    with pytest.raises(DataError, match="beside the folder train lies bus, so train may be a split or a class"):
        layout_of(["train/steam/1.jpg", "bus/1.jpg"])
    assert layout_of(["train/1.jpg", "bus/1.jpg", "train/more/1.jpg"]).class_of("train/1.jpg") == "train"


@pytest.mark.parametrize(
    ("name", "split"),
    [("train", "train"), ("Dev", "validation"), ("x_test", "test"), ("VAL 2", "validation"), ("trainer", None)],
)
def test_a_split_is_told_by_a_word(name: str, split: str | None) -> None:
    assert split_of(name) == split


def test_what_is_not_utf_8_in_the_name_of_a_folder_is_written_out() -> None:
    assert class_name("caf\udce9") == r"caf\udce9"
    assert class_name("cafe\u0301") == "caf\u00e9"


# ---- the readers -----------------------------------------------------------------------------------------------------

CLASSES = ("cat/siamese", "data", "dev", "images", "test")
FILES = {
    f"{split}/{name}/{number}.jpg": f"{split} {name} {number}".encode()
    for split in ("train", "val")
    for name in CLASSES
    for number in range(2)
}


def write_folders(folder: Path, wrapper: str) -> None:
    for name, data in FILES.items():
        path = folder / wrapper / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def write_zip(folder: Path, wrapper: str) -> None:
    folder.mkdir()
    with zipfile.ZipFile(folder / "archive.zip", "w") as archive:
        for name, data in FILES.items():
            archive.writestr(f"{wrapper}/{name}" if wrapper else name, data)


def write_zips(folder: Path, wrapper: str) -> None:
    folder.mkdir()
    for split in ("train", "val"):
        with zipfile.ZipFile(folder / f"{split}.zip", "w") as archive:
            for name, data in FILES.items():
                if name.startswith(split):
                    archive.writestr(f"{wrapper}{name.removeprefix(split)}", data)


def write_tars(folder: Path, wrapper: str) -> None:
    """A class a shard."""
    for place, name in enumerate(CLASSES):
        for split in ("train", "val"):
            members = [(f"./{path}", data) for path, data in FILES.items() if path.startswith(f"{split}/{name}/")]
            write(folder, *members, name=f"{split}-{place}.tar")


FORMS = {"folders": write_folders, "zip": write_zip, "zips": write_zips, "tars": write_tars}


def content(dataset: Any) -> dict[bytes, str]:
    reader = dataset.reader([np.arange(len(dataset))])
    found = {bytes(image): dataset.classes[label] for image, label in map(reader.read, range(len(dataset)))}
    reader.close()
    return found


@pytest.mark.parametrize("wrapper", ["", "set", "images"])
@pytest.mark.parametrize("form", FORMS)
def test_all_readers_find_the_same_classes_in_the_same_folders(tmp_path: Path, form: str, wrapper: str) -> None:
    FORMS[form](tmp_path / "set", wrapper)
    for split, names in (("train", ["train"]), ("val", ["validation", "val"])):
        dataset = HuggingFaceImageNetDataset.open(str(tmp_path / "set"), split=names)
        expected = {data: name.split("/")[1] for name, data in FILES.items() if name.startswith(split)}
        assert content(dataset) == expected
        assert dataset.all_labels().tolist() == sorted(dataset.all_labels().tolist())
        assert dataset.notes[0].startswith("classes are the 5 distinct strings of ")
        assert ", as cat in " in dataset.notes[0]
    if form == "folders":
        train, val = open_image_folder(tmp_path / "set" / wrapper, "train", ["val"], None, whole=False)
        assert content(train) | content(val) == {data: name.split("/")[1] for name, data in FILES.items()}


def test_a_set_without_splits_keeps_classes_that_are_called_as_splits(tmp_path: Path) -> None:
    for name in ("cat", "test", "dev"):
        (tmp_path / "set" / name).mkdir(parents=True)
        (tmp_path / "set" / name / "1.jpg").write_bytes(name.encode())
    dataset = HuggingFaceImageNetDataset.open(str(tmp_path / "set"), split=["train"])
    assert content(dataset) == {b"cat": "cat", b"test": "test", b"dev": "dev"}


def test_names_of_files_tell_splits_where_all_do_and_no_folder_does(tmp_path: Path) -> None:
    for name in ("cat/train_1.jpg", "dog/train_2.jpg", "cat/val_1.jpg"):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).write_bytes(name.encode())
    found = {
        split: content(HuggingFaceImageNetDataset.open(str(tmp_path / "set"), split=[split]))
        for split in ("train", "validation")
    }
    assert found == {
        "train": {b"cat/train_1.jpg": "cat", b"dog/train_2.jpg": "dog"},
        "validation": {b"cat/val_1.jpg": "cat"},
    }


def test_what_lies_in_no_class_is_told_and_what_leaves_the_class_open_refused(tmp_path: Path) -> None:
    write_folders(tmp_path / "a", "")
    (tmp_path / "a" / "docs").mkdir()
    for name in ("docs/logo.png", "train/stray.jpg"):
        (tmp_path / "a" / name).write_bytes(b"x")
    dataset = HuggingFaceImageNetDataset.open(str(tmp_path / "a"), split=["train"])
    assert len(dataset) == 10
    assert dataset.notes[0] == "2 images in no class's folder were passed over (docs/logo.png, train/stray.jpg)"
    write(tmp_path / "b", ("train/cat/1.jpg", b"x"), ("val/cat/1.jpg", b"x"))
    with pytest.raises(DataError, match="has folders for the splits train, validation; a tar shard is of one split"):
        HuggingFaceImageNetDataset.open(str(tmp_path / "b"), split=["train"])
    write(tmp_path / "c", ("cat/1.jpg", b"x"), ("dog/1.jpg", b"x"))
    write(tmp_path / "c", ("1.jpg", b"x"), ("1.cls", b"0"), name="train-1.tar")
    with pytest.raises(DataError, match=r"train-1\.tar tells labels by its members, and other shards by folders"):
        HuggingFaceImageNetDataset.open(str(tmp_path / "c"), split=["train"])


def test_images_of_a_tar_beside_the_folders_of_classes_are_passed_over(tmp_path: Path) -> None:
    write(tmp_path, ("w/1.png", b"x"), ("w/train/cat/1.jpg", b"y"), ("w/train/dog/2.jpg", b"z"))
    dataset = HuggingFaceImageNetDataset.open(str(tmp_path), split=["train"])
    assert content(dataset) == {b"y": "cat", b"z": "dog"}
    assert dataset.all_labels().tolist() == [0, 1]
    assert dataset.name(1) == "train-0.tar key w/train/dog/2"
    assert dataset.notes[1] == "1 members that are no samples were passed over (w)"


def test_accents_are_the_same_name_however_a_system_writes_them(tmp_path: Path) -> None:
    for split, name in (("train", "caf\u00e9"), ("val", "cafe\u0301")):
        for other in (name, "tea"):
            (tmp_path / split / other).mkdir(parents=True)
            (tmp_path / split / other / "1.jpg").write_bytes(b"x")
    train, val = open_image_folder(tmp_path, "train", ["val"], None, whole=False)
    assert val is not None
    assert train.classes == val.classes == ["caf\u00e9", "tea"]
    for names in (["train"], ["validation"]):
        assert HuggingFaceImageNetDataset.open(str(tmp_path), split=names).classes == train.classes


@pytest.mark.parametrize("linked", ["train/cat", "train"])
def test_links_to_folders_are_followed_and_those_that_lead_back_are_not(tmp_path: Path, linked: str) -> None:
    write_folders(tmp_path / "made", "")
    shutil.copytree(tmp_path / "made", tmp_path / "set")
    shutil.rmtree(tmp_path / "set" / linked)
    (tmp_path / "set" / linked).symlink_to(tmp_path / "made" / linked)
    (tmp_path / "set" / "val" / "cat" / "back").symlink_to(tmp_path / "set")
    dataset = HuggingFaceImageNetDataset.open(str(tmp_path / "set"), split=["train"])
    assert content(dataset) == {data: name.split("/")[1] for name, data in FILES.items() if name.startswith("train")}
    for name in ("train", "val"):
        shutil.rmtree(tmp_path / "set" / name) if name == "val" or linked != "train" else None
        (tmp_path / "set" / name).unlink(missing_ok=True)
        (tmp_path / "set" / name).symlink_to(tmp_path / "made" / name)
    dataset = HuggingFaceImageNetDataset.open(str(tmp_path / "set"), split=["validation"])
    assert len(dataset) == 10
