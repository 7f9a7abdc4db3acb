"""A compiled step is the eager one; what is compiled where, for which sizes, and where it is kept."""

import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from program import metrics, results, run, snapshot_path, tensors
from program import train as run_main
from purity import shrink
from torch import nn
from torch._dynamo.utils import counters

import machine
import train
from config import overrides, resolve, resume
from errors import Interrupted, UsageError
from preprocess import get_data_loaders
from stream.augment import Normalize
from training import compiling, step
from training.compiling import keep_compiled, wants_compile
from training.predictor import build_predictor, normalize_of
from training.signals import StopRequest
from training.step import train_step

CPU = torch.device("cpu")
SMALL = ("--max_samples", 56, "--batch_size", 16, "--epochs", 1)
REAL_BUILD = step.build_model
needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler here")


def plain(*arguments: Any) -> Any:
    """A model without dropout, whose random numbers a compiled model draws in another way."""
    model = shrink(REAL_BUILD(*arguments))
    model.avgpool = model.avgpool[0]
    return model


@pytest.fixture(autouse=True)
def _torchs_settings_stay() -> Iterator[None]:
    with torch._dynamo.config.patch(suppress_errors=False, recompile_limit=8):
        yield


def small_training(**given: Any) -> step.Training:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "build_model", plain)
        return step.build_training(resolve({"batch_size": 16} | given), 10, CPU)


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A compiler that traces alone, which takes a moment."""
    torch._dynamo.reset()
    monkeypatch.setitem(step.COMPILE_OPTIONS, "backend", "eager")
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def a_step(training: step.Training, size: int = 8) -> None:
    training.model.train()
    train_step(training, torch.zeros((16, size, size, 3), dtype=torch.uint8), torch.zeros(16, dtype=torch.int64))


# ---- where it is the default -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "device", "expected"),
    [
        ({"dataset": "imagenet1k"}, "cuda", True),
        ({"dataset": "imagenet1k"}, "cpu", False),
        ({"dataset": "imagenet1k"}, "mps", False),
        ({"dataset": "imagefolder", "data_dir": "photos"}, "cuda", True),
        ({"dataset": "digits"}, "cuda", False),
        ({"dataset": "imagenet1k", "deterministic": True}, "cuda", False),
        ({"dataset": "imagenet1k", "compile": False}, "cuda", False),
        ({"dataset": "digits", "compile": True, "deterministic": True}, "cpu", True),
    ],
)
def test_a_run_is_compiled_as_told_else_where_it_pays(given: dict[str, Any], device: str, expected: bool) -> None:
    assert wants_compile(resolve(given), device) is expected


def test_a_default_that_lacks_a_compiler_is_told_of_and_what_was_given_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compiling, "wants_compile", lambda config, device: True)
    monkeypatch.setattr(machine, "missing_for_compile", lambda device: "it needs g++")
    assert not small_training().compiled
    told = capsys.readouterr().out
    assert "note      the model is not compiled, so that steps are slower: it needs g++" in told
    assert ", compiled" not in told
    with pytest.raises(UsageError, match="--compile cannot be used here: it needs g\\+\\+; or give --no_compile"):
        small_training(compile=True)


def test_a_default_that_fails_trains_eagerly_and_what_was_given_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **options: Any) -> Any:
        raise ValueError("no such kernel")

    torch._dynamo.reset()
    monkeypatch.setattr(machine, "missing_for_compile", lambda device: None)
    monkeypatch.setattr(step, "build_model", plain)
    monkeypatch.setitem(step.COMPILE_OPTIONS, "backend", fail)
    done = run(*SMALL, "--compile", "--run_dir", tmp_path / "given")
    assert done.status == 2
    assert "--compile fails here: " in done.err
    run_main(*SMALL, "--run_dir", tmp_path / "eager")
    monkeypatch.setattr(compiling, "wants_compile", lambda config, device: True)
    done = run_main(*SMALL, "--run_dir", tmp_path / "default")
    assert len(done.err.splitlines()) == 2
    assert done.err.count("warning: torch.compile fails on ") == 2  # the normalisation and the model
    assert metrics(tmp_path / "default") == metrics(tmp_path / "eager")


def test_a_resume_keeps_what_was_told_and_an_override_changes_it() -> None:
    saved = vars(resolve({"dataset": "imagenet1k"}))
    assert resume(saved, {}).compile is None
    assert resume(saved | {"compile": False}, {}).compile is False
    assert overrides({"override": ["compile=false"]}) == {"compile": False}
    assert resume(saved, {"override": ["compile=true"]}).compile is True
    with pytest.raises(UsageError, match="--override compile=False"):
        resume(saved, {"compile": False})


# ---- what is compiled ------------------------------------------------------------------------------------------------


class Whole(nn.Module):
    """What a step computes with a model."""

    def __init__(self, normalize: Normalize, model: nn.Module) -> None:
        super().__init__()
        self.normalize, self.model = normalize, model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits: torch.Tensor = self.model(self.normalize(images))
        return logits


@pytest.mark.parametrize(
    "given",
    [
        {"model": "resnet20"},
        {"model": "resnet18", "blurpool": True, "drop_path": 0.2},
        pytest.param({"model": "resnet50"}, marks=pytest.mark.slow),
        pytest.param({"model": "resnet50", "blurpool": True, "drop_path": 0.2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_no_graph_of_a_step_breaks(given: dict[str, Any]) -> None:
    torch._dynamo.reset()
    config = resolve({"dataset": "imagenet1k", "image_size": 64, **given})
    options = {name: getattr(config, name) for name in ("drop_path", "blurpool", "zero_init_gamma")}
    whole = Whole(normalize_of(config), REAL_BUILD(10, 64, config.model, options)).train()
    compiled = torch.compile(whole, backend="eager", fullgraph=True, dynamic=False)
    compiled(torch.zeros((2, 64, 64, 3), dtype=torch.uint8)).sum().backward()


@pytest.mark.usefixtures("traced")
def test_neither_an_evaluation_nor_its_average_is_compiled_and_a_step_is_once() -> None:
    training = small_training(compile=True, ema_decay=0.9)
    assert training.compiled
    a_step(training)
    compiled = graphs()
    assert compiled > 0
    batches = list(get_data_loaders(resolve({"batch_size": 16, "max_samples": 40}), CPU).val)
    assert train.evaluate(training, batches, StopRequest())["images"] == 40
    assert train.evaluate_average(training, batches, StopRequest())  # type: ignore[arg-type]
    assert step.passes_that_fit(training, resolve({"batch_size": 16})) == 1
    a_step(training)
    assert graphs() == compiled


@pytest.mark.usefixtures("traced")
def test_every_size_that_a_run_grows_through_is_compiled_once() -> None:
    training = small_training(compile=True)
    seen = []
    for size in range(8, 18):  # more than torch's limit of 8
        a_step(training, size)
        seen.append(graphs())
    each = seen[1] - seen[0]
    assert each > 0
    assert seen == [seen[0] + each * further for further in range(10)]
    a_step(training, 8)
    assert graphs() == seen[-1]


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("stopped", [False, True])
def test_sizes_that_were_compiled_ahead_are_not_compiled_again_and_nothing_else_stays(
    stopped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    training, stop = small_training(compile=True, ema_decay=0.9), StopRequest()
    before, generators = deepcopy(training.model.state_dict()), torch.get_rng_state()
    if stopped:
        monkeypatch.setattr(stop, "check", Mock(side_effect=[None, None, Interrupted(signal.SIGTERM)]))
    with pytest.raises(Interrupted) if stopped else nullcontext():
        train.compile_ahead(training, [8, 16, 24], 16, stop)
    compiled = graphs()
    assert compiled > 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in training.model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generators)
    assert all(parameter.grad is None for parameter in training.model.parameters())
    a_step(training, 8)
    a_step(training, 16)
    assert graphs() == compiled


@pytest.mark.usefixtures("traced")
def test_a_run_compiles_for_all_its_sizes_before_its_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "missing_for_compile", lambda device: None)
    monkeypatch.setattr(step, "build_model", plain)
    seen: list[tuple[int, int]] = []

    def noted(training: step.Training, images: torch.Tensor, *others: Any) -> Any:
        done = train_step(training, images, *others)
        seen.append((images.shape[1], graphs()))
        return done

    monkeypatch.setattr(train, "train_step", noted)
    data = ("--dataset", "imagenet1k", "--dummy_data", "--num_workers", 0)
    sizes = ("--image_size", 64, "--progressive_size", "32:0,64:0.5", "--epochs", 4)
    run_main(*SMALL, *data, *sizes, "--compile", "--run_dir", tmp_path / "run")
    assert [size for size, _ in seen] == sorted(size for size, _ in seen)
    assert {size for size, _ in seen} == {32, 64}
    assert len({compiled for _, compiled in seen}) == 1


@pytest.mark.usefixtures("traced")
def test_a_rehearsal_times_later_steps_than_the_one_that_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "missing_for_compile", lambda device: None)
    monkeypatch.setattr(step, "build_model", plain)
    monkeypatch.setattr("dry_run.STEP_SECONDS", 0.0)
    assert "s for the first step, " in run_main(*SMALL, "--dry_run").out
    assert "s a step, the median of 1, " in run_main(*SMALL, "--dry_run", "--compile").out


# ---- that it is the same ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@needs_compiler
def test_a_compiled_run_is_the_eager_one_but_for_rounding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "build_model", plain)
    for name, more in (("eager", ()), ("compiled", ("--compile",))):
        done = run_main(*SMALL, *more, "--run_dir", tmp_path / name)
        (device,) = (line for line in done.out.splitlines() if line.startswith("device"))
        assert ("compiled" in device) == bool(more)
    eager, compiled = tmp_path / "eager", tmp_path / "compiled"
    losses = [[row["loss"] for row in metrics(folder)] for folder in (eager, compiled)]
    assert len(losses[0]) == 3
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    one, other = (tensors(snapshot_path(folder, 3)) for folder in (eager, compiled))
    assert list(one) == list(other)
    assert float(results(compiled)[0]["val_loss"]) == pytest.approx(float(results(eager)[0]["val_loss"]), rel=1e-3)


@pytest.mark.slow
@needs_compiler
def test_a_smaller_last_batch_of_an_evaluation_is_not_compiled_for() -> None:
    torch._dynamo.reset()
    batches = list(get_data_loaders(resolve({"batch_size": 16, "max_samples": 40}), CPU).val)
    assert [len(batch.ids) for batch in batches] == [16, 16, 8]
    eager = small_training()
    predictor = build_predictor(eager.model, resolve({"compile": True}), CPU)
    before = graphs()
    train.evaluate(predictor, batches[:1], StopRequest())
    compiled = graphs()
    assert compiled > before
    result = train.evaluate(predictor, batches, StopRequest())
    assert graphs() == compiled
    assert result["images"] == 40
    expected = train.evaluate(small_training(), batches, StopRequest())
    assert result["val_loss"] == pytest.approx(expected["val_loss"], rel=1e-4)


# ---- where it is kept ------------------------------------------------------------------------------------------------


def test_what_is_compiled_is_kept_in_the_users_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "TORCHINDUCTOR_CACHE_DIR"
    monkeypatch.setenv(name, "mine")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "kept"))
    keep_compiled()
    assert os.environ[name] == "mine"
    monkeypatch.delenv(name)
    keep_compiled()
    assert os.environ[name] == str(tmp_path / "kept" / "imagenet1k" / "inductor")
    monkeypatch.delenv(name)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    keep_compiled()
    assert os.environ[name] == str(tmp_path / ".cache" / "imagenet1k" / "inductor")


def test_a_cache_folder_that_cannot_be_written_is_left_to_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    (tmp_path / "file").touch()
    keep_compiled()
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
