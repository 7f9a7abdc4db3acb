"""A run that was cut and resumed is the run that was not: every tensor, batch, loss and log line, bit for bit."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hub import Hub
from kill_sweep import train as train_elsewhere
from program import (
    assert_same_run,
    cut,
    ledger,
    metrics,
    run,
    snapshot_path,
    steps_kept,
    train,
)
from shards import REPO_ID

pytestmark = pytest.mark.usefixtures("small_model")

SMALL: tuple[object, ...] = ("--max_samples", 48, "--batch_size", 16, "--epochs", 2, "--ledger", "--keep_snapshots", 9)
SMALL = (*SMALL, "--snapshot_steps", 2, "--num_workers", 1)
STREAMED = ("--model", "resnet18", "--image_size", 33, "--block_mb", 1, *SMALL)
STEPS = 6
MIDDLE_OF_1, END_OF_1, MIDDLE_OF_2 = 2, 3, 4
FEWER = ("--max_samples", 16, "--batch_size", 8, "--epochs", 1, "--snapshot_steps", 1, "--scheduler", "cosine")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def digits(folders: Path) -> Path:
    train(*SMALL, "--run_dir", folders / "digits")
    return folders / "digits"


@pytest.fixture(scope="module")
def streamed(folders: Path, image_set: Path) -> Path:
    train("--dataset", "hf", "--dataset_name", image_set, *STREAMED, "--run_dir", folders / "streamed")
    return folders / "streamed"


def test_a_run_leaves_a_snapshot_at_each_place_the_cuts_below_need(digits: Path) -> None:
    assert steps_kept(digits) == [MIDDLE_OF_1, END_OF_1, MIDDLE_OF_2, STEPS]
    assert [row["step"] for row in ledger(digits)] == list(range(1, STEPS + 1))


@pytest.mark.parametrize(("step", "workers"), [(MIDDLE_OF_1, 1), (END_OF_1, 3), (MIDDLE_OF_2, 3)])
def test_digits_go_on_as_if_nothing_happened(digits: Path, tmp_path: Path, step: int, workers: int) -> None:
    copy = cut(digits, step, tmp_path / "cut")
    done = train("--resume_from", copy, "--num_workers", workers)
    assert f"step {step}, epoch {step // 3 + 1}" in done.out
    assert_same_run(copy, digits)


@pytest.mark.slow
def test_a_stream_goes_on_in_mid_epoch(streamed: Path, tmp_path: Path) -> None:
    copy = cut(streamed, MIDDLE_OF_1, tmp_path / "cut")
    train("--resume_from", copy, "--num_workers", 3)
    assert_same_run(copy, streamed)


@pytest.mark.slow
def test_a_stream_goes_on_at_an_epochs_end_and_from_a_run_of_three_workers(
    image_set: Path, streamed: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "three"
    data = ("--dataset", "hf", "--dataset_name", image_set)
    train(*data, *STREAMED, "--num_workers", 3, "--run_dir", folder)
    assert_same_run(folder, streamed)
    for step, workers in ((END_OF_1, 1), (MIDDLE_OF_2, 0)):
        copy = cut(folder, step, tmp_path / f"cut{step}")
        train("--resume_from", copy, "--num_workers", workers)
        assert_same_run(copy, streamed)


@pytest.mark.slow
def test_a_run_that_streams_from_the_hub_goes_on_in_a_new_process(
    hub_root: Path, streamed: Path, tmp_path: Path, hub_port: int
) -> None:
    with Hub(hub_root, port=hub_port) as hub:
        whole, data = tmp_path / "whole", ("--dataset", "hf", "--dataset_name", REPO_ID)
        train_elsewhere(*data, *STREAMED, "--run_dir", whole, log=tmp_path / "log")
        copy = cut(whole, MIDDLE_OF_1, tmp_path / "cut")
        before = len(hub.requests)
        train_elsewhere("--resume_from", copy, log=tmp_path / "log")
        read_again = sum(request.sent for request in hub.requests[before:] if request.range)
    assert_same_run(copy, whole)
    assert ledger(whole) == ledger(streamed)
    assert 0 < read_again < sum(request.sent for request in hub.requests[:before] if request.range)


@pytest.mark.slow
def test_a_run_is_resumed_twice(digits: Path, tmp_path: Path) -> None:
    once = cut(digits, MIDDLE_OF_1, tmp_path / "once")
    train("--resume_from", once)
    twice = cut(once, MIDDLE_OF_2, tmp_path / "twice")
    train("--resume_from", twice)
    assert_same_run(twice, digits)


def test_a_finished_run_has_nothing_left_to_do(digits: Path, tmp_path: Path) -> None:
    copy = cut(digits, STEPS, tmp_path / "copy")
    done = train("--resume_from", copy)
    assert "nothing left to do: all 2 epochs are done; --override epochs=N trains longer" in done.out
    assert_same_run(copy, digits)


def test_damaged_snapshots_are_passed_over_and_named_and_the_result_is_the_same(digits: Path, tmp_path: Path) -> None:
    copy = cut(digits, END_OF_1, tmp_path / "cut")
    good = snapshot_path(digits, MIDDLE_OF_2).read_bytes()
    half = len(good) // 2
    damage = {
        4: good[:half] + bytes([good[half] ^ 1]) + good[half + 1 :],
        5: b"",
        9: good[:half],
        10: safetensors.torch.save({"conv1.weight": torch.ones(3)}),
    }
    for step, data in damage.items():
        snapshot_path(copy, step).write_bytes(data)
    Path(f"{snapshot_path(copy, 11)}.tmp").write_bytes(good)
    done = train("--resume_from", copy)
    passed_over = [line for line in done.err.splitlines() if line.startswith("passed over: ")]
    assert [step for line in passed_over for step in damage if snapshot_path(copy, step).name in line] == [10, 9, 5, 4]
    assert f"{snapshot_path(copy, END_OF_1).name}: step {END_OF_1}" in done.out
    assert_same_run(copy, digits)


def test_lines_that_a_kill_left_unfinished_are_dropped(digits: Path, tmp_path: Path) -> None:
    copy = cut(digits, END_OF_1, tmp_path / "cut")
    for name in ("ledger.jsonl", "metrics.jsonl", "results.csv"):
        path = copy / name
        path.write_text(path.read_text().removesuffix("\n")[:-3])
    train("--resume_from", copy)
    assert_same_run(copy, digits)


def test_a_snapshot_file_goes_on_in_the_run_it_lies_in(digits: Path, tmp_path: Path) -> None:
    copy = cut(digits, STEPS, tmp_path / "copy")
    done = train("--resume_from", snapshot_path(copy, END_OF_1))
    dropped = [line.split()[1] for line in done.out.splitlines() if line.startswith("dropped")]
    assert dropped == [f"{snapshot_path(copy, step).name}," for step in (MIDDLE_OF_2, STEPS)]
    assert_same_run(copy, digits)


@pytest.mark.parametrize(("began", "now"), [(False, True), (True, False)])
def test_amp_where_it_is_emulated_is_float32_and_a_resume_keeps_what_it_began_with(
    began: bool, now: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("machine.cpu_has_bf16", lambda: began)
    flags = (*FEWER, "--max_samples", 16, "--ledger", "--keep_snapshots", 9, "--num_workers", 0)
    done = train(*flags, "--amp", "--run_dir", tmp_path / "amp")
    assert ("cpu, float32" in done.out, "emulated" in done.err) == (not began, not began)
    monkeypatch.setattr("machine.cpu_has_bf16", lambda: now)
    copy = cut(tmp_path / "amp", 1, tmp_path / "cut")
    resumed = train(*flags, "--amp", "--run_dir", copy, "--resume_from", "auto")
    assert resumed.err.count("\n") == 1
    assert ("emulated" if began else "began in float32") in resumed.err
    assert_same_run(copy, tmp_path / "amp")
    kind = "bfloat16" if began else "float32"
    assert f"cpu, {kind}" in train("--resume_from", copy, "--override", "epochs=2").out
    plain = train(*flags, *(("--amp", "--amp_dtype", "bf16") if began else ()), "--run_dir", tmp_path / "plain")
    assert ledger(tmp_path / "plain") == ledger(tmp_path / "amp")
    assert ("emulated" in plain.err) is began  # an explicit dtype is taken, aloud


def test_a_resume_takes_a_device_and_needs_none_of_the_files_of_the_start(tmp_path: Path) -> None:
    """Neither the weights, nor the recipe, the finder's report and the class weights; and it may lie anywhere."""
    weights, recipe, classes = (tmp_path / name for name in ("w.safetensors", "r.toml", "c.txt"))
    flags = (*FEWER, "--max_samples", 16, "--ledger", "--keep_snapshots", 9, "--num_workers", 0)
    train(*flags, "--run_dir", tmp_path / "first")
    snapshot_path(tmp_path / "first", 2).rename(weights)
    recipe.write_text("label_smoothing = 0.1\n")
    classes.write_text("\n".join(["0.3", *["1.7"] * 9]))
    files = ("--use_pretrained", weights, "--recipe", recipe, "--class_weights", classes)
    train(*flags, *files, "--run_dir", tmp_path / "whole")
    copy = cut(tmp_path / "whole", 1, tmp_path / "cut")
    for path in (weights, recipe, classes, copy / "config.json"):
        path.unlink()
    train("--resume_from", copy, "--device", "cpu")
    assert_same_run(copy, tmp_path / "whole")


@pytest.mark.parametrize("batch", [1, 7, 1000])
def test_an_evaluation_takes_device_size_batch_precision_and_workers_freely(
    batch: int, digits: Path, tmp_path: Path
) -> None:
    copy = cut(digits, STEPS, tmp_path / "run")
    flags = ("--device", "cpu", "--batch_size", batch, "--eval_size", 12, "--amp", "--num_workers", 0)
    done = train("--resume_from", copy, "--evaluate", *flags)
    assert "report.html" in done.out


def test_a_resume_may_change_the_precision_when_it_insists(digits: Path, tmp_path: Path) -> None:
    copy = cut(digits, MIDDLE_OF_2, tmp_path / "cut")
    done = train("--resume_from", copy, "--override", "amp=true", "--override", "amp_dtype=fp16")
    assert "float16" in done.out
    assert steps_kept(copy)[-1] == STEPS


@pytest.mark.parametrize("step", [None, END_OF_1])
def test_one_cycle_is_torchs_at_every_step_across_a_resume(digits: Path, tmp_path: Path, step: int | None) -> None:
    folder = digits
    if step is not None:
        folder = cut(digits, step, tmp_path / "cut")
        train("--resume_from", folder)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.4 * 16 / 256, total_steps=STEPS)
    expected = []
    for _ in range(STEPS):
        group = optimizer.param_groups[0]
        expected.append((group["lr"], group["momentum"]))
        optimizer.step()
        if len(expected) < STEPS:
            schedule.step()
    assert [(row["lr"], row["momentum"]) for row in metrics(folder)] == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        ("--scheduler", "cosine", "--warmup_epochs", 0.5),
        ("--scheduler", "step", "--step_size", 1),
        ("--accumulate_steps", 2, "--max_grad_norm", 0.5, "--label_smoothing", 0.1),
        ("--amp", "--amp_dtype", "fp16", *FEWER),
        ("--amp", "--amp_dtype", "bf16", "--onecycle_three_phase", "--onecycle_anneal_strategy", "linear"),
    ],
    ids=lambda settings: " ".join(map(str, settings)),
)
def test_every_kind_of_run_is_resumed(tmp_path: Path, settings: tuple[object, ...]) -> None:
    whole = tmp_path / "whole"
    train(*SMALL, *settings, "--run_dir", whole)
    copy = cut(whole, steps_kept(whole)[-2], tmp_path / "cut")
    train("--resume_from", copy)
    assert_same_run(copy, whole)


def test_one_line_starts_a_run_and_goes_on_with_it(digits: Path, tmp_path: Path) -> None:
    line = (*SMALL, "--run_dir", tmp_path / "auto", "--resume_from", "auto")
    started = train(*line)
    assert "resumed" not in started.out
    assert "nothing left to do" in train(*line).out
    snapshot_path(tmp_path / "auto", STEPS).unlink()
    assert f"step {MIDDLE_OF_2}, epoch 2" in train(*line).out
    assert_same_run(tmp_path / "auto", digits)


@pytest.mark.parametrize("how", ["auto", "run", "by another name"])
def test_a_run_that_is_killed_just_after_it_went_back_to_its_best_goes_on_from_there(
    how: str, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = cut(digits, STEPS, tmp_path / "run")
    best = snapshot_path(copy, END_OF_1).rename(copy / "snapshots" / "best.safetensors")
    snapshot_path(copy, MIDDLE_OF_1).unlink()
    with monkeypatch.context() as patch:
        patch.setattr("train.train_epoch", mishap)
        with pytest.raises(RuntimeError, match="killed"):
            run("--resume_from", best)
    assert ([*map(int, steps_kept(copy))], len(ledger(copy)), best.exists()) == ([END_OF_1], END_OF_1, True)
    monkeypatch.chdir(tmp_path)
    other = ("--run_dir", "run", "--resume_from", copy)
    done = train(*{"auto": (*SMALL, "--run_dir", copy, "--resume_from", "auto"), "run": other[2:]}.get(how, other))
    assert f"step {END_OF_1}, epoch 2" in done.out
    assert_same_run(copy, digits)


def mishap(run: object) -> None:
    raise RuntimeError("killed")


def test_a_folder_with_nothing_but_its_best_is_a_run_to_all_that_ask(digits: Path, tmp_path: Path) -> None:
    copy = cut(digits, STEPS, tmp_path / "run")
    for step in steps_kept(copy):
        if step != MIDDLE_OF_2:
            snapshot_path(copy, step).unlink()
    snapshot_path(copy, MIDDLE_OF_2).rename(copy / "snapshots" / "best.safetensors")
    refused = run(*SMALL, "--run_dir", copy)
    assert refused.status == 2
    train(*SMALL, "--run_dir", copy, "--resume_from", "auto")
    assert_same_run(copy, digits)


def test_more_epochs_are_a_new_plan_that_is_shown(digits: Path, tmp_path: Path) -> None:
    copy = cut(digits, END_OF_1, tmp_path / "cut")
    out = train("--resume_from", copy, "--override", "epochs=3", "--override", "lr=0.05").out
    table = out[out.index("replanned the learning rate:") :].splitlines()[1:]
    assert table[0].split() == ["epoch", "before", "now"]
    assert [row.split()[1] for row in table if row.split()[0] == "2.00"] == ["-"]
    assert ledger(copy)[:END_OF_1] == ledger(digits)[:END_OF_1]
    rates = [float.fromhex(row["lr"]) for row in ledger(copy)]
    assert table[1].split() == [
        "1.00",
        f"{float.fromhex(ledger(digits)[END_OF_1]['lr']):.3g}",
        f"{rates[END_OF_1]:.3g}",
    ]
    assert max(rates[END_OF_1:]) <= 0.05


def test_an_override_that_changes_what_a_step_is_is_refused(digits: Path, tmp_path: Path) -> None:
    done = run("--resume_from", digits, "--override", "batch_size=24")
    assert done.status == 2
    assert "2 steps now, not the 3" in done.err


def test_a_resumed_run_is_refused_nothing_it_may_have_anew(digits: Path, tmp_path: Path) -> None:
    copy = cut(digits, MIDDLE_OF_1, tmp_path / "cut")
    done = run("--resume_from", copy, "--log_steps", 1, "--keep_snapshots", 1, "--save_best", "--snapshot_steps", 0)
    assert done.status == 0, done.err
    assert steps_kept(copy) == [STEPS]
    assert ledger(copy) == ledger(digits)
    assert (copy / "snapshots" / "best.safetensors").exists()
