"""What is told before a run is what the run will do: what it reads, how well it mixes, what it holds, what is kept."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hub import Hub
from program import pretend_rank
from shards import REPO_ID, make_imagenet_like, to_table

import preflight
from config import Config, resolve
from preflight import DECODED_OVER_ENCODED, describe_data, memory_bytes, mixing, windows_bytes
from preprocess import Data, get_data_loaders
from stream import allowance
from stream.block_reader import BlockReader, blocks_ahead, fetch_threads
from stream.dataset import HuggingFaceImageNetDataset
from stream.decode_pool import PROCESS_BYTES
from stream.loader import BATCHES_AHEAD
from stream.order import epoch_order

CPU = torch.device("cpu")
CLASSES, TRAIN, VAL, GROUP = 20, 1200, 40, 25
LINES = ["revision", "images", "classes", "blocks", "bytes", "streams", "mixing", "memory", "cache"]


@pytest.fixture(scope="module")
def sorted_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sorted")
    make_set(root, sort_by_class=True)
    return root


@pytest.fixture(scope="module")
def sorted_set(sorted_root: Path) -> Path:
    return sorted_root / "datasets" / REPO_ID


@pytest.fixture(scope="module")
def shuffled_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_set(tmp_path_factory.mktemp("shuffled"))


def make_set(root: Path, **changes: Any) -> Path:
    options: dict[str, Any] = {
        "train": TRAIN,
        "validation": VAL,
        "classes": CLASSES,
        "rows_per_group": GROUP,
        "size": (8, 12),
    }
    return make_imagenet_like(root, **options | changes)


def settings(source: Path | str, **changes: Any) -> Config:
    """Streams of one row group a block, for --block_mb cannot be as small as these sets are."""
    given = {"dataset": "hf", "dataset_name": str(source), "batch_size": 64, "num_workers": 0, "image_size": 8}
    return resolve(given | changes)


def load(config: Config, monkeypatch: pytest.MonkeyPatch, block_bytes: int = 1) -> Data:
    """The loaders of a config whose blocks are so small."""
    original = HuggingFaceImageNetDataset.open

    def with_small_blocks(source: str, **options: Any) -> HuggingFaceImageNetDataset:
        return original(source, **options | {"block_bytes": block_bytes})

    with monkeypatch.context() as patch:
        patch.setattr(HuggingFaceImageNetDataset, "open", with_small_blocks)
        return get_data_loaders(config, CPU)


def lines_of(config: Config, data: Data) -> dict[str, str]:
    """The text of each line by its first word; the words are padded to one width."""
    lines = describe_data(config, data)
    assert {line[9] for line in lines} == {" "}
    return {line[:10].strip(): line[10:] for line in lines}


def real_labels(folder: Path) -> np.ndarray:
    files = sorted((folder / "data").glob("train-*"))
    return np.concatenate([pq.read_table(path, columns=["label"])["label"].to_numpy() for path in files])


def train_of(data: Data) -> HuggingFaceImageNetDataset:
    assert isinstance(data.train.dataset, HuggingFaceImageNetDataset)
    return data.train.dataset


def measured(labels: np.ndarray, order: list[np.ndarray], share: int) -> float:
    """The classes in all batches of an epoch over those in as many batches of a really uniform shuffle."""

    def classes(streams: list[np.ndarray]) -> int:
        steps = min(map(len, streams)) // share
        batches = [np.concatenate([s[k * share : (k + 1) * share] for s in streams]) for k in range(steps)]
        return sum(len(set(labels[batch].tolist())) for batch in batches)

    shuffled = np.random.default_rng(0).permutation(len(labels))
    return classes(order) / classes(np.array_split(shuffled, len(order)))


# ---- mixing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 100, 1000])
@pytest.mark.parametrize("window", [1, 512, 10**6])
def test_labels_in_no_order_mix_fully_whatever_the_window(classes: int, window: int) -> None:
    rows = np.full(200, 100)
    labels = np.random.default_rng(0).integers(0, classes, rows.sum())
    assert mixing(labels, epoch_order(rows, 0, 0, 8, window), 32) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("classes", [10, 100, 1000])
def test_a_window_over_everything_mixes_sorted_files_fully(classes: int) -> None:
    rows = np.full(200, 100)
    labels = np.arange(rows.sum()) * classes // rows.sum()
    assert 0.98 <= mixing(labels, epoch_order(rows, 0, 0, 8, int(rows.sum())), 32) <= 1.02


@pytest.mark.parametrize("classes", [10, 100, 1000])
@pytest.mark.parametrize("streams", [1, 8])
@pytest.mark.parametrize("window", [1, 500, 2000, 8000])
def test_the_mixing_of_sorted_files_is_that_of_all_the_batches(classes: int, streams: int, window: int) -> None:
    rows = np.full(200, 100)
    labels = np.sort(np.random.default_rng(0).integers(0, classes, rows.sum()))
    order = epoch_order(rows, 0, 0, streams, window)
    share = 256 // streams
    assert mixing(labels, order, share) == pytest.approx(measured(labels, order, share), rel=0.1)


def test_classes_of_very_different_sizes_are_expected_as_rarely_as_they_are() -> None:
    rows = np.full(200, 100)
    labels = np.random.default_rng(0).geometric(0.3, rows.sum()) - 1
    assert mixing(labels, epoch_order(rows, 0, 0, 8, 512), 32) == pytest.approx(1, abs=0.03)


def test_one_stream_of_one_class_has_one_of_the_classes() -> None:
    labels = np.repeat(np.arange(4), 64)
    absent = math.comb(192, 32) / math.comb(256, 32)
    assert mixing(labels, [np.arange(256)], 32) == pytest.approx(1 / (4 * (1 - absent)))


def test_a_single_batch_can_be_looked_at() -> None:
    assert mixing(np.arange(8) % 2, [np.arange(4), np.arange(4, 8)], 4) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("window", [1, 128, 512, 2000])
@pytest.mark.parametrize("rows_per_group", [10, 45, 150])
def test_the_mixing_that_the_footers_tell_is_that_of_the_labels(
    tmp_path: Path, window: int, rows_per_group: int
) -> None:
    """Groups of part of a class, of nearly one, and of several."""
    folder = make_set(tmp_path, sort_by_class=True, rows_per_group=rows_per_group)
    dataset = HuggingFaceImageNetDataset.open(str(folder), split=["train"], block_bytes=1)
    labels = dataset.estimated_labels()
    assert labels is not None
    order = epoch_order(dataset.block_rows, 0, 0, 8, window)
    assert mixing(labels, order, 8) == pytest.approx(measured(real_labels(folder), order, 8), rel=0.1)


def test_the_estimate_gives_each_image_a_label_of_its_row_group(sorted_set: Path) -> None:
    labels = real_labels(sorted_set)
    for limit in (None, 333):
        dataset = HuggingFaceImageNetDataset.open(str(sorted_set), split=["train"], block_bytes=1, max_samples=limit)
        estimated = dataset.estimated_labels()
        assert estimated is not None
        assert len(estimated) == len(dataset) == (limit or TRAIN)
        if limit is None:
            low, high = (np.repeat(f(labels.reshape(-1, GROUP), axis=1), GROUP) for f in (np.min, np.max))
            assert ((low <= estimated) & (estimated <= high)).all()


# ---- the lines -------------------------------------------------------------------------------------------------------


def test_a_local_folder_has_every_line_in_order(sorted_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings(sorted_set)
    data = load(config, monkeypatch)
    footers = {s: [pq.read_metadata(p) for p in sorted_set.glob(f"data/{s}-*")] for s in ("train", "validation")}
    sizes = {split: [group for footer in parts for group in group_sizes(footer)] for split, parts in footers.items()}
    lines = lines_of(config, data)
    assert list(lines) == LINES
    assert lines["revision"] == "a local folder"
    assert lines["images"] == f"{sorted_set}: 1,200 for training, 40 for validation; 18 steps an epoch"
    assert lines["classes"] == "20: class 0 ... class 19"
    assert lines["blocks"] == f"48 for training, 2 for validation, of {megabytes(max(sizes['train']))} at most"
    both = [megabytes(sum(sizes[split])) for split in ("train", "validation")]
    assert lines["bytes"] == f"{both[0]} for training, {both[1]} for validation, in each epoch"
    assert lines["streams"] == "8, 8 for each of 1 ranks"
    assert lines["memory"] == (
        f"about {megabytes(memory_bytes(config, data))} a rank (and 1.3 GB while one of 89 megapixels, the largest "
        "that are read, is decoded) for windows, blocks ahead, batches"
    )
    assert lines["cache"] == "none"


def group_sizes(footer: pq.FileMetaData) -> Iterator[int]:
    """The bytes of the images and labels of each row group."""
    for group in range(footer.num_row_groups):
        columns = [footer.row_group(group).column(number) for number in range(3)]
        yield sum(c.total_compressed_size for c in columns if c.path_in_schema in ("image.bytes", "label"))


def megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


def test_a_larger_block_is_told_as_fewer(sorted_set: Path) -> None:
    config = settings(sorted_set)
    assert lines_of(config, get_data_loaders(config, CPU))["blocks"].startswith("3 for training, 1 for validation, of ")
    config = settings(sorted_set, max_samples=500)  # of which each class has its share
    lines = lines_of(config, get_data_loaders(config, CPU))
    assert lines["images"].endswith(": 500 for training, 40 for validation; 7 steps an epoch")
    assert lines["blocks"].startswith("20 for training, 1 for validation, of ")


def test_what_is_not_streamed_has_only_its_images_and_classes() -> None:
    config = resolve({"dataset": "digits", "max_samples": 100})
    assert lines_of(config, get_data_loaders(config, CPU)) == {
        "images": "digits: 100 for training, 100 for validation; 1 steps an epoch",
        "classes": "10: 0 (9), 1 (11), 2 (9), 3 (11), 4 (10), 5 (10), 6 (10), 7 (10), 8 (9), 9 (11)",
        "note": "a sample of 100 training images, of 10 of the 10 classes",
    }


def test_a_rank_is_told_its_share_of_the_streams(sorted_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings(sorted_set)
    alone = lines_of(config, load(config, monkeypatch))
    for rank in range(4):
        pretend_rank(monkeypatch, rank, 4)
        lines = lines_of(config, load(config, monkeypatch))
        assert lines["streams"] == "8, 2 for each of 4 ranks"
        assert [name for name in lines if lines[name] != alone[name]] in (["streams"], ["streams", "memory"])


def test_sorted_files_are_warned_of_with_the_window_that_mends_them(
    sorted_set: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poor = settings(sorted_set, shuffle_window=16)
    line = lines_of(poor, load(poor, monkeypatch))["mixing"]
    assert "WARNING" in line
    assert f"--shuffle_window {TRAIN} " in line
    assert "--cache_dir" in line
    mended = settings(sorted_set, shuffle_window=TRAIN)
    assert "WARNING" not in lines_of(mended, load(mended, monkeypatch))["mixing"]


def test_the_share_that_is_told_is_the_one_that_is_measured(sorted_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings(sorted_set, shuffle_window=64, seed=5)
    data = load(config, monkeypatch)
    told = int(lines_of(config, data)["mixing"].partition("%")[0].rpartition(" ")[2])
    assert told == pytest.approx(100 * measured(real_labels(sorted_set), data.train.order(0), 8), rel=0.1)


@pytest.mark.parametrize("window", [1, 64, TRAIN])
def test_shuffled_files_are_not_warned_of(shuffled_set: Path, monkeypatch: pytest.MonkeyPatch, window: int) -> None:
    config = settings(shuffled_set, shuffle_window=window)
    assert "WARNING" not in lines_of(config, load(config, monkeypatch))["mixing"]


def test_files_that_do_not_tell_their_labels_are_said_to_be_unknown(
    sorted_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in sorted_set.glob("data/*"):
        (tmp_path / "data").mkdir(exist_ok=True)
        pq.write_table(pq.read_table(path), tmp_path / "data" / path.name, write_statistics=False)
    config = settings(tmp_path)
    assert lines_of(config, load(config, monkeypatch))["mixing"].startswith("unknown")


# ---- memory ----------------------------------------------------------------------------------------------------------


def most_held(data: Data, share: int, begun: int) -> int:
    """Batch by batch, the bytes of blocks that are asked for and not dropped; so many batches are `begun` ahead."""
    train, order = train_of(data), data.train.order(0)
    steps = -(-max(map(len, order)) // share)
    used = [
        set(np.concatenate([train.locate(s[step * share : (step + 1) * share])[0] for s in order]).tolist())
        for step in range(steps)
    ]
    queue = list(dict.fromkeys(block for blocks in used for block in sorted(blocks)))
    most = 0
    for step in range(steps + begun):
        reached = set[int]().union(*used[: step + 1])
        asked = queue[: max(queue.index(block) for block in reached) + 1 + blocks_ahead(largest(data))]
        dropped = reached - set[int]().union(*used[max(0, step - begun) :])
        most = max(most, sum(train.blocks[block].size for block in {*asked} - dropped))
    return most


def largest(data: Data) -> int:
    return max(block.size for block in train_of(data).blocks)


def apart_from_windows(config: Config, data: Data) -> int:
    return memory_bytes(config, data) - windows_bytes(config, data)


@pytest.mark.parametrize("window", [1, 100, 400, 1200])
@pytest.mark.parametrize(("streams", "batch"), [(8, 40), (4, 48), (1, 100)])
@pytest.mark.parametrize("ahead", [0, 256 * 2**20])
def test_the_windows_are_the_blocks_held_at_the_fullest_step(
    shuffled_set: Path, monkeypatch: pytest.MonkeyPatch, window: int, streams: int, batch: int, ahead: int
) -> None:
    config = settings(shuffled_set, shuffle_window=window, streams=streams, batch_size=batch)
    data = load(config, monkeypatch)
    monkeypatch.setattr("stream.block_reader.AHEAD_BYTES", ahead)
    sizes = [block.size for block in train_of(data).blocks]
    assert max(sizes) <= windows_bytes(config, data) <= sum(sizes)
    assert windows_bytes(config, data) == most_held(data, batch // streams, 0)
    with_workers = replace(config, num_workers=2)
    assert windows_bytes(with_workers, data) == most_held(data, batch // streams, BATCHES_AHEAD)


@pytest.mark.parametrize("world", [2, 8])
def test_a_rank_holds_only_the_blocks_of_its_streams(
    shuffled_set: Path, monkeypatch: pytest.MonkeyPatch, world: int
) -> None:
    config = settings(shuffled_set, shuffle_window=400, batch_size=40)
    for rank in range(world):
        pretend_rank(monkeypatch, rank, world)
        data = load(config, monkeypatch)
        assert windows_bytes(config, data) == most_held(data, 5, 0)


def test_batches_take_memory(shuffled_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few, many = settings(shuffled_set, batch_size=8), settings(shuffled_set, batch_size=64)
    told = [apart_from_windows(config, load(config, monkeypatch)) for config in (few, many)]
    assert told[1] - told[0] == (BATCHES_AHEAD + 2) * (64 - 8) * 8 * 8 * 3


def test_decoding_processes_are_told_and_take_memory(shuffled_set: Path) -> None:
    alone, three = settings(shuffled_set, num_workers=1), settings(shuffled_set, num_workers=3)
    data = get_data_loaders(alone, CPU)
    one, more = (lines_of(config, data)["memory"] for config in (alone, three))
    assert one.endswith("windows, blocks ahead, batches and 1 decoding processes")
    assert more.endswith("windows, blocks ahead, batches and 3 decoding processes")
    image = max(block.size / block.rows for block in train_of(data).blocks)
    decoding = 2 * (PROCESS_BYTES + (DECODED_OVER_ENCODED + 1) * image)
    assert memory_bytes(three, data) - memory_bytes(alone, data) == pytest.approx(decoding, abs=2)


def lengthen(folder: Path, size: int, group: int) -> None:
    """Append `size` random bytes to every image, which no compression takes away again."""
    rng = np.random.default_rng(0)
    for path in folder.glob("data/train-*"):
        table = pq.read_table(path)
        images = [row["bytes"] + rng.bytes(size) for row in table["image"].to_pylist()]
        pq.write_table(to_table(images, table["label"].to_numpy(), path.stem, CLASSES), path, row_group_size=group)


def test_large_images_make_decoding_processes_larger(tmp_path: Path) -> None:
    folder, image = make_set(tmp_path, train=32, validation=2, files=1), 500_000
    lengthen(folder, image, group=1)
    large, none = (settings(folder, num_workers=number, batch_size=16) for number in (2, 0))
    data = get_data_loaders(large, CPU)
    more = memory_bytes(large, data) - memory_bytes(none, data) - 2 * PROCESS_BYTES
    assert more == pytest.approx((DECODED_OVER_ENCODED + 2) * image, rel=0.02)


def test_fewer_blocks_are_in_transfer_when_they_are_large() -> None:
    megabytes_in_transfer = {size: size * fetch_threads(size * 2**20) for size in (1, 2, 16, 32, 64, 100, 1000)}
    assert megabytes_in_transfer == {1: 32, 2: 16, 16: 128, 32: 128, 64: 128, 100: 200, 1000: 2000}


# ---- requests --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("small", [False, True])
def test_the_requests_that_are_promised_are_made(
    sorted_root: Path, hub_port: int, monkeypatch: pytest.MonkeyPatch, small: bool
) -> None:
    """Of many small files, each is asked for once, with the index, and never again."""
    monkeypatch.setattr("stream.footers.MANY_FILES", 3 if small else 100)
    config = settings(REPO_ID, batch_size=16)
    with Hub(sorted_root, port=hub_port) as hub:
        data = load(config, monkeypatch)
        index = [request for request in hub.requests if request.range]
        line = lines_of(config, data)["requests"]
        blocks = [0, 0]
        for epoch in range(2):
            data.train.set_epoch(epoch)
            before = len(hub.requests)
            assert len(list(data.train)) == TRAIN // 16
            assert len(list(data.val)) == 3
            blocks[epoch] = len(hub.requests) - before
    expected = 2 if small else 48 + 2
    assert blocks == [expected] * 2
    assert line == f"{len(index)} for the index, {expected} for blocks in each epoch"


@pytest.mark.parametrize(("images", "warns"), [(10**9, True), (1, False)])
def test_a_limit_that_makes_requests_slow_is_told_with_the_time_and_the_way_out(
    sorted_root: Path, hub_port: int, monkeypatch: pytest.MonkeyPatch, images: int, warns: bool
) -> None:
    config = settings(REPO_ID)
    monkeypatch.setattr(preflight, "FEW_IMAGES", images)
    with Hub(sorted_root, port=hub_port):
        data = load(config, monkeypatch)
        monkeypatch.setattr(allowance.requests, "limit", 10)
        monkeypatch.setattr(allowance.requests, "window", 60)
        line = lines_of(config, data)["requests"]
    assert "50 for blocks in each epoch; the Hub's limit of 10 in 60 s makes that 5 minutes at least, 4.1 " in line
    assert ("WARNING" in line) == ("--no_streaming" in line) == warns


# ---- the cache -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "window"), [(0.1, TRAIN), (0.5, TRAIN), (0.8, TRAIN), (0.1, 400)])
def test_what_the_limit_of_the_cache_leaves_over_is_told_as_memory(
    hub_port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float, window: int
) -> None:
    """For each of two epochs, against what their readers hold."""
    lengthen(make_set(tmp_path), 10_000, GROUP)
    options: dict[str, Any] = {"cache_dir": str(tmp_path / "cache"), "shuffle_window": window, "epochs": 2}
    monkeypatch.setattr("stream.block_reader.AHEAD_BYTES", 0)
    with Hub(tmp_path, port=hub_port):
        whole = load(settings(REPO_ID, **options), monkeypatch)
        store = train_of(whole).cache
        assert store is not None
        total = sum(block.size for block in train_of(whole).blocks)
        limit = sum(store.sizes().values()) + share * total
        config = settings(REPO_ID, **options, cache_limit_gb=limit / 1e9)
        data = load(config, monkeypatch)
        told, line = windows_bytes(config, data), lines_of(config, data)["memory"]
        assert f" for {megabytes(told)} of windows beyond --cache_limit_gb, blocks ahead" in line
        held = []
        for epoch in range(2):
            data.train.set_epoch(epoch)
            held.append(in_memory(data, monkeypatch))
    assert told == pytest.approx(max(held), rel=0.25, abs=2 * largest(data))


def in_memory(data: Data, monkeypatch: pytest.MonkeyPatch) -> int:
    """The most bytes of blocks that the reader of an epoch keeps in memory, looked at with each batch."""
    readers, make, most = list[BlockReader](), HuggingFaceImageNetDataset.reader, 0

    def noted(dataset: HuggingFaceImageNetDataset, ids: Iterable[np.ndarray]) -> BlockReader:
        readers.append(make(dataset, ids))
        return readers[-1]

    with monkeypatch.context() as patch:
        patch.setattr(HuggingFaceImageNetDataset, "reader", noted)
        for _ in data.train:
            found = [(block, future) for block, future in readers[0]._blocks.items() if future.done()]
            sizes = [train_of(data).blocks[block].size for block, future in found if future.result() is not None]
            most = max(most, sum(sizes))
    return most


def test_the_cache_line_counts_the_blocks_that_are_kept(
    sorted_root: Path, hub_port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(REPO_ID, cache_dir=str(tmp_path / "cache"))
    with Hub(sorted_root, port=hub_port):
        data = load(config, monkeypatch)
        train, val = train_of(data), data.val.dataset
        assert isinstance(val, HuggingFaceImageNetDataset)
        lines = lines_of(config, data)
        assert list(lines) == [*LINES, "requests"]
        assert lines["revision"] == train.revision
        folder = tmp_path / "cache" / REPO_ID.replace("/", "--")
        assert lines["cache"] == f"{folder}: 0 of 48 training blocks, no limit"
        for kept, number in enumerate((0, 7, 47), 1):
            train.read_block(number)
            val.read_block(0)
            assert lines_of(config, data)["cache"] == f"{folder}: {kept} of 48 training blocks, no limit"
        limited = settings(REPO_ID, cache_dir=str(tmp_path / "cache"), cache_limit_gb=2.5)
        told = lines_of(limited, load(limited, monkeypatch))["cache"]
        assert told == f"{folder}: 3 of 48 training blocks, at most 2.5 GB"
        reduced = settings(REPO_ID, cache_dir=str(tmp_path / "cache"), cache_short_side=9)
        assert "0 of 48" in lines_of(reduced, load(reduced, monkeypatch))["cache"]


def test_a_cache_without_a_limit_or_with_room_holds_no_window_in_memory(
    sorted_root: Path, hub_port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Hub(sorted_root, port=hub_port):
        for limit in ({}, {"cache_limit_gb": 1.0}):
            config = settings(REPO_ID, cache_dir=str(tmp_path / "cache"), **limit)
            data = load(config, monkeypatch)
            assert windows_bytes(config, data) == 0
            assert lines_of(config, data)["memory"].endswith("blocks ahead, batches; windows are mapped from the cache")


def test_a_stream_without_a_cache_is_told_of_the_flag(
    sorted_root: Path, hub_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(REPO_ID)
    with Hub(sorted_root, port=hub_port):
        line = lines_of(config, load(config, monkeypatch))["cache"]
    assert line.startswith("none, ")
    assert "--cache_dir" in line
