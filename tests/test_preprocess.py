"""Augmentation depends on image and seed alone, images keep what they show, and each dataset is split as promised."""

import gzip
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import albumentations as A
import cv2
import numpy as np
import pytest
import sklearn.datasets
import tiny_cifar
import torch
from PIL import Image
from shards import draw, encode, make_imagenet_like, photographs
from sklearn.model_selection import train_test_split

from config import Config, resolve
from errors import DataError, UsageError
from preflight import describe_data
from preprocess import AlbumentationsAdapter, eval_transform, get_data_loaders, train_transform
from stream.augment import Augment, Chain
from stream.image_folders import open_image_folder
from stream.images import resize
from stream.local import LocalDataset, load_cifar, load_digits
from stream.picks import fair_sample
from stream.pipelines import Pipeline

DATASETS = ["digits", "cifar10", "cifar100", "imagenet1k", "imagefolder", "hf"]
CPU = torch.device("cpu")


def settings(dataset: str = "imagenet1k", /, **given: Any) -> Config:
    needed = {"hf": {"dataset_name": "x"}, "imagefolder": {"data_dir": "x"}}.get(dataset, {})
    return resolve({"dataset": dataset, **needed, **given})


def photo(number: int = 0, size: tuple[int, int] = (80, 160)) -> np.ndarray:
    return draw(number, 10, size, np.random.default_rng(number))


def gradient(height: int, width: int) -> np.ndarray:
    """Red tells the column, green the row."""
    image = np.zeros((height, width, 3), np.uint8)
    image[..., 0] = np.linspace(0, 255, width).round()[None]
    image[..., 1] = np.linspace(0, 255, height).round()[:, None]
    return image


# ---- AlbumentationsAdapter -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("crop", ["resized", "fixed"])
def test_a_transform_depends_on_neither_order_nor_thread(crop: str) -> None:
    transform, images = train_transform(settings(crop=crop)), [photo(number) for number in range(6)]
    jobs = [(image, (7, epoch, number)) for epoch in range(3) for number, image in enumerate(images)]
    expected = [transform(*job) for job in jobs]
    backwards = [transform(*job) for job in reversed(jobs)][::-1]
    with ThreadPoolExecutor(4) as pool:
        in_threads = list(pool.map(lambda job: transform(*job), jobs))
    alone = [train_transform(settings(crop=crop))(*job) for job in jobs]
    for other in (backwards, in_threads, alone):
        assert all(np.array_equal(a, b) for a, b in zip(expected, other, strict=True))


def test_a_transform_neither_reads_nor_moves_the_global_generators() -> None:
    transform, image = train_transform(settings()), photo()
    np.random.seed(0)
    first = transform(image, (0, 0, 0))
    drawn = np.random.random()
    np.random.seed(0)
    assert np.random.random() == drawn
    assert np.array_equal(transform(image, (0, 0, 0)), first)


def test_a_transform_leaves_its_input_alone() -> None:
    for crop in ("resized", "fixed"):
        image = photo(1, (256, 256))
        before = image.copy()
        result = train_transform(settings(crop=crop))(image, (0, 0, 0))
        result[:] = 0
        assert np.array_equal(image, before)


def test_epochs_samples_and_seeds_are_augmented_differently() -> None:
    transform, image = train_transform(settings()), photo()
    seeds = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 0, 2**40), (0, 1, 1), (2**31, 0, 0)]
    assert len({transform(image, seed).tobytes() for seed in seeds}) == len(seeds)


def test_the_steps_of_a_pipeline_draw_independent_numbers() -> None:
    """Flip against the crop's place before it, and of two flips, over 2,000 seeds: correlations within four sigma."""
    both = AlbumentationsAdapter(A.RandomCrop(8, 8), A.HorizontalFlip(p=0.5), A.VerticalFlip(p=0.5))
    image = gradient(64, 64)
    seen = []
    for number in range(2000):
        out = both(image, (0, 0, number)).astype(int)
        seen.append(
            (out[..., 0].mean(), out[..., 1].mean(), out[0, 0, 0] > out[0, -1, 0], out[0, 0, 1] > out[-1, 0, 1])
        )
    columns = np.array(seen, float).T
    assert np.abs(np.corrcoef(columns) - np.eye(4)).max() < 4 / 2000**0.5
    assert np.abs(columns[2:].mean(axis=1) - 0.5).max() < 2 / 2000**0.5  # four sigma of a fair coin


# ---- sizes and contents ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(80, 160), (160, 80), (8, 8), (32, 32), (300, 20), (1, 1), (224, 224), (500, 375)])
@pytest.mark.parametrize("crop", ["resized", "fixed"])
def test_every_image_comes_out_in_the_size_asked_for(shape: tuple[int, int], crop: str) -> None:
    image = gradient(*shape)
    for given in ({}, {"image_size": 40, "eval_size": 56}):
        config = settings(crop=crop, **given)
        for transform, size in ((train_transform, config.image_size), (eval_transform, config.eval_size)):
            result = transform(config)(image, (0, 0, 0))
            assert result.shape == (size, size, 3)
            assert result.dtype == np.uint8


def test_the_imagenet_crop_covers_between_8_and_100_percent_of_the_area() -> None:
    transform, image = train_transform(settings(image_size=64)), gradient(256, 256)
    areas = []
    for number in range(300):
        out = transform(image, (0, 0, number)).astype(int)
        areas.append(np.ptp(out[..., 0]) * np.ptp(out[..., 1]) / 255**2)
    assert 0.05 < min(areas) < 0.15
    assert 0.85 < max(areas) <= 1


def test_the_fixed_crop_takes_224_of_256() -> None:
    transform, image = train_transform(settings(crop="fixed")), gradient(256, 512)
    outs = [transform(image, (0, 0, number)).astype(int) for number in range(100)]
    heights = [np.ptp(out[..., 1]) / 255 for out in outs]
    assert heights == pytest.approx([223 / 255] * 100, abs=0.01)
    widths = [np.ptp(out[..., 0]) / 255 for out in outs]
    assert widths == pytest.approx([223 / 511] * 100, abs=0.01)
    assert len({int(out[..., 1].min()) for out in outs}) > 20


def test_the_fixed_crop_of_a_smaller_image_size_keeps_the_ratio() -> None:
    out = train_transform(settings(crop="fixed", image_size=112))(gradient(128, 128), (0, 0, 0)).astype(int)
    assert np.ptp(out[..., 0]) / 255 == pytest.approx(111 / 127, abs=0.01)


def test_evaluation_takes_the_middle_224_of_256() -> None:
    out = eval_transform(settings())(gradient(256, 512), (0, 0, 0)).astype(int)
    assert out[..., 1].min() == pytest.approx(16, abs=1)
    assert out[..., 1].max() == pytest.approx(239, abs=1)
    assert out[..., 0].min() == pytest.approx(144 * 255 / 511, abs=1)
    assert out[..., 0].max() == pytest.approx(367 * 255 / 511, abs=1)


def test_evaluation_is_the_same_whatever_the_seed() -> None:
    transform = eval_transform(settings())
    assert np.array_equal(transform(photo(), (0, 0, 0)), transform(photo(), (1, 2, 3)))


@pytest.mark.parametrize("make", [eval_transform, train_transform])
@pytest.mark.parametrize("crop", ["resized", "fixed"])
def test_shrinking_averages_and_does_not_alias(make: Callable[[Config], Pipeline], crop: str) -> None:
    """A checkerboard of single pixels is even grey from afar; without antialiasing it becomes stripes."""
    image = np.zeros((2048, 2048, 3), np.uint8)
    image[::2, ::2] = image[1::2, 1::2] = 255
    for number in range(8):  # a random crop has 579 pixels or more, and shrinks to less than half
        out = make(settings(crop=crop))(image, (0, 0, number))
        slack = 16 if (make, crop) == (train_transform, "resized") else 1
        assert 127 - slack <= out.min() <= out.max() <= 128 + slack


def sharpness(images: list[np.ndarray]) -> float:
    return float(np.mean([np.square(cv2.Laplacian(image.astype(np.float32), cv2.CV_32F)).mean() for image in images]))


@pytest.mark.parametrize("size", [224, 128, 64])
def test_a_crop_that_shrinks_is_sharper_than_pillows_and_softer_than_means_of_pixels(size: int) -> None:
    photos = [cv2.resize(image, (500, 375), interpolation=cv2.INTER_AREA) for image in photographs()]
    rng, crops = np.random.default_rng(0), list[np.ndarray]()
    while len(crops) < 60:
        area, ratio = rng.uniform(0.08, 1) * 500 * 375, rng.uniform(3 / 4, 4 / 3)
        height, width = (min(int(area / ratio) ** 0.5, 375), min(int(area * ratio) ** 0.5, 500))
        crops.append(photos[len(crops) % 2][: int(height), : int(width)])
    averaged = sharpness([cv2.resize(crop, (size, size), interpolation=cv2.INTER_AREA) for crop in crops])
    pillow = [np.asarray(Image.fromarray(crop).resize((size, size), Image.Resampling.BILINEAR)) for crop in crops]
    ours = [resize(crop, size, size) for crop in crops]
    assert sharpness(pillow) < sharpness(ours) < averaged
    assert np.abs(np.array(ours, float) - np.array(pillow, float)).mean() < 3


def test_what_grows_or_hardly_shrinks_is_plainly_interpolated() -> None:
    image = photo(0, (100, 100))
    assert np.array_equal(resize(image, *image.shape[:2]), image)
    for size in (90, 150):
        assert np.array_equal(resize(image, size, size), cv2.resize(image, (size, size)))


def test_shrinking_one_axis_leaves_the_other_as_it_is() -> None:
    stripes = np.zeros((672, 224, 3), np.uint8)
    stripes[:, ::2] = 255
    assert np.array_equal(resize(stripes, 224, 224), stripes[:224])
    across = np.ascontiguousarray(stripes.transpose(1, 0, 2))
    assert np.array_equal(resize(across, 224, 224), across[:, :224])


@pytest.mark.parametrize("shape", [(1, 1), (1, 700), (700, 1), (3, 9), (449, 224), (448, 225), (4000, 223)])
def test_any_shape_can_be_resized(shape: tuple[int, int]) -> None:
    image = np.full((*shape, 3), 77, np.uint8)
    assert np.array_equal(resize(image, 224, 224), np.full((224, 224, 3), 77, np.uint8))


def test_evaluation_shrinks_a_photograph_as_area_averaging_does() -> None:
    image = cv2.resize(photo(0, (160, 160)), (640, 640), interpolation=cv2.INTER_CUBIC)
    expected = cv2.resize(image, (256, 256), interpolation=cv2.INTER_AREA)[16:240, 16:240]
    out = eval_transform(settings())(image, (0, 0, 0))
    assert np.array_equal(out, expected)


@pytest.mark.parametrize("shape", [(2, 20_000), (20_000, 2), (3, 6000), (6000, 3), (1, 40)])
@pytest.mark.parametrize("crop", ["resized", "fixed"])
def test_a_strip_is_cropped_before_it_is_scaled(
    shape: tuple[int, int], crop: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, plain = list[int](), cv2.resize

    def noted(*args: Any, **options: Any) -> np.ndarray:
        made.append(plain(*args, **options).size)
        return plain(*args, **options)

    monkeypatch.setattr(cv2, "resize", noted)
    for make in (train_transform, eval_transform):
        assert make(settings(crop=crop))(gradient(*shape), (0, 0, 0)).shape == (224, 224, 3)
    assert max(made) <= 256 * 256 * 3


def test_of_a_strip_evaluation_takes_the_middle_and_the_fixed_crop_any_place() -> None:
    columns = np.zeros((2, 20_000, 3), np.uint8)
    columns[:, :, 0] = np.arange(20_000) // 100
    assert (eval_transform(settings())(columns, (0, 0, 0))[..., 0].astype(int) - 100 <= 0).all()
    transform = train_transform(settings(crop="fixed"))
    places = [float(transform(columns, (0, 0, number))[..., 0].mean()) for number in range(100)]
    assert min(places) < 20
    assert max(places) > 180
    for image in (columns, np.ascontiguousarray(columns.transpose(1, 0, 2))):
        assert np.array_equal(transform(image, (0, 0, 1)), transform(image, (0, 0, 1)))


@pytest.mark.parametrize("shape", [(40, 1279), (1279, 40), (90, 160)])
def test_what_is_no_strip_is_scaled_whole(shape: tuple[int, int]) -> None:
    image, seeds = cv2.resize(photo(), shape[::-1]), range(3)
    short, size = A.SmallestMaxSize(256, interpolation=cv2.INTER_LINEAR, area_for_downscale="image"), (224, 224)
    for make, crop in ((eval_transform, A.CenterCrop(*size)), (train_transform, A.RandomCrop(*size))):
        plain = AlbumentationsAdapter(short, crop)
        ours = make(settings(crop="fixed"))
        assert all(np.array_equal(ours(image, (0, 0, n)), plain(image, (0, 0, n))) for n in seeds)


# ---- the local datasets ----------------------------------------------------------------------------------------------


def test_the_digits_are_split_1437_to_360_disjoint_and_even_by_class() -> None:
    train, val = load_digits()
    assert (len(train), len(val)) == (1437, 360)
    assert train.classes == val.classes == list("0123456789")
    assert isinstance(train.images, np.ndarray)
    assert isinstance(val.images, np.ndarray)
    assert (train.images.shape[1:], train.images.dtype) == ((8, 8, 3), np.dtype(np.uint8))
    assert (train.images.min(), train.images.max()) == (0, 255)
    assert {image.tobytes() for image in train.images} & {image.tobytes() for image in val.images} == set()
    shares = np.bincount(val.labels) / (np.bincount(train.labels) + np.bincount(val.labels))
    assert np.abs(shares - 0.2).max() < 0.005
    again = load_digits()[1]
    assert np.array_equal(np.asarray(again.images), val.images)


def test_the_digits_and_their_split_are_those_of_scikit_learn() -> None:
    theirs = sklearn.datasets.load_digits()
    images = np.repeat((theirs.images * (255 / 16)).round().astype(np.uint8)[..., None], 3, axis=-1)
    ids = train_test_split(np.arange(len(images)), test_size=0.2, random_state=0, stratify=theirs.target)
    for part, there in zip(load_digits(), ids, strict=True):
        assert np.array_equal(np.asarray(part.images), images[there])
        assert np.array_equal(part.all_labels(), theirs.target[there])


def test_digits_that_are_damaged_are_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sklearn" / "datasets" / "data").mkdir(parents=True)
    (tmp_path / "sklearn" / "__init__.py").touch()
    monkeypatch.delitem(sys.modules, "sklearn", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(DataError, match="install it again"):
        load_digits()
    (tmp_path / "sklearn" / "datasets" / "data" / "digits.csv.gz").write_bytes(gzip.compress(b"0,0,7,15")[:-9])
    with pytest.raises(DataError, match="install it again"):
        load_digits()


@pytest.fixture
def cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    pixels, facts = tiny_cifar.write(tmp_path)
    tiny_cifar.adopt(facts, monkeypatch.setattr)
    return pixels


@pytest.mark.parametrize(
    ("name", "train_files", "test_file"),
    [
        ("cifar10", [f"CIFAR10/data_batch_{n}" for n in range(1, 6)], "CIFAR10/test_batch"),
        ("cifar100", ["CIFAR100/train"], "CIFAR100/test"),
    ],
)
def test_cifar_is_read_from_torchvisions_files(
    tmp_path: Path, cifar: dict[str, np.ndarray], name: str, train_files: list[str], test_file: str
) -> None:
    train, val = load_cifar(name, tmp_path)
    assert np.array_equal(np.asarray(train.images), np.concatenate([cifar[file] for file in train_files]))
    assert np.array_equal(np.asarray(val.images), cifar[test_file])
    assert train.labels == [0, 1, 2, 3] * len(train_files)
    assert train.classes == val.classes == [f"name {label}" for label in range(10)]


def make_photos(root: Path, split: str, counts: dict[str, int]) -> None:
    for label, (name, count) in enumerate(counts.items()):
        (root / split / name).mkdir(parents=True)
        for number in range(count):
            data = encode(photo(label + number, (40, 60)))
            (root / split / name / f"{number}.jpg").write_bytes(data)


def test_an_image_folder_is_read_by_its_folders_names(tmp_path: Path) -> None:
    make_photos(tmp_path, "train", {"ant": 3, "bee": 2})
    make_photos(tmp_path, "val", {"ant": 1, "bee": 1})
    train, val = open_image_folder(tmp_path, "train", ["val"], None, whole=False)
    assert val is not None
    assert train.classes == val.classes == ["ant", "bee"]
    assert (train.labels, val.labels) == ([0, 0, 0, 1, 1], [0, 1])
    assert train.read(4) == ((tmp_path / "train" / "bee" / "1.jpg").read_bytes(), 1)


@pytest.mark.parametrize(
    ("train", "val", "named"),
    [
        (None, {"ant": 1}, ["train", "--data_dir"]),
        ({"ant": 1, "bee": 1}, None, ["val", "--data_dir"]),
        ({"ant": 1, "bee": 1}, {"ant": 1, "cat": 1}, ["bee"]),
        ({"ant": 1, "bee": 0}, {"ant": 1, "bee": 1}, ["train", "no images"]),
    ],
)
def test_an_image_folder_that_is_not_one_is_refused_in_one_line(
    tmp_path: Path, train: dict[str, int] | None, val: dict[str, int] | None, named: list[str]
) -> None:
    for split, counts in (("train", train), ("val", val)):
        if counts is not None:
            make_photos(tmp_path, split, counts)
    with pytest.raises(DataError) as refusal:
        get_data_loaders(settings("imagefolder", data_dir=str(tmp_path)), CPU)
    message = str(refusal.value)
    assert [text for text in named if text not in message] == [], message
    assert "\n" not in message


@pytest.mark.parametrize(("limit", "kept"), [(None, 10), (10, 10), (99, 10), (5, 5), (3, 3), (1, 1)])
def test_max_samples_spreads_over_a_local_dataset_and_keeps_labels_with_images(limit: int | None, kept: int) -> None:
    images = np.arange(10, dtype=np.uint8)[:, None, None, None].repeat(3, axis=-1)
    whole = LocalDataset(images, list(range(10)), [f"class {number}" for number in range(10)])
    part = whole.take(fair_sample(whole.all_labels(), limit))
    assert len(part) == len(part.block_rows) == kept
    assert [int(np.asarray(part.read(i)[0])[0, 0, 0]) for i in range(kept)] == part.labels
    assert part.labels == [i * 10 // kept for i in range(kept)]


# ---- get_data_loaders ------------------------------------------------------------------------------------------------


def test_the_loaders_of_the_digits_are_wired_to_the_settings() -> None:
    config = settings("digits", batch_size=48, seed=5)
    data = get_data_loaders(config, CPU)
    assert (len(data.train), len(data.val)) == (29, 8)  # 1,437 in 8 streams of 179 or 180, 6 of each a step
    assert (data.train.batch_size, data.val.batch_size) == (48, 48)
    assert (data.train.train, data.val.train) == (True, False)
    assert (data.train.augment, data.val.augment) == (Chain((Augment(5, padding=1),)), None)
    assert (data.classes, data.revision) == (list("0123456789"), None)
    assert describe_data(config, data) == [
        "images    digits: 1,437 for training, 360 for validation; 29 steps an epoch",
        "classes   10: 0 (142), 1 (146), 2 (142), 3 (146), 4 (145), 5 (145), 6 (145), 7 (143), 8 (139), 9 (144)",
    ]
    seen = torch.cat([batch.ids for batch in data.val])
    assert seen.tolist() == list(range(360))


def test_local_data_is_shuffled_as_a_whole_whatever_the_window() -> None:
    first = get_data_loaders(settings("digits", shuffle_window=1), CPU)
    second = get_data_loaders(settings("digits"), CPU)
    assert all(np.array_equal(a, b) for a, b in zip(first.train.order(0), second.train.order(0), strict=True))


def test_an_evaluation_batch_is_never_larger_than_256() -> None:
    assert get_data_loaders(settings("digits", batch_size=512), CPU).val.batch_size == 256


def test_max_samples_bounds_both_splits_of_hub_data(tmp_path: Path) -> None:
    folder = make_imagenet_like(tmp_path, train=60, validation=25, rows_per_group=5, size=(20, 30))
    config = settings("hf", dataset_name=str(folder), max_samples=23, batch_size=8, streams=4, image_size=16)
    data = get_data_loaders(config, CPU)
    assert (len(data.train.dataset), len(data.val.dataset)) == (23, 23)
    assert data.revision is None
    images, labels, _ = next(iter(data.train))
    assert (images.shape, labels.shape) == ((8, 16, 16, 3), (8,))


def test_a_batch_larger_than_the_dataset_is_refused_with_both_numbers() -> None:
    with pytest.raises(UsageError, match=r"--batch_size 64 .* 40 images"):
        get_data_loaders(settings("digits", max_samples=40), CPU)


def test_one_class_is_nothing_to_classify(tmp_path: Path) -> None:
    make_photos(tmp_path, "train", {"ant": 3})
    make_photos(tmp_path, "val", {"ant": 1})
    with pytest.raises(DataError, match="one class"):
        get_data_loaders(settings("imagefolder", data_dir=str(tmp_path)), CPU)
