"""predict.py: the classes of files as they come, and nothing that one of them does to the others."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from program import run, train
from safetensors.torch import save_file
from sklearn.datasets import load_sample_images
from torch import nn

import predict
from config import resolve
from model_resnet50 import build_model
from preprocess import eval_transform
from results.heatmap import heatmaps
from stream.augment import Normalize
from training.predictor import Predictor

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def unrendered() -> None:
    """These pictures are rendered."""


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two photographs, one of them as CMYK too, a broken one, and a text file."""
    folder = tmp_path_factory.mktemp("photos")
    for name, pixels in zip(("china.jpg", "flower.jpg"), load_sample_images().images, strict=True):
        Image.fromarray(pixels).resize((320, 214)).save(folder / name, quality=95)
    Image.open(folder / "china.jpg").convert("CMYK").save(folder / "cmyk.jpg", quality=95)
    (folder / "broken.jpg").write_bytes((folder / "flower.jpg").read_bytes()[:3000])
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "weights.safetensors"
    save_file(build_model(7, 64, "resnet18").state_dict(), path)
    return path


def expected(weights: Path, image: Path) -> list[float]:
    """Probabilities by torchvision's own steps, as far as these exist."""
    from safetensors.torch import load_file

    model = build_model(7, 64, "resnet18")
    model.load_state_dict(load_file(weights))
    config = resolve({"eval_size": 224, "eval_crop_pct": 0.875, "eval_interpolation": "bilinear"})
    pixels = eval_transform(config)(image.read_bytes(), (0, 0, 0))
    with torch.inference_mode():
        return model.eval()(Normalize()(torch.from_numpy(pixels)[None])).softmax(1)[0].tolist()


def test_the_classes_of_a_folder_are_those_of_its_images_one_by_one(
    photos: Path, weights: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    flags = ("--top", 3, "--json", "--csv", tmp_path / "there" / "classes.csv")
    done = run(weights, photos, *flags, entry=predict.main)
    assert done.status == 0
    told = json.loads(done.out)
    assert [Path(row["image"]).name for row in told] == ["china.jpg", "cmyk.jpg", "flower.jpg"]
    for row in told:
        right = expected(weights, Path(row["image"]))
        likeliest = np.argsort(right)[::-1][:3].tolist()
        assert [one["index"] for one in row["top"]] == likeliest
        assert [one["probability"] for one in row["top"]] == pytest.approx([right[i] for i in likeliest], abs=1e-6)
        assert [one["class"] for one in row["top"]] == [str(i) for i in likeliest]
    assert "broken.jpg cannot be read" in caplog.text
    assert "are no images and left out: 1 .txt" in done.err
    with open(tmp_path / "there" / "classes.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["image"], int(row["rank"]), int(row["index"])) for row in rows] == [
        (row["image"], rank, one["index"]) for row in told for rank, one in enumerate(row["top"], 1)
    ]


def test_a_file_that_is_named_is_tried_whatever_it_is(
    photos: Path, weights: Path, caplog: pytest.LogCaptureFixture
) -> None:
    done = run(weights, photos / "notes.txt", photos / "china.jpg", entry=predict.main)
    assert done.status == 0
    assert "notes.txt cannot be read (no decoder recognises it" in caplog.text
    (line,) = done.out.splitlines()
    assert line.startswith(str(photos / "china.jpg"))
    assert line.count(" % ") == 5


@pytest.mark.parametrize(
    ("told", "status", "words"),
    [
        (["*.gif"], 3, "matches it; give images, folders or patterns"),
        (["nowhere"], 3, "nothing is called"),
        (["broken.jpg"], 3, "not one of the images can be read"),
        (["notes.txt"], 3, "not one of the images can be read"),
        (["http://example.com/cat.jpg"], 2, "is a URL, and nothing is downloaded"),
        (["china.jpg", "--top", "0"], 2, "--top 0 is too small"),
        (["china.jpg", "--heatmap"], 2, "--heatmap is laid over the images of --grid FILE"),
        (["china.jpg", "--grid", "grid.gif"], 2, "end its name with .png"),
        (["china.jpg", "--csv", "."], 2, "--csv . is a folder; give a file"),
        (["china.jpg", "--csv", "china.jpg/classes.csv"], 2, "another folder with --csv"),
        (["china.jpg", "--grid", "china.jpg/grid.png"], 2, "another folder with --grid"),
        (["china.jpg", "--grid", "/proc/none/grid.png"], 2, "another folder with --grid"),
        (["china.jpg", "--lr", "1"], 2, "unrecognized arguments: --lr 1"),
        ([], 2, "the following arguments are required: IMAGE"),
    ],
)
def test_what_cannot_be_done_is_told_in_one_line(
    photos: Path, weights: Path, monkeypatch: pytest.MonkeyPatch, told: list[str], status: int, words: str
) -> None:
    monkeypatch.chdir(photos)
    done = run(weights, *told, entry=predict.main)
    assert (done.status, done.out) == (status, "")
    assert words in done.err.splitlines()[-1]


def test_an_empty_folder_has_no_images(weights: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    done = run(weights, tmp_path / "empty", entry=predict.main)
    assert (done.status, "there are no images in" in done.err) == (3, True)


def test_many_images_are_decoded_by_processes_with_the_same_result(photos: Path, weights: Path, tmp_path: Path) -> None:
    for number in range(70):
        name = "broken.jpg" if number == 40 else "flower.jpg"
        (tmp_path / f"{number:03d}.jpg").write_bytes((photos / name).read_bytes())
    done = run(
        weights, tmp_path, "--json", "--num_workers", 1, "--batch_size", 32, "--eval_size", 32, entry=predict.main
    )
    alone = run(weights, photos / "flower.jpg", "--json", "--eval_size", 32, entry=predict.main)
    told, (one,) = json.loads(done.out), json.loads(alone.out)
    assert [Path(row["image"]).stem for row in told] == [f"{n:03d}" for n in range(70) if n != 40]
    for row in told:
        assert [top["index"] for top in row["top"]] == [top["index"] for top in one["top"]]
        assert row["top"][0]["probability"] == pytest.approx(one["top"][0]["probability"], abs=1e-6)


def test_odd_names_stay_on_their_line_and_in_their_picture(photos: Path, tmp_path: Path) -> None:
    odd = ["a\nb", "<b>$x_$", "\udcff", "猫" * 100]
    for name in odd:
        for part in ("train", "val"):
            (tmp_path / "set" / part / name[:60]).mkdir(parents=True)
            for number in range(4):
                pixels = np.full((40, 40, 3), 60 * odd.index(name), np.uint8)
                Image.fromarray(pixels).save(tmp_path / "set" / part / name[:60] / f"{number}.png")
    flags = ("--dataset", "imagefolder", "--data_dir", tmp_path / "set", "--image_size", 32, "--model", "resnet18")
    train(*flags, "--epochs", 1, "--batch_size", 8, "--num_workers", 0, "--run_dir", tmp_path / "run")
    image = tmp_path / "$^$\n<i>.jpg"
    image.write_bytes((photos / "china.jpg").read_bytes())
    more = ("--grid", tmp_path / "grid.png", "--heatmap", "--csv", tmp_path / "table.csv")
    done = run(tmp_path / "run", image, *more, entry=predict.main)
    assert done.status == 0, done.err
    assert done.out.count("\n") == 1
    assert "cannot be drawn" not in done.err
    assert Image.open(tmp_path / "grid.png").size[0] > 200


class Colours(nn.Module):
    """Two classes: how red and how green an image is, each from a feature map of its own."""

    name = "colours"

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Conv2d(3, 2, 4, 4, bias=False)
        self.fc = nn.Linear(2, 2, bias=False)
        with torch.no_grad():
            self.features.weight.copy_(torch.eye(2, 3)[:, :, None, None].expand(2, 3, 4, 4))
            self.fc.weight.copy_(torch.eye(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.features(x).relu().mean((2, 3)))


def test_a_heatmap_is_warm_where_the_class_is() -> None:
    images = torch.zeros(2, 32, 32, 3, dtype=torch.uint8)  # the same image twice, asked about both classes
    images[:, 8:16, 4:12, 0] = 255
    images[:, 20:28, 20:28, 1] = 255
    predictor = Predictor(model=Colours().eval(), normalize=Normalize(), device=CPU)
    warm = heatmaps(predictor, images, torch.tensor([0, 1]))
    assert warm.shape == (2, 32, 32)
    assert warm.amax((1, 2)).tolist() == [1, 1]
    assert warm[0, 12, 8] > 0.9 > 0.1 > warm[0, 24, 24]
    assert warm[1, 24, 24] > 0.9 > 0.1 > warm[1, 12, 8]
    assert all(parameter.grad is None for parameter in predictor.model.parameters())


def test_a_grid_of_many_says_how_many_there_are(photos: Path, weights: Path, tmp_path: Path) -> None:
    told = [photos / "flower.jpg"] * 70
    done = run(weights, *told, "--eval_size", 32, "--num_workers", 0, "--grid", tmp_path / "g.png", entry=predict.main)
    assert f"the first {predict.MOST_IN_GRID} of 70 images" in done.err
    assert done.out.count("\n") == 70
