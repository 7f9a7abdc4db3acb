"""docs/EXTENDING.md as it is written: its files in the extensions/ of a copy of the program, its commands run there."""

import contextlib
import json
import math
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from program import (
    ROOT,
    TORCHRUN,
    Outcome,
    assert_same_run,
    assert_same_tensors,
    cut,
    environment,
    ledger,
    metrics,
    results,
    run,
    snapshot_path,
    tensors,
)
from test_layers import WINGS
from torch import nn

import choices
import config
import evaluate
import export
import predict
from choices import AUGMENTATIONS, DATASETS, MODELS, SCHEDULES, augmentation, dataset, model, schedule
from defaults import Preset
from errors import DataError, UsageError
from model_resnet50 import build_model, head_of, load_weights
from open_data import open_sets
from preprocess import batch_augment
from registry import Registry, load_extensions
from stream.augment import Registered
from stream.local import LocalDataset, from_arrays, from_files
from training.optim import schedule_at
from training.snapshot import read

GUIDE = (ROOT / "docs" / "EXTENDING.md").read_text()
FILES = {text.split("extensions/")[1].split(":")[0]: text for text in re.findall(r"```python\n(.*?)```", GUIDE, re.S)}
OF_TESTS = '''"""extensions/zz_tests.py: an augmentation of nothing, and a tracker that notes its rank."""

import os

from choices import augmentation, tracker
from tracking.tracker import Tracker

augmentation("same", draws=3)(lambda images, random: images.clone())


@tracker("ranks")
class Ranks(Tracker):
    def start(self, config, run_dir, run_id, step):
        with open(run_dir / "ranks.txt", "a") as file:
            file.write(os.environ["RANK"])
'''
DRIVER = """
import contextlib, io, json, runpy, sys
import torch
torch.set_num_threads(1)
for line in sys.stdin:
    sys.argv, out, err, status = json.loads(line), io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as stop:
            status = int(stop.code or 0)
    print(json.dumps([status, out.getvalue(), err.getvalue()]), flush=True)
"""
SCHEDULE = """
from choices import schedule

schedule("flat")(lambda moment, config: 1.0)
"""
ALL = (
    *("--dataset", "stripes", "--model", "small_cnn", "--augment", "solarize,same", "--scheduler", "root"),
    *("--warmup_epochs", 0.5, "--snapshot_steps", 3, "--keep_snapshots", 99, "--ledger"),
)


@dataclass(frozen=True)
class Copy:
    """A copy of the program with extensions, and a process in which its commands run, so that it starts only once."""

    folder: Path
    process: "subprocess.Popen[str]"

    def run(self, *command: object) -> Outcome:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([str(part) for part in command]) + "\n")
        self.process.stdin.flush()
        return Outcome(*json.loads(self.process.stdout.readline()))

    def done(self, *command: object) -> str:
        outcome = self.run(*command)
        assert outcome.status == 0, outcome.err
        return outcome.out


def copied(folder: Path, **files: str) -> Path:
    """The program with these files in extensions/, and what the guide's commands read."""
    folder.mkdir()
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    for wing in {*WINGS, "recipes", *(path.parent.name for path in ROOT.glob("*/__init__.py"))}:
        shutil.copytree(ROOT / wing, folder / wing, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "extensions").mkdir()
    for name, text in files.items():
        (folder / "extensions" / name).write_text(text)
    (folder / "photos").mkdir()
    rows = [(f"{number}.png", ("dark", "bright")[number % 2]) for number in range(20)]
    for number, (name, _) in enumerate(rows):
        Image.new("RGB", (40, 30), (60 + 120 * (number % 2),) * 3).save(folder / "photos" / name)
    (folder / "photos" / "labels.csv").write_text("".join(f"{name},{label}\n" for name, label in rows))
    return folder


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Copy]:
    folder = copied(tmp_path_factory.mktemp("extending") / "copy", **FILES, **{"zz_tests.py": OF_TESTS})
    (folder / "drive.py").write_text(DRIVER)
    pipe = subprocess.PIPE
    command = [sys.executable, "drive.py"]
    with subprocess.Popen(command, cwd=folder, env=environment(), stdin=pipe, stdout=pipe, text=True) as process:
        yield Copy(folder, process)
        assert process.stdin is not None
        process.stdin.close()


@pytest.fixture(scope="module")
def printed(copy: Copy) -> dict[str, str]:
    """What each command of the guide printed."""
    commands = re.findall(r"^    uv run python (.*)$", GUIDE, re.MULTILINE)
    return {command: copy.done(*shlex.split(command)) for command in commands}


@pytest.fixture(scope="module")
def whole(copy: Copy) -> Path:
    """A run with one of each."""
    copy.done("main.py", *ALL, "--run_dir", "runs/all")
    return copy.folder / "runs" / "all"


# ---- the guide -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_each_file_of_the_guide_is_whole_and_short_and_prints_what_the_guide_says(printed: dict[str, str]) -> None:
    assert [*FILES] == ["stripes.py", "listed.py", "small_cnn.py", "solarize.py", "root.py", "bars.py"]
    assert max(text.count("\n") for text in FILES.values()) < 30
    told = [line for block in re.findall(r"```text\n(.*?)```", GUIDE, re.S) for line in block.splitlines()]
    assert len(told) > 8
    assert [line for line in told if line not in "".join(printed.values())] == []


@pytest.mark.slow
@pytest.mark.usefixtures("printed")
def test_the_files_are_noted_in_the_run_with_their_digests(copy: Copy) -> None:
    files = {**FILES, "zz_tests.py": OF_TESTS}
    noted = json.loads((copy.folder / "runs" / "stripes" / "config.json").read_text())["launches"][0]["extensions"]
    assert noted == {name: f"sha256:{sha256(text.encode()).hexdigest()[:16]}" for name, text in files.items()}


@pytest.mark.slow
@pytest.mark.usefixtures("printed")
def test_the_schedule_is_its_formula_at_every_step(copy: Copy) -> None:
    rates = [row["lr"] for row in metrics(copy.folder / "runs" / "falling")]
    warmup = [(step + 1) / 22 for step in range(22)]
    assert rates == [0.1 * factor for factor in (*warmup, *(1 - math.sqrt(step / 44) for step in range(44)))]
    assert (copy.folder / "runs" / "falling" / "plots" / "schedule.png").stat().st_size > 5000


@pytest.mark.slow
@pytest.mark.usefixtures("printed")
def test_the_tracker_has_the_accuracy_of_each_epoch_after_a_resume_too(copy: Copy) -> None:
    run_dir = copy.folder / "runs" / "bars"
    copy.done("main.py", "--resume_from", run_dir, "--override", "epochs=3", "--override", "scheduler=cosine")
    bars = [f"{int(row['step']):6} {'#' * round(50 * float(row['val_top1']))}" for row in results(run_dir)]
    assert len(bars) == 3
    assert (run_dir / "bars.txt").read_text().splitlines() == bars


@pytest.mark.slow
@pytest.mark.usefixtures("printed")
def test_the_model_has_its_parameters_and_its_export_answers_as_it_does(copy: Copy) -> None:
    run_dir = copy.folder / "runs" / "small"
    resolved = json.loads((run_dir / "config.json").read_text())["resolved"]
    count = sum(math.prod(shape) + shape[0] for shape in ((16, 3, 3, 3), (16,), (32, 16, 3, 3), (32,), (10, 32)))
    assert (resolved["model"], resolved["parameters"]) == ("small_cnn", count)
    photo = copy.folder / "photos" / "1.png"
    told = json.loads(copy.done("predict.py", "runs/small", photo, "--top", 1, "--json"))[0]["top"][0]
    session = onnxruntime.InferenceSession(run_dir / "onnx" / "model.onnx", providers=["CPUExecutionProvider"])
    shares = np.asarray(session.run(None, {"image": np.array(Image.open(photo))})[0])
    assert told["index"] == shares.argmax()
    assert told["probability"] == pytest.approx(shares.max(), abs=1e-5)


# ---- what comes after training ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_of_extensions_resumes_to_the_bit_in_mid_epoch(copy: Copy, whole: Path) -> None:
    resumed = cut(whole, 3, whole.parent / "cut")
    copy.done("main.py", "--resume_from", resumed)
    assert_same_run(whole, resumed)


@pytest.mark.slow
def test_it_is_evaluated_on_its_own_images_and_on_a_share_of_them(copy: Copy, whole: Path) -> None:
    assert read(snapshot_path(whole, 20)).state["classes"] == ["across", "along"]
    assert "images    stripes, validation: 80" in copy.done("evaluate.py", whole)
    flags = ("--dataset", "stripes", "--val_share", 0.25, "--max_samples", 30)
    assert "stripes, 0.25 held out: 10" in copy.done("evaluate.py", whole, *flags)
    assert {"across", "along"} & {*copy.done("predict.py", whole, "photos/0.png").split()}
    refused = copy.run("export.py", whole, "--to", "timm", "--out", "runs/timm")
    assert (refused.status, refused.err) == (2, "error: timm has no small_cnn; export to onnx or torch_export\n")


@pytest.mark.slow
def test_a_single_set_is_split_in_training_as_in_its_evaluation(copy: Copy, printed: dict[str, str]) -> None:
    (path,) = (copy.folder / "runs").glob("listed-*")
    assert "listed, validation: 4" in copy.done("evaluate.py", path)
    with pytest.raises(AssertionError, match=r"needs --data_dir: a folder with labels\.csv"):
        copy.done("main.py", "--dataset", "listed")


@pytest.mark.slow
def test_the_finder_and_a_rehearsal_take_extensions(copy: Copy) -> None:
    told = copy.done("run_lr_finder.py", *ALL, "--lr_iter", 20, "--run_dir", "runs/found")
    rate = json.loads((copy.folder / "runs" / "found" / "lr_finder" / "lr_finder.json").read_text())["constant_lr"]
    assert rate is None or f"--lr {rate:.3g}\n" in told
    told = copy.done("main.py", *ALL, "--dry_run")
    assert re.search(r"whole model +\S+ +2 +5,250 ", told)


@pytest.mark.slow
def test_an_augmentation_that_changes_nothing_changes_no_number_of_a_run(copy: Copy) -> None:
    flags = (
        *("--model", "small_cnn", "--color_jitter", 0.4, "--random_erasing", 0.5, "--ledger"),
        *("--epochs", 1, "--max_samples", 256, "--batch_size", 64),
    )
    for name, more in (("none", ()), ("same", ("--augment", "same")), ("other", ("--augment", "same,solarize"))):
        copy.done("main.py", *flags, *more, "--run_dir", f"runs/{name}")
    none, same, other = (ledger(copy.folder / "runs" / name) for name in ("none", "same", "other"))
    assert none == same
    assert_same_tensors(*(tensors(snapshot_path(copy.folder / "runs" / name, 4)) for name in ("none", "same")))
    assert [row["ids"] for row in other] == [row["ids"] for row in none]
    assert other[0]["loss"] != none[0]["loss"]


@pytest.mark.slow
def test_two_ranks_see_the_images_of_one_and_only_the_first_has_trackers(copy: Copy, whole: Path) -> None:
    command = [sys.executable, *TORCHRUN, "2", "main.py", *map(str, ALL), "--track", "ranks", "--run_dir", "runs/ranks"]
    subprocess.run(command, cwd=copy.folder, env=environment(), check=True, capture_output=True)
    for one, two in zip(ledger(whole), ledger(copy.folder / "runs" / "ranks"), strict=True):
        assert (one["ids"], one["lr"]) == (two["ids"], two["lr"])
    assert (copy.folder / "runs" / "ranks" / "ranks.txt").read_text() == "0"


# ---- the wrong ways --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--dataset stripe", "--dataset has no choice stripe; did you mean stripes?"),
        ("--dataset digit", "--dataset has no choice digit; did you mean digits?"),
        ("--model smal_cnn", "--model has no choice smal_cnn; did you mean small_cnn?"),
        ("--model keras:x", "--model has no choice keras:x"),
        ("--augment solarise", "--augment has no choice solarise; did you mean solarize?"),
        ("--augment same,same", "names something twice"),
        ("--scheduler rot", "--scheduler has no choice rot; did you mean root?"),
        ("--scheduler cosin", "--scheduler has no choice cosin; did you mean cosine?"),
        ("--model small_cnn --drop_path 0.1", "--drop_path is nothing that --model small_cnn takes"),
    ],
)
def test_a_name_that_is_none_is_told_with_the_nearest(copy: Copy, flags: str, told: str) -> None:
    done = copy.run("main.py", *flags.split())
    assert (done.status, done.err.count("\n")) == (2, 1), done.err
    assert told in done.err


@pytest.mark.slow
@pytest.mark.parametrize("door", [evaluate, predict, export])
def test_a_run_whose_file_is_gone_is_refused_by_name(copy: Copy, whole: Path, tmp_path: Path, door: Any) -> None:
    """In this process there is no extension."""
    more: dict[Any, list[object]] = {predict: ["x.png"], export: ["--to", "onnx", "--out", tmp_path / "x"]}
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    with contextlib.chdir(tmp_path):
        done = run(whole, *more.get(door, []), entry=door.main)
    assert (done.status, done.err.count("\n")) == (2, 1), done.err
    assert "--dataset stripes of this run is not known here" in done.err
    saved = read(snapshot_path(whole, 20)).state["config"] | {"dataset": "digits"}
    with pytest.raises(UsageError, match="--model small_cnn of this run is not known here"):
        config.resume(saved, {}, to_train=False)
    saved |= {"model": "resnet20", "track": "bars"}
    assert config.resume(saved, {}, to_train=False).scheduler == "root"
    for name, choice in (("scheduler", "root"), ("augment", "solarize"), ("track", "bars")):
        with pytest.raises(UsageError, match=f"--{name} {choice} of this run is not known here"):
            config.resume(saved, {})
        saved[name] = {"scheduler": "cosine"}.get(name)
    assert config.resume(saved, {}).scheduler == "cosine"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("import nothing_of_this_name", "ModuleNotFoundError"),
        ("def f(:", "SyntaxError"),
        ("raise ValueError('two\\nlines')", "two\\nlines"),
        ("from choices import schedule\nschedule('cosine')(print)", "--scheduler has the choice cosine already"),
        ("from choices import *\nDATASETS.register('digits')(DATASETS['mnist'])", "the choice digits already"),
    ],
)
def test_a_broken_file_is_named_in_one_line_by_every_program(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(UsageError, match="cannot be imported") as caught:
        load_extensions(tmp_path)
    assert str(tmp_path / "mine.py") in str(caught.value)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_broken_file_stops_every_front_door(tmp_path: Path) -> None:
    folder = copied(tmp_path / "copy", **{"mine.py": "1 / 0"})
    for door in ("main", "run_lr_finder", "evaluate", "predict", "export"):
        command = [sys.executable, f"{door}.py", "--help"]
        done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
        assert "extensions/mine.py cannot be imported (ZeroDivisionError" in done.stderr


def test_a_file_that_begins_with_an_underscore_is_left_to_the_others(tmp_path: Path) -> None:
    for name in ("_parts.py", ".hidden.py", "notes.txt"):
        (tmp_path / name).write_text("1 / 0")
    assert load_extensions(tmp_path) == []
    assert load_extensions(tmp_path / "none") == []


# ---- what is registered wrongly --------------------------------------------------------------------------------------


@pytest.fixture
def registries(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is forgotten afterwards."""
    for registry in (DATASETS, MODELS, SCHEDULES, AUGMENTATIONS):
        for name in ("_names", "_choices"):
            monkeypatch.setattr(registry, name, dict(getattr(registry, name)))


PRESET = Preset(image_size=8, batch_size=4, epochs=2, lr=0.1)
PIXELS = np.zeros((4, 8, 8), np.uint8)
FOUR = from_arrays(PIXELS, [0, 1, 0, 1], ["a", "b"])


def fail(*arguments: object) -> Any:
    raise FileNotFoundError("no such\nfile")


@pytest.mark.usefixtures("registries")
@pytest.mark.parametrize(
    ("function", "kind", "told"),
    [
        (fail, DataError, r"--dataset mine failed \(FileNotFoundError: no such\\nfile\)"),
        (lambda config: from_files([(Path("x.png"), "a"), (Path("y.png"), "b")]), UsageError, "no array"),
        (lambda config: from_arrays(PIXELS.astype(float), [0, 1, 0, 1], "ab"), DataError, "float64 .4, 8, 8, 3"),
        (lambda config: from_arrays(PIXELS, [0, 1, 2, 1], "ab"), DataError, "4 whole numbers from 0 to 1"),
        (lambda config: from_arrays(PIXELS, [0, 1], "ab"), DataError, "4 whole numbers"),
    ],
)
def test_a_dataset_that_fails_is_one_line(function: Callable[[Any], Any], kind: type[Exception], told: str) -> None:
    dataset("mine", PRESET, in_memory=True)(function)
    with pytest.raises(kind, match=told) as caught:
        open_sets(config.resolve({"dataset": "mine"}), None, None)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("registries")
@pytest.mark.parametrize("made", [[], None, 3, [1, 2, 3], (None, None)])
def test_a_dataset_that_gives_something_else_is_one_line(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DATASETS["digits"], "open", lambda config: made)
    with pytest.raises(DataError, match=r"--dataset digits gave .*; its function must return a set"):
        open_sets(config.resolve({}), None, None)


def test_a_dataset_may_give_a_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DATASETS["digits"], "open", lambda config, given=DATASETS["digits"].open: [*given(config)])
    assert len(open_sets(config.resolve({}), None, None)[0]) == 1437


def test_an_augmentation_that_fails_is_one_line_but_not_where_memory_is_short() -> None:
    for message, kind in (("bad", UsageError), ("cannot allocate memory", RuntimeError)):

        def failing(images: torch.Tensor, random: torch.Tensor, message: str = message) -> torch.Tensor:
            raise RuntimeError(message)

        augmentation(f"fails-{kind.__name__}")(failing)
        chain = batch_augment(config.resolve({"augment": f"fails-{kind.__name__}"}))
        with pytest.raises(kind, match=message):
            chain(torch.zeros(2, 8, 8, 3, dtype=torch.uint8), torch.arange(2), 0)


@pytest.mark.parametrize("name", ["half%", "my:cnn", "a,b", "a$(b)c", "", "two words"])
def test_a_name_that_no_flag_or_shell_can_take_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="use letters, digits"):
        Registry[int]("--x").register(name)(1)


@pytest.mark.parametrize(("first", "second"), [("aa", "bb"), ("bb", "aa")])
def test_files_may_import_each_other_in_any_order(first: str, second: str, tmp_path: Path) -> None:
    folder = tmp_path / "program"
    copied(
        folder, **{f"{first}.py": "helper = 1\n" + SCHEDULE, f"{second}.py": f"from extensions.{first} import helper\n"}
    )
    done = subprocess.run([sys.executable, "main.py", "--help"], cwd=folder, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert "flat" in done.stdout


def test_a_dataset_has_the_rates_of_its_preset_and_only_its_flags() -> None:
    dataset("mine", PRESET, needs={"data_dir": "a folder"})(lambda config: FOUR)
    with pytest.raises(UsageError, match="--dataset mine needs --data_dir: a folder"):
        config.resolve({"dataset": "mine"})
    with pytest.raises(UsageError, match="not with --dataset mine"):
        config.resolve({"dataset": "mine", "data_dir": "x", "dataset_name": "y"})
    resolved = config.resolve({"dataset": "mine", "data_dir": "x"})
    assert (resolved.image_size, resolved.batch_size, resolved.epochs, resolved.is_small) == (8, 4, 2, False)
    assert (PRESET.highest_constant_lr, Preset(8, 4, 2, 0.1, constant_lr=0.3).highest_constant_lr) == (0.025, 0.3)
    assert resolved.dataset_id == "mine"
    train, val, _, notes = open_sets(resolved, None, None)
    assert isinstance(train, LocalDataset)
    assert (len(train), len(val)) == (3, 1)
    assert any("--val_share 0.2" in note for note in notes)


class Sum(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1)[:, :3]


@pytest.mark.usefixtures("registries")
def test_a_model_that_fails_is_one_line() -> None:
    made: dict[str, Any] = {"raising": fail, "none": lambda a, b: None, "sum": lambda a, b: Sum()}
    for name, function in {**made, "wide": lambda a, b: nn.Sequential(nn.Flatten(), nn.Linear(9, a))}.items():
        model(name)(function)
    for name, told in (("raising", "no such"), ("none", "NoneType"), ("wide", "RuntimeError")):
        with pytest.raises(UsageError, match=f"--model {name} failed .*{told}") as caught:
            build_model(3, 8, name)
        assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="Sum gives more than logits"):
        build_model(4, 8, "sum")
    built = build_model(3, 8, "sum")
    assert not load_weights(built, {}, "nowhere")
    with pytest.raises(UsageError, match="sum has no linear layer and no convolution"):
        head_of(built)


@pytest.mark.usefixtures("registries")
def test_a_model_gets_the_options_that_it_has_parameters_for() -> None:
    given: dict[str, float] = {}

    @model("mine")
    def mine(num_classes: int, image_size: int, drop_path: float = 0.0) -> nn.Module:
        given.update(drop_path=drop_path)
        return nn.Sequential(nn.Flatten(), nn.Linear(3 * image_size**2, num_classes))

    build_model(2, 8, "mine", {"drop_path": 0.3, "blurpool": False, "zero_init_gamma": None})
    assert given == {"drop_path": 0.3}
    with pytest.raises(UsageError, match="--zero_init_gamma is nothing"):
        build_model(2, 8, "mine", {"drop_path": 0.0, "blurpool": False, "zero_init_gamma": False})


@pytest.mark.usefixtures("registries")
@pytest.mark.parametrize("factor", [-0.1, math.nan, math.inf, None, "x"])
def test_a_schedule_that_gives_no_factor_is_one_line(factor: Any) -> None:
    schedule("mine")(lambda moment, config: factor)
    with pytest.raises(UsageError, match="--scheduler mine failed"):
        schedule_at(config.resolve({"scheduler": "mine"}), 0.1, 10, 3)


@pytest.mark.usefixtures("registries")
def test_a_schedule_sees_where_the_run_is() -> None:
    seen: list[choices.Moment] = []
    schedule("mine")(lambda moment, config: seen.append(moment) or 0.5)  # type: ignore[func-returns-value]
    settings = config.resolve({"scheduler": "mine", "epochs": 4, "warmup_epochs": 1, "min_lr": 0.02})
    assert schedule_at(settings, 0.1, 10, 25)[0] == 0.05
    moment = seen[-1]
    assert (moment.step, moment.total, moment.begin, moment.steps_per_epoch) == (25, 40, 10, 10)
    assert [moment.share, moment.least, moment.above_least(0.5)] == pytest.approx([0.5, 0.2, 0.6])


def apply(images: torch.Tensor, ids: list[int], epoch: int = 0, name: str = "mine", seed: int = 0) -> torch.Tensor:
    """The draws of these samples."""
    seen: list[torch.Tensor] = []
    keep = lambda images, random: seen.append(random) or images.clone()  # type: ignore[func-returns-value]
    Registered(seed, name, keep, 2)(images, torch.tensor(ids), epoch)
    return seen[0]


def test_draws_follow_from_seed_name_epoch_and_sample_alone() -> None:
    images = torch.zeros(4, 2, 2, 3, dtype=torch.uint8)
    whole = apply(images, [5, 0, 7, 2])
    assert (whole.dtype, whole.shape) == (torch.float32, (4, 2))
    assert torch.equal(apply(images[:2], [7, 5]), whole[[2, 0]])
    others = [apply(images, [5, 0, 7, 2], **changed) for changed in ({"epoch": 1}, {"name": "other"}, {"seed": 1})]  # type: ignore[arg-type]
    assert all(not (other == whole).any() for other in others)
    many = apply(torch.zeros(5000, 1, 1, 3, dtype=torch.uint8), [*range(5000)])
    assert many.min() >= 0
    assert many.max() < 1
    assert many.mean(0) == pytest.approx([0.5, 0.5], abs=0.02)


@pytest.mark.usefixtures("registries")
def test_registered_augmentations_come_in_the_order_given_before_erasing() -> None:
    for name in ("first", "second"):
        augmentation(name)(lambda images, random: images.float())
    flags = {"augment": "second,first", "random_erasing": 0.5, "auto_augment": "ta_wide", "color_jitter": "0.4"}
    chain = batch_augment(config.resolve(flags))
    assert [type(part).__name__ for part in chain.parts] == [
        *("Augment", "ColorJitter", "AutoAugment", "Registered", "Registered", "RandomErasing")
    ]
    assert [part.name for part in chain.parts if isinstance(part, Registered)] == ["second", "first"]
    with pytest.raises(UsageError, match=r"--augment second returned torch.float32 .*must return uint8 \(4, 8, 8, 3\)"):
        chain(torch.zeros(4, 8, 8, 3, dtype=torch.uint8), torch.arange(4), 0)


def test_a_registry_without_names_says_so() -> None:
    with pytest.raises(UsageError, match="--track has no choice x; none is registered in extensions/"):
        Registry[int]("--track")["x"]


def test_a_transformer_takes_no_growing_sizes_and_says_so_before_it_trains(tmp_path: Path) -> None:
    flags = ("--model", "timm:vit_tiny_patch16_224", "--progressive_size", "32:0,64:1", "--max_samples", 16)
    done = run(*flags, "--run_dir", tmp_path / "run")
    assert (done.status, done.err.count("\n")) == (2, 1), done.err
    assert "takes images of one size" in done.err
