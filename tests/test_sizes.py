"""Sizes, interpolations, mirrored evaluation and repeats: pixels are Pillow's and torchvision's, orders are kept."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from program import assert_same_run, cut, ledger, run, train
from shards import photographs
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from config import Config, resolve
from preprocess import eval_transform, train_transform
from stream.images import resize
from stream.order import epoch_order, repeated

MODES = {"bilinear": InterpolationMode.BILINEAR, "bicubic": InterpolationMode.BICUBIC}
SMALL = ("--max_samples", 64, "--batch_size", 16)


def settings(**given: Any) -> Config:
    return resolve({"dataset": "imagenet1k"} | given)


# ---- interpolation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interpolation", MODES)
@pytest.mark.parametrize(
    ("size", "share", "short"), [(224, 0.9655, 232), (224, 0.95, 235), (160, None, 183), (224, 1.0, 224)]
)
def test_evaluation_is_torchvisions_to_the_pixel(
    interpolation: str, size: int, share: float | None, short: int
) -> None:
    ours = eval_transform(settings(eval_size=size, eval_crop_pct=share, eval_interpolation=interpolation))
    steps = [transforms.Resize(short, MODES[interpolation]), transforms.CenterCrop(size)]
    theirs = transforms.Compose(steps)
    for image in photographs():
        for shown in (image, image[:-1, :-2], image[:, 3:], np.ascontiguousarray(image.transpose(1, 0, 2))):
            expected = np.asarray(theirs(Image.fromarray(shown)))
            assert np.array_equal(ours(shown, (0, 0, 0)), expected)


@pytest.mark.parametrize("interpolation", MODES)
def test_a_resized_crop_is_pillows(interpolation: str) -> None:
    transform = train_transform(settings(train_interpolation=interpolation, image_size=96))
    plain = train_transform(settings(image_size=96))
    for number, image in enumerate(photographs()):
        crop, differs = transform(image, (0, 1, number)), plain(image, (0, 1, number))
        assert crop.shape == (96, 96, 3)
        assert 0 < np.abs(crop.astype(int) - differs).mean() < 12  # the same place
    expected = Image.fromarray(image).resize((50, 40), getattr(Image.Resampling, interpolation.upper()))
    assert np.array_equal(resize(image, 40, 50, interpolation), np.asarray(expected))


def test_an_evaluation_crop_may_be_any_share_in_the_fast_interpolation_too() -> None:
    image = photographs()[0]
    whole, part = (
        eval_transform(settings(eval_size=64, eval_crop_pct=share))(image, (0, 0, 0)) for share in (1.0, 0.5)
    )
    assert whole.shape == part.shape == (64, 64, 3)
    assert not np.array_equal(whole, part)


# ---- mirror images ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_model")
def test_mirrored_evaluation_averages_the_logits_of_both(tmp_path: Path) -> None:
    from preprocess import get_data_loaders
    from train import evaluate
    from training.signals import StopRequest
    from training.step import build_training

    config = resolve({"dataset": "digits", "max_samples": 40, "tta": "flip", "batch_size": 16})
    data = get_data_loaders(config, torch.device("cpu"))
    training = build_training(config, 10, torch.device("cpu"))
    loss, count = 0.0, 0
    training.model.eval()
    with torch.no_grad():
        for images, labels, _ in data.val:
            x = training.normalize(images)
            logits = (training.model(x) + training.model(x.flip(3))) / 2
            loss += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
            count += len(labels)
    assert evaluate(training, data.val, StopRequest())["val_loss"] == pytest.approx(loss / count, rel=1e-5)


# ---- repeats ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("repeats", [2, 3, 4])
@pytest.mark.parametrize(("images", "streams", "window"), [(1000, 4, 4), (997, 8, 2), (13, 2, 5)])
def test_copies_are_as_many_as_asked_for_apart_and_of_fewer_images(
    repeats: int, images: int, streams: int, window: int
) -> None:
    order = epoch_order(np.ones(images, np.int64), 3, 7, streams, images)
    for stream in order:
        found = repeated(stream, repeats, window, images)
        assert len(found) == len(stream)
        assert len(np.unique(found)) == len(found)
        shown, counts = np.unique(found % images, return_counts=True)
        assert set(shown) == set(stream[: -(-len(stream) // repeats)])
        assert (counts != repeats).sum() <= window  # where the stream was cut
        apart = found[1:] % images != found[:-1] % images
        assert apart[: -window * repeats].all()


def test_without_repeats_nothing_changes_and_an_order_is_that_of_any_number_of_ranks() -> None:
    ids = np.arange(10)
    assert np.array_equal(repeated(ids, 1, 2, 10), ids)
    assert len(repeated(ids[:0], 3, 2, 10)) == 0


@pytest.mark.usefixtures("small_model")
def test_a_repeated_image_is_changed_anew_and_a_run_resumes_to_the_bit(tmp_path: Path) -> None:
    flags: tuple[object, ...] = (
        *SMALL,
        "--epochs",
        2,
        "--repeats",
        2,
        "--random_erasing",
        1,
        "--mixup",
        0.2,
        "--ledger",
    )
    flags = (*flags, "--snapshot_steps", 1, "--keep_snapshots", 20)
    train(*flags, "--run_dir", tmp_path / "whole")
    train("--resume_from", cut(tmp_path / "whole", 3, tmp_path / "cut"))
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    assert len(ledger(tmp_path / "whole")) == 8


def test_the_copies_of_an_image_differ_on_the_stream_and_in_memory(image_set: Path) -> None:
    from preprocess import get_data_loaders

    for given in ({"dataset": "digits"}, {"dataset": "hf", "dataset_name": str(image_set), "image_size": 40}):
        config = resolve(given | {"max_samples": 32, "batch_size": 16, "streams": 2, "repeats": 2, "num_workers": 0})
        data = get_data_loaders(config, torch.device("cpu"))
        images, labels, ids = (torch.cat(parts) for parts in zip(*data.train, strict=True))
        real = ids % len(data.train.dataset)
        assert np.unique(real.numpy(), return_counts=True)[1].tolist() == [2] * 16
        differing = 0
        for one in np.unique(real.numpy()):
            first, second = np.flatnonzero(real.numpy() == one).tolist()
            assert labels[first] == labels[second]
            differing += not torch.equal(images[first], images[second])
        assert differing >= 11  # digits move by a pixel


# ---- progressive sizes -----------------------------------------------------------------------------------------------


def test_the_size_of_an_epoch_is_linear_between_its_points_in_steps_of_32() -> None:
    config = settings(progressive_size="128:0,192:0.6", image_size=192, epochs=10)
    assert [config.size_at(epoch) for epoch in range(10)] == [128, 128, 160, 160, 160, 192, 192, 192, 192, 192]
    ffcv = settings(progressive_size="160:0.74,192:0.86", image_size=192, epochs=100)
    expected = [int(np.round(np.interp(epoch, [74, 86], [160, 192]) / 32)) * 32 for epoch in range(100)]
    assert [ffcv.size_at(epoch) for epoch in range(100)] == expected
    assert settings().size_at(5) == 224


@pytest.mark.usefixtures("small_model")
def test_a_run_grows_its_images_and_resumes_to_the_bit(image_set: Path, tmp_path: Path) -> None:
    flags: tuple[object, ...] = (
        "--dataset",
        "hf",
        "--dataset_name",
        image_set,
        "--model",
        "resnet18",
        "--max_samples",
        32,
    )
    flags = (*flags, "--batch_size", 16, "--epochs", 3, "--progressive_size", "32:0,64:0.5", "--num_workers", 1)
    flags = (*flags, "--ledger", "--snapshot_steps", 1, "--keep_snapshots", 20, "--eval_size", 40)
    done = train(*flags, "--run_dir", tmp_path / "whole")
    assert "at 64x64" in done.out
    train("--resume_from", cut(tmp_path / "whole", 3, tmp_path / "cut"))
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    train(*flags, "--progressive_size", "64:0", "--run_dir", tmp_path / "plain")
    assert ledger(tmp_path / "plain")[0]["loss"] != ledger(tmp_path / "whole")[0]["loss"]


@pytest.mark.parametrize(
    "text", ["128", "128:0,192", "128:0.5,192:0.2", "100:0,192:1", "128:0,192:2", "x:0", "0:0", ""]
)
def test_a_list_of_sizes_that_is_none_is_refused_in_one_line(text: str) -> None:
    refused = run("--progressive_size", text)
    assert (refused.status, refused.err.count("\n")) == (2, 1)
    assert "such as 128:0,192:0.6" in refused.err


def test_the_last_size_is_the_image_size() -> None:
    assert resolve({"progressive_size": "32:0,64:1"}).image_size == 64
    refused = run("--progressive_size", "32:0,64:1", "--image_size", 96)
    assert "ends at another size than --image_size 96" in refused.err
