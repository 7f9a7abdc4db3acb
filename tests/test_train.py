"""The step, the loop and the evaluation do what the flags say."""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from program import (
    assert_same_tensors,
    cut,
    ledger,
    metrics,
    results,
    run,
    snapshot_path,
    steps_kept,
    tensors,
    train,
)
from torch import nn

import config as configuration
from config import Config
from errors import DivergedError
from preprocess import get_data_loaders
from stream.loader import Batch, Cancelled
from train import evaluate
from training.journal import Journal
from training.signals import StopRequest
from training.state import Progress
from training.step import Training, build_training, train_step

CPU = torch.device("cpu")
SMALL = ("--max_samples", 48, "--batch_size", 16, "--num_workers", 0)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Four epochs at a rate that is too high, so that the best one need not be the last."""
    folder = tmp_path_factory.mktemp("run") / "digits"
    flags = ("--epochs", 4, "--keep_snapshots", 2, "--save_best", "--scheduler", "step", "--lr", 0.3, "--seed", 1)
    train(*SMALL, *flags, "--run_dir", folder)
    yield folder
    for path in folder.rglob("*.safetensors"):
        path.unlink()


def settings(**given: Any) -> Config:
    return configuration.resolve({"dataset": "digits", "batch_size": 16, "num_workers": 0} | given)


def batch(config: Config) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels, _ = next(iter(get_data_loaders(config, CPU).train))
    return images, labels


def training_without_batch_statistics(**given: Any) -> Training:
    """Every norm uses its running statistics, so that a gradient is the mean of its parts' gradients."""
    training = build_training(settings(**given), 10, CPU)
    for module in training.model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    training.model.eval()
    return training


def gradient(training: Training) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in training.model.parameters() if p.grad is not None]).double()


def test_an_accumulated_gradient_is_the_whole_batchs() -> None:
    images, labels = batch(settings())
    seen = []
    for parts in (1, 2, 8):
        training = training_without_batch_statistics(accumulate_steps=parts)
        numbers = train_step(training, images, labels)
        seen.append((numbers.loss, numbers.correct, gradient(training)))
    for loss, correct, grad in seen[1:]:
        assert correct == seen[0][1]
        torch.testing.assert_close(loss, seen[0][0])
        torch.testing.assert_close(grad, seen[0][2], rtol=1e-3, atol=1e-5)


def test_the_gradient_is_clipped_to_the_norm_and_no_shorter_one_is() -> None:
    images, labels = batch(settings())
    free = training_without_batch_statistics()
    train_step(free, images, labels)
    norm = float(gradient(free).norm())
    for limit, expected in ((norm / 2, norm / 2), (norm * 2, norm)):
        clipped = training_without_batch_statistics(max_grad_norm=limit)
        train_step(clipped, images, labels)
        assert float(gradient(clipped).norm()) == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_clipping_bounds_the_true_gradient_under_a_gradient_scaler() -> None:
    images, labels = batch(settings())
    training = training_without_batch_statistics(max_grad_norm=0.1, amp=True, amp_dtype="fp16")
    training.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    assert not train_step(training, images[:2], labels[:2]).skipped
    assert float(gradient(training).norm()) == pytest.approx(0.1, rel=1e-3)


def test_a_step_that_the_scaler_skips_changes_nothing_and_is_told() -> None:
    images, labels = batch(settings())
    training = training_without_batch_statistics(amp=True, amp_dtype="fp16")
    training.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    before = {name: tensor.clone() for name, tensor in training.model.named_parameters()}
    assert train_step(training, images[:2], labels[:2]).skipped
    assert_same_tensors(before, dict(training.model.named_parameters()))
    assert training.scaler.get_scale() == 2.0**59
    assert not any(state["momentum_buffer"].any() for state in training.optimizer.state.values())


def test_evaluation_counts_what_a_plain_loop_counts() -> None:
    config = settings(max_samples=50)
    data = get_data_loaders(config, CPU)
    training = build_training(config, 10, CPU)
    result = evaluate(training, data.val, StopRequest())
    assert not training.model.training
    images, labels, _ = (torch.cat(parts) for parts in zip(*data.val, strict=True))
    with torch.no_grad():
        logits = training.model(training.normalize(images))
    ranks = (logits > logits.gather(1, labels[:, None])).sum(1)
    expected = (int((ranks < 1).sum()), int((ranks < 5).sum()), 50)
    assert (result["correct1"], result["correct5"], result["images"]) == expected
    assert (result["val_top1"], result["val_top5"]) == (expected[0] / 50, expected[1] / 50)
    assert result["val_loss"] == pytest.approx(float(nn.functional.cross_entropy(logits, labels)), rel=1e-5)


def test_a_loss_that_is_no_number_raises_with_its_step_though_later_ones_were_taken(tmp_path: Path) -> None:
    done = run(*SMALL, "--epochs", 2, "--lr", 1e30, "--ledger", "--run_dir", tmp_path / "run")
    assert done.status == 4
    match = re.search(r"diverged at step (\d+): at step \d+ the loss is (nan|inf)", done.err)
    assert match, done.err
    each = run(*SMALL, "--epochs", 2, "--lr", 1e30, "--ledger", "--log_steps", 1, "--run_dir", tmp_path / "each")
    assert f"diverged at step {match[1]}:" in each.err
    finite = [math.isfinite(float.fromhex(row["loss"])) for row in ledger(tmp_path / "each")]
    assert finite.index(False) == int(match[1]) - 1


def test_best_is_the_epoch_with_the_best_top1(digits: Path) -> None:
    top1 = [float(row["val_top1"]) for row in results(digits)]
    best = tensors(digits / "snapshots" / "best.safetensors")
    done = train("--resume_from", digits / "snapshots" / "best.safetensors", "--evaluate")
    assert f"top1 {max(top1):.2%} " in done.out
    steps = int(best["model.bn1.num_batches_tracked"])
    assert steps == int(results(digits)[top1.index(max(top1))]["step"])
    if steps in steps_kept(digits):
        assert_same_tensors(best, tensors(snapshot_path(digits, steps)))


def test_an_epoch_that_is_only_better_than_the_one_before_it_is_not_the_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    top1 = iter([0.5, 0.3, 0.4])
    same = {"val_loss": 1.0, "val_top5": 1.0, "correct1": 0, "correct5": 0, "images": 48}
    monkeypatch.setattr("train.evaluate", lambda *_: same | {"val_top1": next(top1)})
    train(*SMALL, "--epochs", 3, "--save_best", "--run_dir", tmp_path / "run")
    assert next(top1, None) is None
    assert int(tensors(tmp_path / "run" / "snapshots" / "best.safetensors")["model.bn1.num_batches_tracked"]) == 3


def test_a_run_that_went_back_keeps_the_best_of_what_it_did_instead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The epoch that is dropped is better than any to come."""
    top1 = iter([0.1, 0.5, 0.2])
    same = {"val_loss": 1.0, "val_top5": 1.0, "correct1": 0, "correct5": 0, "images": 160}
    monkeypatch.setattr("train.evaluate", lambda *_: same | {"val_top1": next(top1)})
    flags = ("--max_samples", 160, "--batch_size", 16, "--epochs", 2, "--save_best")
    train(*flags, "--run_dir", tmp_path / "run")
    copy = cut(tmp_path / "run", 10, tmp_path / "copy")
    done = train("--resume_from", copy, "--override", "lr=1e-12")
    assert "dropped   best.safetensors, a later step of the same run" in done.out
    assert_same_tensors(tensors(copy / "snapshots" / "best.safetensors"), tensors(snapshot_path(copy, 20)))


def test_only_the_newest_snapshots_are_kept(digits: Path) -> None:
    assert steps_kept(digits) == [9, 12]
    assert sorted(path.name for path in digits.iterdir() if path.name != "evaluation") == [
        "config.json",
        "lock",
        "metrics.jsonl",
        "plots",
        "report.html",
        "results.csv",
        "snapshots",
    ]


def test_evaluating_a_run_gives_the_numbers_of_its_last_row_and_changes_nothing(digits: Path) -> None:
    def beside_the_evaluation() -> dict[Path, int]:
        """The run's own files with their times; report.html tells of the evaluation too."""
        files = {path for path in digits.rglob("*") if path.is_file() and "evaluation" not in path.parts}
        return {path: path.stat().st_mtime_ns for path in files - {digits / "report.html"}}

    before = beside_the_evaluation()
    done = train("--resume_from", digits, "--evaluate")
    row = results(digits)[-1]
    (loss,) = re.findall(r"val loss ([\d.]+)  top1", done.out)
    assert float(loss) == pytest.approx(float(row["val_loss"]), rel=1e-6, abs=1e-4)
    assert f"  top1 {float(row['val_top1']):.2%} (" in done.out
    assert f"top5 {float(row['val_top5']):.2%}" in done.out
    assert beside_the_evaluation() == before


def test_results_are_the_means_of_the_steps(digits: Path) -> None:
    rows = results(digits)
    assert [int(row["epoch"]) for row in rows] == [1, 2, 3, 4]
    for row in rows:
        steps = [step for step in metrics(digits) if step["epoch"] == int(row["epoch"])]
        assert len(steps) == 3
        assert float(row["train_loss"]) == pytest.approx(sum(step["loss"] for step in steps) / 3, rel=1e-12)
        assert float(row["train_top1"]) == pytest.approx(sum(step["top1"] for step in steps) / 3, rel=1e-12)
        assert (int(row["step"]), float(row["lr"])) == (steps[-1]["step"], steps[-1]["lr"])


@pytest.mark.slow
def test_neither_workers_nor_log_steps_change_a_run(tmp_path: Path) -> None:
    flags = ("--max_samples", 48, "--batch_size", 16, "--epochs", 1, "--ledger")
    train(*flags, "--num_workers", 0, "--run_dir", tmp_path / "one")
    train(*flags, "--num_workers", 3, "--log_steps", 1, "--snapshot_steps", 1, "--run_dir", tmp_path / "other")
    train(*flags, "--seed", 1, "--run_dir", tmp_path / "seed")
    assert ledger(tmp_path / "one") == ledger(tmp_path / "other")
    assert results(tmp_path / "one") == results(tmp_path / "other")
    assert {row["ids"] for row in ledger(tmp_path / "one")}.isdisjoint(row["ids"] for row in ledger(tmp_path / "seed"))


@pytest.mark.slow
def test_the_weights_of_a_local_folder_are_evaluated(
    image_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder that does not tell its preprocessing: the whole image, by Pillow's bilinear filter."""
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    resnet_config: Any = ResNetConfig
    theirs: Any = ResNetForImageClassification(resnet_config(num_labels=10))
    theirs.eval()
    theirs.save_pretrained(tmp_path / "weights")
    data = {"dataset": "hf", "dataset_name": str(image_set), "image_size": 64, "batch_size": 64}
    flags = [word for name, value in data.items() for word in (f"--{name}", value)]
    monkeypatch.chdir(tmp_path)
    done = train(*flags, "--use_pretrained", tmp_path / "weights", "--evaluate")
    config = configuration.resolve(data | {"eval_crop_pct": 1.0, "eval_interpolation": "bilinear"})
    batches = [*get_data_loaders(config, CPU).val]
    images, labels, _ = (torch.cat(parts) for parts in zip(*batches, strict=True))
    with torch.no_grad():
        logits = theirs(build_training(config, 10, CPU).normalize(images)).logits
    correct = int((logits.argmax(1) == labels).sum())
    assert f"({correct} of 97)" in done.out
    (loss,) = re.findall(r"val loss ([\d.]+)  top1", done.out)
    assert float(loss) == pytest.approx(float(nn.functional.cross_entropy(logits, labels)), rel=1e-4)


@pytest.mark.slow
def test_digits_with_no_flags_pass_97_percent(tmp_path: Path) -> None:
    train("--run_dir", tmp_path / "run")
    assert float(results(tmp_path / "run")[-1]["val_top1"]) >= 0.97


class Failing(list[Batch]):
    """Batches of which only the first comes."""

    def __init__(self, batches: list[Batch], error: BaseException | None) -> None:
        super().__init__(batches)
        self.error = error

    def __iter__(self) -> Iterator[Batch]:
        yield self[0]
        if self.error:
            raise self.error


@pytest.mark.parametrize(
    ("error", "expected"),
    [(InterruptedError("a system call"), InterruptedError), (Cancelled(), RuntimeError), (None, RuntimeError)],
)
def test_an_epoch_that_ends_early_is_not_taken_for_a_whole_one(
    error: BaseException | None, expected: type[Exception]
) -> None:
    batches = list(get_data_loaders(settings(max_samples=64), CPU).val)
    with pytest.raises(expected, match=r"a system call|the data ended after 1 of 4 batches"):
        evaluate(training_without_batch_statistics(max_samples=64), Failing(batches, error), StopRequest())


@pytest.mark.parametrize("bad", [{"loss": math.nan}, {"skipped": 1.0}], ids=["no number", "skipped"])
def test_bad_steps_in_a_row_end_a_run_though_it_recovers_before_anyone_looks(
    tmp_path: Path, bad: dict[str, float]
) -> None:
    """Those whose loss is no number, and those that the scaler skips."""
    config = settings(max_bad_steps=3, max_samples=144, log_steps=5)
    loader, training = get_data_loaders(config, CPU).train, build_training(config, 10, CPU)
    (tmp_path / "snapshots").mkdir()
    journal = Journal(config, training, Progress(), loader, {}, tmp_path)
    journal.start_epoch()

    def run_five() -> None:
        for batch, changes in zip(loader, [{}, bad, bad, bad, {}], strict=False):
            with journal.timed_step(batch):
                numbers = train_step(training, batch.images, batch.labels)
            told = {"loss": 1.0} | changes
            journal.step(batch, numbers._replace(**{name: torch.tensor(value) for name, value in told.items()}))

    with pytest.raises(DivergedError, match="diverged at step 2: at step 5"):
        run_five()
    journal.close()
    assert len(metrics(tmp_path)) == 5
