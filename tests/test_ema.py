"""The averaged model is what its formula says, is evaluated and kept beside the weights, and resumes to the bit."""

import copy
import csv
from pathlib import Path

import pytest
import torch
from program import assert_same_run, cut, results, run, snapshot_path, train
from safetensors.torch import load_file
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import evaluate
from training.ema import EMA

FLAGS = ("--max_samples", 64, "--batch_size", 16, "--epochs", 2, "--ema_decay", 0.9, "--ema_every", 2)


def moved(model: nn.Module) -> None:
    """Another state of the model, buffers and counts included."""
    for tensor in model.state_dict().values():
        tensor.copy_(torch.randn_like(tensor) if tensor.is_floating_point() else tensor + 7)


def test_without_a_warm_up_the_average_is_that_of_its_formula_after_every_step() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    ema = EMA(model, decay=0.3, every=2, steps_per_epoch=5)
    expected, updates = copy.deepcopy(model.state_dict()), 0
    for step in range(24):
        moved(model)
        ema.update(model, step + 1)
        if step % 5 in (0, 2, 4):
            updates += 1
            decay = min(0.3, (1 + updates) / (10 + updates))
            for name, value in model.state_dict().items():
                averaged = decay * expected[name] + (1 - decay) * value
                expected[name] = averaged.to(value.dtype)
        for name, value in ema.module.state_dict().items():
            torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-6, msg=f"{name} after step {step}")


@pytest.mark.parametrize("every", [1, 2, 3, 4])
def test_with_a_warm_up_the_average_is_that_of_torchvisions_loop_to_the_bit(every: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.7), use_buffers=True)  # type: ignore[no-untyped-call]
    ema = EMA(model, decay=0.7, every=every, steps_per_epoch=3, warmup=6)
    for epoch in range(5):
        for step in range(3):
            moved(model)
            ema.update(model, 3 * epoch + step + 1)
            if step % every == 0:
                theirs.update_parameters(model)
                if epoch < 2:
                    theirs.n_averaged.fill_(0)
            for name, value in ema.module.state_dict().items():
                assert torch.equal(value, theirs.module.state_dict()[name]), (name, epoch, step)


@pytest.mark.usefixtures("small_model")
def test_the_average_is_evaluated_judged_by_kept_and_resumed_to_the_bit(tmp_path: Path) -> None:
    done = train(
        *FLAGS,
        "--save_best",
        "--ledger",
        "--snapshot_steps",
        1,
        "--keep_snapshots",
        20,
        "--run_dir",
        tmp_path / "whole",
    )
    rows = results(tmp_path / "whole")
    assert {"ema_loss", "ema_top1", "ema_top5"} < rows[0].keys()
    assert rows[-1]["ema_loss"] != rows[-1]["val_loss"]
    assert done.out.count("ema top1") == 2
    train("--resume_from", cut(tmp_path / "whole", 3, tmp_path / "cut"))
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    assert results(tmp_path / "cut")[-1]["ema_loss"] == rows[-1]["ema_loss"]
    last = load_file(sorted((tmp_path / "whole" / "snapshots").glob("step-*"))[-1])
    differing = [
        name for name in last if name.startswith("ema.") and not torch.equal(last[name], last["model" + name[3:]])
    ]
    assert len(differing) > 20
    evaluated = run("--resume_from", tmp_path / "whole", "--evaluate")
    assert f"val loss {float(rows[-1]['val_loss']):.4f}" in evaluated.out
    evaluated = run(snapshot_path(tmp_path / "whole", int(rows[-1]["step"])), "--which", "ema", entry=evaluate.main)
    assert f"val loss {float(rows[-1]['ema_loss']):.4f}" in evaluated.out


@pytest.mark.usefixtures("small_model")
def test_an_average_may_be_added_and_dropped_on_a_resume(tmp_path: Path) -> None:
    train(*FLAGS[:-4], "--run_dir", tmp_path / "run")
    done = train("--resume_from", tmp_path / "run", "--override", "epochs=3", "--override", "ema_decay=0.5")
    assert done.out.count("ema top1") == 1
    train("--resume_from", tmp_path / "run", "--override", "epochs=4", "--override", "ema_decay=none")
    with open(tmp_path / "run" / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["epoch"]) for row in rows] == [1, 2, 3, 4]
    assert all(None not in row for row in rows)
