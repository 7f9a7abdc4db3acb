"""Parquet columns of any kind are read right, or refused with the columns that there are."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub import Hub
from shards import draw, encode

from errors import DataError, UsageError
from stream.dataset import Cache, HuggingFaceImageNetDataset

ROWS = 24
REPO_ID = "someone/columns"
IMAGES = [encode(draw(row % 3, 3, (20, 30), np.random.default_rng(row))) for row in range(ROWS)]
NUMBERS = [row % 3 for row in range(ROWS)]
NAMES = [("cat", "ant", "dog")[number] for number in NUMBERS]
STRUCTS = pa.array([{"bytes": image, "path": "a.jpg"} for image in IMAGES])


def write(folder: Path, files: int = 2, **columns: Any) -> Path:
    """A set of a training split in files of row groups of 4, without a card and without `datasets`' own metadata."""
    folder.mkdir(parents=True, exist_ok=True)
    given = {"image": STRUCTS} | columns
    table = pa.table({name: column for name, column in given.items() if column is not None})
    for number in range(files):
        part = table.slice(number * ROWS // files, ROWS // files)
        pq.write_table(part, folder / f"train-{number}.parquet", row_group_size=4)
    return folder


def open_set(source: object, **options: Any) -> HuggingFaceImageNetDataset:
    return HuggingFaceImageNetDataset.open(str(source), split=["train"], block_bytes=1, **options)


def check(dataset: HuggingFaceImageNetDataset, classes: list[str], names: list[str]) -> None:
    """The classes, and the image and the class of each row, as blocks and as labels alone; a block has 4 rows."""
    assert dataset.classes == classes
    blocks = [dataset.read_block(number) for number in range(len(dataset.blocks))]
    assert [image for block in blocks for image in block.images.to_pylist()] == IMAGES
    labels = np.concatenate([block.labels for block in blocks])
    assert [classes[label] for label in labels] == names
    alone = np.concatenate([dataset._shards.labels(block) for block in dataset.blocks])
    assert (alone.dtype, alone.tolist()) == (np.dtype(np.int64), labels.tolist())
    for block, part in zip(dataset.blocks, blocks, strict=True):
        for rows, low, high in dataset._shards.label_ranges([block]).T:
            assert not rows or (low, high) == (part.labels.min(), part.labels.max())


def refusal(folder: Path, kind: type[Exception] = DataError, **options: Any) -> str:
    with pytest.raises(kind) as caught:
        open_set(folder, **options).read_block(0)
    assert "\n" not in str(caught.value)
    return str(caught.value)


SORTED = ["ant", "cat", "dog"]
FROM_1 = [str(number + 1) for number in NUMBERS]
WIDE = [(101, 7, 2000)[number] for number in NUMBERS]
LABELS: dict[str, tuple[pa.Array, list[str], list[str], str]] = {
    "numbers": (pa.array(NUMBERS), ["0", "1", "2"], [*map(str, NUMBERS)], "numbers 0 to 2"),
    "small numbers": (pa.array(NUMBERS, pa.uint8()), ["0", "1", "2"], [*map(str, NUMBERS)], "numbers 0 to 2"),
    "numbers from 1": (pa.array(NUMBERS).cast(pa.int32()), ["1", "2", "3"], FROM_1, "labels count from 1"),
    "numbers far apart": (
        pa.array(WIDE),
        ["7", "101", "2000"],
        [*map(str, WIDE)],
        "3 distinct numbers of column label",
    ),
    "strings": (pa.array(NAMES), SORTED, NAMES, "3 distinct strings of column label"),
    "large strings": (pa.array(NAMES, pa.large_string()), SORTED, NAMES, "3 distinct strings"),
    "categories": (pa.array(NAMES).dictionary_encode(), SORTED, NAMES, "3 distinct strings"),
    "numbers as strings": (
        pa.array([str(10**number) for number in NUMBERS]),
        ["1", "10", "100"],
        [str(10**number) for number in NUMBERS],
        "3 distinct strings",
    ),
    "lists of a number": (pa.array([[number] for number in NUMBERS]), ["0", "1", "2"], [*map(str, NUMBERS)], "0 to 2"),
    "lists of a string": (pa.array([[name] for name in NAMES]), SORTED, NAMES, "3 distinct strings"),
    "lists of fixed size": (
        pa.array([[name] for name in NAMES], pa.list_(pa.string(), 1)),
        SORTED,
        NAMES,
        "3 distinct",
    ),
    "truth": (
        pa.array([number == 0 for number in NUMBERS]),
        ["False", "True"],
        [str(number == 0) for number in NUMBERS],
        "2 distinct strings",
    ),
}
LABELS["numbers from 1"] = (pa.array([number + 1 for number in NUMBERS], pa.int32()), *LABELS["numbers from 1"][1:])


@pytest.mark.parametrize("statistics", [True, False])
@pytest.mark.parametrize("kind", LABELS)
def test_labels_of_any_kind_are_classes_by_name(tmp_path: Path, kind: str, statistics: bool) -> None:
    column, classes, names, note = LABELS[kind]
    folder = write(tmp_path / "set", label=column)
    if not statistics:
        for path in folder.iterdir():
            pq.write_table(pq.read_table(path), path, row_group_size=4, write_statistics=False)
        note = f"{len(classes)} distinct"
    dataset = open_set(folder)
    check(dataset, classes, names)
    assert len(dataset.notes) == 1
    assert note in dataset.notes[0]


IMAGE_COLUMNS: dict[str, pa.Array] = {
    "binary": pa.array(IMAGES),
    "large binary": pa.array(IMAGES, pa.large_binary()),
    "struct of bytes": pa.array([{"bytes": image} for image in IMAGES]),
    "paths": pa.array([f"photos/{row}.jpg" for row in range(ROWS)]),
    "paths in structs": pa.array([{"path": f"photos/{row}.jpg"} for row in range(ROWS)]),
}


@pytest.mark.parametrize("kind", IMAGE_COLUMNS)
def test_images_of_any_kind_are_read_without_the_image_feature(tmp_path: Path, kind: str) -> None:
    folder = write(tmp_path / "set", image=IMAGE_COLUMNS[kind], label=pa.array(NAMES))
    (folder / "photos").mkdir()
    for row, image in enumerate(IMAGES):
        (folder / "photos" / f"{row}.jpg").write_bytes(image)
    check(open_set(folder), SORTED, NAMES)


OTHERS = {"text": pa.array([f"a photograph, the {row}th" for row in range(ROWS)]), "width": pa.array([9] * ROWS)}


def test_a_column_is_chosen_by_its_name_or_by_the_flag(tmp_path: Path) -> None:
    """Of other columns only those that are named like labels count; pandas' index counts never."""
    index = pa.array(range(ROWS))
    folder = write(
        tmp_path / "set", species_class=pa.array(NAMES), thumb=pa.array(IMAGES), __index_level_0__=index, **OTHERS
    )
    check(open_set(folder), SORTED, NAMES)
    assert open_set(folder, label_column="width").classes == ["9"]
    check(open_set(folder, image_column="thumb"), SORTED, NAMES)
    assert open_set(folder, label_column="text").classes == sorted(OTHERS["text"].to_pylist())
    names = {open_set(folder, label_column=name).blocks[0].name for name in ("species_class", "width", "text")}
    assert len(names) == 3


def test_several_or_no_columns_are_told_with_their_types_and_the_flag(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", label=pa.array(NUMBERS), class_name=pa.array(NAMES))
    told = refusal(folder)
    assert "several columns of labels: label (int64), class_name (string); choose with --label_column" in told
    folder = write(tmp_path / "b", first=STRUCTS, image=None, second=STRUCTS, label=pa.array(NUMBERS))
    assert (
        "images: first (struct of bytes, path), second (struct of bytes, path); choose with --image_column"
        in refusal(folder)
    )
    folder = write(tmp_path / "c", score=pa.array([0.5] * ROWS))
    assert "no column of labels, only image (struct of bytes, path), score (float64)" in refusal(folder)
    told = refusal(folder, UsageError, label_column="score")
    assert "column score" in told
    assert "holds float64 and not labels" in told
    assert "is not there" in refusal(folder, UsageError, image_column="picture")
    folder = write(tmp_path / "d", image=None, label=pa.array(NAMES))
    assert "no column of images, only label (string)" in refusal(folder)


def test_several_labels_or_none_in_a_row_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", label=pa.array([[0, 1]] + [[0]] * (ROWS - 1)))
    assert "a row has 2 labels, and one is needed" in refusal(folder)
    folder = write(tmp_path / "b", label=pa.array([None] * ROWS, pa.string()))
    assert "has no labels in column label" in refusal(folder)
    folder = write(tmp_path / "c", label=pa.array([None, *NAMES[1:]]))
    assert "has the label None" in refusal(folder)
    folder = write(tmp_path / "d", label=pa.array([-1] * ROWS))
    assert "has the label -1" in refusal(folder)


def test_captions_are_not_taken_for_classes_unless_they_are_chosen(tmp_path: Path) -> None:
    rows = 200
    folder = tmp_path / "set"
    folder.mkdir()
    table = pa.table({"image": [IMAGES[0]] * rows, "text": [f"a photograph, the {row}th" for row in range(rows)]})
    pq.write_table(table, folder / "train.parquet")
    assert "200 distinct texts in 200 rows, which are no classes" in refusal(folder)
    assert len(open_set(folder, label_column="text").classes) == rows


def test_a_card_tells_the_classes_of_labels_that_are_stored_as_names(tmp_path: Path) -> None:
    folder = write(tmp_path / "set", label=pa.array(NAMES))
    names = "".join(f"          '{number}': {name}\n" for number, name in enumerate(["dog", "cat", "ant"]))
    (folder / "README.md").write_text(
        "---\ndataset_info:\n  features:\n  - name: image\n    dtype: image\n  - name: label\n    dtype:\n"
        f"      class_label:\n        names:\n{names}---\n"
    )
    check(open_set(folder), ["dog", "cat", "ant"], NAMES)
    path = folder / "train-1.parquet"
    pq.write_table(pa.table({"image": STRUCTS, "label": ["fox"] * ROWS}), path)
    dataset = open_set(folder)
    with pytest.raises(DataError, match=r"train-1\.parquet: it has the label 'fox', which is none of its 3 classes"):
        dataset.read_block(len(dataset.blocks) - 1)


def test_a_list_of_one_class_label_has_its_names(tmp_path: Path) -> None:
    folder = write(tmp_path / "set", label=pa.array([[number] for number in NUMBERS]))
    label = {"_type": "List", "feature": {"_type": "ClassLabel", "names": ["x", "y", "z"]}}
    told = json.dumps({"info": {"features": {"image": {"_type": "Image"}, "label": label}}})
    for path in folder.iterdir():
        table = pq.read_table(path).replace_schema_metadata({"huggingface": told})
        pq.write_table(table, path, row_group_size=4)
    check(open_set(folder), ["x", "y", "z"], ["xyz"[number] for number in NUMBERS])


def test_a_row_is_named_by_its_file_and_its_place_in_it(tmp_path: Path) -> None:
    dataset = open_set(write(tmp_path / "set", label=pa.array(NAMES)))
    assert dataset._shards.names(dataset.blocks[0], np.array([1])) == ["train-0.parquet row 1"]
    assert dataset._shards.names(dataset.blocks[-1], np.array([3])) == ["train-1.parquet row 11"]


@pytest.mark.parametrize(("kind", "requests"), [("strings", 2), ("numbers", 0)])
def test_label_columns_on_the_hub_are_fetched_once_and_only_where_the_footers_do_not_tell(
    hub_port: int, tmp_path: Path, kind: str, requests: int
) -> None:
    column, classes, names, _ = LABELS[kind]
    write(tmp_path / "datasets" / REPO_ID, label=column)

    def ranges(call: Callable[[], Any]) -> int:
        before = len(hub.requests)
        call()
        return len([request for request in hub.requests[before:] if request.range and not request.at_end])

    with Hub(tmp_path, port=hub_port) as hub:
        cache = Cache(tmp_path / "cache")
        sha = hub.repos["datasets", REPO_ID].sha
        assert ranges(lambda: open_set(REPO_ID, cache=cache)) == requests
        assert ranges(lambda: open_set(REPO_ID, cache=cache, revision=sha)) == 0
        dataset = open_set(REPO_ID, cache=cache, revision=sha)
        alone = lambda: [dataset._shards.labels(block) for block in dataset.blocks]
        assert ranges(alone) == 2 - requests
        assert ranges(alone) == 0
        check(dataset, classes, names)


def test_files_that_are_no_data_are_not_read(tmp_path: Path) -> None:
    folder = write(tmp_path / "set", label=pa.array(NAMES))
    for name in ("._train-0.parquet", ".hidden/train-2.parquet", "__MACOSX/train-3.parquet", "@eaDir/train-4.parquet"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"no data")
    for number in range(9):
        (folder / "@eaDir" / f"train-{number}.jpg").write_bytes(b"no data")
    check(open_set(folder), SORTED, NAMES)


LARGE = 2**63 + 1
NO_CLASSES: dict[str, tuple[pa.Array, list[str] | None, str]] = {
    "below 0": (pa.array([0, 1, -1, 2] * 6), None, "label -1"),
    "below 0, small": (pa.array([0, 1, -3, 2] * 6, pa.int8()), None, "label -3"),
    "below 0, in lists": (pa.array([[0], [1], [-1], [2]] * 6), None, "label -1"),
    "below 0, coded": (pa.array([5, 7, -1, 7] * 6).dictionary_encode(), None, "label -1"),
    "below 0 beside names": (pa.array([0, 1, -1, 2] * 6), ["a", "b", "c"], "label -1"),
    "beyond the names": (pa.array([0, 1, 7, 2] * 6), ["a", "b", "c"], "label 7"),
    "too large": (pa.array([0, 1, LARGE, 2] * 6, pa.uint64()), None, f"label {LARGE}"),
    "too large beside names": (pa.array([0, 1, LARGE, 2] * 6, pa.uint64()), ["a", "b", "c"], f"label {LARGE}"),
    "none": (pa.array([0, 1, None, 2] * 6), None, "label None"),
    "none beside names": (pa.array([0, 1, None, 2] * 6), ["a", "b", "c"], "label None"),
    "no text": (pa.array(["a", "b", None, "c"] * 6), None, "label None"),
    "no truth": (pa.array([True, False, None, True] * 6), None, "label None"),
    "empty lists": (pa.array([[0], [1], [], [2]] * 6), None, ""),
    "no lists": (pa.array([[0], [1], None, [2]] * 6), None, "label None"),
    "several": (pa.array([[0], [1], [1, 2], [2]] * 6), None, "a row has 2 labels"),
    "numbers that are not whole": (pa.array([0.0, 1.0, float("nan"), 2.0] * 6), None, "label (float64)"),
}


@pytest.mark.parametrize("form", ["parquet", "no statistics", "arrow"])
@pytest.mark.parametrize("kind", NO_CLASSES)
def test_a_label_of_no_class_is_refused_in_one_line_with_its_file(tmp_path: Path, kind: str, form: str) -> None:
    """Whether footers tell it or not, when the set is opened or when the block is read; all labels alone, too."""
    column, names, told = NO_CLASSES[kind]
    folder = write(tmp_path / "set", files=1, label=column)
    label = {"_type": "ClassLabel", "names": names}
    metadata = {"huggingface": json.dumps({"info": {"features": {"image": {"_type": "Image"}, "label": label}}})}
    table = pq.read_table(folder / "train-0.parquet").replace_schema_metadata(metadata if names else None)
    (folder / "train-0.parquet").unlink()
    if form == "arrow":
        with pa.ipc.new_stream(folder / "train-0.arrow", table.schema) as writer:
            writer.write_table(table)
    else:
        pq.write_table(table, folder / "train-0.parquet", row_group_size=4, write_statistics=form == "parquet")
    reads: list[Callable[[Any], Any]] = [
        lambda data: data.reader([np.arange(ROWS)]).read(2),
        lambda data: data.all_labels(),
    ]
    for read in reads:
        with pytest.raises(DataError) as caught:
            read(open_set(folder))
        assert "\n" not in str(caught.value)
        assert told in str(caught.value)
        assert "train-0" in str(caught.value) or "a row has" in str(caught.value) or "float64" in told
