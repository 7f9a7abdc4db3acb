"""Images that a parquet file names by their paths are those that it could hold, and none comes from elsewhere."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub import Hub
from program import run, train
from shards import class_names, draw, encode

from errors import DataError
from stream import hub as remote
from stream import ranges, retry
from stream.dataset import Cache, HuggingFaceImageNetDataset
from stream.images import UnreadableImage
from stream.outside import USUAL_BYTES
from stream.retry import Network
from stream.shared import in_memory

pytestmark = pytest.mark.usefixtures("small_model")

REPO_ID = "someone/paths"
ROWS, CLASSES = 16, 4
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
Image = dict[str, Any] | bytes | str | None
IMAGES = [encode(draw(row % CLASSES, CLASSES, (20, 30), np.random.default_rng(row))) for row in range(ROWS)]
LABELS = [row % CLASSES for row in range(ROWS)]
NAMES = [f"photos/{row:02d}.jpg" for row in range(ROWS)]
FLAGS = ("--model", "resnet18", "--image_size", 16, "--batch_size", 8, "--epochs", 1, "--num_workers", 0)


def make_set(
    root: Path, images: list[Image], kind: pa.DataType = STRUCT, photos: str = "photos", **options: Any
) -> Path:
    """A Hub's set whose training split has these images, the validation split all of them embedded.

    The images lie as files in the folder `photos`, too. The types of the columns are told by the card.
    """
    folder = root / "datasets" / REPO_ID
    (folder / photos).mkdir(parents=True)
    (folder / "data").mkdir(exist_ok=True)
    for name, image in zip(NAMES, IMAGES, strict=True):
        (folder / photos / Path(name).name).write_bytes(image)
    embedded: list[Image] = [{"bytes": image, "path": None} for image in IMAGES]
    for split, column, of in (("train", images, kind), ("validation", embedded, STRUCT)):
        labels = pa.array([row % CLASSES for row in range(len(column))], pa.int64())
        table = pa.table({"image": pa.array(column, of), "label": labels})
        pq.write_table(table, folder / "data" / f"{split}-0.parquet", **({"row_group_size": 8} | options))
    names = "".join(f"          '{label}': {name}\n" for label, name in enumerate(class_names(CLASSES)))
    (folder / "README.md").write_text(
        "---\ndataset_info:\n  features:\n  - name: image\n    dtype: image\n  - name: label\n    dtype:\n"
        f"      class_label:\n        names:\n{names}configs:\n- config_name: default\n  data_files:\n"
        "  - split: train\n    path: data/train-*\n  - split: validation\n    path: data/validation-*\n---\n"
    )
    return folder


def path_only(path: str | None) -> Image:
    return {"bytes": None, "path": path}


def open_set(source: object, **options: Any) -> HuggingFaceImageNetDataset:
    return HuggingFaceImageNetDataset.open(str(source), split=["train"], network=Network(5, 3), **options)


def read(source: object, **options: Any) -> tuple[list[bytes], list[int]]:
    """The encoded images, empty if there is none, and the labels of the training split."""
    dataset = open_set(source, **options)
    reader = dataset.reader([np.arange(len(dataset))])
    images = []
    for number in range(len(dataset)):
        try:
            images.append(bytes(in_memory(reader.read(number)[0])))
        except UnreadableImage:
            images.append(b"")
    reader.close()
    labels = dataset.all_labels()
    assert labels is not None
    return images, labels.tolist()


def refusal(source: object) -> str:
    """The one line with which the training split is refused."""
    with pytest.raises(DataError) as caught:
        read(source)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def gets(hub: Hub, part: str = "photos/") -> list[str]:
    """The files of this part that were asked for, as often as they were."""
    return [request.path.partition("?")[0] for request in hub.requests if part in request.path]


LAYOUTS: dict[str, tuple[list[Image], Any]] = {
    "paths": ([path_only(name) for name in NAMES], STRUCT),
    "paths alone": ([{"path": name} for name in NAMES], pa.struct([("path", pa.string())])),
    "bytes alone": ([{"bytes": image} for image in IMAGES], pa.struct([("bytes", pa.binary())])),
    "a mix": (
        [{"bytes": None if row % 3 else IMAGES[row], "path": NAMES[row]} for row in range(ROWS)],
        STRUCT,
    ),
    "a mix without other paths": (
        [path_only(NAMES[row]) if row % 2 else {"bytes": IMAGES[row], "path": None} for row in range(ROWS)],
        STRUCT,
    ),
    "text": (list(NAMES), pa.string()),
    "text by number": (list(NAMES), pa.dictionary(pa.int32(), pa.string())),
    "binary": (list(IMAGES), pa.binary()),
    "binary by number": (list(IMAGES), pa.dictionary(pa.int32(), pa.binary())),
    "URLs": ([f"hf://datasets/{REPO_ID}@{'0' * 40}/{name}" for name in NAMES], pa.string()),
    "URLs without a revision": ([f"hf://datasets/{REPO_ID}/{name}" for name in NAMES], pa.string()),
    "paths with dots": ([f"./photos//{Path(name).name}" for name in NAMES], pa.string()),
}


# ---- the same images -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["streamed", "cached", "downloaded"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_images_on_the_hub_are_those_that_the_file_could_hold(
    hub_port: int, tmp_path: Path, layout: str, how: str
) -> None:
    options: dict[str, Any] = {"cache": Cache(tmp_path / "cache")} if how == "cached" else {}
    make_set(tmp_path, *LAYOUTS[layout])
    with Hub(tmp_path, port=hub_port, redirect=layout == "a mix"):
        for _ in range(2):
            assert read(REPO_ID, streaming=how != "downloaded", **options) == (IMAGES, LABELS)
        sha = remote.pin(REPO_ID, "main", remote.FileStore(tmp_path / "refs"), remote.Network())
    if how != "streamed":  # nothing is asked for a second time
        assert read(REPO_ID, revision=sha, streaming=how != "downloaded", **options) == (IMAGES, LABELS)


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if "URL" not in layout])
def test_images_in_a_folder_are_those_that_the_file_could_hold(tmp_path: Path, layout: str) -> None:
    assert read(make_set(tmp_path, *LAYOUTS[layout])) == (IMAGES, LABELS)


@pytest.mark.parametrize("on_the_hub", [False, True])
def test_a_path_may_count_from_the_parquet_file(hub_port: int, tmp_path: Path, on_the_hub: bool) -> None:
    folder = make_set(tmp_path, *LAYOUTS["paths"], photos="data/photos")
    with Hub(tmp_path, port=hub_port) as hub:
        assert read(REPO_ID if on_the_hub else folder) == (IMAGES, LABELS)
    assert len(gets(hub)) == (ROWS + 1 if on_the_hub else 0)  # the one block tries the other place once


def test_the_top_of_the_dataset_comes_first(tmp_path: Path) -> None:
    folder = make_set(tmp_path, *LAYOUTS["paths"])
    (folder / "data" / "photos").mkdir()
    for name in NAMES:
        (folder / "data" / name).write_bytes(b"another")
    assert read(folder) == (IMAGES, LABELS)


def test_what_datasets_writes_without_embedding_is_read(tmp_path: Path) -> None:
    import datasets

    folder = make_set(tmp_path, *LAYOUTS["paths"])
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=class_names(CLASSES)))
    made = datasets.Dataset.from_dict({"image": NAMES, "label": LABELS}, features=features)
    table = made.data.table
    assert table["image"].to_pylist() == [path_only(name) for name in NAMES]
    pq.write_table(table, folder / "data" / "train-0.parquet")
    (folder / "README.md").unlink()
    assert read(folder) == (IMAGES, LABELS)


def test_a_run_with_paths_has_the_weights_of_a_run_with_bytes(hub_port: int, tmp_path: Path) -> None:
    """Two steps, with images from the Hub for one and from a disk for the other."""
    told: list[list[dict[str, Any]]] = []
    make_set(tmp_path / "paths", *LAYOUTS["paths"])
    folder = make_set(tmp_path / "binary", [{"bytes": image, "path": None} for image in IMAGES])
    with Hub(tmp_path / "paths", port=hub_port):
        for name in (REPO_ID, folder):
            run_dir = tmp_path / f"run {len(told)}"
            train("--dataset", "hf", "--dataset_name", name, *FLAGS, "--ledger", "--run_dir", run_dir)
            told.append([json.loads(line) for line in (run_dir / "ledger.jsonl").read_text().splitlines()])
    assert len(told[0]) == 2
    assert told[0] == told[1]


# ---- what it costs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_image_outside_is_one_request_at_the_pinned_commit(hub_port: int, tmp_path: Path, layout: str) -> None:
    images, kind = LAYOUTS[layout]
    make_set(tmp_path, images, kind)
    with Hub(tmp_path, port=hub_port) as hub:
        read(REPO_ID, cache=Cache(tmp_path / "cache"))
        sha = hub.repos["datasets", REPO_ID].sha
        outside = [
            name
            for name, image in zip(NAMES, images, strict=True)
            if isinstance(image, str) or (isinstance(image, dict) and image.get("bytes") is None)
        ]
        assert sorted(gets(hub)) == [f"/datasets/{REPO_ID}/resolve/{sha}/{name}" for name in outside]
        read(REPO_ID, cache=Cache(tmp_path / "cache"))
        assert len(gets(hub)) == len(outside)


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("fault", ["reset", "short", 503])
def test_a_request_for_an_image_that_fails_is_repeated(
    hub_port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: int | str, streaming: bool
) -> None:
    monkeypatch.setattr(retry, "FIRST_WAIT", 0.01)
    make_set(tmp_path, *LAYOUTS["paths"])
    seen: set[str] = set()

    def first_time(method: str, path: str) -> int | str | None:
        if "photos/" not in path or path in seen:
            return None
        seen.add(path)
        return fault

    with Hub(tmp_path, port=hub_port, fault=first_time):
        assert read(REPO_ID, streaming=streaming) == (IMAGES, LABELS)
    assert len(seen) == ROWS


def test_a_hub_that_goes_away_within_the_images_is_told_as_such(
    hub_port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "FIRST_WAIT", 0.01)
    make_set(tmp_path, *LAYOUTS["paths"])
    with Hub(tmp_path, port=hub_port, fault=lambda method, path: "reset" if "photos/" in path else None):
        assert "cannot reach" in refusal(REPO_ID)


def test_blocks_count_the_images_that_lie_outside(tmp_path: Path) -> None:
    """Also in one large row group, and where the footer has no statistics."""
    many = [path_only(f"photos/{row}.jpg") for row in range(3000)]
    kinds: list[dict[str, Any]] = [{"row_group_size": 10}, {}, {"write_statistics": False}]
    for number, options in enumerate(kinds):
        folder = make_set(tmp_path / str(number), many, **({"row_group_size": 3000} | options))
        dataset = open_set(folder, block_bytes=50 * USUAL_BYTES)
        assert sum(block.rows for block in dataset.blocks) == 3000
        assert max(block.rows for block in dataset.blocks) <= 50
        assert min(block.rows for block in dataset.blocks) > 30
        assert all(block.rows * USUAL_BYTES <= block.size <= 50 * USUAL_BYTES for block in dataset.blocks)
        assert len({block.name for block in dataset.blocks}) == len(dataset.blocks)
    assert open_set(folder, block_bytes=50 * USUAL_BYTES).estimated_labels() is None
    labels = open_set(tmp_path / "1" / "datasets" / REPO_ID, block_bytes=50 * USUAL_BYTES).estimated_labels()
    assert labels is not None
    assert len(labels) == 3000


def test_the_parts_of_a_row_group_are_its_rows(tmp_path: Path) -> None:
    folder = make_set(tmp_path, *LAYOUTS["paths"], row_group_size=ROWS)
    three = 3 * USUAL_BYTES + 1000
    assert [block.rows for block in open_set(folder, block_bytes=three).blocks] == [2, 3, 3, 2, 3, 3]
    assert read(folder, block_bytes=three) == (IMAGES, LABELS)
    assert [block.rows for block in open_set(folder, block_bytes=1).blocks] == [1] * ROWS


def test_embedded_images_have_the_blocks_they_always_had(image_set: Path, tmp_path: Path) -> None:
    """Some of them null, and however they are named."""
    rows = [{"bytes": image, "path": "a.jpg"} for image in IMAGES[:-1]]
    folder = make_set(tmp_path, [*rows, None])
    for source in (folder, image_set):
        dataset = open_set(source, block_bytes=20_000)
        for block in dataset.blocks:
            path = source / "data" / Path(block.name).name.rpartition(".")[0]
            groups = [pq.read_metadata(path).row_group(group) for group in block.groups]
            assert block.rows == sum(group.num_rows for group in groups)
            assert block.size == sum(group.column(leaf).total_compressed_size for group in groups for leaf in (0, 2))
    assert read(folder)[0] == [*IMAGES[:-1], b""]


# ---- what is refused, and what is put up with ------------------------------------------------------------------------

OUTSIDE = [
    *("/etc/hostname", "../photos/00.jpg", "photos/../../secret.jpg", "photos/..", "..", "C:/photos/00.jpg"),
    *("photos\\..\\..\\00.jpg", "file:///etc/hostname", "http://127.0.0.1:9/00.jpg", "https://example.invalid/00.jpg"),
    *("hf://datasets/someone/other/photos/00.jpg", f"hf://datasets/{REPO_ID}x/photos/00.jpg"),
    *(f"hf://{REPO_ID}/photos/00.jpg", f"hf://datasets/{REPO_ID}@main/../other/00.jpg", "s3://bucket/00.jpg"),
    *(f"hf://datasets/{REPO_ID}@main//etc/hostname", "zip://00.jpg::photos.zip", "photos/00.jpg\0"),
]


@pytest.mark.parametrize("on_the_hub", [False, True])
@pytest.mark.parametrize("path", OUTSIDE)
def test_a_path_that_leads_out_is_refused_before_anything_is_asked_for(
    hub_port: int, tmp_path: Path, path: str, on_the_hub: bool
) -> None:
    folder = make_set(tmp_path, [*map(path_only, NAMES[:3]), path_only(path)])
    with Hub(tmp_path, port=hub_port) as hub:
        told = refusal(REPO_ID if on_the_hub else folder)
        assert gets(hub) == []
    for words in ("train-0.parquet", "column image", repr(path), "by their paths from the top", "embed"):
        assert words in told


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_link_that_leads_out_of_a_folder_is_refused(tmp_path: Path, kind: str) -> None:
    folder = make_set(tmp_path, *LAYOUTS["text"])
    outside = Path(shutil.move(folder / "photos", tmp_path / "elsewhere"))
    if kind == "folder":
        (folder / "photos").symlink_to(outside)
    else:
        (folder / "photos").mkdir()
        for name in NAMES:
            (folder / name).symlink_to(outside / Path(name).name)
    told = refusal(folder)
    assert "column image" in told
    assert "'photos/00.jpg'" in told


def test_a_link_within_a_folder_and_one_to_it_are_followed(tmp_path: Path) -> None:
    folder = make_set(tmp_path / "made", *LAYOUTS["text"])
    (folder / "photos").rename(folder / "others")
    (folder / "photos").symlink_to("others")
    (tmp_path / "link").symlink_to(folder)
    assert read(tmp_path / "link") == (IMAGES, LABELS)


def test_a_refusal_ends_a_run_with_status_3(tmp_path: Path) -> None:
    folder = make_set(tmp_path, [path_only("/etc/hostname")] * ROWS)
    done = run("--dataset", "hf", "--dataset_name", folder, *FLAGS, "--run_dir", tmp_path / "run")
    errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert (done.status, len(errors)) == (3, 1), done.err
    assert "/etc/hostname" in errors[0]


def remove(path: Path) -> None:
    path.unlink()


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def make_empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("how", ["folder", "streamed", "downloaded"])
@pytest.mark.parametrize("change", [remove, make_folder, make_empty])
def test_a_missing_image_is_empty_and_its_neighbours_are_whole(
    hub_port: int, tmp_path: Path, change: Callable[[Path], None], how: str
) -> None:
    folder = make_set(tmp_path, *LAYOUTS["text"])
    for row in (0, 5):
        change(folder / NAMES[row])
    with Hub(tmp_path, port=hub_port):
        images, labels = read(folder if how == "folder" else REPO_ID, streaming=how != "downloaded")
    assert images == [b"" if row in (0, 5) else image for row, image in enumerate(IMAGES)]
    assert labels == LABELS


@pytest.mark.parametrize("how", ["folder", "streamed", "downloaded"])
def test_a_file_too_large_for_an_image_is_not_held(
    hub_port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    folder = make_set(tmp_path, *LAYOUTS["text"])
    largest = max(map(len, IMAGES))
    monkeypatch.setattr(ranges, "LARGEST_IMAGE", largest)
    (folder / NAMES[4]).write_bytes(bytes(largest + 1))
    with Hub(tmp_path, port=hub_port) as hub:
        images, _ = read(folder if how == "folder" else REPO_ID, streaming=how != "downloaded")
    assert images == [b"" if row == 4 else image for row, image in enumerate(IMAGES)]
    assert how == "downloaded" or max([0, *(r.sent for r in hub.requests if "photos/" in r.path)]) <= largest + 1


def test_a_missing_image_is_counted_like_any_that_cannot_be_read(tmp_path: Path) -> None:
    folder = make_set(tmp_path, *LAYOUTS["paths"])
    remove(folder / NAMES[3])
    flags = ("--dataset", "hf", "--dataset_name", folder, *FLAGS, "--run_dir")
    done = run(*flags, tmp_path / "strict", "--max_bad_fraction", 0)
    assert done.status == 3
    assert "1 of 16 images cannot be read, the last one data/train-0.parquet row 3; mend them" in done.err
    train(*flags, tmp_path / "lenient")


@pytest.mark.parametrize("name", [None, "", "."])
def test_an_image_without_bytes_or_a_path_is_empty(tmp_path: Path, name: str | None) -> None:
    folder = make_set(tmp_path, [*map(path_only, NAMES[:-1]), path_only(name)])
    assert read(folder) == ([*IMAGES[:-1], b""], LABELS)


@pytest.mark.parametrize("on_the_hub", [False, True])
def test_a_block_of_which_no_path_leads_anywhere_is_refused(hub_port: int, tmp_path: Path, on_the_hub: bool) -> None:
    folder = make_set(tmp_path, [path_only(f"gone/{name}") for name in NAMES])
    with Hub(tmp_path, port=hub_port):
        told = refusal(REPO_ID if on_the_hub else folder)
    for words in ("train-0.parquet", "column image", "'gone/photos/00.jpg'", "by their paths from the top"):
        assert words in told


def test_a_long_path_is_told_in_part(tmp_path: Path) -> None:
    folder = make_set(tmp_path, [path_only("/" + "x" * 10**6)] * ROWS)
    assert len(refusal(folder)) < 1000


def test_a_pipe_or_a_device_is_not_read(tmp_path: Path) -> None:
    folder = make_set(tmp_path, *LAYOUTS["paths"])
    (folder / NAMES[2]).unlink()
    os.mkfifo(folder / NAMES[2])
    assert read(folder)[0] == [b"" if row == 2 else image for row, image in enumerate(IMAGES)]
