"""The figures of an evaluation are scikit-learn's and torchmetrics', and classes are found by any of their names."""

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support, top_k_accuracy_score

from errors import DataError
from pages.names import short
from results import charts
from results.class_map import imagenet_class_names, imagenet_numbers, map_classes
from results.figures import calibration_error, confusions, figures_of, fit_temperature
from results.real_labels import read_real_labels
from results.report import Evaluation, as_json, describe, safe, write_files
from results.scores import Judge, Scores, _Gathered
from stream.loader import Batch
from stream.local import LocalDataset

CPU = torch.device("cpu")


def scores_of(logits: torch.Tensor, labels: torch.Tensor, judge: Judge | None = None) -> Scores:
    """What `collect` makes of these logits (N, classes), in batches of 7 of which the last is padded."""
    count, classes = logits.shape
    gathered = _Gathered(judge or Judge(np.arange(classes)), classes, CPU)
    for first in range(0, count, 7):
        ids = torch.arange(first, min(first + 7, count))
        padded = torch.nn.functional.pad(logits[ids], (0, 0, 0, 7 - len(ids)))
        y = torch.nn.functional.pad(labels[ids], (0, 7 - len(ids)), value=-1)
        gathered.add(padded, y, Batch(torch.empty(0), labels[ids], ids))
    table = gathered.table(count)
    counts = (table[:, 1] == 1) & (table[:, 2] >= 0)
    return Scores(
        ids=np.flatnonzero(counts),
        labels=gathered.allowed[table[counts, 2].astype(int)],
        predictions=gathered.allowed[table[counts, 3].astype(int)],
        probabilities=table[counts, 4],
        losses=table[counts, 5],
        in_top5=table[counts, 6] == 1,
        unreadable=0,
        unlabelled=0,
        seconds=1.0,
    )


def drawn_logits(images: int, classes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (images,), generator=generator)
    logits = torch.randn((images, classes), generator=generator) * 2
    logits[torch.arange(images), labels] += 2
    return logits, labels


@pytest.mark.parametrize(("images", "classes"), [(97, 3), (500, 10), (300, 1000)])
def test_figures_are_those_of_scikit_learn(images: int, classes: int) -> None:
    logits, labels = drawn_logits(images, classes)
    scores = scores_of(logits, labels)
    figures = figures_of(scores, [f"c{number}" for number in range(classes)], np.arange(classes))
    y, answers = labels.numpy(), logits.argmax(1).numpy()
    assert scores.ids.tolist() == [*range(images)]
    assert scores.predictions.tolist() == answers.tolist()
    theirs = confusion_matrix(y, answers, labels=range(classes))
    ours = np.zeros((classes, classes), int)
    for label, prediction, count in confusions(scores):
        ours[label, prediction] = count
    assert (ours == theirs).all()
    assert figures.correct1 == int((y == answers).sum())
    if classes > 5:
        hits = top_k_accuracy_score(y, logits.numpy(), k=5, labels=range(classes), normalize=False)
        assert figures.correct5 == hits
    seen = np.unique(y)
    each = precision_recall_fscore_support(y, answers, labels=seen, zero_division=0)
    listed = [c for c in figures.classes if c.images]
    assert [c.number for c in listed] == seen.tolist()
    ours_each = np.array([(c.precision, c.recall, c.f1, c.images) for c in listed], float).T
    np.testing.assert_allclose(ours_each, each, rtol=1e-12)
    macro = precision_recall_fscore_support(y, answers, labels=seen, average="macro", zero_division=0)
    np.testing.assert_allclose([figures.macro_precision, figures.macro_recall, figures.macro_f1], macro[:3], rtol=1e-12)
    expected = torch.nn.functional.cross_entropy(logits.double(), labels)
    assert figures.loss == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("scale", [0.1, 1.0, 8.0, 1000.0])
def test_the_calibration_error_is_that_of_torchmetrics_also_at_the_ends_of_its_ranges(scale: float) -> None:
    torchmetrics = pytest.importorskip("torchmetrics.classification")
    logits, labels = drawn_logits(2000, 10)
    theirs = torchmetrics.MulticlassCalibrationError(10, n_bins=15, norm="l1")((logits * scale).softmax(1), labels)
    scores = scores_of(logits * scale, labels)
    ours = calibration_error(scores.probabilities, scores.labels == scores.predictions)
    assert ours == pytest.approx(float(theirs), abs=1e-6)


def test_a_temperature_undoes_the_scale_of_logits() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn((4000, 10), generator=generator) * 3
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    fit = fit_temperature((logits * 2.5).numpy(), labels.numpy())
    assert fit.value == pytest.approx(2.5, rel=0.05)
    assert fit.loss_after < fit.loss_before
    assert fit.ece_after < 0.02 < fit.ece_before


def test_only_allowed_classes_are_answered_and_labels_go_through_the_map() -> None:
    logits = torch.tensor([[9.0, 1, 2, 3], [0, 8, 1, 2], [5, 0, 0, 4]])
    judge = Judge(np.array([3, 1]), allowed=np.array([1, 3]))  # the data's classes 0 and 1 are the model's 3 and 1
    scores = scores_of(logits, torch.tensor([0, 1, 0]), judge)
    assert scores.labels.tolist() == [3, 1, 3]
    assert scores.predictions.tolist() == [3, 1, 3]
    assert scores.probabilities[0] == pytest.approx(float(torch.tensor([1.0, 3]).softmax(0)[1]))
    figures = figures_of(scores, list("abcd"), np.array([1, 3]))
    assert (figures.top1, [c.name for c in figures.classes]) == (1.0, ["b", "d"])


def test_a_class_without_images_has_no_fractions_and_no_part_in_the_means() -> None:
    logits = torch.eye(3)[[0, 1, 2]] * 5
    figures = figures_of(scores_of(logits, torch.tensor([0, 1, 1])), list("abc"), np.arange(3))
    assert figures.classes[2].images == 0
    assert figures.classes[2].precision is None
    assert figures.macro_recall == pytest.approx((1 + 0.5) / 2)


# ---- class names -----------------------------------------------------------------------------------------------------


def numbers(data: list[str], model: list[str] | None, count: int, absent: tuple[str, ...] = ()) -> list[int]:
    return map_classes(data, model, count, lambda: absent).numbers.tolist()


def test_classes_are_matched_by_name_in_any_order_and_number() -> None:
    assert numbers(["b", "a"], ["a", "b", "c"], 3) == [1, 0]
    assert numbers(["c"], ["a", "b", "c"], 3) == [2]
    assert numbers(["a", "0"], ["a", "b"], 2, absent=("0",)) == [0, -1]
    assert numbers(["x", "y"], None, 2) == [0, 1]
    assert "does not name" in map_classes(["x", "y"], None, 2, tuple).how


def test_imagenets_classes_are_known_by_id_number_and_name() -> None:
    names = imagenet_class_names()
    assert (len(names), names[0], names[999]) == (1000, "tench", "toilet tissue")
    assert numbers(["n01440764", "n01498041"], names, 1000) == [0, 6]
    assert numbers(["n01498041 stingray"], None, 1000) == [6]
    assert numbers(["999", "0", "17"], names, 1000) == [999, 0, 17]
    assert numbers([str(number) for number in range(1000)], None, 1000) == [*range(1000)]
    assert numbers(sorted(str(number) for number in range(1000)), None, 1000)[:3] == [0, 1, 10]
    assert numbers(["tench, Tinca tinca", "stingray"], names, 1000) == [0, 6]
    assert numbers(["Cardigan", "cardigan"], None, 1000) == [264, 474]
    assert numbers(["stingray"], ["n01498041", "n01440764"], 2) == [0]
    respelled = [f"{name}!" if number % 90 == 0 else name for number, name in enumerate(names)]
    found = imagenet_numbers(respelled)
    assert found is not None
    assert found.tolist() == [*range(1000)]


@pytest.mark.parametrize(
    ("data", "model", "count", "told"),
    [
        (["a", "z"], ["a", "b"], 2, "the class z, which the model has not"),
        (["x", "y", "z"], None, 2, "it has 2 classes without names"),
        (["zebra crossing"], None, 1000, "zebra crossing"),
        (["new\nline"], ["a", "b"], 2, r"new\\nline"),
    ],
)
def test_classes_that_the_model_has_not_are_named(
    data: list[str], model: list[str] | None, count: int, told: str
) -> None:
    with pytest.raises(DataError, match=told) as error:
        map_classes(data, model, count, tuple)
    assert "\n" not in str(error.value)


# ---- ReaL labels -----------------------------------------------------------------------------------------------------


def real_file(folder: Path, first: list[list[int]]) -> Path:
    (folder / "real.json").write_text(json.dumps(first + [[0]] * (50_000 - len(first))))
    return folder / "real.json"


def numbered_images(count: int) -> LocalDataset:
    paths = [Path(f"/set/n/ILSVRC2012_val_{number:08d}_n01440764.JPEG") for number in range(1, count + 1)]
    return LocalDataset(paths, [0] * count, ["n01440764"])


def test_with_real_labels_any_of_an_images_classes_is_right_and_none_does_not_count(tmp_path: Path) -> None:
    options = read_real_labels(real_file(tmp_path, [[5, 7], [], [3]]), numbered_images(3), None, 1000)
    assert options.tolist() == [[7, 5], [-1, -1], [3, -1]]
    logits = torch.zeros((3, 1000))
    logits[0, 7], logits[0, 5], logits[1, 0], logits[2, 9] = 4, 2, 1, 1
    scores = scores_of(logits, torch.zeros(3, dtype=torch.int64), Judge(np.zeros(1, np.int64), options=options))
    assert scores.ids.tolist() == [0, 2]
    assert scores.labels.tolist() == [7, 3]
    assert scores.predictions.tolist() == [7, 9]


@pytest.mark.parametrize("text", ["[]", "{", '{"a": 1}', json.dumps([[1000]] * 50_000), "[" * 100_000, "3"])
def test_files_that_are_no_real_labels_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "real.json").write_text(text)
    with pytest.raises(DataError, match="cannot be read as ReaL labels"):
        read_real_labels(tmp_path / "real.json", numbered_images(1), None, 1000)


def test_real_labels_need_imagenets_classes_and_file_names(tmp_path: Path) -> None:
    file = real_file(tmp_path, [])
    with pytest.raises(DataError, match="ILSVRC2012_val_00000001"):
        read_real_labels(file, LocalDataset([Path("/set/1.jpg")], [0], ["n01440764"]), None, 1000)
    with pytest.raises(DataError, match="for ImageNet's classes"):
        read_real_labels(file, numbered_images(1), ["cat", "dog"], 2)


# ---- what is written -------------------------------------------------------------------------------------------------

STRANGE = ["<b>tench</b>", "new\nline", "$x^{2$", 'quo"te,d', "é猫", "\udcff", "a" * 200, "plain", "0", "-1"]


def evaluation(classes: int = 10) -> Evaluation:
    names = STRANGE if classes == 10 else [f"class {number}" for number in range(classes)]
    scores = scores_of(*drawn_logits(97, classes))
    return Evaluation({"source": "x"}, names, scores, figures_of(scores, names, np.arange(classes)))


def test_names_of_any_kind_are_written_so_that_they_are_read_again(tmp_path: Path) -> None:
    found = evaluation()
    images = [Path(f"/set/{STRANGE[1]}/{number}.png") for number in range(97)]
    write_files(found, LocalDataset(images, found.scores.labels, STRANGE, Path("/set")), tmp_path)
    rows = [*csv.DictReader(io.StringIO((tmp_path / "predictions.csv").read_text(), newline=""))]
    assert len(rows) == 97
    assert [row["image"] for row in rows] == [f"{STRANGE[1]}/{number}.png" for number in range(97)]
    written = [name.encode(errors="backslashreplace").decode() for name in STRANGE]
    assert [row["label"] for row in rows] == [written[label] for label in found.scores.labels]
    with open(tmp_path / "confusion.csv", newline="") as file:
        assert sum(int(row["images"]) for row in csv.DictReader(file)) == 97
    told = json.loads((tmp_path / "evaluation.json").read_text())
    assert [entry["name"] for entry in told["classes"]] == STRANGE
    assert all("\n" not in line for line in describe(found))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["confusion.csv", "evaluation.json", "predictions.csv"]


def test_a_loss_that_is_no_number_is_null_in_json() -> None:
    logits, labels = drawn_logits(20, 3)
    logits[0] = torch.nan
    scores = scores_of(logits, labels)
    found = Evaluation({}, ["a", "b", "c"], scores, figures_of(scores, ["a", "b", "c"], np.arange(3)))
    told = as_json(found)
    assert told["loss"] is None
    json.dumps(told, allow_nan=False)
    assert "top5" not in describe(found)[0]


def test_names_are_shortened_to_one_line_and_made_safe_for_folders() -> None:
    assert short("tench, Tinca tinca") == "tench"
    assert len(short("a" * 200)) == 32
    assert short("a\nb") == r"a\nb"
    assert safe("../up/$x y") == "up-x-y"
    assert safe("猫") == "data"


@pytest.mark.parametrize("classes", [2, 10, 41, 1000])
def test_every_picture_is_drawn_at_few_and_at_many_classes(classes: int, tmp_path: Path) -> None:
    images = np.zeros((24, 8, 8, 3), np.uint8)
    charts.draw_all(evaluation(classes), tmp_path, lambda ids: images[: len(ids)])
    assert sorted(path.stem for path in tmp_path.iterdir()) == ["classes", "confusion", "hardest", "reliability"]


def test_a_picture_that_cannot_be_drawn_is_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(ids: np.ndarray) -> np.ndarray:
        raise DataError("the images are gone")

    charts.draw_all(evaluation(), tmp_path, fail)
    assert capsys.readouterr().err.count("\n") == 1
    assert sorted(path.stem for path in tmp_path.iterdir()) == ["classes", "confusion", "reliability"]
