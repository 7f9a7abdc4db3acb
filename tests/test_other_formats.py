"""Sets that are neither parquet nor tar are read right, image by image, or named truly in one line."""

import csv
import io
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from hub import Hub
from program import run, train
from shards import draw, encode

from errors import DataError, UsageError
from stream.dataset import Cache, HuggingFaceImageNetDataset

pytestmark = pytest.mark.usefixtures("small_model")

REPO_ID = "someone/others"
ROWS = 12
NAMES = [("cat", "ant", "dog")[row % 3] for row in range(ROWS)]
SORTED = ["ant", "cat", "dog"]
IMAGES = {f"{row:02d}": encode(draw(row % 3, 3, (20, 30), np.random.default_rng(row))) for row in range(ROWS)}
SPLITS = {"train": range(8), "validation": range(8, ROWS)}
FLAGS = ("--model", "resnet18", "--image_size", 16, "--batch_size", 8, "--epochs", 1, "--num_workers", 0)


def keys(split: str) -> list[str]:
    return [f"{row:02d}" for row in SPLITS[split]]


def in_folders(folder: Path, word: str = "") -> None:
    """An image a file, in folders for each class, with what systems leave between them."""
    for split in SPLITS:
        for key in keys(split):
            path = folder / split / NAMES[int(key)] / word / f"{key}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(IMAGES[key])
            for name in ("._x.jpg", ".hidden/x.jpg", "@eaDir/x.jpg", "Thumbs.db"):
                (path.parent / name).parent.mkdir(exist_ok=True)
                (path.parent / name).write_bytes(b"no image")


def in_a_folder(folder: Path, where: str = "images") -> None:
    (folder / where).mkdir(parents=True)
    for key, image in IMAGES.items():
        (folder / where / f"{key}.jpg").write_bytes(image)


def zipped(folder: Path) -> None:
    in_folders(folder / "made")
    for split in SPLITS:
        zip_folder(folder / f"{split}.zip", folder / "made" / split)
    shutil.rmtree(folder / "made")


def zipped_together(folder: Path) -> None:
    in_folders(folder / "made" / "pets")
    zip_folder(folder / "pets.zip", folder / "made")
    shutil.rmtree(folder / "made")


def zip_folder(path: Path, folder: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, file.relative_to(folder))
        archive.writestr("__MACOSX/cat/._00.jpg", b"no image")


def as_csv(folder: Path, separator: str = ",", word: str = "file,species") -> None:
    in_a_folder(folder)
    for split in SPLITS:
        with open(folder / f"{split}.{'csv' if separator == ',' else 'tsv'}", "w", newline="") as file:
            rows = csv.writer(file, delimiter=separator)
            rows.writerow(word.split(","))
            rows.writerows((f"images/{key}.jpg", NAMES[int(key)]) for key in keys(split))


def as_jsonl(folder: Path) -> None:
    in_a_folder(folder)
    for split in SPLITS:
        lines = [json.dumps({"image": f"images/{key}.jpg", "label": NAMES[int(key)]}) for key in keys(split)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines))


def with_metadata(folder: Path) -> None:
    """As `datasets` reads them: a table beside the images, which names them."""
    for split in SPLITS:
        (folder / split).mkdir(parents=True)
        lines = [json.dumps({"file_name": f"{key}.jpg", "label": NAMES[int(key)]}) for key in keys(split)]
        (folder / split / "metadata.jsonl").write_text("\n".join(lines))
        for key in keys(split):
            (folder / split / f"{key}.jpg").write_bytes(IMAGES[key])


def made(split: str) -> datasets.Dataset:
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=SORTED))
    images = [{"bytes": IMAGES[key], "path": None} for key in keys(split)]
    return datasets.Dataset.from_dict({"image": images, "label": [NAMES[int(key)] for key in keys(split)]}, features)


def saved(folder: Path) -> None:
    datasets.disable_progress_bars()
    datasets.DatasetDict({split: made(split) for split in SPLITS}).save_to_disk(folder)


def as_arrow(folder: Path) -> None:
    saved(folder / "made")
    for split in SPLITS:
        shutil.move(folder / "made" / split / "data-00000-of-00001.arrow", folder / f"{split}.arrow")
    shutil.rmtree(folder / "made")


FORMS: dict[str, Callable[[Path], None]] = {
    "folders": in_folders,
    "folders with images in folders": lambda folder: in_folders(folder, "images"),
    "zips": zipped,
    "one zip": zipped_together,
    "csv": as_csv,
    "tsv": lambda folder: as_csv(folder, "\t", "path,class"),
    "jsonl": as_jsonl,
    "metadata": with_metadata,
    "save_to_disk": saved,
    "arrow": as_arrow,
}


def open_set(source: object, split: str = "train", **options: Any) -> Any:
    return HuggingFaceImageNetDataset.open(str(source), split=[split], **options)


def check(dataset: Any, split: str) -> None:
    """The classes, and the image, the label and the name of each sample, in whatever order they are."""
    assert len(dataset) == len(SPLITS[split])
    assert dataset.block_rows.tolist() == [1] * len(dataset)
    reader = dataset.reader([np.arange(len(dataset))])
    found = {bytes(image): dataset.classes[label] for image, label in map(reader.read, range(len(dataset)))}
    assert found == {IMAGES[key]: NAMES[int(key)] for key in keys(split)}
    labels = dataset.all_labels()
    assert (labels.dtype, labels.tolist()) == (np.dtype(np.int64), [reader.read(i)[1] for i in range(len(dataset))])
    assert len({dataset.name(number) for number in range(len(dataset))}) == len(dataset)
    taken = dataset.take(np.array([3, 1]))
    assert [taken.read(number) for number in range(2)] == [dataset.read(3), dataset.read(1)]
    assert [taken.name(0), taken.all_labels().tolist()] == [dataset.name(3), labels[[3, 1]].tolist()]
    assert taken.fingerprint() != dataset.fingerprint() == open_again(dataset).fingerprint()


def open_again(dataset: Any) -> Any:
    return dataset.take(np.arange(len(dataset)))


@pytest.mark.parametrize("on_the_hub", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_a_set_in_another_form_is_read_right(hub_port: int, tmp_path: Path, form: str, on_the_hub: bool) -> None:
    folder = tmp_path / "datasets" / REPO_ID
    FORMS[form](folder)
    with Hub(tmp_path, port=hub_port) as hub:
        for split in SPLITS:
            dataset = open_set(REPO_ID if on_the_hub else folder, split, cache=Cache(tmp_path / "cache"))
            assert sorted(dataset.classes) == (sorted({NAMES[int(key)] for key in keys(split)}))
            check(dataset, split)
            sha = hub.repos["datasets", REPO_ID].sha
            assert dataset.revision == (sha if on_the_hub else None)
            assert any("downloaded" in note for note in dataset.notes) == on_the_hub
        before = len(hub.requests)
        again = open_set(REPO_ID, revision=sha, cache=Cache(tmp_path / "cache")) if on_the_hub else dataset
        if on_the_hub:
            check(again, "train")
            assert [request for request in hub.requests[before:] if request.method == "GET"] == []


def test_a_set_in_another_form_trains(tmp_path: Path) -> None:
    in_folders(tmp_path / "set")
    flags = ("--dataset", "hf", "--dataset_name", tmp_path / "set", *FLAGS)
    done = train(*flags, "--run_dir", tmp_path / "run")
    assert "classes   3: ant (3), cat (3), dog (2)" in done.out
    assert run("--resume_from", tmp_path / "run").status == 0


def test_a_limit_takes_samples_of_all(tmp_path: Path) -> None:
    in_folders(tmp_path / "set")
    dataset = open_set(tmp_path / "set", max_samples=3)
    assert len(dataset) == 3
    assert [dataset.classes[label] for label in dataset.all_labels()] == ["ant", "cat", "dog"]
    assert dataset.classes == SORTED


# ---- what is refused -------------------------------------------------------------------------------------------------


def refusal(folder: Path, kind: type[Exception] = DataError, **options: Any) -> str:
    with pytest.raises(kind) as caught:
        open_set(folder, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("suffix", ["xyz", "h5", "txt", "mp3"])
def test_files_that_cannot_be_read_are_named_truly(tmp_path: Path, suffix: str) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    for split in SPLITS:
        (folder / f"{split}.{suffix}").write_bytes(b"something")
    done = run("--dataset", "hf", "--dataset_name", folder, *FLAGS, "--run_dir", tmp_path / "run")
    assert (done.status, done.err.count("\n")) == (3, 1), done.err
    assert f"are .{suffix}" in done.err
    assert "which cannot be read; give parquet files" in done.err


def test_a_folder_without_files_of_data_is_told_as_such(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    assert "has no data; give parquet files" in refusal(tmp_path / "set")
    (tmp_path / "set" / "README.md").write_text("# Nothing yet\n")
    assert "has no data; give parquet files" in refusal(tmp_path / "set")
    with zipfile.ZipFile(tmp_path / "set" / "train.zip", "w") as archive:
        archive.writestr("notes.jpg.txt", b"no image")
    assert "train.zip, have no images in them" in refusal(tmp_path / "set")


def test_images_without_labels_are_told_where_to_go(tmp_path: Path) -> None:
    in_a_folder(tmp_path / "set")
    told = refusal(tmp_path / "set")
    assert "are .jpg images without labels, such as images/00.jpg" in told
    assert f"use --dataset imagefolder --data_dir {tmp_path / 'set'}" in told


def test_a_table_without_labels_or_with_paths_outside_is_refused(tmp_path: Path) -> None:
    as_csv(tmp_path / "set", word="file,species")
    path = tmp_path / "set" / "train.csv"
    path.write_text("file\nimages/00.jpg\n")
    assert "has no column of labels, only file (string)" in refusal(tmp_path / "set")
    path.write_text("file,species\n../../../etc/hostname,cat\nimages/00.jpg,dog\n")
    with pytest.raises(DataError, match="names an image outside the dataset"):
        open_set(tmp_path / "set").read(0)
    path.write_text("file,species,genus\nimages/00.jpg,cat,a\n")
    assert "several columns of labels: species (string), genus (string)" in refusal(tmp_path / "set")
    assert open_set(tmp_path / "set", label_column="genus").classes == ["a"]
    assert "is not there" in refusal(tmp_path / "set", UsageError, label_column="family")
    path.write_text("file,species\nimages/00.jpg,NA\nimages/01.jpg,None\n")
    assert open_set(tmp_path / "set").classes == ["NA", "None"]
    path.write_text("file,species\nimages/00.jpg,cat\nimages/01.jpg,\n")
    assert "train.csv row 1 has the label None" in refusal(tmp_path / "set")


def test_an_image_that_is_missing_or_damaged_is_counted_and_not_waited_for(tmp_path: Path) -> None:
    as_csv(tmp_path / "a")
    (tmp_path / "a" / "images" / "03.jpg").unlink()
    assert open_set(tmp_path / "a").read(3)[0] == b""
    zipped(tmp_path / "b")
    path = tmp_path / "b" / "train.zip"
    data = path.read_bytes()
    first = zipfile.ZipFile(io.BytesIO(data)).infolist()[0]
    path.write_bytes(data.replace(IMAGES["01"][100:120], b"\0" * 20))
    images = [open_set(tmp_path / "b").read(number)[0] for number in range(8)]
    assert images.count(b"") <= 1, first
    path.write_bytes(data[:100])
    assert "is not a zip file" in refusal(tmp_path / "b")


# ---- labels as they are written --------------------------------------------------------------------------------------


def labelled(folder: Path, *tables: list[str], suffix: str = "csv") -> Path:
    """A set of tables of these labels."""
    in_a_folder(folder)
    for number, labels in enumerate(tables):
        rows = [(f"images/{row:02d}.jpg", label) for row, label in enumerate(labels)]
        with open(folder / f"train-{number}.{suffix}", "w", newline="") as file:
            csv.writer(file, delimiter="," if suffix == "csv" else "\t").writerows([("file", "label"), *rows])
    return folder


TEXTS: dict[str, tuple[list[list[str]], list[str]]] = {
    "zeros": ([["007", "7", "07"]], ["007", "07", "7"]),
    "zeros in one file": ([["1", "2"], ["3", "01"]], ["01", "1", "2", "3"]),
    "what pandas takes for other types": (
        [["1.0", "1e5", "true", "NA"], ["nan", "+1", " x", "1_0"]],
        [" x", "+1", "1.0", "1_0", "1e5", "NA", "nan", "true"],
    ),
    "floats": ([["1.0", "2.0"]], ["1.0", "2.0"]),
    "truth": ([["true", "false"]], ["false", "true"]),
    "numbers": ([["0", "2"], ["1", "0"]], ["0", "1", "2"]),
    "numbers too large for any": ([["18446744073709551616", "1"]], ["1", "18446744073709551616"]),
    "dates": ([["2020-01-01", "2021-01-01"]], ["2020-01-01", "2021-01-01"]),
}


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
@pytest.mark.parametrize("kind", TEXTS)
def test_labels_in_a_table_of_text_are_names_as_they_are_written(tmp_path: Path, kind: str, suffix: str) -> None:
    tables, classes = TEXTS[kind]
    dataset = open_set(labelled(tmp_path / "set", *tables, suffix=suffix))
    assert sorted(dataset.classes) == classes
    expected = [label for table in tables for label in table]
    assert [dataset.classes[label] for label in dataset.all_labels()] == expected
    assert dataset.read(1)[0] == IMAGES["01"]


def test_other_columns_of_numbers_are_no_labels_and_one_without_a_name_is_none(tmp_path: Path) -> None:
    in_a_folder(tmp_path)
    (tmp_path / "train.csv").write_text(
        "\ufeff,file,width,score,species,empty\n0,images/00.jpg,20,1.5,cat,\n1,images/01.jpg,20,2,ant,,\n"
    )
    assert "species (string)" in refusal(tmp_path)  # width may be one
    assert "score" not in refusal(tmp_path)
    assert open_set(tmp_path, label_column="species").classes == ["ant", "cat"]
    assert open_set(tmp_path, label_column="score").classes == ["1.5", "2"]
    assert open_set(tmp_path, label_column="width").classes == ["20"]


def test_a_table_that_leaves_open_which_field_is_which_is_refused(tmp_path: Path) -> None:
    in_a_folder(tmp_path)
    path = tmp_path / "train.csv"
    path.write_text("file,label\nimages/00.jpg,cat, big\nimages/01.jpg,dog\n")
    assert "train.csv: its line 2 has 3 fields, and the first 2" in refusal(tmp_path)
    path.write_text("file,label,label\nimages/00.jpg,cat,dog\n")
    assert "train.csv: it has two columns of one name" in refusal(tmp_path)


@pytest.mark.parametrize("where", ["", "images/"])
def test_a_table_of_one_row_beside_one_image_is_read(tmp_path: Path, where: str) -> None:
    for split, count in (("train", 8), ("val", 1)):
        (tmp_path / split / where).mkdir(parents=True)
        rows = [f"{split}/{where}{row:02d}.jpg,{NAMES[row]}" for row in range(count)]
        (tmp_path / split / "labels.csv").write_text("\n".join(["file,label", *rows]))
        for row in range(count):
            (tmp_path / split / where / f"{row:02d}.jpg").write_bytes(IMAGES[f"{row:02d}"])
    for split, classes in (("train", SORTED), ("validation", ["cat"])):
        dataset = open_set(tmp_path, split)
        assert dataset.classes == classes
        assert dataset.read(0)[0] == IMAGES["00"]


@pytest.mark.parametrize(
    ("labels", "classes"), [([1.0, 0.0, 1], ["0", "1"]), ([1.5, 0, 1], None), ([1.0, None, 0.0], None)]
)
def test_a_whole_number_in_json_may_be_written_with_a_point(
    tmp_path: Path, labels: list[Any], classes: list[str] | None
) -> None:
    in_a_folder(tmp_path)
    lines = [json.dumps({"image": f"images/0{row}.jpg", "label": label}) for row, label in enumerate(labels)]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    if classes is None:
        assert refusal(tmp_path)
    else:
        dataset = open_set(tmp_path)
        assert (dataset.classes, dataset.all_labels().tolist()) == (classes, labels)
