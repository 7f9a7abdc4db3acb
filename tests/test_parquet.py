"""Blocks hold the rows that pyarrow reads, cost the bytes they need, and a file of no use is named in one line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from shards import card, class_names, to_table

from errors import DataError
from stream import chunks, footers
from stream.cache import Bytes
from stream.chunks import LARGEST_GAP
from stream.dataset import HuggingFaceImageNetDataset
from stream.footers import TAIL_BYTES
from stream.formats import UnreadableImage
from stream.parquet import Block, ParquetShards
from stream.ranges import Check, LocalFiles, trust
from stream.row_groups import from_bytes
from stream.shared import in_memory

CLASSES = 1000
FEATURES = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": class_names(CLASSES)}}


class RecordedFiles(LocalFiles):
    """Local files, and what was asked of them."""

    def __init__(self, names: list[str]) -> None:
        super().__init__(names)
        self.ranges: list[tuple[int, int, int]] = []
        self.tails: list[tuple[int, int]] = []

    def read(self, number: int, first: int, end: int, check: Check = trust) -> bytes:
        if end == self.size(number):
            self.tails.append((number, end - first))
        else:
            self.ranges.append((number, first, end))
        return super().read(number, first, end, check)


def keep_nothing(name: str, make: Callable[[], Bytes]) -> Bytes:
    return make()


def open_shards(*paths: Path) -> tuple[ParquetShards, RecordedFiles]:
    files = RecordedFiles([str(path) for path in paths])
    return ParquetShards("a set", files, keep_nothing, (None, None), FEATURES), files


def make_table(rows: int, *, between: int = 0, label_type: Any = None, label_first: bool = False) -> pa.Table:
    """Images of 900 bytes that do not compress; `between` them and the labels so many bytes a row of another column."""
    rng = np.random.default_rng(0)
    table = to_table([rng.bytes(900) for _ in range(rows)], np.arange(rows) % CLASSES, "a", CLASSES)
    metadata = table.schema.metadata
    if label_type is not None:
        table = table.set_column(1, "label", table["label"].cast(label_type))
    if between:
        table = table.add_column(1, "embedding", pa.array([rng.bytes(between) for _ in range(rows)], pa.binary()))
    if label_first:
        table = table.select(table.column_names[::-1])
    return table.replace_schema_metadata(metadata)


def write(path: Path, rows: int, group: int, *, options: dict[str, Any] | None = None, **table: Any) -> pq.FileMetaData:
    pq.write_table(make_table(rows, **table), path, row_group_size=group, **(options or {}))
    return pq.read_metadata(path)


def span(footer: pq.FileMetaData, group: int, column: str) -> tuple[int, int]:
    """The first byte of a column in a row group, and the first after it."""
    parts = [footer.row_group(group).column(number) for number in range(footer.row_group(group).num_columns)]
    part = next(part for part in parts if part.path_in_schema == column)
    first = part.dictionary_page_offset if part.has_dictionary_page else part.data_page_offset
    return first, first + part.total_compressed_size


def group_bytes(footer: pq.FileMetaData, group: int) -> int:
    spans = [span(footer, group, column) for column in ("image.bytes", "label")]
    return sum(end - first for first, end in spans)


def tuples(blocks: list[Block]) -> list[tuple[int, tuple[int, ...], int]]:
    return [(block.file, block.groups, block.rows) for block in blocks]


def assert_same_rows(ours: pa.Table, path: Path, groups: tuple[int, ...]) -> None:
    whole = pq.ParquetFile(path).read_row_groups(list(groups))
    assert ours["image"].to_pylist() == [image and image["bytes"] for image in whole["image"].to_pylist()]
    assert ours["label"].to_pylist() == whole["label"].to_pylist()


# ---- blocks ----------------------------------------------------------------------------------------------------------


def test_blocks_fill_up_to_their_size_and_never_cross_a_file(tmp_path: Path) -> None:
    paths = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    footers = [write(path, rows, 10, between=5000) for path, rows in zip(paths, (70, 20), strict=True)]
    sizes = [[group_bytes(footer, group) for group in range(footer.num_row_groups)] for footer in footers]
    largest = max(map(max, sizes))
    blocks = open_shards(*paths)[0].blocks(3 * largest)
    assert tuples(blocks) == [(0, (0, 1, 2), 30), (0, (3, 4, 5), 30), (0, (6,), 10), (1, (0, 1), 20)]
    assert [block.size for block in blocks] == [
        sum(sizes[block.file][group] for group in block.groups) for block in blocks
    ]
    assert [block.name for block in blocks] == [
        f"{paths[0]}.0-2",
        f"{paths[0]}.3-5",
        f"{paths[0]}.6-6",
        f"{paths[1]}.0-1",
    ]


def test_a_block_may_be_as_large_as_its_limit_and_no_byte_larger(tmp_path: Path) -> None:
    footer = write(tmp_path / "a.parquet", 20, 10)
    both = group_bytes(footer, 0) + group_bytes(footer, 1)
    shards, _ = open_shards(tmp_path / "a.parquet")
    assert tuples(shards.blocks(both)) == [(0, (0, 1), 20)]
    assert tuples(shards.blocks(both - 1)) == [(0, (0,), 10), (0, (1,), 10)]


@pytest.mark.parametrize("limit", [1, 100])
def test_a_row_group_larger_than_a_block_is_a_block_of_its_own(tmp_path: Path, limit: int) -> None:
    write(tmp_path / "a.parquet", 12, 4)
    assert tuples(open_shards(tmp_path / "a.parquet")[0].blocks(limit)) == [(0, (group,), 4) for group in range(3)]


def test_a_file_without_rows_has_no_blocks(tmp_path: Path) -> None:
    paths = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    for path, rows in zip(paths, (0, 4), strict=True):
        write(path, rows, 4)
    assert tuples(open_shards(*paths)[0].blocks(1)) == [(1, (0,), 4)]
    assert open_shards(paths[0])[0].blocks(1) == []


@pytest.mark.parametrize("limit", [1, 10**6])
def test_a_last_row_group_of_one_row_is_read_like_any_other(tmp_path: Path, limit: int) -> None:
    path = tmp_path / "a.parquet"
    write(path, 21, 10)
    shards, _ = open_shards(path)
    blocks = shards.blocks(limit)
    assert sum(block.rows for block in blocks) == 21
    assert blocks[-1].groups[-1] == 2
    for block in blocks:
        assert_same_rows(shards.read(block), path, block.groups)


@pytest.mark.parametrize("limit", [1, 10**6])
def test_a_row_group_without_rows_is_no_obstacle(tmp_path: Path, limit: int) -> None:
    path, table = tmp_path / "a.parquet", make_table(5)
    with pq.ParquetWriter(path, table.schema) as writer:
        for part in (table, table.slice(0, 0), table):
            writer.write_table(part)
    shards, _ = open_shards(path)
    blocks = shards.blocks(limit)
    assert sum(block.rows for block in blocks) == 10
    for block in blocks:
        assert_same_rows(shards.read(block), path, block.groups)
        assert shards.label_ranges([block]).T.tolist() == [[5, 0, 4]] * (block.rows // 5)


# ---- what is read ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label_first", [False, True])
def test_a_block_of_a_plain_file_is_one_range_from_its_first_to_its_last_byte(
    tmp_path: Path, label_first: bool
) -> None:
    path = tmp_path / "a.parquet"
    footer = write(path, 60, 10, label_first=label_first)
    shards, files = open_shards(path)
    blocks = shards.blocks(2 * group_bytes(footer, 0) + 100)
    assert [block.groups for block in blocks] == [(0, 1), (2, 3), (4, 5)]
    for block in blocks:
        shards.read(block)
    spans = [
        [span(footer, group, column) for group in block.groups for column in ("image.bytes", "label")]
        for block in blocks
    ]
    assert files.ranges == [(0, min(s[0] for s in part), max(s[1] for s in part)) for part in spans]


def test_a_fat_column_is_read_around_in_every_row_group(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    footer = write(path, 3, 1, between=LARGEST_GAP + 100)
    shards, files = open_shards(path)
    (block,) = shards.blocks(10**9)
    table = shards.read(block)
    assert_same_rows(table, path, block.groups)
    images, labels = ([span(footer, group, column) for group in range(3)] for column in ("image.bytes", "label"))
    expected = [images[0], (labels[0][0], images[1][1]), (labels[1][0], images[2][1]), labels[2]]
    assert files.ranges == [(0, *part) for part in expected]


@pytest.mark.parametrize(("short", "ranges"), [(0, 1), (1, 2)])
def test_a_gap_is_read_through_up_to_exactly_its_largest_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, short: int, ranges: int
) -> None:
    path = tmp_path / "a.parquet"
    footer = write(path, 5, 5, between=500)
    gap = span(footer, 0, "label")[0] - span(footer, 0, "image.bytes")[1]
    monkeypatch.setattr(chunks, "LARGEST_GAP", gap - short)
    shards, files = open_shards(path)
    (block,) = shards.blocks(10**9)
    assert_same_rows(shards.read(block), path, block.groups)
    assert len(files.ranges) == ranges


def test_a_small_column_between_is_read_in_vain_and_not_given(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    footer = write(path, 20, 10, between=5000)
    shards, files = open_shards(path)
    (block,) = shards.blocks(10**9)
    assert shards.read(block).column_names == ["image", "label"]
    assert files.ranges == [(0, span(footer, 0, "image.bytes")[0], span(footer, 1, "label")[1])]


@pytest.mark.parametrize("compression", ["none", "snappy", "zstd", "gzip"])
@pytest.mark.parametrize("dictionary", [True, False, ["label"]], ids=["dictionary", "plain", "label dictionary"])
@pytest.mark.parametrize("label_type", ["int64", "int32"])
def test_every_encoding_gives_the_rows_that_pyarrow_reads(
    tmp_path: Path, compression: str, dictionary: Any, label_type: str
) -> None:
    path = tmp_path / "a.parquet"
    options = {"compression": compression, "use_dictionary": dictionary}
    footer = write(path, 50, 10, options=options, label_type=label_type)
    assert footer.row_group(0).column(2).has_dictionary_page is (dictionary is not False)
    shards, _ = open_shards(path)
    blocks = shards.blocks(sum(group_bytes(footer, group) for group in range(3)))
    assert tuples(blocks) == [(0, (0, 1, 2), 30), (0, (3, 4), 20)]
    for block in blocks:
        assert_same_rows(shards.read(block), path, block.groups)
    assert shards.label_ranges(blocks).T.tolist() == [[10, 10 * group, 10 * group + 9] for group in range(5)]


@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_rows_spread_over_many_pages_are_read_whole(tmp_path: Path, version: str) -> None:
    path = tmp_path / "a.parquet"
    options = {"data_page_size": 2000, "write_batch_size": 2, "data_page_version": version, "write_page_index": True}
    write(path, 40, 20, options=options)
    shards, _ = open_shards(path)
    (block,) = shards.blocks(10**9)
    assert_same_rows(shards.read(block), path, block.groups)


def test_label_ranges_are_unknown_where_the_footer_does_not_tell(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", 20, 10, options={"write_statistics": False})
    shards, _ = open_shards(tmp_path / "a.parquet")
    assert not shards.label_ranges(shards.blocks(1)).any()


# ---- footers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("short", "reads"), [(0, 1), (1, 2)])
def test_only_a_footer_larger_than_the_first_read_costs_a_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, short: int, reads: int
) -> None:
    path = tmp_path / "a.parquet"
    size = write(path, 20, 10).serialized_size + 8
    monkeypatch.setattr(footers, "TAIL_BYTES", size - short)
    shards, files = open_shards(path)
    assert files.tails == [(0, size - short), (0, size)][:reads]
    assert tuples(shards.blocks(1)) == [(0, (0,), 10), (0, (1,), 10)]


def test_a_footer_as_large_as_many_columns_make_it_is_read_whole(tmp_path: Path) -> None:
    path, table = tmp_path / "a.parquet", make_table(10)
    metadata = {**table.schema.metadata, b"notes": b"x" * 2 * TAIL_BYTES}
    pq.write_table(table.replace_schema_metadata(metadata), path)
    shards, files = open_shards(path)
    assert files.tails == [(0, TAIL_BYTES), (0, pq.read_metadata(path).serialized_size + 8)]
    assert_same_rows(shards.read(shards.blocks(1)[0]), path, (0,))


def test_kept_footers_are_never_read_again(tmp_path: Path) -> None:
    paths = [tmp_path / f"{name}.parquet" for name in "abc"]
    for number, path in enumerate(paths):
        write(path, 10 + number, 5)
    kept: dict[str, Bytes] = {}

    def keep(name: str, make: Callable[[], Bytes]) -> memoryview:
        if name not in kept:
            kept[name] = make()
        return memoryview(kept[name])

    files = [RecordedFiles([str(path) for path in paths]) for _ in range(2)]
    first, second = (ParquetShards("a set", part, keep, (None, None), None) for part in files)
    assert sorted(files[0].tails) == [
        (number, min(TAIL_BYTES, path.stat().st_size)) for number, path in enumerate(paths)
    ]
    assert (files[1].tails, files[1].ranges) == ([], [])
    assert sorted(kept) == [f"{path}.footer" for path in paths]
    assert first.blocks(1) == second.blocks(1)
    assert first.classes == second.classes


def test_what_is_kept_of_the_row_groups_opens_the_same_set_without_their_footers(tmp_path: Path) -> None:
    paths = [tmp_path / f"{name}.parquet" for name in "abc"]
    for number, path in enumerate(paths):
        write(path, 10 + number, 5)
    first, _ = open_shards(*paths)
    files = RecordedFiles([str(path) for path in paths])
    kept = from_bytes(first.row_groups.to_bytes())
    again = ParquetShards("a set", files, keep_nothing, (None, None), FEATURES, kept)
    assert [number for number, _ in files.tails] == [0]  # which tells the classes
    assert again.blocks(1) == first.blocks(1)
    assert (again.classes, again.index_bytes) == (first.classes, first.index_bytes)
    for block in again.blocks(10**9):
        assert np.array_equal(again.label_ranges([block]), first.label_ranges([block]))
        assert again.read(block) == first.read(block)
    assert sorted(number for number, _ in files.tails) == [0, 1, 2]


def test_no_more_footers_are_held_than_there_is_room_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [tmp_path / f"{name}.parquet" for name in "abc"]
    sizes = [write(path, 10, 5).serialized_size + 8 for path in paths]
    monkeypatch.setattr(footers, "HELD_BYTES", sum(sizes) - 1)
    shards, files = open_shards(*paths)
    files.tails.clear()
    for block in [*shards.blocks(10**9), *shards.blocks(10**9)[::-1]]:
        shards.read(block)
    held = shards._chunks.footers
    assert sum(map(len, held._held.values())) == held._held_bytes <= sum(sizes[:2])
    assert 1 <= len(files.tails) <= 4


def test_names_that_all_files_repeat_are_found_where_a_file_has_others(tmp_path: Path) -> None:
    """Long metadata are cut out before a footer is parsed, but only those that the first file has too."""
    names = [f"class number {number} of many" for number in range(CLASSES)]
    for number, some in enumerate((names, names, [*names[1:], names[0]])):
        table = make_table(9)
        features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": some}}
        metadata = {"huggingface": json.dumps({"info": {"features": features}})}
        pq.write_table(table.replace_schema_metadata(metadata), tmp_path / f"{number}.parquet")
    files = LocalFiles([str(tmp_path / f"{number}.parquet") for number in range(3)])
    shards = ParquetShards("a set", files, keep_nothing, (None, None), None)
    assert shards.row_groups.files["like"].tolist() == [0, 0, 2]
    assert shards.classes == names
    labels = [shards.labels(block).tolist() for block in shards.blocks(10**9)]
    assert labels == [[*range(9)], [*range(9)], [*range(1, 10)]]


# ---- files of no use -------------------------------------------------------------------------------------------------


def without(column: str) -> Callable[[Path], None]:
    return lambda path: pq.write_table(make_table(9).drop_columns([column]), path)


def renamed_bytes(path: Path) -> None:
    table = make_table(9)
    pixels = pa.StructArray.from_arrays([table["image"].combine_chunks().field("bytes")], ["pixels"])
    pq.write_table(table.set_column(0, "image", pixels), path)


def overwrite(first: int, data: bytes) -> Callable[[Path], None]:
    """Replaces bytes of a sound file from `first` on, which is counted from its end."""

    def change(path: Path) -> None:
        sound = path.read_bytes()
        start = len(sound) + first
        path.write_bytes(sound[:start] + data + sound[start + len(data) :])

    return change


BROKEN: dict[str, Callable[[Path], Any]] = {
    "empty": lambda path: path.write_bytes(b""),
    "three bytes": lambda path: path.write_bytes(b"PAR"),
    "only the magic": lambda path: path.write_bytes(b"PAR1"),
    "cut at the end": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "no parquet": lambda path: path.write_bytes(b"<html>404</html>\n" * 100),
    "footer of nothing": overwrite(-8, b"\0\0\0\0"),
    "footer larger than the file": overwrite(-8, b"\xff\xff\xff\x7f"),
    "rubbish for a footer": overwrite(-200, b"\xff" * 150),
    "no images": without("image"),
    "no labels": without("label"),
    "images without bytes": renamed_bytes,
    "gone": lambda path: path.unlink(),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_file_of_no_use_among_good_ones_is_named_in_one_line(tmp_path: Path, kind: str) -> None:
    paths = [tmp_path / f"{name}.parquet" for name in "abc"]
    for path in paths:
        write(path, 9, 3)
    BROKEN[kind](paths[1])
    with pytest.raises(DataError) as caught:
        ParquetShards("a set", LocalFiles([str(path) for path in paths]), keep_nothing, (None, None), None)
    assert "b.parquet" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
def test_a_file_damaged_before_its_footer_is_named_when_it_is_read(tmp_path: Path, compression: str) -> None:
    path = tmp_path / "a.parquet"
    footer = write(path, 30, 10, options={"compression": compression})
    first, _ = span(footer, 1, "image.bytes")
    data = path.read_bytes()
    path.write_bytes(data[:first] + b"\xff" * 2000 + data[first + 2000 :])
    shards, _ = open_shards(path)
    sound, damaged, _ = shards.blocks(1)
    assert_same_rows(shards.read(sound), path, sound.groups)
    with pytest.raises(DataError) as caught:
        shards.read(damaged)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("missing", [1, 5000, 10**6], ids=["a byte", "half a block", "everything"])
def test_a_file_cut_short_after_its_footer_was_read_is_named(tmp_path: Path, missing: int) -> None:
    path = tmp_path / "a.parquet"
    footer = write(path, 30, 10)
    shards, _ = open_shards(path)
    length = max(0, span(footer, 2, "label")[1] - missing)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(DataError) as caught:
        shards.read(shards.blocks(1)[-1])
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


# ---- images and labels -----------------------------------------------------------------------------------------------


def make_set(folder: Path, images: list[bytes | None], labels: list[int | None], **options: Any) -> Path:
    """A local set of one file; an image of None is there without its bytes."""
    table = to_table([image or b"" for image in images], np.zeros(len(images), np.int64), "a", CLASSES)
    rows = [{"bytes": image, "path": "a.JPEG"} for image in images]
    arrays = [pa.array(rows, table.schema.field("image").type), pa.array(labels, pa.int64())]
    folder.mkdir()
    pq.write_table(pa.table(arrays, schema=table.schema), folder / "train.parquet", **options)
    return folder


def open_set(folder: Path) -> HuggingFaceImageNetDataset:
    return HuggingFaceImageNetDataset.open(str(folder), split=["train"], block_bytes=1)


def test_an_image_that_is_null_or_without_bytes_is_unreadable_and_its_neighbours_are_whole(tmp_path: Path) -> None:
    folder = make_set(tmp_path / "set", [b"one", None, b"", b"four"], [0, 1, 2, 3])
    table = pq.read_table(folder / "train.parquet")
    rows = [*table["image"].to_pylist(), None, {"bytes": b"six", "path": None}]
    images = pa.array(rows, table["image"].type)
    pq.write_table(pa.table([images, pa.array(range(6))], schema=table.schema), folder / "train.parquet")
    reader = open_set(folder).reader([np.arange(6)])
    for number, image in enumerate([b"one", None, None, b"four", None, b"six"]):
        if image is None:
            with pytest.raises(UnreadableImage, match="no image here"):
                reader.read(number)
        else:
            assert (bytes(in_memory(reader.read(number)[0])), reader.read(number)[1]) == (image, number)
    reader.close()


@pytest.mark.parametrize("label", [None, -1, CLASSES])
@pytest.mark.parametrize("statistics", [True, False])
def test_a_label_that_is_no_class_is_refused(tmp_path: Path, label: int | None, statistics: bool) -> None:
    folder = make_set(tmp_path / "set", [b"x"] * 3, [0, label, CLASSES - 1], write_statistics=statistics)
    with pytest.raises(DataError) as caught:
        open_set(folder).read_block(0)
    assert str(folder / "train.parquet") in str(caught.value)
    assert f"label {label}," in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_footer_alone_tells_a_label_that_is_no_class(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="label -1,"):
        open_set(make_set(tmp_path / "set", [b"x"] * 3, [0, -1, 1]))


def test_the_first_and_the_last_class_are_labels_like_any_other(tmp_path: Path) -> None:
    dataset = open_set(make_set(tmp_path / "set", [b"x"] * 2, [0, CLASSES - 1]))
    assert dataset.read_block(0).labels.tolist() == [0, CLASSES - 1]


def test_labels_are_int64_whatever_the_file_stores(tmp_path: Path) -> None:
    (tmp_path / "set" / "data").mkdir(parents=True)
    write(tmp_path / "set" / "data" / "train-0.parquet", 10, 10, label_type="int32")
    (tmp_path / "set" / "README.md").write_text(card({"train": 10}, {"train": 9000}, CLASSES))
    labels = open_set(tmp_path / "set").read_block(0).labels
    assert (labels.dtype, labels.tolist()) == (np.dtype(np.int64), list(range(10)))


@pytest.mark.parametrize("limit", [None, 5])
def test_a_split_without_one_image_is_refused(tmp_path: Path, limit: int | None) -> None:
    folder = make_set(tmp_path / "set", [], [])
    with pytest.raises(DataError, match="no images in split train"):
        HuggingFaceImageNetDataset.open(str(folder), split=["train"], max_samples=limit)
