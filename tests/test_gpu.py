"""On a GPU: nobody waits for it in a step, its batches are the CPU's, and memory that runs out is explained."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from program import ledger, results, run, train

import open_data
from config import Config, resolve
from preprocess import get_data_loaders
from stream.local import load_digits
from training.step import build_training, train_step

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
SMALL = ("--max_samples", 256, "--batch_size", 32, "--epochs", 2)


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """Whatever makes the host wait for the device raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def little_memory() -> Iterator[None]:
    """5 GiB of the GPU's memory: ResNet-50 takes 3 GB for 64 images in bf16, and 6 GB for 128."""
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(5 * 2**30 / torch.cuda.get_device_properties(GPU).total_memory)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


def settings(**given: Any) -> Config:
    return resolve({"dataset": "digits", "batch_size": 32, **given})


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"amp": True},
        {"amp": True, "amp_dtype": "fp16"},
        {"amp": True, "amp_dtype": "fp16", "max_grad_norm": 1.0, "accumulate_steps": 2},
        {"optimizer": "adamw", "max_grad_norm": 1.0},
        {"mixup": 0.2, "cutmix": 1.0, "auto_augment": "ta_wide", "random_erasing": 0.5, "ema_decay": 0.9},
        {"loss": "bce", "auto_augment": "rand-m7-mstd0.5-inc1", "color_jitter": "0.4", "repeats": 2, "mixup": 0.1},
    ],
    ids=lambda given: " ".join(given) or "float32",
)
def test_no_step_and_no_batch_waits_for_the_gpu(given: dict[str, Any], request: pytest.FixtureRequest) -> None:
    config = settings(cutout=2, **given)
    data = get_data_loaders(config, GPU)
    training = build_training(config, 10, GPU)
    training.model.train()
    images, labels, _ = next(iter(data.train))
    train_step(training, images, labels, training.mix(0, images))
    request.getfixturevalue("no_waiting")
    for step, (images, labels, _) in enumerate(data.train):
        train_step(training, images, labels, training.mix(step, images))
        if training.ema is not None:
            training.ema.update(training.model, step + 1)


def test_waiting_is_noticed(no_waiting: None) -> None:
    with pytest.raises(RuntimeError, match="synchronizing"):
        torch.ones((), device=GPU).item()


@pytest.mark.parametrize("given", [{"dataset": "digits"}, {"dataset": "cifar10", "cutout": 8}, {}], ids=str)
def test_batches_are_those_of_the_cpu(
    given: dict[str, Any], image_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    digits, _ = load_digits()
    monkeypatch.setattr(open_data, "load_cifar", lambda *_: (digits, digits))
    given = given or {"dataset": "hf", "dataset_name": str(image_set), "image_size": 48}
    config = settings(max_samples=96, **given)
    on_gpu, on_cpu = (get_data_loaders(config, device).train for device in (GPU, CPU))
    for epoch in range(2):
        on_gpu.set_epoch(epoch)
        on_cpu.set_epoch(epoch)
        for theirs, ours in zip(on_gpu, on_cpu, strict=True):
            assert theirs.images.is_cuda
            assert all(torch.equal(a.cpu(), b) for a, b in zip(theirs, ours, strict=True))


def test_a_deterministic_run_goes_on_as_if_nothing_happened(tmp_path: Path) -> None:
    flags = (*SMALL, "--amp", "--deterministic", "--ledger", "--snapshot_steps", 5)
    train(*flags, "--run_dir", tmp_path / "whole")
    middle = tmp_path / "whole" / "snapshots" / "step-000000010.safetensors"
    copy = tmp_path / "cut" / "snapshots" / middle.name
    copy.parent.mkdir(parents=True)
    copy.write_bytes(middle.read_bytes())
    train("--resume_from", copy)
    assert ledger(tmp_path / "cut") == ledger(tmp_path / "whole")[10:]


def test_memory_that_runs_out_is_explained_with_the_passes_that_are_found_without_any(
    little_memory: None, tmp_path: Path
) -> None:
    flags = ("--image_size", 224, "--batch_size", 1024, "--model", "resnet50", "--epochs", 1, "--amp")
    done = run(*flags, "--accumulate_steps", 1, "--run_dir", tmp_path / "run")
    assert done.status == 2, done.err
    assert "of 1024 images does not fit" in done.err
    assert "one of 64 does; use --accumulate_steps 16," in done.err
    done = train(*flags, "--run_dir", tmp_path / "again")
    assert "memory    a batch of 1024 does not fit in one pass; it takes --accumulate_steps 16\n" in done.out
    assert len(results(tmp_path / "again")) == 1


def test_pinned_memory_is_used_again_and_again(image_set: Path) -> None:
    config = settings(dataset="hf", dataset_name=str(image_set), image_size=48)
    loader = get_data_loaders(config, GPU).train
    taken = []
    for epoch in range(6):
        loader.set_epoch(epoch)
        for _ in loader:
            torch.cuda.synchronize()
        taken.append(torch.cuda.host_memory_stats()["num_host_alloc"])
    assert taken[-1] == taken[2]


def test_a_compiled_run_learns_as_an_eager_one(tmp_path: Path) -> None:
    for name, more in {"eager": (), "compiled": ("--compile",)}.items():
        train("--epochs", 6, "--amp", *more, "--run_dir", tmp_path / name)
    for name in ("eager", "compiled"):
        assert float(results(tmp_path / name)[-1]["val_top1"]) > 0.96


def test_a_run_on_files_is_compiled_by_default_and_so_again_on_a_resume(image_set: Path, tmp_path: Path) -> None:
    data = ("--dataset", "hf", "--dataset_name", image_set, "--image_size", 64, "--model", "resnet18", "--amp")
    done = train(*data, "--max_samples", 64, "--batch_size", 32, "--epochs", 1, "--run_dir", tmp_path / "run")
    assert "bfloat16, compiled\n" in done.out
    assert "torch.compile fails" not in done.err
    assert "bfloat16, compiled\n" in train("--resume_from", tmp_path / "run", "--override", "epochs=2").out
    on_cpu = train("--resume_from", tmp_path / "run", "--override", "epochs=3", "--device", "cpu")
    assert "compiled" not in on_cpu.out
