"""One of several configurations is chosen by name, never mixed up with another, and asked for where it must be."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub import Hub
from program import run, steps_kept, train
from shards import class_names, make_imagenet_like, to_table

import config
from errors import DataError, UsageError
from stream.dataset import Cache, HuggingFaceImageNetDataset

pytestmark = pytest.mark.usefixtures("small_model")

REPO_ID = "someone/several"
CLASSES = {"left": 2, "right": 3}
FLAGS = ("--model", "resnet18", "--image_size", 16, "--batch_size", 8, "--epochs", 1, "--num_workers", 0)


def card(configurations: dict[str, str], features: str = "") -> str:
    """The README.md of a set whose configurations have a folder each, or share one."""
    entries = "".join(
        f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {folder}/train-*\n"
        f"  - split: validation\n    path: {folder}/validation-*\n"
        for name, folder in configurations.items()
    )
    return f"---\n{features}configs:\n{entries}---\n"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hub whose set has two configurations of other images and classes, and no default."""
    root = tmp_path_factory.mktemp("configurations")
    folder = root / "datasets" / REPO_ID
    for seed, (name, classes) in enumerate(CLASSES.items()):
        options: dict[str, Any] = {
            "train": 16,
            "validation": 8,
            "test": 0,
            "files": 1,
            "classes": classes,
            "seed": seed,
        }
        made = make_imagenet_like(root / "made" / name, **options, size=(20, 30), rows_per_group=8)
        shutil.copytree(made / "data", folder / name)
    (folder / "README.md").write_text(card({"left": "left", "right": "right"}))
    return root


@pytest.fixture
def several(root: Path) -> Path:
    return root / "datasets" / REPO_ID


def images_of(path: Path) -> list[bytes]:
    return [image["bytes"] for image in pq.read_table(path)["image"].to_pylist()]


def read(source: object, name: str | None, cache: Path | None = None) -> tuple[list[bytes], list[int], list[str]]:
    """The images, labels and classes of a configuration's training split, which is one block."""
    kept = Cache(cache) if cache else None
    dataset = HuggingFaceImageNetDataset.open(str(source), split=["train"], configuration=name, cache=kept)
    (_,) = dataset.blocks
    block = dataset.read_block(0)
    return block.images.to_pylist(), block.labels.tolist(), dataset.classes


# ---- the one that was chosen -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLASSES)
def test_a_configuration_has_its_own_images_and_classes(several: Path, name: str) -> None:
    images, labels, classes = read(several, name)
    (path,) = (several / name).glob("train-*")
    assert images == images_of(path)
    assert labels == pq.read_table(path)["label"].to_pylist()
    assert classes == class_names(CLASSES[name])


@pytest.mark.parametrize("cached", [False, True])
def test_what_is_kept_of_one_configuration_is_not_used_for_another(
    root: Path, several: Path, hub_port: int, tmp_path: Path, cached: bool
) -> None:
    cache = tmp_path / "cache" if cached else None
    with Hub(root, port=hub_port) as hub:
        for name in ("left", "right", "left", "right"):
            assert read(REPO_ID, name, cache) == read(several, name)
        before = len(hub.requests)
        sha = hub.repos["datasets", REPO_ID].sha
        kept = Cache(cache) if cache else None
        HuggingFaceImageNetDataset.open(REPO_ID, split=["train"], configuration="left", revision=sha, cache=kept)
        assert len(hub.requests) == before  # the listing and the footers are kept


def test_a_chosen_configuration_costs_no_more_requests_than_the_only_one(
    root: Path, several: Path, hub_port: int, tmp_path: Path
) -> None:
    only = shutil.copytree(several / "left", tmp_path / "datasets" / REPO_ID / "left").parent
    (only / "README.md").write_text(card({"left": "left"}))
    counts = []
    for folder, name in ((tmp_path, None), (tmp_path, "left")):
        with Hub(folder, port=hub_port) as hub:
            HuggingFaceImageNetDataset.open(
                REPO_ID, split=["train"], configuration=name, cache=Cache(tmp_path / f"cache {name}")
            )
            counts.append(len([request for request in hub.requests if request.method == "GET"]))
    assert counts[1] <= counts[0]


def test_a_listing_that_was_kept_before_there_was_a_choice_is_still_used(
    small_hub: Path, hub_port: int, tmp_path: Path
) -> None:
    name, cache = "ILSVRC/imagenet-1k", Cache(tmp_path / "cache")
    with Hub(small_hub, port=hub_port) as hub:
        HuggingFaceImageNetDataset.open(name, split=["train"], cache=cache)
        sha = hub.repos["datasets", name].sha
    kept = {path.name for path in (tmp_path / "cache").rglob(f"{sha}/*")}
    assert "listing" in kept
    HuggingFaceImageNetDataset.open(name, split=["train"], cache=cache, revision=sha)


def test_two_configurations_that_share_files_keep_their_own_labels(hub_port: int, tmp_path: Path) -> None:
    """The files have two columns of labels, and the card tells which of them are classes in which configuration."""
    folder = tmp_path / "datasets" / REPO_ID
    (folder / "both").mkdir(parents=True)
    table = to_table([b"%d" % row for row in range(8)], np.arange(8) % 2, "a", 2)
    table = table.append_column("fine", pa.array(np.arange(8) % 4)).replace_schema_metadata(None)
    for split in ("train", "validation"):
        pq.write_table(table, folder / "both" / f"{split}-0.parquet")
    features = "dataset_info:\n"
    for name, columns in (("coarse", {"label": 2, "fine": 0}), ("fine", {"label": 0, "fine": 4})):
        features += f"- config_name: {name}\n  features:\n  - name: image\n    dtype: image\n"
        for column, classes in columns.items():
            names = "".join(f"          '{number}': {column} {number}\n" for number in range(classes))
            kind = f"\n      class_label:\n        names:\n{names}" if classes else " int64\n"
            features += f"  - name: {column}\n    dtype:{kind}"
    (folder / "README.md").write_text(card({"coarse": "both", "fine": "both"}, features))
    with Hub(tmp_path, port=hub_port):
        for _ in range(2):
            assert read(REPO_ID, "coarse", tmp_path / "cache")[1:] == ([0, 1] * 4, ["label 0", "label 1"])
            assert read(REPO_ID, "fine", tmp_path / "cache")[1] == [0, 1, 2, 3] * 2


@pytest.mark.parametrize("name", ["default", "all"])
def test_without_the_flag_the_default_is_taken_if_there_is_one(several: Path, tmp_path: Path, name: str) -> None:
    """It is called default, or its entry in the card says so."""
    folder = Path(shutil.copytree(several, tmp_path / "set"))
    text = card({"left": "left", name: "right"})
    (folder / "README.md").write_text(text.replace("config_name: all\n", "config_name: all\n  default: true\n"))
    assert read(folder, None) == read(folder, name) == read(several, "right")


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_the_hub", [False, True])
@pytest.mark.parametrize(
    ("name", "status", "told"),
    [(None, 3, "several configurations"), ("middle", 2, "no configuration middle"), ("../left", 2, "../left")],
)
def test_a_missing_or_unknown_choice_is_one_line_with_the_choices(
    root: Path, several: Path, hub_port: int, tmp_path: Path, name: str | None, status: int, told: str, on_the_hub: bool
) -> None:
    chosen = ("--dataset_config", name) if name else ()
    flags = ("--dataset_name", REPO_ID if on_the_hub else several, *chosen, *FLAGS, "--run_dir", tmp_path / "run")
    with Hub(root, port=hub_port):
        done = run("--dataset", "hf", *flags)
    assert (done.status, done.err.count("\n")) == (status, 1), done.err
    assert told in done.err
    assert done.err.endswith("; choose with --dataset_config one of left, right\n")
    assert not (tmp_path / "run").exists()


def test_a_set_of_one_configuration_refuses_another_name(image_set: Path) -> None:
    with pytest.raises(UsageError, match="one of default"):
        read(image_set, "left")


def test_another_fault_of_a_set_with_a_choice_is_not_taken_for_the_choice(several: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(several, tmp_path / "set"))
    shutil.rmtree(folder / "right")
    with pytest.raises(DataError, match="has no split train, only none"):
        read(folder, "right")


@pytest.mark.parametrize("dataset", ["digits", "cifar10", "imagefolder", "imagenet1k"])
def test_a_dataset_without_configurations_refuses_the_flag(dataset: str) -> None:
    with pytest.raises(UsageError, match="--dataset_config go with --dataset hf"):
        config.resolve({"dataset": dataset, "dataset_config": "left", "data_dir": "photos"})


def test_a_resume_with_another_configuration_is_refused(several: Path, tmp_path: Path) -> None:
    flags = ("--dataset", "hf", "--dataset_name", several, *FLAGS)
    train(*flags, "--dataset_config", "left", "--run_dir", tmp_path / "run")
    resumed = ("--resume_from", tmp_path / "run")
    done = run(*resumed, "--dataset_config", "right")
    assert done.status == 2
    assert "--override dataset_config=right" in done.err
    assert "--dataset_config" in done.err.splitlines()[1]
    done = run(*resumed, "--override", "dataset_config=right")
    assert done.status != 0  # it has another number of classes
    assert "\nTraceback" not in done.err
    train(*resumed, "--dataset_config", "left")
    assert steps_kept(tmp_path / "run") == [2]


def test_a_snapshot_from_before_the_flag_goes_on_with_the_default() -> None:
    saved = dataclasses.asdict(config.resolve({"dataset": "hf", "dataset_name": "a/b"}))
    del saved["dataset_config"]
    assert config.resume(saved, {}).dataset_config is None
    with pytest.raises(UsageError, match="dataset_config=left"):
        config.resume(saved, {"dataset_config": "left"})
