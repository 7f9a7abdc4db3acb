"""The members of a tar shard are paired by what is there: keys with dots, any image suffix, names and numbers."""

import bz2
import gzip
import io
import json
import lzma
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hub import Hub
from program import run
from shards import draw, encode

from errors import DataError
from stream import samples
from stream.clutter import is_clutter
from stream.dataset import Cache, HuggingFaceImageNetDataset

pytestmark = pytest.mark.usefixtures("small_model")

REPO_ID = "someone/tars"
PIXELS = [draw(row, 3, (20, 30), np.random.default_rng(row)) for row in range(3)]
JPEGS = [encode(pixels) for pixels in PIXELS]
NAMES = ["cat", "ant", "dog"]
SORTED = ["ant", "cat", "dog"]
FLAGS = ("--model", "resnet18", "--image_size", 16, "--batch_size", 8, "--epochs", 1, "--num_workers", 0)
Members = list[tuple[str, bytes]]


def tar(*members: tuple[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return file.getvalue()


def write(folder: Path, *members: tuple[str, bytes], name: str = "train-0.tar") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(tar(*members))
    return folder


def pairs(image: str, label: str, values: list[Any] = NAMES) -> Members:
    """Three samples; `image` and `label` are the names of their members, with {} for their numbers."""
    found: Members = []
    for row, value in enumerate(values):
        text = json.dumps(value) if label.endswith("json") else str(value)
        found += [(image.format(row), JPEGS[row]), (label.format(row), text.encode())]
    return found


def open_set(source: object, **options: Any) -> HuggingFaceImageNetDataset:
    return HuggingFaceImageNetDataset.open(str(source), split=["train"], **options)


def check(
    dataset: HuggingFaceImageNetDataset, classes: list[str], names: list[str], images: list[bytes] = JPEGS
) -> None:
    assert dataset.classes == classes
    block = dataset.read_block(0)
    assert block.images.to_pylist() == images
    assert [classes[label] for label in block.labels] == names
    alone = dataset._shards.labels(dataset.blocks[0])
    assert (alone.dtype, alone.tolist()) == (np.dtype(np.int64), block.labels.tolist())
    for rows, low, high in dataset._shards.label_ranges(dataset.blocks[:1]).T:
        assert not rows or (low, high) == (block.labels.min(), block.labels.max())


def refusal(folder: Path, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        open_set(folder, **options).read_block(0)
    assert "\n" not in str(caught.value)
    return str(caught.value)


KEYS = {
    "plain": ("n01_{}.jpg", "n01_{}.cls", "n01_{}"),
    "a folder with dots": ("v1.0/n01_{}.jpg", "v1.0/n01_{}.cls", "v1.0/n01_{}"),
    "a version": ("n01440764_{}.v2.jpg", "n01440764_{}.v2.cls", "n01440764_{}"),
    "a number behind a dot": ("img.000{}.jpg", "img.000{}.cls", "img.000{}"),
    "several dots": ("a.b.{}.c.jpg", "a.b.{}.c.cls", "a.b.{}.c"),
    "dots and fields": ("img.{}.image.jpg", "img.{}.target.cls", "img.{}"),
    "fields": ("{}.image.jpg", "{}.cls", "{}"),
    "input and target": ("{}.input.png", "{}.target.cls", "{}"),
    "fields of no known name": ("{}.rgb.png", "{}.species.txt", "{}"),
    "capitals": ("{}.JPEG", "{}.CLS", "{}"),
}


@pytest.mark.parametrize("kind", KEYS)
def test_members_are_paired_by_what_is_there(tmp_path: Path, kind: str) -> None:
    image, label, key = KEYS[kind]
    dataset = open_set(write(tmp_path / "set", *pairs(image, label)))
    check(dataset, SORTED, NAMES)
    assert dataset._shards.names(dataset.blocks[0], np.array([2])) == [f"train-0.tar key {key.format(2)}"]
    assert dataset.notes == ["classes are the 3 distinct strings of the shards' labels"]


def test_an_image_of_several_is_chosen_by_its_suffix_and_another_field_is_no_sample(tmp_path: Path) -> None:
    """Masks and thumbnails beside an image are not mixed up with it, and captions not with labels."""
    members = pairs("{}.jpg", "{}.cls")
    extra = [(f"{row}.{name}", b"no") for row in range(3) for name in ("seg.png", "webp", "txt", "json")]
    extra = [(name, b"{}" if name.endswith("json") else data) for name, data in extra]
    check(open_set(write(tmp_path / "set", *extra, *members)), SORTED, NAMES)


LABELS: dict[str, tuple[str, list[Any], list[str], list[str]]] = {
    "numbers": ("cls", [2, 0, 1], ["0", "1", "2"], ["2", "0", "1"]),
    "numbers with a line's end": ("cls", ["2\n", "0\n", "1\n"], ["0", "1", "2"], ["2", "0", "1"]),
    "numbers from 1": ("cls", [3, 1, 2], ["1", "2", "3"], ["3", "1", "2"]),
    "numbers far apart": ("txt", [7, 1000, 12], ["7", "12", "1000"], ["7", "1000", "12"]),
    "text with zeros": ("cls", ["007", "7", "00"], ["00", "007", "7"], ["007", "7", "00"]),
    "text of numbers that are not whole": ("txt", ["1.0", "1e5", "-0"], ["-0", "1.0", "1e5"], ["1.0", "1e5", "-0"]),
    "text too long for a number": ("cls", ["9" * 19, "1", "1"], ["1", "9" * 19], ["9" * 19, "1", "1"]),
    "whole numbers as json writes them": (
        "json",
        [{"label": 1.0}, {"label": 0.0}, {"label": 0}],
        ["0", "1"],
        ["1", "0", "0"],
    ),
    "names": ("txt", NAMES, SORTED, NAMES),
    "names and numbers": ("cls", ["ant", 3, "cat"], ["3", "ant", "cat"], ["ant", "3", "cat"]),
    "json": ("json", [{"label": 2}, {"label": 0}, {"label": 1}], ["0", "1", "2"], ["2", "0", "1"]),
    "json cls": ("json", [{"cls": 1, "width": 9}, {"cls": 0}, {"cls": 0}], ["0", "1"], ["1", "0", "0"]),
    "json with names": ("json", [{"id": 7, "class_name": name} for name in NAMES], SORTED, NAMES),
    "json with capitals": ("json", [{"Label": name} for name in NAMES], SORTED, NAMES),
    "json with lists of one": ("json", [{"label": [name]} for name in NAMES], SORTED, NAMES),
    "json without keys": ("json", NAMES, SORTED, NAMES),
    "truth": (
        "json",
        [{"label": True}, {"label": False}, {"label": True}],
        ["False", "True"],
        ["True", "False", "True"],
    ),
}


@pytest.mark.parametrize("kind", LABELS)
def test_labels_of_any_kind_are_classes_by_name(tmp_path: Path, kind: str) -> None:
    suffix, values, classes, names = LABELS[kind]
    check(open_set(write(tmp_path / "set", *pairs("{}.jpg", f"{{}}.{suffix}", values))), classes, names)


def test_names_are_those_of_all_shards(tmp_path: Path) -> None:
    write(tmp_path / "set", *pairs("{}.jpg", "{}.cls"))
    write(tmp_path / "set", *pairs("{}.jpg", "{}.cls", ["fox", "bee", 5]), name="train-1.tar")
    dataset = open_set(tmp_path / "set")
    assert dataset.classes == ["5", "ant", "bee", "cat", "dog", "fox"]
    assert [dataset.read_block(number).labels.tolist() for number in range(2)] == [[3, 1, 4], [5, 2, 0]]
    assert "has 6 classes; give no --num_classes" in refusal(tmp_path / "set", num_classes=5)


def test_a_json_without_a_label_leaves_it_to_the_text(tmp_path: Path) -> None:
    members = [(f"{row}.json", b'{"width": 20}') for row in range(3)]
    check(open_set(write(tmp_path / "set", *members, *pairs("{}.jpg", "{}.txt"))), SORTED, NAMES)


@pytest.mark.parametrize("suffix", ["webp", "gif", "bmp", "ppm", "tif", "tiff", "avif", "jfif", "jpe", "PNG", "jp2"])
def test_images_of_other_suffixes_are_decoded(tmp_path: Path, suffix: str) -> None:
    kind = {"jfif": "jpg", "jpe": "jpg", "tif": "tiff", "PNG": "png"}.get(suffix, suffix)
    image = bytes(cv2.imencode(f".{kind}", PIXELS[0])[1])
    dataset = open_set(write(tmp_path / "set", (f"a.{suffix}", image), ("a.cls", b"0")))
    check(dataset, ["0"], ["0"], [image])


CLUTTER = ["README", "README.md", "classes.txt", "._1.jpg", "__MACOSX/2.jpg", ".DS_Store", "@eaDir/0.jpg", "Thumbs.db"]


@pytest.mark.parametrize(
    "name", [*CLUTTER[3:], ".x/a.jpg", "a/..b.jpg", "a/THUMBS.DB", "a/x@SynoResource", "a/desktop.ini"]
)
def test_what_systems_leave_is_clutter(name: str) -> None:
    assert is_clutter(name)


@pytest.mark.parametrize(
    "name", ["a.jpg", "./a.jpg", "../a.jpg", "a.b/c.d.jpg", "n@eaDir/a.jpg", "my__MACOSX/a", "a/db.jpg"]
)
def test_data_is_no_clutter(name: str) -> None:
    assert not is_clutter(name)


def test_members_that_are_no_samples_are_passed_over_and_counted(tmp_path: Path) -> None:
    """An image without a label, a label without an image, and what is hidden."""
    hidden = [(name, b"0") for name in [*CLUTTER, ".hidden/0.jpg", ".hidden/0.cls", "._1.cls", "9.cls", "8.jpg"]]
    dataset = open_set(write(tmp_path / "set", *hidden[:6], *pairs("{}.jpg", "{}.cls"), *hidden[6:]))
    check(dataset, SORTED, NAMES)
    assert dataset.notes[1] == "13 members that are no samples were passed over (._1.jpg, __MACOSX/2.jpg, .DS_Store)"


def test_a_shard_of_images_in_folders_has_these_for_classes(tmp_path: Path) -> None:
    members = [(f"./train/{name}/{row}.jpg", JPEGS[row]) for row, name in enumerate(NAMES)]
    dataset = open_set(write(tmp_path / "set", ("LICENSE.txt", b"free"), *members))
    check(dataset, SORTED, NAMES)
    assert dataset._shards.names(dataset.blocks[0], np.array([0])) == ["train-0.tar key ./train/cat/0"]


def test_names_that_are_no_utf_8_are_shown_as_they_can_be(tmp_path: Path) -> None:
    folder = write(tmp_path / "set", *pairs("\udce9{}.jpg", "\udce9{}.cls"))
    dataset = open_set(folder)
    check(dataset, SORTED, NAMES)
    assert dataset._shards.names(dataset.blocks[0], np.array([1])) == ["train-0.tar key \ufffd1"]
    write(folder, ("caf\udce9/1.jpg", JPEGS[0]), ("tea/1.jpg", JPEGS[1]))
    assert open_set(folder).classes == [r"caf\udce9", "tea"]


def test_a_set_without_samples_is_told_by_a_member_and_the_suffixes(tmp_path: Path) -> None:
    images = [(f"{row}.jpg", JPEGS[0]) for row in range(4)]
    folder = write(tmp_path / "set", *images, ("a.npy", b"1"), ("b", b"2"))
    told = refusal(folder)
    assert "train-0.tar has no sample" in told
    assert "such as 0.jpg, have the suffixes .jpg (4), .npy (1), none (1)" in told
    done = run("--dataset", "hf", "--dataset_name", folder, *FLAGS, "--run_dir", tmp_path / "run")
    assert (done.status, done.err.count("\n")) == (3, 1), done.err


@pytest.mark.parametrize(
    ("name", "data", "told"),
    [
        ("a.json", b'{"label": 0.5}', "0.5 is no number or name of a class"),
        ("a.json", b'{"label": [1, 2]}', "[1, 2] is no number"),
        ("a.json", b"{", "the member a.json holds no label"),
        ("a.cls", b"\xff", "the member a.cls holds no label"),
        ("a.txt", b"a photograph of a cat " * 20, "is longer than a class's name"),
        ("a.cls", b"-1", "has the label -1"),
    ],
)
def test_what_is_no_label_is_told_with_its_member(tmp_path: Path, name: str, data: bytes, told: str) -> None:
    folder = write(tmp_path / "set", ("a.jpg", JPEGS[0]), (name, data))
    assert told in refusal(folder)
    assert "train-0.tar" in refusal(folder)


def test_captions_are_not_taken_for_classes(tmp_path: Path) -> None:
    members = [(f"{row}.{kind}", data) for row in range(99) for kind, data in (("jpg", b"x"), ("txt", b"a %d" % row))]
    assert "99 distinct texts in 99 rows, which are no classes" in refusal(write(tmp_path / "set", *members))


# ---- the files -------------------------------------------------------------------------------------------------------

COMPRESSED: dict[str, Callable[[bytes], bytes]] = {
    "train-0.tar.gz": gzip.compress,
    "train-0.tgz": gzip.compress,
    "train-0.tar": gzip.compress,
    "train-0.tar.bz2": bz2.compress,
    "train-0.tar.xz": lzma.compress,
}


@pytest.mark.parametrize("on_the_hub", [False, True])
@pytest.mark.parametrize("name", COMPRESSED)
def test_a_compressed_shard_is_read_like_any_other(hub_port: int, tmp_path: Path, name: str, on_the_hub: bool) -> None:
    folder = write(tmp_path / "datasets" / REPO_ID, *pairs("{}.jpg", "{}.cls"), name=name)
    (folder / name).write_bytes(COMPRESSED[name]((folder / name).read_bytes()))
    for clutter in ("._train-1.tgz", "@eaDir/train-2.tar"):
        (folder / clutter).parent.mkdir(exist_ok=True)
        (folder / clutter).write_bytes(b"no data")
    with Hub(tmp_path, port=hub_port):
        dataset = open_set(REPO_ID if on_the_hub else folder, cache=Cache(tmp_path / "cache"))
        check(dataset, SORTED, NAMES)


def test_what_grows_out_of_proportion_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "ROOM", 2**20)
    folder = write(tmp_path / "set", *pairs("{}.jpg", "{}.cls"), ("a.bin", bytes(2**23)), name="train-0.tgz")
    path = folder / "train-0.tgz"
    path.write_bytes(gzip.compress(path.read_bytes()))
    assert "when it is decompressed" in refusal(folder)


@pytest.mark.parametrize("kind", ["tar", "tgz"])
@pytest.mark.parametrize("where", ["the middle", "between members", "a header"])
def test_a_truncated_shard_is_named_wherever_it_ends(tmp_path: Path, where: str, kind: str) -> None:
    folder = write(tmp_path / "set", *pairs("{}.jpg", "{}.cls", [0, 1, 1]), name=f"train-0.{kind}")
    path = folder / f"train-0.{kind}"
    data = path.read_bytes()
    with tarfile.open(path) as archive:
        member = archive.getmembers()[4]
    length = {"the middle": member.offset_data + 9, "between members": member.offset, "a header": member.offset + 99}
    cut = data[: length[where]]
    path.write_bytes(gzip.compress(cut) if kind == "tgz" else cut)
    assert f"train-0.{kind}" in refusal(folder)
    path.write_bytes(gzip.compress(data)[:1000])
    assert f"train-0.{kind}" in refusal(folder)


def test_an_index_is_kept_and_blocks_of_an_earlier_version_are_not_taken_for_it(hub_port: int, tmp_path: Path) -> None:
    write(tmp_path / "datasets" / REPO_ID, *pairs("{}.jpg", "{}.cls"))
    with Hub(tmp_path, port=hub_port) as hub:
        sha = hub.repos["datasets", REPO_ID].sha
        kept = tmp_path / "cache" / REPO_ID.replace("/", "--") / sha
        kept.mkdir(parents=True)
        for name in ("train-0.tar.shard", "train-0.tar.arrow"):
            (kept / name).write_bytes(b"an earlier version's")
        for _ in range(2):
            check(open_set(REPO_ID, cache=Cache(tmp_path / "cache")), SORTED, NAMES)
            ranges = [request for request in hub.requests if request.range]
        assert len(ranges) == 2  # the index, and the block
        dataset = open_set(REPO_ID, cache=Cache(tmp_path / "cache"), revision=sha)
        dataset._shards.labels(dataset.blocks[0])
        assert dataset._shards.names(dataset.blocks[0], np.array([1])) == ["train-0.tar key 1"]
        assert [request for request in hub.requests if request.range] == ranges


def test_a_shard_that_was_not_indexed_is_read_for_its_labels_and_keys(tmp_path: Path) -> None:
    folder = write(tmp_path / "set", *pairs("{}.jpg", "{}.cls", [2, 0, 1]))
    split = {"filenames": ["train-0.tar"], "shard_lengths": [3]}
    (folder / "_info.json").write_text(json.dumps({"splits": {"train": split}}))
    dataset = open_set(folder, num_classes=3)
    assert dataset._shards.label_ranges(dataset.blocks).tolist() == [[0], [0], [0]]
    check(dataset, ["0", "1", "2"], ["2", "0", "1"])
    assert dataset._shards.names(dataset.blocks[0], np.array([1])) == ["train-0.tar key 1"]
    write(folder, *pairs("{}.jpg", "{}.cls"))
    assert "has the label 'cat', a name, and its classes are numbers" in refusal(folder, num_classes=3)
