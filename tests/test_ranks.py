"""Two and four ranks compute what one process computes: each loss, gradient and weight, and the numbers in the log.

The numbers are float64, where another order of summation costs nothing that a wrong scale could hide in. BatchNorm,
whose statistics are those of a rank's own images, is replaced by a norm of each image but where it is the subject.
"""

import contextlib
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from killable import _server as forks
from program import TIMEOUT, assert_same_tensors, metrics, results, snapshot_path, tensors
from torch import distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

import distributed
import main
from config import resolve
from preprocess import get_data_loaders
from train import evaluate
from training import step
from training.signals import StopRequest

pytestmark = pytest.mark.slow

Tensors = dict[str, torch.Tensor]
WORLDS = (1, 2, 4)
STEPS = 3
BATCH = 32
CLIP = 0.05  # a small part of the gradient's norm
EXACT = 1e-9
ROUNDED = 1e-4  # one ReLU that rounding switches is seen in a gradient
SMALL = {"max_samples": STEPS * BATCH, "batch_size": BATCH, "model": "resnet18", "lr": 0.03}
LOGGED = tuple(word for name, value in SMALL.items() for word in (f"--{name}", value))
LOGGED = (*LOGGED, "--epochs", 1, "--log_steps", 2)


@dataclass(frozen=True)
class Case:
    """What the ranks train with: flags, and what is done to the model or with it."""

    flags: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float64
    batch_norm: bool = False
    reduced: bool = True
    counted: bool = False
    statistics_of_rank0: bool = False


MIXED = {"mixup": 0.2, "cutmix": 1.0, "auto_augment": "ta_wide", "random_erasing": 0.5, "color_jitter": "0.4"}
MIXED |= {"repeats": 2}
CASES = {
    "plain": Case(),
    "float32": Case(dtype=torch.float32),
    "accumulated": Case({"accumulate_steps": 2}),
    "clipped": Case({"max_grad_norm": CLIP}),
    "clipped, accumulated": Case({"max_grad_norm": CLIP, "accumulate_steps": 2}),
    "accumulated, counted": Case({"accumulate_steps": 2}, counted=True),
    "each for itself": Case(reduced=False),
    "mixed": Case(MIXED | {"label_smoothing": 0.1}),
    "mixed, bce": Case(MIXED | {"accumulate_steps": 2, "loss": "bce", "label_smoothing": 0.1}),
    "batch norm": Case({"accumulate_steps": 2}, batch_norm=True),
    "batch norm, as saved": Case({"accumulate_steps": 2}, batch_norm=True, statistics_of_rank0=True),
}


@dataclass
class Outcome:
    """What one rank saw of a case: numbers and gradients of each step, and what the model held in the end.

    Losses are means over ranks, and `correct` sums. `first_loss` and `first_top1` are what the new model makes of this
    rank's first images, all at once. `reductions` counts how often ranks added up their gradients, where that is
    counted. `statistics` are BatchNorm's before the evaluation.
    """

    first_loss: float
    first_top1: float
    losses: list[float]
    correct: list[int]
    gradients: list[Tensors]
    reductions: int
    weights: Tensors
    statistics: Tensors
    statistics_evaluated: Tensors


# ---- what a rank does ------------------------------------------------------------------------------------------------


def small(build: Callable[..., Any], case: Case) -> Callable[..., Any]:
    """A `build_model` for the first stage of a ResNet, which computes in the case's precision."""

    def built(*arguments: Any) -> Any:
        model = build(*arguments)
        model.layer2 = model.layer3 = model.layer4 = nn.Identity()
        model.fc = nn.Linear(model.conv1.out_channels, model.fc.out_features)
        if not case.batch_norm:
            for part in [*model.modules()]:
                for name, norm in part.named_children():
                    if isinstance(norm, nn.BatchNorm2d):
                        setattr(part, name, nn.GroupNorm(1, norm.num_features))
        model.register_forward_pre_hook(lambda _, inputs: (inputs[0].to(case.dtype),))
        return model.to(case.dtype)

    return built


def copies(named: Iterator[tuple[str, torch.Tensor]]) -> Tensors:
    return {name: tensor.detach().clone() for name, tensor in named}


def reduce_and_note(buckets: list[bool], bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """What ranks do with a part of the gradient, noting whether it is the last part."""
    buckets.append(bucket.is_last())
    assert dist.group.WORLD is not None
    return allreduce_hook(dist.group.WORLD, bucket)


def train_case(case: Case) -> Outcome:
    config, device = resolve(SMALL | case.flags), torch.device("cpu")
    data = get_data_loaders(config, device)
    training = step.build_training(config, len(data.classes), device)
    model = training.model
    assert isinstance(training.ddp, DistributedDataParallel) == (distributed.world_size() > 1)
    if not case.reduced:
        training = replace(training, ddp=model)
    buckets: list[bool] = []
    if case.counted and isinstance(training.ddp, DistributedDataParallel):
        training.ddp.register_comm_hook(buckets, reduce_and_note)
    images, labels, _ = next(iter(data.train))
    with torch.no_grad():
        logits = model.eval()(training.normalize(images))
    model.train()
    losses, correct, gradients = [], [], []
    for number, (images, labels_of_step, _) in enumerate(data.train):
        if case.statistics_of_rank0:
            distributed.copy_from_rank0(model.buffers())
        numbers = step.train_step(training, images, labels_of_step, training.mix(number, images))
        losses.append(float(distributed.mean_over_ranks(numbers.loss)))
        correct.append(int(distributed.sum_over_ranks(numbers.correct.numpy())))
        gradients.append(copies((name, p.grad) for name, p in model.named_parameters() if p.grad is not None))
    statistics = copies(model.named_buffers())
    evaluate(training, data.val, StopRequest())
    return Outcome(
        first_loss=float(F.cross_entropy(logits, labels)),
        first_top1=float((logits.argmax(1) == labels).double().mean()),
        losses=losses,
        correct=correct,
        gradients=gradients,
        reductions=sum(buckets),
        weights=copies(model.named_parameters()),
        statistics=statistics,
        statistics_evaluated=copies(model.named_buffers()),
    )


def live(rank: int, world: int, port: int, folder: Path) -> None:
    """One rank: a whole run of main.py, which forms the process group, then every case."""
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": world, "RANK": rank}
    os.environ.update({name: str(value) for name, value in meeting.items()})
    torch.set_num_threads(1)
    build_model = step.build_model
    with open(folder / f"log{rank}", "w") as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        step.build_model = small(build_model, Case())
        accumulate = ("--accumulate_steps", 1 if world == 1 else 2)
        status = main.main([str(word) for word in (*LOGGED, *accumulate, "--run_dir", folder / "run")])
        if status or distributed.world_size() != world:
            sys.exit(status or 1)
        outcomes = {}
        for name, case in CASES.items():
            step.build_model = small(build_model, case)
            outcomes[name] = train_case(case)
            if rank:
                outcomes[name].gradients.clear()
    torch.save(outcomes, folder / f"outcomes{rank}")


# ---- the gangs -------------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True)
class Gang:
    """What the ranks of one process group left: the outcome of each case on each rank, and the folder of their run."""

    outcomes: list[dict[str, Outcome]]
    run: Path

    def __getitem__(self, case: str) -> Outcome:
        """Rank 0's outcome."""
        return self.outcomes[0][case]


@pytest.fixture(scope="module")
def gangs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, Gang]]:
    """One, two and four ranks, all at work at the same time."""
    root = tmp_path_factory.mktemp("gangs")
    folders = {world: root / str(world) for world in WORLDS}
    processes = []
    for world, folder in folders.items():
        folder.mkdir()
        port = free_port()
        processes += [forks.Process(target=live, args=(rank, world, port, folder)) for rank in range(world)]
    for process in processes:
        process.start()
    limit = time.monotonic() + TIMEOUT
    for process in processes:
        process.join(max(0, limit - time.monotonic()))
    for process in processes:
        process.kill()
        process.join()
    ends = [process.exitcode for process in processes]
    assert not any(ends), "\n".join([str(ends), *(path.read_text() for path in sorted(root.glob("*/log*")))])
    yield {world: gather(world, folder) for world, folder in folders.items()}
    shutil.rmtree(root)


def gather(world: int, folder: Path) -> Gang:
    found = [torch.load(folder / f"outcomes{rank}", weights_only=False) for rank in range(world)]
    return Gang(found, folder / "run")


def difference(found: Tensors, expected: Tensors) -> float:
    """The largest difference of an element, over the largest element of its tensor."""
    assert found.keys() == expected.keys()
    assert found
    return max(float((found[name] - expected[name]).abs().max() / expected[name].abs().max()) for name in expected)


def assert_same_training(found: Outcome, expected: Outcome, tolerance: float) -> None:
    """The same losses (which are logged in float32), gradients of each step, and weights after the last."""
    assert len(found.losses) == STEPS
    assert found.losses == pytest.approx(expected.losses, rel=max(tolerance, 1e-6))
    assert found.correct == expected.correct
    apart = [difference(*pair) for pair in zip(found.gradients, expected.gradients, strict=True)]
    assert max(apart) < tolerance
    assert difference(found.weights, expected.weights) < tolerance


# ---- what they have in common ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_do_not_scale_the_loss_the_gradients_or_the_weights(gangs: dict[int, Gang], world: int) -> None:
    assert_same_training(gangs[world]["plain"], gangs[1]["plain"], EXACT)


@pytest.mark.parametrize("world", [2, 4])
def test_in_float32_ranks_differ_from_one_process_by_rounding_only(gangs: dict[int, Gang], world: int) -> None:
    assert_same_training(gangs[world]["float32"], gangs[1]["float32"], ROUNDED)


@pytest.mark.parametrize("case", ["mixed", "mixed, bce"])
@pytest.mark.parametrize("world", [2, 4])
def test_images_are_changed_and_mixed_alike_on_any_number_of_ranks(
    gangs: dict[int, Gang], world: int, case: str
) -> None:
    assert_same_training(gangs[world][case], gangs[1][case], EXACT)
    assert difference(gangs[1][case].weights, gangs[1]["plain"].weights) > 1e6 * EXACT


@pytest.mark.parametrize("world", WORLDS)
def test_accumulation_does_not_scale_the_loss_the_gradients_or_the_weights(gangs: dict[int, Gang], world: int) -> None:
    assert_same_training(gangs[world]["accumulated"], gangs[1]["plain"], EXACT)


@pytest.mark.parametrize("world", [2, 4])
def test_accumulation_adds_gradients_up_over_ranks_once_a_step(gangs: dict[int, Gang], world: int) -> None:
    assert gangs[world]["accumulated, counted"].reductions == STEPS


@pytest.mark.parametrize("world", [2, 4])
def test_a_rank_that_kept_its_gradient_to_itself_would_be_seen(gangs: dict[int, Gang], world: int) -> None:
    alone, one = gangs[world]["each for itself"], gangs[1]["plain"]
    assert difference(alone.gradients[0], one.gradients[0]) > 0.1
    assert difference(alone.weights, one.weights) > 1e6 * EXACT
    assert difference(alone.weights, gangs[world].outcomes[-1]["each for itself"].weights) > 1e6 * EXACT


@pytest.mark.parametrize("case", ["clipped", "clipped, accumulated"])
@pytest.mark.parametrize("world", WORLDS)
def test_it_is_the_global_gradient_that_is_clipped(gangs: dict[int, Gang], world: int, case: str) -> None:
    def norm(gradients: Tensors) -> float:
        return float(nn.utils.get_total_norm(gradients.values()))

    assert [norm(gradients) for gradients in gangs[world][case].gradients] == [pytest.approx(CLIP, rel=1e-4)] * STEPS
    assert norm(gangs[1]["plain"].gradients[0]) > 10 * CLIP
    assert_same_training(gangs[world][case], gangs[1]["clipped"], EXACT)


@pytest.mark.parametrize("case", [name for name, case in CASES.items() if case.reduced])
@pytest.mark.parametrize("world", [2, 4])
def test_no_rank_drifts_from_the_others_by_a_single_bit(gangs: dict[int, Gang], world: int, case: str) -> None:
    first, *others = [outcomes[case] for outcomes in gangs[world].outcomes]
    for other in others:
        assert_same_tensors(other.weights, first.weights)
        assert_same_tensors(other.statistics_evaluated, first.statistics_evaluated)
        assert other.losses == first.losses


@pytest.mark.parametrize("world", [2, 4])
def test_an_evaluation_uses_the_statistics_of_rank_0(gangs: dict[int, Gang], world: int) -> None:
    first, *others = [outcomes["batch norm"] for outcomes in gangs[world].outcomes]
    assert_same_tensors(first.statistics_evaluated, first.statistics)
    for other in others:
        assert difference(other.statistics, first.statistics) > 1e-3  # until then each rank has its own
        assert_same_tensors(other.statistics_evaluated, first.statistics)


@pytest.mark.parametrize("world", [2, 4])
def test_a_snapshot_between_steps_needs_no_statistics_but_rank_0s(gangs: dict[int, Gang], world: int) -> None:
    for outcomes in gangs[world].outcomes:
        assert_same_tensors(outcomes["batch norm, as saved"].weights, outcomes["batch norm"].weights)
        assert_same_tensors(outcomes["batch norm, as saved"].statistics, outcomes["batch norm"].statistics)


@pytest.mark.parametrize("world", [2, 4])
def test_the_log_tells_of_the_global_batch_not_of_a_rank_s_share(gangs: dict[int, Gang], world: int) -> None:
    one, logged = (metrics(gangs[ranks].run) for ranks in (1, world))
    new = gangs[1]["plain"]
    assert (logged[0]["loss"], logged[0]["top1"]) == (pytest.approx(new.first_loss, rel=1e-6), new.first_top1)
    assert gangs[world]["plain"].first_loss != pytest.approx(new.first_loss, rel=1e-4)
    assert len(logged) == STEPS
    assert [row["loss"] for row in logged] == pytest.approx([row["loss"] for row in one], rel=1e-6)
    rest = [[{name: value for name, value in row.items() if name != "loss"} for row in rows] for rows in (one, logged)]
    assert rest[0] == rest[1]
    epochs = [{name: float(value) for name, value in results(gangs[ranks].run)[0].items()} for ranks in (1, world)]
    assert epochs[1] == pytest.approx(epochs[0], rel=1e-6)


@pytest.mark.parametrize("world", [2, 4])
def test_a_whole_run_that_accumulates_ends_with_the_weights_of_one_process(gangs: dict[int, Gang], world: int) -> None:
    one, saved = (tensors(snapshot_path(gangs[ranks].run, STEPS)) for ranks in (1, world))
    for held in (one, saved):
        for name in [name for name in held if name.startswith("rng.")]:
            del held[name]
    assert len(saved) == 2 * len(gangs[1]["plain"].weights)
    assert difference(saved, one) < EXACT
