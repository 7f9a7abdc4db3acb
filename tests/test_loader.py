"""Batches are the same for any number of threads and from any step on; what cannot be read is replaced and counted."""

import io
import logging
import struct
import threading
import zlib
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from shards import make_imagenet_like
from slow import told_sound

from config import Config, resolve
from errors import DataError
from preprocess import eval_transform, train_transform
from stream.block_reader import BlockReader
from stream.dataset import HuggingFaceImageNetDataset
from stream.decode_pool import pack
from stream.images import UnreadableImage, decode
from stream.loader import UNREADABLE, Batch, StreamingDataLoader
from stream.local import LocalDataset
from stream.order import epoch_order

TRAIN, VAL, BATCH, STREAMS = 190, 37, 16, 4
BAD = (3, 50, 51, 52, 189)


def settings() -> Config:
    return resolve({"dataset": "hf", "dataset_name": "x", "image_size": 24})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sound")
    return make_imagenet_like(root, train=TRAIN, validation=VAL, rows_per_group=10, size=(30, 60))


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same images in one file, with those numbered `BAD` cut short or emptied, in both splits."""
    root = tmp_path_factory.mktemp("damaged")
    made = make_imagenet_like(root, train=TRAIN, validation=VAL, files=1, rows_per_group=10, size=(30, 60))
    for path in made.glob("data/[tv][ra]*.parquet"):
        table = pq.read_table(path)
        rows = table["image"].to_pylist()
        for number in BAD:
            if number < len(rows):
                rows[number]["bytes"] = rows[number]["bytes"][:300] if number % 2 else b""
        images = pa.array(rows, table["image"].type)
        pq.write_table(table.set_column(0, "image", images), path, row_group_size=10)
    return made


def open_split(folder: Path, split: str, block_bytes: int = 30_000) -> HuggingFaceImageNetDataset:
    return HuggingFaceImageNetDataset.open(str(folder), split=[split], block_bytes=block_bytes)


def make(dataset: Any, train: bool = True, **changes: Any) -> StreamingDataLoader:
    order = partial(epoch_order, dataset.block_rows, seed=0, streams=STREAMS, window=64)
    options: dict[str, Any] = {
        "batch_size": BATCH,
        "image_size": 24,
        "train": train,
        "seed": 0,
        "num_workers": 2,
        "max_bad_fraction": 0.001,
    }
    transform = train_transform(settings()) if train else eval_transform(settings())
    given = order if train else lambda epoch: [np.arange(len(dataset))]
    return StreamingDataLoader(dataset, transform, given, **(options | changes))


def run(loader: StreamingDataLoader, epoch: int = 0, start: int = 0) -> list[Batch]:
    loader.set_epoch(epoch, start)
    return list(loader)


def assert_same(ours: list[Batch], theirs: list[Batch]) -> None:
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))


# ---- sound data ------------------------------------------------------------------------------------------------------


def test_batches_are_uint8_nhwc_with_int64_labels_and_ids(folder: Path) -> None:
    images, labels, ids = run(make(open_split(folder, "train")))[0]
    assert (images.shape, images.dtype) == ((BATCH, 24, 24, 3), torch.uint8)
    assert (labels.shape, labels.dtype) == ((BATCH,), torch.int64)
    assert (ids.shape, ids.dtype) == ((BATCH,), torch.int64)
    assert images.permute(0, 3, 1, 2).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("workers", [1, 3, 4])
@pytest.mark.parametrize("train", [True, False])
def test_the_number_of_threads_changes_no_bit(folder: Path, workers: int, train: bool) -> None:
    dataset = open_split(folder, "train" if train else "validation")
    assert_same(
        run(make(dataset, train, num_workers=workers), epoch=1), run(make(dataset, train, num_workers=0), epoch=1)
    )


@pytest.mark.parametrize("workers", [0, 3])
def test_an_epoch_begun_at_a_step_is_the_tail_of_the_whole_one(folder: Path, workers: int) -> None:
    loader = make(open_split(folder, "train"), num_workers=workers)
    whole = run(loader, epoch=2)
    for start in (1, 4, len(loader) - 1, len(loader)):
        assert_same(run(loader, epoch=2, start=start), whole[start:])
        assert len(loader) == len(whole)


def test_a_resume_does_not_read_the_blocks_it_has_no_use_for(folder: Path) -> None:
    dataset, read = open_split(folder, "train"), []
    original = dataset.read_block
    dataset.read_block = lambda number: read.append(number) or original(number)  # type: ignore[method-assign, func-returns-value]
    loader = make(dataset)
    (batch,) = run(loader, start=len(loader) - 1)
    assert sorted(read) == sorted(set(dataset.locate(batch.ids.numpy())[0].tolist()))
    read.clear()
    batches = run(loader)
    assert sorted(read) == sorted(set(dataset.locate(torch.cat([b.ids for b in batches]).numpy())[0].tolist()))


def test_training_drops_the_incomplete_batch_and_repeats_nothing(folder: Path) -> None:
    loader = make(open_split(folder, "train"))
    batches = run(loader)
    assert len(batches) == len(loader) == min(len(stream) for stream in loader.order(0)) // (BATCH // STREAMS) == 11
    ids = torch.cat([batch.ids for batch in batches]).tolist()
    assert len(ids) == len(set(ids)) == 11 * BATCH


def test_a_global_batch_takes_an_equal_share_of_each_stream(folder: Path) -> None:
    loader = make(open_split(folder, "train"))
    batches, streams, share = run(loader, epoch=3), loader.order(3), BATCH // STREAMS
    for step, batch in enumerate(batches):
        expected = np.concatenate([stream[step * share : (step + 1) * share] for stream in streams])
        assert batch.ids.tolist() == expected.tolist()


def test_evaluation_counts_every_image_once_in_order_with_its_last_partial_batch(folder: Path) -> None:
    batches = run(make(open_split(folder, "validation"), train=False))
    assert [len(batch.ids) for batch in batches] == [16, 16, 5]
    assert torch.cat([batch.ids for batch in batches]).tolist() == list(range(VAL))


def test_labels_and_pixels_are_those_of_the_row_that_the_id_names(folder: Path) -> None:
    dataset, transform = open_split(folder, "train"), train_transform(settings())
    files = sorted((folder / "data").glob("train-*"))
    rows = [row for path in files for row in pq.read_table(path).to_pylist()]
    assert len(dataset) == len(rows) == TRAIN
    for image, label, sample_id in zip(*run(make(dataset), epoch=5)[2], strict=True):
        row = rows[int(sample_id)]
        assert row["label"] == label
        expected = transform(decode(row["image"]["bytes"]), (0, 5, int(sample_id)))
        assert np.array_equal(image.numpy(), expected)


def test_epochs_differ_in_their_augmentation_too(folder: Path) -> None:
    loader = make(open_split(folder, "validation"), train=True, batch_size=36)
    first, second = (
        {int(number): image for image, number in zip(batch.images, batch.ids, strict=True)}
        for batch in (run(loader)[0], run(loader, epoch=1)[0])
    )
    shared = first.keys() & second.keys()
    assert len(shared) > 30
    assert sum(torch.equal(first[i], second[i]) for i in shared) < 3


# ---- what cannot be read ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 3])
def test_training_replaces_an_unreadable_image_by_the_next_of_its_stream(damaged: Path, workers: int) -> None:
    loader = make(open_split(damaged, "train"), num_workers=workers, max_bad_fraction=0.1)
    streams, share, replaced = loader.order(0), BATCH // STREAMS, 0
    for step, batch in enumerate(run(loader)):
        expected = []
        for stream in streams:
            for position in range(step * share, (step + 1) * share):
                candidates = [*stream[position:].tolist(), *stream[:position].tolist()]
                expected.append(next(i for i in candidates if i not in BAD))
                replaced += candidates[0] in BAD
        assert batch.ids.tolist() == expected
        assert batch.labels.min() >= 0
    assert replaced > 0


@pytest.mark.parametrize("workers", [0, 2])
def test_a_sample_is_told_sound_once_it_was_read_without_complaint(damaged: Path, workers: int) -> None:
    loader = make(open_split(damaged, "train"), num_workers=workers, image_size=1)
    loader.transform, loader.packed = told_sound, pack(told_sound)
    told, seen = np.zeros((2, TRAIN), int), np.zeros((2, TRAIN), int)
    for epoch in range(2):
        for images, _, ids in run(loader, epoch):
            np.add.at(seen[epoch], ids, 1)
            np.add.at(told[epoch], ids, images[:, 0, 0, 0])
    assert not told[0][seen[0] == 1].any()
    assert np.array_equal(told[1][seen[0] > 0], seen[1][seen[0] > 0])
    assert np.array_equal(loader.sound, seen.any(axis=0))
    assert not loader.sound[list(BAD)].any()


def test_evaluation_marks_an_unreadable_image_and_counts_it_for_nothing(damaged: Path) -> None:
    batches = run(make(open_split(damaged, "validation"), train=False, max_bad_fraction=0.1))
    labels = torch.cat([batch.labels for batch in batches])
    assert np.flatnonzero(labels == UNREADABLE).tolist() == [3]
    assert torch.cat([batch.ids for batch in batches]).tolist() == list(range(VAL))
    assert not batches[0].images[3].any()


def test_unreadable_images_are_named_and_counted_once(damaged: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "stream.loader"):
        run(make(open_split(damaged, "train"), train=False, max_bad_fraction=0.1))
    lines = [record.getMessage() for record in caplog.records]
    assert sorted(line.partition(" cannot be read (")[0] for line in lines) == sorted(
        f"data/train-00000-of-00001.parquet row {number}" for number in BAD
    )
    assert lines[-1].endswith(f"{len(BAD)} so far of {TRAIN}")
    empty = [line for line in lines if "the dataset has no image here" in line]
    assert len(empty) == sum(number % 2 == 0 for number in BAD)


@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize("train", [True, False])
def test_too_many_unreadable_images_stop_the_run(
    damaged: Path, workers: int, train: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stream.loader.FEW_BAD", 0)
    dataset = open_split(damaged, "train")
    for allowed in (len(BAD), len(BAD) - 1):
        loader = make(dataset, train, num_workers=workers, max_bad_fraction=allowed / TRAIN + 1e-9, batch_size=10)
        loader.order = lambda epoch: [np.arange(TRAIN)]
        if allowed == len(BAD):
            assert len(run(loader)) == TRAIN // 10
        else:
            with pytest.raises(DataError, match=rf"5 of {TRAIN} images cannot be read, the last one data/train.* row"):
                run(loader)


@pytest.mark.parametrize(("bad", "fraction", "ends"), [(10, 0.001, False), (11, 0.001, True), (1, 0.0, True)])
def test_a_handful_of_unreadable_images_ends_no_run_however_small_the_set(
    tmp_path: Path, bad: int, fraction: float, ends: bool
) -> None:
    paths = []
    for number in range(30):
        paths.append(tmp_path / f"{number:02d}.png")
        Image.new("RGB", (9, 9)).save(paths[-1])
    for path in paths[:bad]:
        path.write_bytes(b"no image") if int(path.stem) % 2 else path.unlink()
    reported: list[tuple[str, str]] = []
    dataset = LocalDataset(paths, [0, 1] * 15, ["a", "b"], tmp_path)
    loader = make(dataset, train=False, num_workers=0, max_bad_fraction=fraction)
    loader.report = lambda name, reason: reported.append((name, reason))
    if ends:
        with pytest.raises(DataError, match=rf"{bad} of 30 images cannot be read, the last one .*png; mend them"):
            run(loader)
    else:
        assert torch.cat([batch.labels for batch in run(loader)]).tolist()[:bad] == [UNREADABLE] * bad
    assert [name for name, _ in reported] == [path.name for path in paths[:bad]]
    for name, reason in reported:
        assert ("the file is not there any more" in reason) == (int(Path(name).stem) % 2 == 0)


def test_a_label_that_is_no_class_never_reaches_the_loss() -> None:
    dataset = LocalDataset(np.zeros((8, 9, 9, 3), np.uint8), [0, 1, 2, 1] * 2, ["a", "b"])
    with pytest.raises(DataError, match=r"\d has the label 2, which is no class"):
        run(make(dataset, batch_size=4, num_workers=0))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_without_one_readable_image_is_filled_from_the_others(workers: int) -> None:
    """From the same position of the next one on; which that is depends on neither threads nor where one starts."""
    bad = {*range(5, 10), 15}
    images: list[Any] = [b"" if number in bad else np.full((9, 9, 3), number, np.uint8) for number in range(20)]
    dataset = LocalDataset(images, [0, 1] * 10, ["a", "b"])
    loader = make(dataset, batch_size=8, num_workers=workers)
    loader.order = lambda epoch: [np.arange(first, first + 5) for first in (0, 5, 10, 15)]
    expected = [[0, 1, 10, 11, 10, 11, 16, 16], [2, 3, 12, 13, 12, 13, 17, 18]]
    assert [batch.ids.tolist() for batch in run(loader)] == expected
    loader.set_epoch(0, start=1)
    assert [batch.ids.tolist() for batch in loader] == expected[1:]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_set_without_one_readable_image_is_an_error_not_a_hang(workers: int) -> None:
    dataset = LocalDataset([b""] * 8, [0, 1] * 4, ["a", "b"])  # type: ignore[arg-type]
    with pytest.raises(DataError, match="not one image can be read"):
        run(make(dataset, batch_size=4, num_workers=workers, max_bad_fraction=1.0))


# ---- decode ----------------------------------------------------------------------------------------------------------

PHOTO = np.random.default_rng(0).integers(0, 256, (3, 4, 3), np.uint8).repeat(8, 0).repeat(8, 1)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def sixteen_bits() -> bytes:
    return bytes(cv2.imencode(".png", PHOTO[..., 0].astype(np.uint16) * 257)[1])


EXACT = {
    "png": (encoded(Image.fromarray(PHOTO), "PNG"), PHOTO),
    "grey png": (encoded(Image.fromarray(PHOTO[..., 0]), "PNG"), PHOTO[..., [0, 0, 0]]),
    "palette": (encoded(Image.fromarray(PHOTO).quantize(256), "PNG"), PHOTO),
    "alpha": (encoded(Image.fromarray(np.dstack([PHOTO, PHOTO[..., :1]])), "PNG"), PHOTO),
    "bilevel": (encoded(Image.fromarray(PHOTO[..., 0] > 127), "PNG"), np.uint8(255) * (PHOTO[..., [0, 0, 0]] > 127)),
    "16 bits": (sixteen_bits(), PHOTO[..., [0, 0, 0]]),
}


@pytest.mark.parametrize("kind", EXACT)
def test_every_lossless_kind_of_image_decodes_to_its_pixels(kind: str) -> None:
    data, expected = EXACT[kind]
    image = decode(data)
    assert image.dtype == np.uint8
    assert image.shape == PHOTO.shape
    assert np.array_equal(image, expected)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_every_kind_of_jpeg_decodes_to_nearly_its_pixels(mode: str) -> None:
    original = Image.fromarray(PHOTO).convert(mode)
    image = decode(encoded(original, "JPEG", quality=100, subsampling=0))
    assert image.dtype == np.uint8
    assert image.shape == PHOTO.shape
    assert np.abs(image.astype(int) - np.asarray(original.convert("RGB")).astype(int)).max() <= 8


def test_pixels_in_memory_are_taken_as_they_are() -> None:
    assert decode(PHOTO) is PHOTO


JPEG = encoded(Image.fromarray(PHOTO), "JPEG", quality=95)


@pytest.mark.parametrize(
    "data",
    [b"", b"\0" * 1000, b"not an image", JPEG[:2], JPEG[:200], JPEG[: len(JPEG) // 2], JPEG[: len(JPEG) * 3 // 4],
     EXACT["png"][0][:-30], EXACT["palette"][0][:-30]],
    ids=["empty", "zeros", "text", "magic", "header", "half", "three quarters", "png", "palette"],
)  # fmt: skip
def test_what_is_cut_short_or_no_image_is_unreadable_and_not_grey(data: bytes) -> None:
    with pytest.raises(UnreadableImage):
        decode(data)


def test_an_image_of_one_pixel_and_one_with_broken_exif_are_as_good_as_any() -> None:
    dot = encoded(Image.new("RGB", (1, 1), (9, 9, 9)), "JPEG")
    whole = encoded(Image.fromarray(PHOTO), "JPEG", quality=95)
    exif = b"\xff\xe1\x00\x10Exif\x00\x00MM\x00*\xff\xff\xff\xff"
    broken = whole[:2] + exif + whole[2:]
    assert np.array_equal(decode(broken), decode(whole))
    for transform in (train_transform(settings()), eval_transform(settings())):
        assert transform(decode(dot), (0, 0, 0)).shape == (24, 24, 3)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_header_that_promises_more_than_memory_holds_is_unreadable_at_once(kind: str) -> None:
    data = bytearray(encoded(Image.fromarray(PHOTO), kind))
    if kind == "JPEG":
        at = data.index(b"\xff\xc0") + 5
        data[at : at + 4] = struct.pack(">HH", 60_000, 60_000)
    else:
        data[16:24] = struct.pack(">II", 60_000, 60_000)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    with pytest.raises(UnreadableImage, match="DecompressionBombError"):
        decode(bytes(data))


# ---- threads and errors ----------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _before() -> Iterator[None]:
    """Threads of earlier tests may still wait for a network that is gone."""
    others.update(threading.enumerate())
    yield
    others.clear()


others: set[threading.Thread] = set()


def our_threads() -> list[str]:
    return [t.name for t in {*threading.enumerate()} - others if t.name.startswith(("decode", "fetch"))]


@pytest.mark.parametrize("taken", [0, 1, 5])
def test_leaving_the_iterator_early_leaves_no_thread_behind(folder: Path, taken: int) -> None:
    batches = iter(make(open_split(folder, "train")))
    for _ in range(taken):
        next(batches)
    assert bool(our_threads()) is bool(taken)
    assert isinstance(batches, Iterator)
    batches.close()  # type: ignore[attr-defined]
    assert our_threads() == []


class Failing(LocalDataset):
    """Images in memory, of which reading the one numbered 13 fails as a network does."""

    def read(self, sample_id: int) -> tuple[Any, int]:
        if sample_id == 13:
            raise ConnectionError("the network is gone")
        return super().read(sample_id)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_of_the_reader_reaches_the_caller_and_ends_the_threads(workers: int) -> None:
    images = np.zeros((40, 24, 24, 3), np.uint8)
    loader = make(Failing(images, [0] * 40, ["a"]), train=False, num_workers=workers)
    with pytest.raises(ConnectionError, match="the network is gone"):
        run(loader)
    assert our_threads() == []


def test_a_failed_block_is_not_taken_for_an_unreadable_image(folder: Path, tmp_path: Path) -> None:
    dataset = open_split(folder, "train")
    dataset._files.names[0] = str(tmp_path / "gone")
    with pytest.raises(DataError, match="cannot read"):
        run(make(dataset, max_bad_fraction=1.0))
    assert our_threads() == []


@pytest.mark.parametrize("start", [0, 1, 5])
@pytest.mark.parametrize(("train", "batch"), [(True, BATCH), (True, 4), (False, 4)])
def test_a_reader_is_told_the_samples_in_the_order_of_the_batches(
    folder: Path, monkeypatch: pytest.MonkeyPatch, train: bool, batch: int, start: int
) -> None:
    dataset = open_split(folder, "train" if train else "validation")
    told, make_reader = list[np.ndarray](), dataset.reader

    def reader(ids: Iterable[np.ndarray]) -> BlockReader:
        told.extend(ids)
        return make_reader(told)

    monkeypatch.setattr(dataset, "reader", reader)
    batches = run(make(dataset, train, batch_size=batch, num_workers=0), epoch=1, start=start)
    assert np.concatenate(told).tolist() == torch.cat([batch.ids for batch in batches]).tolist()
    assert len(told) > 1


def test_a_reader_forgets_each_block_when_its_last_sample_was_used(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stream.block_reader.SMALL_THREADS", 8)
    dataset = open_split(folder, "train", block_bytes=1)
    ids = np.concatenate(epoch_order(dataset.block_rows, 0, 0, 1, 20))
    reader = BlockReader(dataset, [ids])
    most = 0
    for first in range(0, TRAIN, 10):
        part = ids[first : first + 10]
        labels = [reader.read(int(i))[1] for i in part]
        assert labels == [dataset.read_block(b).labels[r] for b, r in zip(*dataset.locate(part), strict=True)]
        reader.release(part)
        most = max(most, len(reader._blocks))
    reader.close()
    assert reader._blocks == {}
    assert most < len(dataset.blocks) - 5
