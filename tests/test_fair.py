"""A part of a set is a fair sample of it, and a small set works without a flag."""

from pathlib import Path

import numpy as np
import pytest
import torch
from program import run, train
from shards import make_imagenet_like
from test_image_folders import make_classes, put

import open_data
from choices import DATASETS
from config import FITTED, resolve
from defaults import IMAGENET, Preset, fit_to, streams_for
from errors import DataError, UsageError
from preflight import mixing
from preprocess import Data, get_data_loaders
from stream.dataset import HuggingFaceImageNetDataset
from stream.local import LocalDataset
from stream.order import epoch_order
from stream.picks import classes_within, fair_sample, hold_out

CPU = torch.device("cpu")
RNG = np.random.default_rng(0)
NAMES = [f"image {number}" for number in range(1000)]
SKEWED = RNG.choice(20, 1000, p=np.arange(1, 21) / 210)


# ---- which images ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1, 7, 20, 21, 64, 500, 999])
@pytest.mark.parametrize("labels", [np.sort(SKEWED), SKEWED, np.arange(1000) % 20], ids=["sorted", "random", "even"])
def test_a_sample_has_every_class_that_it_has_room_for_and_its_share_of_each(labels: np.ndarray, limit: int) -> None:
    ids = fair_sample(labels, limit)
    assert len(ids) == len({*ids.tolist()}) == limit
    assert (np.diff(ids) > 0).all()
    counts = np.bincount(labels[ids], minlength=20)
    assert (counts > 0).sum() == min(limit, 20)
    if limit >= 20:
        expected = 1 + (np.bincount(labels) - 1) * (limit - 20) / (len(labels) - 20)
        assert np.abs(counts - expected).max() <= 1


@pytest.mark.parametrize("limit", [None, 1000, 5000])
def test_a_limit_that_is_none_keeps_everything(limit: int | None) -> None:
    assert fair_sample(SKEWED, limit).tolist() == list(range(1000))


def test_a_sample_may_be_of_some_classes_only() -> None:
    ids = fair_sample(SKEWED, 50, np.array([3, 17]))
    assert {*SKEWED[ids].tolist()} == {3, 17}
    assert fair_sample(SKEWED, 50, np.array([], np.int64)).tolist() == []


@pytest.mark.parametrize("share", [0.05, 0.1, 0.5, 0.9])
def test_what_is_held_out_is_that_share_of_each_class_and_depends_on_the_seed_alone(share: float) -> None:
    kept, held = hold_out(SKEWED, NAMES, share, 3)
    assert sorted([*kept, *held]) == list(range(1000))
    assert len(held) == round(share * 1000)
    counts = np.bincount(SKEWED)
    assert np.abs(np.bincount(SKEWED[held], minlength=20) - share * counts).max() <= 1
    assert np.array_equal(hold_out(SKEWED, NAMES, share, 3)[1], held)
    assert not np.array_equal(hold_out(SKEWED, NAMES, share, 4)[1], held)


def test_a_class_of_one_image_is_trained_on() -> None:
    labels = np.array([0] * 9 + [1])
    for share in (0.1, 0.5, 0.9):
        assert 9 in hold_out(labels, NAMES[:10], share, 0)[0]


@pytest.mark.parametrize("seed", range(5))
def test_few_images_change_places_when_some_are_added_or_removed(seed: int) -> None:
    """Each that is added may take the place of one other, in its class or where a class is rounded up."""
    rng = np.random.default_rng(seed)
    added = np.sort(rng.choice(1000, 20, replace=False))
    before = np.setdiff1d(np.arange(1000), added)
    names = np.array(NAMES)
    held = {*names[hold_out(SKEWED, NAMES, 0.2, seed)[1]]}
    held_before = {*names[before][hold_out(SKEWED[before], names[before].tolist(), 0.2, seed)[1]]}
    assert len((held ^ held_before) - {*names[added]}) <= 2 * len(added)
    shuffled = rng.permutation(1000)
    assert {*names[shuffled][hold_out(SKEWED[shuffled], names[shuffled].tolist(), 0.2, seed)[1]]} == held


def test_images_added_to_a_folder_are_those_that_a_resume_is_told_of(tmp_path: Path) -> None:
    folder = make_classes(tmp_path / "set", each=150)

    def opened(where: Path) -> Data:
        given = {"dataset": "imagefolder", "data_dir": str(where), "val_share": 0.2, "batch_size": 8, "num_workers": 0}
        return get_data_loaders(resolve(given), CPU)

    def parts(data: Data) -> list[set[str]]:
        return [{loader.dataset.name(i) for i in range(len(loader.dataset))} for loader in (data.train, data.val)]

    before = opened(folder)
    (tmp_path / "run").mkdir()
    before.keep_inventory(tmp_path / "run")
    saved, split = {"classes": before.classes, "data": before.fingerprint}, parts(before)
    folder = folder.rename(tmp_path / "moved")
    assert parts(opened(folder)) == split
    assert opened(folder).changes(saved, tmp_path / "run") == []
    new = {f"{name}/new {number}.png" for name, count in (("ant", 3), ("bee", 2)) for number in range(count)}
    for name in new:
        put(folder / name)
    after = opened(folder)
    trained, validated = parts(after)
    moved = (split[0] & validated) | (split[1] & trained)
    assert len(moved) <= 5
    assert trained | validated == split[0] | split[1] | new
    words = [f"{len(now - then)} added" for now, then in zip((trained, validated), split, strict=True) if now - then]
    told = after.changes(saved, tmp_path / "run")
    assert [line for line, added in zip(told, words, strict=True) if added not in line] == []


def test_ranges_of_labels_tell_the_classes_that_groups_may_have() -> None:
    ranges = np.array([[0, 4, 4], [1, 6, 4]])
    assert classes_within(ranges, np.arange(10)) == 5
    assert classes_within(ranges, np.array([2, 3, 9])) == 0


# ---- a sample of what is streamed ------------------------------------------------------------------------------------


@pytest.mark.parametrize("sort_by_class", [True, False])
@pytest.mark.parametrize("limit", [10, 64, 200])
def test_a_sample_of_a_stream_has_the_same_classes_to_train_on_and_to_validate(
    tmp_path: Path, sort_by_class: bool, limit: int
) -> None:
    folder = make_imagenet_like(
        tmp_path, train=600, validation=200, rows_per_group=20, size=(20, 30), sort_by_class=sort_by_class
    )
    given = {"dataset": "hf", "dataset_name": str(folder), "max_samples": limit, "batch_size": 8, "image_size": 16}
    data = get_data_loaders(resolve(given), CPU)
    sizes = min(limit, 600), min(limit, 200)
    assert (len(data.train.dataset), len(data.val.dataset)) == sizes
    for part in (data.train.dataset, data.val.dataset):
        counts = np.bincount(part.all_labels(), minlength=10)
        assert counts.min() > 0
        if sort_by_class:
            assert counts.max() <= -(-limit // 10) + 1
    assert f"note      a sample of {limit} training images, of 10 of the 10 classes" in data.notes


def test_a_sample_of_fewer_images_than_classes_is_validated_on_its_classes(tmp_path: Path) -> None:
    folder = make_imagenet_like(tmp_path, train=600, validation=200, rows_per_group=20, size=(20, 30))
    given = {"dataset": "hf", "dataset_name": str(folder), "max_samples": 4, "batch_size": 4, "image_size": 16}
    data = get_data_loaders(resolve(given), CPU)
    trained, validated = (np.unique(part.dataset.all_labels()).tolist() for part in (data.train, data.val))
    assert len(trained) == 4
    assert validated == trained
    assert "note      a sample of 4 training images, of 4 of the 10 classes" in data.notes


def test_a_shuffled_set_is_sampled_from_few_blocks_and_a_sorted_one_from_as_many_as_it_takes(tmp_path: Path) -> None:
    """Each block is a request, and costs its bytes whatever is used of it."""
    sets = {
        sort: make_imagenet_like(tmp_path / str(sort), train=2000, rows_per_group=50, size=(16, 16), sort_by_class=sort)
        for sort in (False, True)
    }
    used = {
        sort: len(HuggingFaceImageNetDataset.open(str(folder), split=["train"], max_samples=100).blocks)
        for sort, folder in sets.items()
    }
    assert used[False] <= 4
    assert 10 <= used[True] <= 20


def test_the_rows_that_a_sample_takes_are_the_images_that_the_ids_name(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    folder = make_imagenet_like(tmp_path, train=120, rows_per_group=15, size=(20, 30), sort_by_class=True)
    part = HuggingFaceImageNetDataset.open(str(folder), split=["train"], max_samples=37)
    reader, labels = part.reader([np.arange(37)]), part.all_labels()
    assert labels is not None
    for number in range(37):
        file, _, row = part.name(number).partition(" row ")
        stored = pq.read_table(folder / file).slice(int(row), 1).to_pylist()[0]
        image, label = reader.read(number)
        assert (bytes(image), label, int(labels[number])) == (
            stored["image"]["bytes"],
            stored["label"],
            stored["label"],
        )
    reader.close()


@pytest.mark.parametrize(("images", "batch"), [(64, 64), (64, 32), (500, 128), (30, 8)])
def test_mixing_is_never_more_than_a_uniform_shuffles(images: int, batch: int) -> None:
    labels = np.arange(images) % 10
    for seed in range(5):
        order = epoch_order(np.ones(images, np.int64), 0, seed, 8 if batch % 8 == 0 else 1, images)
        assert 0.9 <= mixing(labels, order, batch // len(order)) <= 1.0


@pytest.mark.parametrize("layout", ["folder", "parquet"])
@pytest.mark.parametrize(("limit", "share"), [(20, 0.5), (20, 0.9), (40, 0.2), (10, 0.1), (500, 0.5)])
def test_a_limit_holds_for_both_parts_of_a_set_of_many_classes(
    tmp_path: Path, limit: int, share: float, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if layout == "folder":
        part = LocalDataset(np.zeros((120, 8, 8, 3), np.uint8), np.arange(120) % 30, [f"{n:02d}" for n in range(30)])
        monkeypatch.setattr(open_data, "open_image_folder", lambda *given, **options: (part, None))
        given: dict[str, object] = {"dataset": "imagefolder", "data_dir": "x"}
    else:
        folder = make_imagenet_like(tmp_path, train=120, validation=1, test=0, size=(9, 12), classes=30)
        given = {"dataset": "hf", "dataset_name": str(folder)}
    given |= {"max_samples": limit, "val_share": share, "num_workers": 0}
    if (layout, limit) == ("parquet", 10):  # 11 images of as many classes
        with pytest.raises(
            DataError, match=r"--val_share 0.1 of 11 images is none; give a larger share or more --max_samples"
        ):
            get_data_loaders(resolve(given), CPU, derived=FITTED)
        return
    data = get_data_loaders(resolve(given), CPU, derived=FITTED)
    trained, validated = (part.dataset.all_labels() for part in (data.train, data.val))
    assert max(len(trained), len(validated)) <= limit
    assert {*validated.tolist()} <= {*trained.tolist()}
    assert len(validated) > 0
    if layout == "folder":
        assert (len(trained), len(validated)) == {20: (20, 20), 40: (40, 10), 10: (10, 1), 500: (60, 60)}[limit]
    told = f"note      a sample of {len(trained)} training images, of {len({*trained.tolist()})} of the 30 classes"
    assert told in data.notes


# ---- a small set -----------------------------------------------------------------------------------------------------


def settings_of(preset: Preset) -> dict[str, int]:
    return vars(preset) | {"accumulate_steps": 1}


@pytest.mark.parametrize("images", [20, 24, 33, 64, 192, 1000, 5000])
def test_a_folder_of_photographs_needs_no_flags_but_where_it_is(tmp_path: Path, images: int) -> None:
    preset = IMAGENET
    values, lines = fit_to(preset, images, {"batch_size", "streams", "epochs"}, settings_of(preset), 1)
    batch, streams, epochs = values["batch_size"], values["streams"], values["epochs"]
    assert batch % streams == 0
    assert 4 <= batch <= 256
    assert images // batch >= 5
    assert epochs * (images // batch) >= min(2000, 200 * (images // batch))
    assert (batch == 256) == (images >= 2048)
    assert [line.split()[0] for line in lines] == [
        name.removesuffix("_size") for name, value in values.items() if value != vars(preset)[name]
    ]


def test_imagenet_keeps_its_published_settings() -> None:
    for name in ("imagenet1k", "hf", "imagefolder"):
        preset = DATASETS[name].preset
        values, lines = fit_to(preset, 1_281_167, {"batch_size", "streams", "epochs"}, settings_of(preset), 8)
        assert (values, lines) == ({"batch_size": 256, "streams": 8, "epochs": 90}, [])


@pytest.mark.usefixtures("small_model")
@pytest.mark.parametrize("each", [10, 96])
def test_small_folders_train_without_a_flag_that_fits_them(tmp_path: Path, each: int) -> None:
    folder = make_classes(tmp_path / "set", each=each)
    flags = ("--dataset", "imagefolder", "--data_dir", folder, "--val_share", 0.2, "--num_workers", 0)
    done = train(*flags, "--image_size", 16, "--model", "resnet18", "--epochs", 1, "--run_dir", tmp_path / "run")
    assert f"batch     {4 if each == 10 else 16}: " in done.out
    resumed = train("--resume_from", tmp_path / "run")
    assert "nothing left to do" in resumed.out


@pytest.mark.parametrize(
    ("images", "given", "ranks", "expected"),
    [
        (20, {}, 1, (4, 4)),
        (20, {}, 2, (8, 8)),
        (5, {}, 2, (4, 4)),
        (20, {"streams": 3}, 1, (6, 3)),
        (37, {"streams": 3}, 1, (6, 3)),
        (192, {"streams": 3}, 1, (24, 3)),
        (5000, {"streams": 3}, 1, (255, 3)),
        (20, {"accumulate_steps": 3}, 1, (6, 6)),
        (37, {"accumulate_steps": 3}, 2, (12, 6)),
        (192, {"accumulate_steps": 3}, 1, (24, 8)),
        (5000, {"accumulate_steps": 3}, 1, (240, 8)),
        (5000, {"accumulate_steps": 3}, 2, (240, 8)),
        (192, {"accumulate_steps": 3, "streams": 4}, 2, (24, 4)),
        (192, {"accumulate_steps": 5, "streams": 6}, 1, (30, 6)),
        (5000, {"accumulate_steps": 33}, 1, (231, 7)),
        (5000, {"accumulate_steps": 200}, 1, (400, 8)),
        (192, {"accumulate_steps": 3, "batch_size": 30}, 1, (30, 6)),
        (192, {"streams": 4, "batch_size": 32}, 2, (32, 4)),
        (5000, {}, 3, (252, 6)),
        (5000, {}, 16, (256, 16)),
        (192, {}, 16, (64, 16)),
    ],
)
def test_what_is_derived_fits_what_was_given(
    images: int, given: dict[str, int], ranks: int, expected: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = {"dataset": "hf", "dataset_name": "x"} | given
    config, lines = resolve(flags).fitted(images, FITTED - given.keys(), ranks)
    assert (config.batch_size, config.streams) == expected
    config.check_world(ranks)
    told = {line.split()[0] for line in lines}
    assert "streams" not in told & given.keys()
    assert ("batch" in told) == ("batch_size" not in given and expected[0] != 256)
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    assert resolve(flags).fitted(images, FITTED - given.keys(), ranks)[0] == config


@pytest.mark.parametrize(
    ("given", "ranks", "told"),
    [
        ({"streams": 3}, 2, "--streams 3 is not divisible by 2 ranks"),
        ({"batch_size": 30, "accumulate_steps": 4}, 1, "30 images is not divisible by --accumulate_steps 4"),
        ({"batch_size": 9}, 2, "--batch_size 9 is not divisible by 2 ranks"),
        ({"batch_size": 8, "accumulate_steps": 8}, 1, "BatchNorm needs two images"),
    ],
)
def test_what_was_given_and_does_not_fit_is_refused(given: dict[str, int], ranks: int, told: str) -> None:
    config, _ = resolve({"dataset": "hf", "dataset_name": "x"} | given).fitted(192, FITTED - given.keys(), ranks)
    with pytest.raises(UsageError, match=told):
        config.check_world(ranks)


def test_a_warm_up_is_compared_with_the_epochs_that_a_small_set_gets() -> None:
    config = resolve({"dataset": "hf", "dataset_name": "x", "warmup_epochs": 100.0})
    assert config.fitted(64, FITTED, 1)[0].epochs == 200
    with pytest.raises(UsageError, match="--warmup_epochs 100 leaves nothing of --epochs 90"):
        config.fitted(1_281_167, FITTED, 1)


def test_a_set_too_small_for_what_a_batch_must_be_shared_by_is_refused_with_what_to_lower(tmp_path: Path) -> None:
    folder = make_classes(tmp_path / "set", each=5)
    flags = ("--dataset", "imagefolder", "--data_dir", folder, "--val_share", 0.2, "--num_workers", 0)
    done = run(*flags, "--streams", 5, "--accumulate_steps", 2, "--run_dir", tmp_path / "run")
    assert (done.status, done.err.count("\n")) == (2, 1)
    assert "a batch of 10" in done.err
    assert "--streams 5, --accumulate_steps 2" in done.err
    done = run(*flags, "--batch_size", 9, "--run_dir", tmp_path / "run")
    assert "--batch_size 9 is larger than the training set of 8 images" in done.err


def test_what_was_given_is_not_fitted() -> None:
    preset, base = IMAGENET, {"accumulate_steps": 1}
    values, lines = fit_to(preset, 192, {"streams"}, base | {"batch_size": 30, "streams": 8, "epochs": 3}, 1)
    assert values == {"batch_size": 30, "streams": 6, "epochs": 3}
    assert len(lines) == 1
    values, lines = fit_to(preset, 192, (), base | {"batch_size": 64, "streams": 8, "epochs": 3}, 1)
    assert (values["batch_size"], lines) == (64, [])
    values, _ = fit_to(preset, 192, {"batch_size"}, base | {"batch_size": 256, "streams": 6, "epochs": 3}, 1)
    assert values["batch_size"] == 24


@pytest.mark.parametrize(
    ("batch", "ranks", "streams"),
    [(30, 1, 6), (256, 1, 8), (7, 1, 7), (11, 1, 1), (60, 4, 4), (12, 2, 6), (5, 2, 5), (64, 16, 16)],
)
def test_streams_divide_the_batch_and_are_shared_by_the_ranks(batch: int, ranks: int, streams: int) -> None:
    assert streams_for(batch, ranks, 8) == streams


@pytest.mark.parametrize("world", [1, 2, 4, 8])
@pytest.mark.parametrize("images", [20, 100, 3000])
def test_ranks_share_a_fitted_batch_evenly(world: int, images: int) -> None:
    preset = IMAGENET
    values, _ = fit_to(preset, images, {"batch_size", "streams", "epochs"}, settings_of(preset), world)
    assert values["batch_size"] % values["streams"] == values["streams"] % world == 0
    assert values["batch_size"] >= 4 * world or 2 * values["batch_size"] > images


def test_a_batch_of_thirty_trains_without_another_flag(tmp_path: Path) -> None:
    done = train("--max_samples", 64, "--batch_size", 30, "--epochs", 1, "--run_dir", tmp_path / "run")
    assert "2 steps an epoch" in done.out
    done = run("--max_samples", 64, "--batch_size", 30, "--streams", 8, "--epochs", 1, "--run_dir", tmp_path / "other")
    assert (done.status, done.err.count("\n")) == (2, 1)
