"""A dataset kept in the memory of the device gives the batches that picking its images one by one would give."""

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from program import pretend_rank

from config import Config, resolve
from preprocess import get_data_loaders
from stream.augment import Augment
from stream.loader import Batch
from stream.local import LocalDataset, load_digits
from stream.order import epoch_order
from stream.picks import fair_sample
from stream.resident import ResidentLoader

CPU = torch.device("cpu")
COUNT, STREAMS, BATCH = 103, 4, 12
AUGMENT = Augment(3, flip=True, padding=1, cutout=2)
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (COUNT, 8, 8, 3), np.uint8)
DATASET = LocalDataset(IMAGES, RNG.integers(0, 10, COUNT).tolist(), list("0123456789"))


def order(epoch: int) -> list[np.ndarray]:
    return epoch_order(DATASET.block_rows, epoch, 0, STREAMS, COUNT)


def make(**changes: Any) -> ResidentLoader:
    options: dict[str, Any] = {"image_size": 8, "batch_size": BATCH, "train": True, "augment": AUGMENT}
    return ResidentLoader(DATASET, order, **(options | changes))


def run(loader: Any, epoch: int = 0, start: int = 0) -> list[Batch]:
    loader.set_epoch(epoch, start)
    return list(loader)


def assert_same(ours: list[Batch], theirs: list[Batch]) -> None:
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))


# ---- training --------------------------------------------------------------------------------------------------------


def test_batches_are_uint8_nhwc_with_int64_labels_and_ids() -> None:
    for images, labels, ids in run(make()):
        assert (images.shape, images.dtype) == ((BATCH, 8, 8, 3), torch.uint8)
        assert (labels.shape, labels.dtype) == ((BATCH,), torch.int64)
        assert (ids.shape, ids.dtype) == ((BATCH,), torch.int64)
        assert images.permute(0, 3, 1, 2).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("epoch", [0, 5])
def test_a_batch_is_an_equal_share_of_each_stream_picked_and_augmented(epoch: int) -> None:
    streams, share = order(epoch), BATCH // STREAMS
    batches = run(make(), epoch)
    assert len(batches) == min(len(stream) for stream in streams) // share == 8
    for step, (images, labels, ids) in enumerate(batches):
        expected = np.concatenate([stream[step * share : (step + 1) * share] for stream in streams])
        assert ids.tolist() == expected.tolist()
        assert labels.tolist() == [DATASET.labels[i] for i in expected]
        for image, number in zip(images, expected, strict=True):
            alone = AUGMENT(torch.from_numpy(IMAGES[number : number + 1]), torch.tensor([number]), epoch)
            assert torch.equal(image, alone[0])


def test_without_augmentation_images_are_those_of_the_dataset() -> None:
    for images, _, ids in run(make(augment=None)):
        assert np.array_equal(images, IMAGES[ids])


def test_an_epoch_begun_at_a_step_is_the_tail_of_the_whole_one() -> None:
    loader = make()
    whole = run(loader, epoch=2)
    for start in (1, 4, len(loader) - 1, len(loader)):
        assert_same(run(loader, epoch=2, start=start), whole[start:])
        assert len(loader) == len(whole)


def test_an_epoch_can_be_had_twice_and_the_next_one_is_another() -> None:
    loader = make()
    first = run(loader, epoch=1)
    assert_same(run(loader, epoch=1), first)
    assert_same(run(make(), epoch=1), first)
    assert [batch.ids.tolist() for batch in run(loader, epoch=2)] != [batch.ids.tolist() for batch in first]


def test_one_sample_looks_different_from_epoch_to_epoch() -> None:
    first, second = (
        {int(number): image for batch in run(make(), epoch) for number, image in zip(batch.ids, batch.images)}  # noqa: B905
        for epoch in (0, 1)
    )
    shared = first.keys() & second.keys()
    assert len(shared) > 80
    assert sum(torch.equal(first[i], second[i]) for i in shared) < 5


def test_the_dataset_is_not_changed_by_augmenting_its_batches() -> None:
    before = IMAGES.copy()
    for images, _, _ in run(make(augment=None)):
        images.zero_()
    run(make())
    assert np.array_equal(IMAGES, before)


# ---- ranks -----------------------------------------------------------------------------------------------------------


def loaders_of(rank: int, world: int, config: Config) -> Any:
    """The loaders as rank `rank` of `world` would have them."""
    with pytest.MonkeyPatch.context() as patch:
        pretend_rank(patch, rank, world)
        data = get_data_loaders(config, CPU)
        return run(data.train, epoch=1, start=1), run(data.val)


def test_any_number_of_ranks_trains_on_the_same_global_batches_and_evaluates_the_same_ones() -> None:
    config = resolve({"dataset": "digits", "batch_size": 32, "max_samples": 200, "cutout": 2})
    (whole, whole_val), train = loaders_of(0, 1, config), load_digits()[0]
    train = train.take(fair_sample(train.all_labels(), 200))
    assert [len(batch.ids) for batch in whole] == [32] * 5
    streams = epoch_order(train.block_rows, 1, config.seed, config.streams, 200)
    assert whole[0].ids.tolist() == np.concatenate([stream[4:8] for stream in streams]).tolist()
    assert whole[0].labels.tolist() == [train.labels[i] for i in whole[0].ids]
    for world in (2, 4):
        parts, vals = zip(*(loaders_of(rank, world, config) for rank in range(world)), strict=True)
        joined = [Batch(*map(torch.cat, zip(*batches, strict=True))) for batches in zip(*parts, strict=True)]
        assert_same(joined, whole)
        assert_same([batch for val in vals for batch in val], whole_val)


# ---- evaluation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 16, 50, 103, 300])
def test_evaluation_has_every_image_once_in_order_with_a_smaller_last_batch(size: int) -> None:
    loader = ResidentLoader(DATASET, lambda epoch: [np.arange(COUNT)], image_size=8, batch_size=size, train=False)
    batches = run(loader)
    assert len(loader) == len(batches) == -(-COUNT // size)
    assert [len(batch.ids) for batch in batches[:-1]] == [size] * (len(batches) - 1)
    images, labels, ids = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert ids.tolist() == list(range(COUNT))
    assert labels.tolist() == DATASET.labels
    assert np.array_equal(images, IMAGES)
    assert_same(run(loader, epoch=3), batches)


# ---- other sizes -----------------------------------------------------------------------------------------------------


def constants() -> LocalDataset:
    """Every image of one colour, which tells its number."""
    shades = np.stack([np.arange(COUNT), 255 - np.arange(COUNT), np.full(COUNT, 7)], axis=1).astype(np.uint8)
    return LocalDataset(shades[:, None, None].repeat(24, 1).repeat(24, 2), list(range(COUNT)), ["a"])


@pytest.mark.parametrize("size", [5, 8, 24, 60])
@pytest.mark.parametrize("train", [True, False])
def test_images_come_in_the_size_asked_for_and_a_plain_one_stays_plain(size: int, train: bool) -> None:
    dataset = constants()
    given = partial(epoch_order, dataset.block_rows, seed=0, streams=1, window=COUNT)
    for images, labels, ids in run(ResidentLoader(dataset, given, image_size=size, batch_size=20, train=train)):
        assert (images.shape, images.dtype) == ((len(ids), size, size, 3), torch.uint8)
        assert images.permute(0, 3, 1, 2).is_contiguous(memory_format=torch.channels_last)
        expected = torch.stack([ids, 255 - ids, torch.full_like(ids, 7)], dim=1).to(torch.uint8)
        assert torch.equal(images, expected[:, None, None].expand_as(images))
        assert torch.equal(labels, ids)


def test_a_shrunk_checkerboard_is_grey_not_a_pick_of_its_pixels() -> None:
    board = np.indices((24, 24)).sum(0)[None, ..., None].repeat(3, -1) % 2 * np.uint8(255)
    dataset = LocalDataset(board.astype(np.uint8), [0], ["a"])
    loader = ResidentLoader(dataset, lambda epoch: [np.arange(1)], image_size=8, batch_size=1, train=False)
    ((images, _, _),) = run(loader)
    assert images.min() >= 120
    assert images.max() <= 135


def test_augmentation_sees_images_of_the_size_asked_for() -> None:
    plain, changed = run(make(image_size=16, augment=None), 1), run(make(image_size=16), 1)
    expected = [Batch(AUGMENT(images, ids, 1), labels, ids) for images, labels, ids in plain]
    assert_same(changed, expected)


@pytest.mark.parametrize("images", [127, 128, 135, 190])
def test_every_rank_has_the_whole_batches_of_the_dataset_and_no_more(images: int) -> None:
    """Streams differ by a sample in length, and a rank with a step more than another would wait for it for ever."""
    config = resolve({"dataset": "digits", "batch_size": 64, "max_samples": images})
    for world in (1, 2, 4, 8):
        for rank in range(world):
            with pytest.MonkeyPatch.context() as patch:
                pretend_rank(patch, rank, world)
                loader = get_data_loaders(config, CPU).train
                batches = run(loader)
            assert len(loader) == len(batches) == images // 64
            assert {len(batch.ids) for batch in batches} == {64 // world}
