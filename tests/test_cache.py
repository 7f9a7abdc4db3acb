"""What was streamed once is kept: later epochs, runs and ranks read it, and it changes no batch."""

import io
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import cv2
import killable
import numpy as np
import pyarrow as pa
import pytest
import torch
from hub import Hub
from huggingface_hub import constants
from PIL import Image
from program import TIMEOUT, assert_same_run, ledger, metrics, run, start, steps_kept, train, wait
from shards import REPO_ID, photographs

from config import resolve
from preprocess import get_data_loaders
from stream.dataset import Cache, HuggingFaceImageNetDataset
from stream.images import decode
from stream.kept import reduce
from stream.loader import StreamingDataLoader
from stream.pictures import Picture
from stream.planes import is_planes
from stream.shared import InFile, in_memory

pytestmark = pytest.mark.usefixtures("small_model")

DATA: tuple[object, ...] = ("--dataset", "imagenet1k")
FLAGS: tuple[object, ...] = ("--max_samples", 256, "--model", "resnet18", "--image_size", 33, "--batch_size", 32)
FLAGS = (*FLAGS, "--epochs", 2, "--block_mb", 1, "--ledger", "--snapshot_steps", 3, "--keep_snapshots", 9)
TRAIN_BLOCKS, VAL_BLOCKS, STEPS = 13, 1, 16


def blocks_asked_for(hub: Hub, since: int = 0) -> Counter[tuple[str, str]]:
    """How often each block was fetched, which is a whole file here.

    Footers, which reach its end, and labels, which begin behind its first image, are left out.
    """
    asked = [(r.path, r.range) for r in hub.requests if r.range and not r.at_end and r.path.endswith(".parquet")]
    first = {path: min(_first_byte(span) for other, span in asked if other == path) for path, _ in asked}
    recent = Counter((r.path, r.range) for r in hub.requests[since:] if r.range and not r.at_end)
    return Counter({key: n for key, n in recent.items() if first.get(key[0]) == _first_byte(key[1])})


def _first_byte(span: str) -> int:
    return int(span.removeprefix("bytes=").partition("-")[0])


def entries(cache: Path) -> list[Path]:
    return sorted(cache.rglob("*.arrow"))


def size_of(cache: Path) -> int:
    return sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def sound(hub_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run from the same files on a disk."""
    folder = tmp_path_factory.mktemp("sound") / "run"
    train("--dataset", "hf", "--dataset_name", hub_root / "datasets" / REPO_ID, *FLAGS, "--run_dir", folder)
    yield folder
    for path in folder.rglob("*.safetensors"):
        path.unlink()


@pytest.mark.parametrize("damaged", [False, True])
def test_a_set_is_opened_again_from_what_was_kept_of_its_footers(
    hub_root: Path, hub_port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damaged: bool
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{hub_port}")
    with Hub(hub_root, port=hub_port) as hub:
        first = HuggingFaceImageNetDataset.open(REPO_ID, split=["train"], cache=Cache(tmp_path))
        for path in tmp_path.rglob("*.footer"):
            path.unlink()
        (index,) = tmp_path.rglob("*.index")
        if damaged:
            index.write_bytes(index.read_bytes()[:-1] + b"?")
        since = len(hub.requests)
        again = HuggingFaceImageNetDataset.open(REPO_ID, split=["train"], cache=Cache(tmp_path))
        asked = {request.path for request in hub.requests[since:] if request.at_end}
    assert len(asked) == (len(first._files.names) if damaged else 1)  # one file tells the classes
    assert (again.blocks, again.classes, again.fingerprint()) == (first.blocks, first.classes, first.fingerprint())


@pytest.mark.slow
def test_each_block_is_fetched_once_in_two_epochs_and_never_by_a_later_run(
    hub_root: Path, hub_port: int, sound: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    with Hub(hub_root, port=hub_port) as hub:
        done = train(*DATA, *FLAGS, "--cache_dir", cache, "--run_dir", tmp_path / "cold")
        assert f"0 of {TRAIN_BLOCKS} training blocks" in done.out
        assert len(blocks_asked_for(hub)) == TRAIN_BLOCKS + VAL_BLOCKS == len(entries(cache))
        assert set(blocks_asked_for(hub).values()) == {1}
        since = len(hub.requests)
        done = train(*DATA, *FLAGS, "--cache_dir", cache, "--run_dir", tmp_path / "warm")
        assert f"{TRAIN_BLOCKS} of {TRAIN_BLOCKS} training blocks" in done.out
        assert not blocks_asked_for(hub, since)
        for path in entries(cache)[::2]:
            path.unlink()
        train(*DATA, *FLAGS, "--cache_dir", cache, "--run_dir", tmp_path / "half")
        assert blocks_asked_for(hub, since).total() == len(entries(cache)[::2])
    assert ledger(tmp_path / "cold") == ledger(tmp_path / "warm") == ledger(tmp_path / "half") == ledger(sound)
    assert not list(cache.rglob("*.tmp"))


@pytest.mark.slow
def test_a_damaged_entry_is_fetched_again_and_changes_nothing(
    hub_root: Path, hub_port: int, sound: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    with Hub(hub_root, port=hub_port) as hub:
        train(*DATA, *FLAGS, "--cache_dir", cache, "--run_dir", tmp_path / "cold")
        since = len(hub.requests)
        flipped, cut_short, emptied = entries(cache)[:3]
        data = bytearray(flipped.read_bytes())
        data[len(data) // 2] ^= 1
        flipped.write_bytes(data)
        cut_short.write_bytes(cut_short.read_bytes()[:-1])
        emptied.write_bytes(b"")
        train(*DATA, *FLAGS, "--cache_dir", cache, "--run_dir", tmp_path / "again")
        assert blocks_asked_for(hub, since).total() == 3
    assert ledger(tmp_path / "again") == ledger(sound)


@pytest.mark.slow
def test_a_limit_is_kept_and_what_it_holds_is_of_use(
    hub_root: Path, hub_port: int, sound: Path, tmp_path: Path
) -> None:
    cache, whole = tmp_path / "cache", tmp_path / "whole"
    with Hub(hub_root, port=hub_port) as hub:
        train(*DATA, *FLAGS, "--cache_dir", whole, "--run_dir", tmp_path / "unlimited")
        limit = size_of(whole) // 2
        since = len(hub.requests)
        train(*DATA, *FLAGS, "--cache_dir", cache, "--cache_limit_gb", limit / 1e9, "--run_dir", tmp_path / "run")
        fetched = blocks_asked_for(hub, since).total()
    assert limit / 2 < size_of(cache) <= limit
    assert fetched < 2 * TRAIN_BLOCKS + VAL_BLOCKS
    assert ledger(tmp_path / "run") == ledger(sound)


def test_reduced_images_are_smaller_decode_and_have_a_place_of_their_own(
    hub_root: Path, hub_port: int, tmp_path: Path
) -> None:
    with Hub(hub_root, port=hub_port):
        whole, reduced = (
            HuggingFaceImageNetDataset.open(REPO_ID, split=["train"], cache=Cache(tmp_path / "cache", short_side=side))
            for side in (None, 40)
        )
        blocks = [dataset.read_block(0) for dataset in (whole, reduced)]
    assert (blocks[0].labels == blocks[1].labels).all()
    assert blocks[1].images.nbytes < blocks[0].images.nbytes / 2
    assert len(entries(tmp_path / "cache")) == 2


def test_what_a_cache_keeps_is_made_by_the_decoding_processes(
    hub_root: Path, hub_port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = {"dataset": "imagenet1k", "cache_dir": str(tmp_path), "cache_format": "planes", "num_workers": 2}
    with Hub(hub_root, port=hub_port):
        dataset = get_data_loaders(resolve(flags), torch.device("cpu")).train.dataset
        monkeypatch.setattr(Picture, "planes", lambda picture: pytest.fail("made in this process"))
        images = dataset.read_block(0).images
    assert all(is_planes(image.as_py()) for image in images)
    lacking = pa.record_batch({"image": pa.array([None, b""], pa.binary()), "label": pa.array([0, 1])})
    assert dataset._reduced(lacking).equals(lacking)


@pytest.mark.slow
def test_what_is_trained_on_is_what_is_kept_whether_it_was_kept_or_not(
    hub_root: Path, hub_port: int, sound: Path, tmp_path: Path
) -> None:
    """Planes from the Hub, half from the cache, all from it; killed while they are kept; with room for half of them."""
    cache, flags = tmp_path / "cache", (*DATA, *FLAGS, "--cache_format", "planes", "--cache_short_side", 36)
    with Hub(hub_root, port=hub_port):
        train(*flags, "--cache_dir", cache, "--run_dir", tmp_path / "cold")
        for path in entries(cache)[::2]:
            path.unlink()
        train(*flags, "--cache_dir", cache, "--run_dir", tmp_path / "half")
        train(*flags, "--cache_dir", cache, "--run_dir", tmp_path / "warm")
        few = ("--cache_dir", tmp_path / "few", "--cache_limit_gb", size_of(cache) / 2e9)
        train(*flags, *few, "--run_dir", tmp_path / "limited")
        killed = (*flags, "--cache_dir", tmp_path / "killed cache", "--run_dir", tmp_path / "killed")
        process = killable.start(*killed, log=tmp_path / "log", place="after rename", time=1)
        process.join(TIMEOUT)
        assert process.exitcode == -9, (tmp_path / "log").read_text()
        train("--resume_from", tmp_path / "killed")
    expected = ledger(tmp_path / "cold")
    for name in ("half", "warm", "limited", "killed"):
        assert ledger(tmp_path / name) == expected, name
    assert [row["ids"] for row in expected] == [row["ids"] for row in ledger(sound)]
    assert expected != ledger(sound)
    assert size_of(tmp_path / "few") <= size_of(cache) / 2


@pytest.mark.slow
def test_a_cache_that_was_filled_ahead_trains_with_the_network_off(
    hub_root: Path, hub_port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = (*DATA, *FLAGS, "--cache_format", "planes", "--cache_short_side", 36, "--cache_dir", tmp_path / "cache")
    blocks = TRAIN_BLOCKS + VAL_BLOCKS
    with Hub(hub_root, port=hub_port) as hub:
        done = run(*flags, "--fill_cache")
        assert (done.status, done.out.splitlines()[-1]) == (
            0,
            f"cache     {blocks} of {blocks} blocks are in {tmp_path / 'cache'}",
        )
        assert set(blocks_asked_for(hub).values()) == {1}
        little = run(*flags[:-1], tmp_path / "little", "--cache_limit_gb", 1e-4, "--fill_cache")
        assert "--cache_limit_gb" in little.out.splitlines()[-1]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    train(*flags, "--run_dir", tmp_path / "offline")


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--cache_format", "planes"], "need --cache_dir"),
        (
            ["--cache_dir", "x", "--cache_format", "original", "--cache_short_side", "40"],
            "leave out --cache_short_side, on a resume with --override cache_short_side=none",
        ),
        (["--dataset", "digits", "--cache_dir", "x", "--fill_cache"], "--fill_cache is for what is streamed"),
        (["--cache_dir", "x", "--fill_cache", "--dry_run"], "--fill_cache stops once the dataset is kept"),
    ],
)
def test_formats_that_make_no_sense_are_refused(flags: list[str], told: str, tmp_path: Path) -> None:
    done = run(*DATA, *flags, "--run_dir", tmp_path / "run")
    assert done.status == 2
    assert told in done.err


@pytest.mark.parametrize("mode", ["RGB", "CMYK", "L", "P"])
def test_a_reduced_image_shows_what_the_whole_one_does(mode: str) -> None:
    photo = Image.fromarray(photographs()[0][:400, :500]).convert(mode)
    whole = io.BytesIO()
    photo.save(whole, "PNG" if mode == "P" else "JPEG")
    image = decode(reduce(whole.getvalue(), 100))
    assert image.shape == (100, 125, 3)
    expected = cv2.resize(decode(whole.getvalue()), (125, 100), interpolation=cv2.INTER_AREA)
    assert np.abs(image.astype(int) - expected).mean() < 6


@pytest.mark.parametrize("encoded", [b"", b"not an image"])
def test_an_unreadable_image_is_kept_as_it_is(encoded: bytes) -> None:
    assert reduce(encoded, 100) == encoded


@pytest.mark.slow
def test_a_full_cache_trains_with_the_network_off(
    hub_root: Path, hub_port: int, sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    with Hub(hub_root, port=hub_port):
        train(*DATA, *FLAGS, "--cache_dir", cache, "--run_dir", tmp_path / "cold")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    train(*DATA, *FLAGS, "--cache_dir", cache, "--run_dir", tmp_path / "offline")
    assert ledger(tmp_path / "offline") == ledger(sound)
    entries(cache)[0].unlink()
    done = run(*DATA, *FLAGS, "--cache_dir", cache, "--run_dir", tmp_path / "lacking")
    assert done.status == 3
    assert "HF_HUB_OFFLINE" in done.err


@pytest.mark.slow
def test_two_ranks_share_a_cache_without_fetching_anything_twice(
    hub_root: Path, hub_port: int, sound: Path, tmp_path: Path
) -> None:
    with Hub(hub_root, port=hub_port) as hub:
        flags = (*DATA, *FLAGS, "--cache_dir", tmp_path / "cache", "--run_dir", tmp_path / "run")
        done = wait(start(*flags, ranks=2))
    assert done.status == 0, done.err
    assert set(blocks_asked_for(hub).values()) == {1}
    assert [row["ids"] for row in ledger(tmp_path / "run")] == [row["ids"] for row in ledger(sound)]


@pytest.mark.slow
def test_three_kills_in_one_epoch_change_nothing(hub_root: Path, hub_port: int, tmp_path: Path) -> None:
    """The run is killed at every second snapshot, and goes on from it."""
    flags = (*DATA, *FLAGS, "--snapshot_steps", 1, "--epochs", 1)
    whole, killed, log = (tmp_path / name for name in ("whole", "killed", "log"))
    with Hub(hub_root, port=hub_port):
        train(*flags, "--run_dir", whole)
        arguments: tuple[object, ...] = (*flags, "--run_dir", killed)
        for step in (2, 4, 6):
            process = killable.start(*arguments, log=log, place="after rename", time=2)
            process.join(TIMEOUT)
            assert (process.exitcode, steps_kept(killed)[-1]) == (-9, step), log.read_text()
            arguments = ("--resume_from", killed)
        train("--resume_from", killed)
    assert [row["step"] for row in metrics(killed)] == list(range(1, 9))
    assert_same_run(killed, whole, apart=("rng.python", "rng.numpy"))


def test_what_is_kept_is_read_and_batches_are_filled_by_the_decoding_processes(
    hub_root: Path, hub_port: int, tmp_path: Path
) -> None:
    with Hub(hub_root, port=hub_port):
        kept, local = (
            HuggingFaceImageNetDataset.open(source, split=["train"], cache=cache, block_bytes=20_000)
            for source, cache in ((REPO_ID, Cache(tmp_path, None)), (str(hub_root / "datasets" / REPO_ID), None))
        )
        numbers = np.arange(len(kept))
        reader, other = kept.reader([numbers]), local.reader([numbers])
        for number in numbers.tolist():
            (image, label), (same, its) = reader.read(number), other.read(number)
            assert isinstance(image, InFile)
            assert (label, bytes(image.data)) == (its, bytes(in_memory(same)))
            assert Path(image.path).read_bytes()[image.start : image.start + image.size] == bytes(image.data)
            assert Path(image.path).read_bytes()[: len(image.digest)] == image.digest
        reader.close()
        other.close()
        config = resolve({"dataset": "imagenet1k", "image_size": 32, "batch_size": 8, "num_workers": 1})
        loader = get_data_loaders(config, torch.device("cpu")).train
        loader.augment = None
        assert isinstance(loader, StreamingDataLoader)
        assert loader.pool is not None
        assert all(loader.pool.memory.find(batch.images.numpy()) for batch in loader)
