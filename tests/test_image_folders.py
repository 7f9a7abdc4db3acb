"""Image folders as people have them: what is an image is read, what is not is counted, and every layout is found."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from PIL import Image
from program import run, train

from errors import DataError
from stream.image_folders import open_image_folder, read_labels
from stream.images import decode
from stream.local import LocalDataset

pytestmark = pytest.mark.usefixtures("small_model")

QUICK = ("--image_size", 33, "--epochs", 1, "--num_workers", 0, "--model", "resnet18")
SPLITS = ["validation", "val", "valid", "test"]
ANT, BEE = (200, 30, 30), (30, 30, 200)


def put(path: Path, colour: tuple[int, int, int] = ANT, kind: str | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (24, 20), colour).save(path, kind)
    return path


def make_classes(folder: Path, each: int = 4, names: tuple[str, ...] = ("ant", "bee")) -> Path:
    for name, colour in zip(names, (ANT, BEE), strict=False):
        for number in range(each):
            put(folder / name / f"{number}.png", colour)
    return folder


def opened(folder: Path, whole: bool = True, **options: object) -> tuple[LocalDataset, LocalDataset | None]:
    given: dict[str, object] = {"split": "train", "others": SPLITS, "labels": None} | options
    return open_image_folder(folder, whole=whole, **given)  # type: ignore[arg-type]


def names_of(dataset: LocalDataset) -> list[str]:
    return [dataset.name(number) for number in range(len(dataset))]


def test_every_suffix_of_an_image_is_read_in_either_case_and_none_at_all(tmp_path: Path) -> None:
    make_classes(tmp_path)
    kinds = {"a.gif": "GIF", "b.JPG": "JPEG", "c.jfif": "JPEG", "d.Tiff": "TIFF", "e.AVIF": "AVIF", "f.webp": "WEBP"}
    kinds |= {"g.bmp": "BMP", "h.ppm": "PPM", "i.jp2": "JPEG2000", "no_suffix": "PNG", "n01440764_10026.jpg_1": "JPEG"}
    for name, kind in kinds.items():
        put(tmp_path / "ant" / name, kind=kind)
    data, _ = opened(tmp_path)
    assert [name for name in names_of(data) if name.startswith("ant/")] == [
        f"ant/{name}" for name in sorted([*kinds, *(f"{number}.png" for number in range(4))])
    ]
    assert data.notes == []
    for number, name in enumerate(names_of(data)):
        pixels = decode(data.read(number)[0])
        assert np.abs(pixels.reshape(-1, 3).mean(0) - (ANT if name.startswith("ant") else BEE)).max() < 6, name


def test_what_is_no_image_is_left_out_counted_and_named_by_its_kind(tmp_path: Path) -> None:
    make_classes(tmp_path)
    for name in ("notes.txt", "more.txt", "model.PTH", "LICENSE"):
        (tmp_path / "ant" / name).write_text("words")
    (tmp_path / "bee" / "new.jxl").write_bytes(b"\xff\x0a" + bytes(40))
    data, _ = opened(tmp_path)
    assert len(data) == 8
    assert data.notes == [
        f"5 files in {tmp_path} are no images and left out: 2 .txt, 1 .pth, 1 without suffix, 1 .jxl"
    ] or sorted(data.notes[0].partition(": ")[2].split(", ")) == ["1 .jxl", "1 .pth", "1 without suffix", "2 .txt"]


@pytest.mark.parametrize("split", ["", "train"])
def test_what_systems_put_beside_data_is_neither_a_class_nor_a_sample(tmp_path: Path, split: str) -> None:
    root = make_classes(tmp_path / split)
    make_classes(tmp_path / "val") if split else None
    for hidden in (".ipynb_checkpoints", "__MACOSX", "@eaDir", ".git", ".hidden"):
        put(root / hidden / "x.jpg")
        put(root / "ant" / hidden / "x.jpg")
    for hidden in ("._0.png", ".x.jpg", "Thumbs.db", ".DS_Store"):
        (root / "ant" / hidden).write_bytes((root / "ant" / "0.png").read_bytes())
    data, _ = opened(tmp_path)
    assert data.classes == ["ant", "bee"]
    assert names_of(data) == [f"{name}/{number}.png" for name in ("ant", "bee") for number in range(4)]
    assert data.notes == []


def test_subfolders_links_and_a_link_that_leads_back_are_followed_once(tmp_path: Path) -> None:
    root = make_classes(tmp_path / "set", each=2)
    put(root / "ant" / "deep" / "er" / "x.png")
    put(tmp_path / "elsewhere" / "y.png", BEE)
    (root / "bee" / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "bee" / "back").symlink_to(root / "bee")
    (root / "bee" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    data, _ = opened(root)
    assert names_of(data) == [
        *("ant/0.png", "ant/1.png", "ant/deep/er/x.png"),
        *("bee/0.png", "bee/1.png", "bee/gone.png", "bee/linked/y.png"),
    ]


def test_a_folder_without_an_image_is_no_class_and_told(tmp_path: Path) -> None:
    make_classes(tmp_path)
    (tmp_path / "cow").mkdir()
    (tmp_path / "doc").mkdir()
    (tmp_path / "doc" / "README.md").write_text("words")
    put(tmp_path / "stray.png")
    data, _ = opened(tmp_path)
    assert data.classes == ["ant", "bee"]
    assert data.notes[0] == f"{tmp_path} has no images in 2 folders (cow, doc): no class"
    assert data.notes[1] == f"1 images in {tmp_path} lie beside the class folders and are left out"


@pytest.mark.parametrize("val", SPLITS)
def test_each_usual_name_of_a_validation_folder_is_found(tmp_path: Path, val: str) -> None:
    make_classes(tmp_path / "train")
    make_classes(tmp_path / val, each=1)
    data, held = opened(tmp_path, whole=False)
    assert (len(data), len(held or ())) == (8, 2)


def test_flags_name_other_splits(tmp_path: Path) -> None:
    make_classes(tmp_path / "training")
    make_classes(tmp_path / "dev", each=1)
    make_classes(tmp_path / "test", each=3)
    flags = ("--dataset", "imagefolder", "--data_dir", tmp_path, "--train_split", "training", *QUICK)
    done = train(*flags, "--val_split", "dev", "--run_dir", tmp_path / "a")
    assert "8 for training, 2 for validation" in done.out
    done = train(*flags, "--run_dir", tmp_path / "b")
    assert "8 for training, 6 for validation" in done.out
    done = run(*flags, "--val_split", "none", "--run_dir", tmp_path / "c")
    assert (done.status, done.err.count("\n")) == (3, 1)
    assert "no folder none" in done.err


def test_classes_that_are_called_like_splits_are_classes(tmp_path: Path) -> None:
    make_classes(tmp_path, names=("train", "test"))
    data, _ = opened(tmp_path)
    assert data.classes == ["test", "train"]
    assert len(data) == 8


def test_without_validation_the_refusal_names_the_flag_that_helps(tmp_path: Path) -> None:
    make_classes(tmp_path / "split" / "train")
    done = run("--data_dir", tmp_path / "split", *QUICK, "--run_dir", tmp_path / "run")
    assert (done.status, done.err.count("\n")) == (3, 1)
    assert "--val_share 0.1" in done.err


def test_a_folder_of_class_folders_is_enough(tmp_path: Path) -> None:
    make_classes(tmp_path / "photos", each=10)
    done = train("--data_dir", tmp_path / "photos", *QUICK, "--batch_size", 8, "--run_dir", tmp_path / "run")
    assert "has no splits: --val_share 0.2 of each class is held out" in done.out
    assert "16 for training, 4 for validation" in done.out
    resumed = train("--resume_from", tmp_path / "run", "--override", "epochs=2")
    assert "16 for training, 4 for validation" in resumed.out


def test_splits_of_other_names_are_not_taken_for_classes(tmp_path: Path) -> None:
    make_classes(tmp_path / "train_images")
    make_classes(tmp_path / "test")
    done = run("--data_dir", tmp_path, *QUICK, "--run_dir", tmp_path / "run")
    assert (done.status, done.err.count("\n")) == (3, 1)


@pytest.mark.parametrize("split", ["", "train"])
def test_a_share_held_out_is_stratified_disjoint_and_the_same_on_a_resume(tmp_path: Path, split: str) -> None:
    root = make_classes(tmp_path / "set" / split, each=20)
    for number in range(10):
        (root / "bee" / f"{number}.png").unlink()
    flags = ("--dataset", "imagefolder", "--data_dir", tmp_path / "set", "--val_share", 0.2, *QUICK, "--batch_size", 8)
    done = train(*flags, "--run_dir", tmp_path / "run", "--epochs", 2, "--snapshot_steps", 1)
    assert "24 for training, 6 for validation" in done.out
    snapshots = sorted((tmp_path / "run" / "snapshots").glob("step-*"))
    for path in snapshots[-1:]:
        path.unlink()
    resumed = train("--resume_from", tmp_path / "run")
    assert "24 for training, 6 for validation" in resumed.out
    done = run("--resume_from", tmp_path / "run", "--val_share", 0.3)
    assert done.status == 2
    assert "--val_share" in done.err


@pytest.mark.parametrize("dataset", ["digits"])
def test_any_dataset_can_hold_out_a_share(dataset: str, tmp_path: Path) -> None:
    done = train("--dataset", dataset, "--val_share", 0.25, "--max_samples", 150, "--epochs", 1, "--run_dir", tmp_path)
    assert "150 for training, 50 for validation" in done.out


# ---- labels in a file ------------------------------------------------------------------------------------------------


def make_flat(folder: Path) -> Path:
    """A validation folder without class folders: bee, ant, bee, ant."""
    for number in range(1, 5):
        put(folder / f"ILSVRC2012_val_0000000{number}.JPEG", BEE if number % 2 else ANT)
    return folder


TABLES = {
    "names.csv": "file,label\nILSVRC2012_val_00000001.JPEG,n02\n{2}.JPEG,n01\n{3}.JPEG,n02\n{4}.JPEG,n01\n",
    "kaggle.csv": "ImageId,PredictionString\n{4},n01 1 2 3 4 n01 5 6\n{1},n02 9 9 9 9 \n{2},n01 1 1 1 1\n{3},n02 0 0",
    "tabs.tsv": "{1}.JPEG\tn02\nval/{2}.JPEG\tn01\nval/{3}.JPEG\tn02\nval/{4}.JPEG\tn01\n",
    "synsets.txt": "n02\nn01\nn02\nn01\n",
}


@pytest.mark.parametrize("kind", TABLES)
def test_a_flat_validation_folder_is_labelled_by_a_file(tmp_path: Path, kind: str) -> None:
    make_classes(tmp_path / "set" / "train", names=("n01", "n02"))
    make_flat(tmp_path / "set" / "val")
    text = TABLES[kind].replace("n02", "n02000000").replace("n01", "n01000000")
    for name in ("n01", "n02"):
        (tmp_path / "set" / "train" / name).rename(tmp_path / "set" / "train" / f"{name}000000")
    for number in range(1, 5):
        text = text.replace(f"{{{number}}}", f"ILSVRC2012_val_0000000{number}")
    (tmp_path / kind).write_text(text)
    _, val = opened(tmp_path / "set", whole=False, labels=tmp_path / kind)
    assert val is not None
    assert [val.classes[label] for label in val.labels] == ["n02000000", "n01000000"] * 2
    flags = ("--dataset", "imagefolder", "--data_dir", tmp_path / "set", *QUICK, "--run_dir", tmp_path / "run")
    assert "8 for training, 4 for validation" in train(*flags, "--val_labels", tmp_path / kind).out
    done = run(*flags[:-1], tmp_path / "other")
    assert (done.status, done.err.count("\n")) == (3, 1)
    assert "--val_labels" in done.err


def test_numbers_of_ilsvrc_are_turned_into_names_by_its_own_table(tmp_path: Path) -> None:
    """Its numbers are not those of the sorted names; without the table they are refused, not guessed."""
    names = [f"{number}.JPEG" for number in range(4)]
    (tmp_path / "truth.txt").write_text("2\n1\n1\n2\n")
    with pytest.raises(DataError, match=r"meta\.mat"):
        read_labels(tmp_path / "truth.txt", names)
    kinds = [("ILSVRC2012_ID", "i4"), ("WNID", "O"), ("words", "O")]
    synsets = np.array([(1, "n02119789", "kit fox"), (2, "n01440764", "tench")], kinds)
    scipy.io.savemat(tmp_path / "meta.mat", {"synsets": synsets})
    assert list(read_labels(tmp_path / "truth.txt", names).values()) == [
        *("n01440764", "n02119789", "n02119789", "n01440764")
    ]


def test_a_file_of_labels_that_fits_no_image_or_not_all_is_refused_or_told(tmp_path: Path) -> None:
    make_classes(tmp_path / "train")
    make_flat(tmp_path / "val")
    (tmp_path / "short.txt").write_text("ant\nbee\n")
    with pytest.raises(DataError, match="2 lines for 4 images"):
        opened(tmp_path, whole=False, labels=tmp_path / "short.txt")
    (tmp_path / "other.csv").write_text("a.jpg,ant\nb.jpg,bee\n")
    with pytest.raises(DataError, match="tells the label of no image"):
        opened(tmp_path, whole=False, labels=tmp_path / "other.csv")
    (tmp_path / "some.csv").write_text("ILSVRC2012_val_00000001,bee\n")
    _, val = opened(tmp_path, whole=False, labels=tmp_path / "some.csv")
    assert val is not None
    assert val.notes[-1].startswith("3 images in ")
    with pytest.raises(DataError, match="cannot be read as text"):
        opened(tmp_path, whole=False, labels=tmp_path / "none.csv")


def test_a_file_of_labels_that_leaves_open_which_image_or_class_it_means_is_refused(tmp_path: Path) -> None:
    names = ["a.1.png", "a.2.png", "b.jpg", "b.png"]
    for text, problem in (
        ("b.png,cat\nb.png,dog\n", "two classes of b.png, cat and dog"),
        ("b,cat\n", "may be b.jpg or b.png"),
        (f"b.png,{'x' * 140_000}\n", "is no table"),
    ):
        (tmp_path / "labels.csv").write_text(text)
        with pytest.raises(DataError, match=problem):
            read_labels(tmp_path / "labels.csv", names)
    (tmp_path / "labels.csv").write_text("a.1,cat\na.2,dog\nb.jpg,cat\nb.jpg,cat\n")
    assert read_labels(tmp_path / "labels.csv", names) == {"a.1.png": "cat", "a.2.png": "dog", "b.jpg": "cat"}
    make_classes(tmp_path / "set" / "train", names=("cat", "dog"))
    for part in ("x", "y"):
        put(tmp_path / "set" / "val" / part / "1.png")
    with pytest.raises(DataError, match=r"several images called 1\.png"):
        opened(tmp_path / "set", whole=False, labels=tmp_path / "labels.csv")


def test_a_line_may_quote_its_label(tmp_path: Path) -> None:
    names = ["a.png", "b.png", "c.png"]
    (tmp_path / "labels.txt").write_text('"cat"\n"dog, large"\nant\n')
    assert read_labels(tmp_path / "labels.txt", names) == {"a.png": "cat", "b.png": "dog, large", "c.png": "ant"}
    for text in ('"cat\ndog\nant\n', '"cat"\n""\nant\n'):
        (tmp_path / "labels.txt").write_text(text)
        with pytest.raises(DataError, match="has a quote that does not end, or an empty label"):
            read_labels(tmp_path / "labels.txt", names)


@pytest.mark.parametrize("names", [("Train", "Test"), ("training", "testing"), ("train_set", "VAL")])
def test_folders_of_splits_are_not_taken_for_classes(tmp_path: Path, names: tuple[str, str]) -> None:
    for name in names:
        make_classes(tmp_path / name)
    with pytest.raises(DataError, match="--train_split and --val_split name other splits"):
        opened(tmp_path)


def test_a_split_of_a_folder_without_splits_is_refused(tmp_path: Path) -> None:
    make_classes(tmp_path)
    assert opened(tmp_path)
    with pytest.raises(DataError, match="held is not a folder of class folders"):
        opened(tmp_path, split="held")


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_classes(tmp_path)
    real = shutil.os.scandir  # type: ignore[attr-defined]

    def refuse(path: Path) -> object:
        if str(path).endswith("bee"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr("stream.image_folders.os.scandir", refuse)
    with pytest.raises(DataError, match=r"bee cannot be read \(Permission denied\)"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("made", "words"),
    [
        ([], "photos is not a folder; give --data_dir one with a folder a class, or with train/ and val/"),
        (["photos"], "photos has no class folders; --data_dir needs a folder a class, or train/ and val/"),
    ],
)
def test_a_folder_without_classes_is_named_and_what_it_needs(tmp_path: Path, made: list[str], words: str) -> None:
    for name in made:
        (tmp_path / name).mkdir(parents=True)
    done = run("--data_dir", tmp_path / "photos", "--run_dir", tmp_path / "run")
    assert (done.status, words in done.err.splitlines()[-1]) == (3, True), done.err
