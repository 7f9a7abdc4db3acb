"""The losses of our training step beside those of loops made of torchvision's and timm's own parts, step by step.

    uv run python benchmarks/parity.py                                            # ResNet-50, 50 steps: 10 minutes
    uv run python benchmarks/parity.py --model resnet18 --steps 10 --epochs 5 --size 36 --batch 8 --start recipe

Three recipes on the same batches of our loader with the same draws of mixup and cutmix, all in float64, where another
order of summation costs nothing that a mistake could hide in. Network, loss, parameter groups, optimiser, schedule and
average of the reference are the library's; only the first weights are ours. Epochs, warm-ups and the time between
decays are short, so that the schedule moves. The exit status is 1 when a loss differs by more than 1e-7.

A difference of rounding must not grow. With torchvision's default start of a ResNet-50 it grows thirtyfold a step at
these sizes, in torchvision's own loop too, for the first gradient has a norm of 1,600; so blocks start as the identity
here (norm 17), in both loops. `--start recipe` starts as the recipe says, which a ResNet-18 can bear.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
import torch.nn.functional as F
import torchvision
from timm import create_model
from timm.data import Mixup
from timm.loss import BinaryCrossEntropy
from timm.optim import Lamb, param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR, StepLR
from torch.optim.swa_utils import AveragedModel
from torchvision.ops._utils import split_normalization_params
from torchvision.transforms import v2

from benchmarks.common import installed_versions, record
from config import Config, parse, resolve
from preprocess import get_data_loaders
from training.mixing import Mix
from training.optim import build_schedule
from training.step import Training, build_training, train_step

CPU = torch.device("cpu")
CLASSES = 1000
TOLERANCE = 1e-7
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Batch = tuple[torch.Tensor, torch.Tensor]
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Form:
    """How much is compared, on what: `steps` in `epochs` of the same length, images of `size` pixels.

    Residual blocks `start` as the identity, or as the recipe says.
    """

    model: str = "resnet50"
    steps: int = 50
    epochs: int = 10
    size: int = 64
    batch: int = 4
    start: str = "identity"

    @property
    def epoch(self) -> int:
        """The steps of an epoch."""
        return self.steps // self.epochs


@dataclass
class Trace:
    """The loss of each step, and what the model and its average, if there is one, held in the end."""

    losses: list[float]
    weights: Tensors
    average: Tensors


@dataclass
class Reference:
    """A training loop of a library. `mix` takes normalised images and labels, and `after_epoch` their number so far."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    criterion: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    after_epoch: Callable[[int], object]
    mix: Callable[[torch.Tensor, torch.Tensor, Mix | None], Batch]
    average: AveragedModel | None = None


# ---- ours ------------------------------------------------------------------------------------------------------------


def settings(recipe: str, shorter: tuple[str, ...], form: Form) -> Config:
    """A recipe for few generated images of one stream, whose rate follows the batch."""
    few = (
        "--dummy_data",
        "--max_samples",
        form.epoch * form.batch,
        "--batch_size",
        form.batch,
        "--epochs",
        form.epochs,
    )
    other = ("--image_size", form.size, "--eval_size", form.size, "--streams", 1, "--num_workers", 0, "--no_amp")
    start = ("--zero_init_gamma",) if form.start == "identity" else ()
    flags = ("--recipe", recipe, "--model", form.model, *few, *other, *start, *shorter)
    return resolve(parse("parity.py", "", [str(flag) for flag in flags]))


def batches_of(config: Config) -> list[Batch]:
    """The training batches of a run: uint8 images (N, H, W, 3) and their labels."""
    data, found = get_data_loaders(config, CPU), []
    for epoch in range(config.epochs):
        data.train.set_epoch(epoch)
        found += [(images, labels) for images, labels, _ in data.train]
    return found


@contextmanager
def float64() -> Iterator[None]:
    """Whatever is made within computes in float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def train_ours(training: Training, config: Config, lr: float, epoch: int, batches: list[Batch]) -> Trace:
    """What main.py does with the batches, `epoch` of them in each epoch."""
    schedule = build_schedule(training.optimizer, config, lr, epoch)
    losses = []
    training.model.train()
    for step, (images, labels) in enumerate(batches):
        losses.append(float(train_step(training, images, labels, training.mix(step, images)).loss))
        if training.ema is not None:
            training.ema.update(training.model, step + 1)
        schedule.step()
    return Trace(losses, tensors(training.model), tensors(training.average))


def tensors(model: nn.Module | None) -> Tensors:
    """A copy of the floating-point numbers of a model."""
    held = model.state_dict() if model is not None else {}
    return {name: value.clone() for name, value in held.items() if value.is_floating_point()}


# ---- theirs ----------------------------------------------------------------------------------------------------------


def torchvisions(config: Config, classes: int) -> nn.Module:
    start = {"zero_init_residual": bool(config.zero_init_gamma)}
    return torchvision.models.get_model(config.model, num_classes=classes, **start)  # type: ignore[no-any-return]


def torchvision_v1(config: Config, lr: float, classes: int) -> Reference:
    model = torchvisions(config, classes)
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=1e-4)
    schedule = StepLR(optimizer, step_size=config.step_size, gamma=0.1)
    return Reference(model, optimizer, nn.CrossEntropyLoss(), lambda epochs: schedule.step(), lambda x, y, mix: (x, y))


def torchvision_v2(config: Config, lr: float, classes: int) -> Reference:
    model = torchvisions(config, classes)
    norms, others = split_normalization_params(model)
    groups = [{"params": norms, "weight_decay": 0.0}, {"params": others, "weight_decay": 2e-5}]
    optimizer = torch.optim.SGD(groups, lr, momentum=0.9, weight_decay=2e-5)
    warmup = int(config.warmup_epochs)
    rise = LinearLR(optimizer, start_factor=0.01, total_iters=warmup)
    fall = CosineAnnealingLR(optimizer, T_max=config.epochs - warmup)
    schedule = SequentialLR(optimizer, [rise, fall], milestones=[warmup])
    decay = 1 - min(1.0, (1 - 0.99998) * 1024 * 32 / 600)

    def averaged(average: Any, parameter: Any, count: Any) -> Any:
        return decay * average + (1 - decay) * parameter

    mixup, cutmix = v2.MixUp(num_classes=classes), v2.CutMix(num_classes=classes)

    def mixed(x: torch.Tensor, y: torch.Tensor, mix: Mix | None) -> Batch:
        assert mix is not None
        mixup.make_params = lambda _: {"lam": mix.share}
        cutmix.make_params = lambda _: {"lam_adjusted": mix.share, "box": mix.box}
        targets = F.one_hot(y, classes).to(x.dtype)  # it would make float32 of labels
        return (mixup if mix.box is None else cutmix)(x, targets)  # type: ignore[no-any-return]

    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    average = AveragedModel(model, avg_fn=averaged, use_buffers=True)
    return Reference(model, optimizer, criterion, lambda epochs: schedule.step(), mixed, average)


def timm_a3(config: Config, lr: float, classes: int) -> Reference:
    model = create_model(config.model, num_classes=classes)
    optimizer = Lamb(param_groups_weight_decay(model, 0.02), lr=lr, weight_decay=0.02)
    warmup = int(config.warmup_epochs)
    options: Any = {"warmup_t": warmup, "warmup_lr_init": 1e-4 * lr, "lr_min": 1e-6}
    schedule = CosineLRScheduler(optimizer, t_initial=config.epochs, **options)
    mixup = Mixup(mixup_alpha=0.1, cutmix_alpha=1.0, label_smoothing=0.0, num_classes=classes)

    def mixed(x: torch.Tensor, y: torch.Tensor, mix: Mix | None) -> Batch:
        """It pairs the first image with the last, so a batch doubled makes any pairs."""
        assert mix is not None
        share, box = mix.share, mix.box
        left, top, right, bottom = box or (0, 0, 0, 0)
        doubled = [torch.cat([part, part.roll(1, 0).flip(0)]) for part in (x, y)]
        found = patch("timm.data.mixup.cutmix_bbox_and_lam", lambda *_, **__: ((top, bottom, left, right), share))
        drawn = patch.object(mixup, "_params_per_batch", lambda: (share, box is not None))
        with found, drawn:
            images, targets = mixup(*doubled)
        return images[: len(x)], targets[: len(x)]

    criterion = BinaryCrossEntropy(smoothing=0.0, target_threshold=0.2)
    return Reference(model, optimizer, criterion, schedule.step, mixed)


def train_theirs(
    reference: Reference, config: Config, epoch_steps: int, batches: list[Batch], draws: list[Mix | None]
) -> Trace:
    """The references' loop: the schedule moves after each epoch, the average is reset while the rate warms up."""
    losses = []
    reference.model.train()
    for number, ((images, labels), mix) in enumerate(zip(batches, draws, strict=True)):
        epoch, step = divmod(number, epoch_steps)
        pixels = v2.functional.to_dtype(images.permute(0, 3, 1, 2), torch.float64, scale=True)
        x, y = reference.mix(v2.functional.normalize(pixels, list(MEAN), list(STD)), labels, mix)
        loss = reference.criterion(reference.model(x), y)
        reference.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        reference.optimizer.step()
        losses.append(loss.item())
        if reference.average is not None and step % config.ema_every == 0:
            reference.average.update_parameters(reference.model)
            if epoch < config.warmup_epochs:
                reference.average.n_averaged.fill_(0)
        if step == epoch_steps - 1:
            reference.after_epoch(epoch + 1)
    average = reference.average.module if reference.average is not None else None
    return Trace(losses, tensors(reference.model), tensors(average))


def start_alike(reference: Reference, first: nn.Module) -> None:
    """Give the reference our first weights, and our layout. Raises ValueError where its norms start otherwise."""
    for name, value in reference.model.state_dict().items():
        ours = first.state_dict()[name]
        if value.is_floating_point() and value.ndim == 1 and name != "fc.bias" and not torch.equal(value, ours):
            raise ValueError(f"{name} starts with other values than in the reference")
    reference.model.to(memory_format=torch.channels_last)  # float64 is slow in the other one
    reference.model.load_state_dict(first.state_dict())
    if reference.average is not None:
        reference.average.module.load_state_dict(first.state_dict())


# ---- both ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """A recipe, what shortens its schedule, and its reference."""

    recipe: str
    shorter: tuple[str, ...]
    title: str
    reference: Callable[[Config, float, int], Reference]


PLANS = (
    Plan("resnet50-v1", ("--step_size", "4"), "torchvision", torchvision_v1),
    Plan("resnet50-v2", ("--warmup_epochs", "2"), "torchvision", torchvision_v2),
    Plan("resnet50-a3", ("--warmup_epochs", "2"), "timm", timm_a3),
)


@dataclass(frozen=True)
class Difference:
    """The largest differences of a plan: of a loss, relative to it, and of a weight, relative to its tensor's largest.

    `average` is that of the averaged weights, None where there are none.
    """

    plan: Plan
    losses: tuple[float, float]
    loss: float
    weight: float
    average: float | None

    @property
    def ok(self) -> bool:
        return self.loss <= TOLERANCE


def compare(plan: Plan, form: Form) -> Difference:
    """Train a plan both ways. Raises ValueError where not even the first weights agree."""
    config = settings(plan.recipe, plan.shorter, form)
    assert isinstance(config.lr, float)
    batches = batches_of(config)
    assert len(batches) == form.steps
    with float64():
        training = build_training(config, CLASSES, CPU, form.epoch)
        reference = plan.reference(config, config.lr, CLASSES)
        start_alike(reference, training.model)
        draws = [training.mix(step, images) for step, (images, _) in enumerate(batches)]
        theirs = train_theirs(reference, config, form.epoch, batches, draws)
        ours = train_ours(training, config, config.lr, form.epoch, batches)
    pairs = list(zip(ours.losses, theirs.losses, strict=True))
    average = apart(ours.average, theirs.average) if theirs.average else None
    loss = max(abs(one - other) / abs(other) for one, other in pairs)
    return Difference(plan, (pairs[0][1], pairs[-1][1]), loss, apart(ours.weights, theirs.weights), average)


def apart(found: Tensors, expected: Tensors) -> float:
    """The largest difference of an element, over the largest element of its tensor."""
    if found.keys() != expected.keys():
        raise ValueError(f"other tensors: {sorted(found.keys() ^ expected.keys())}")
    return max(float((found[name] - value).abs().max() / value.abs().max()) for name, value in expected.items())


def table(found: list[Difference], steps: int) -> str:
    """Markdown: a row a recipe."""
    head = [
        "recipe",
        "reference",
        "steps",
        "loss, first and last",
        "largest relative difference of a loss",
        "of a weight",
    ]
    head += ["of an averaged weight", "ok"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for one in found:
        average = "" if one.average is None else f"{one.average:.1e}"
        cells = [one.plan.recipe, one.plan.title, str(steps), f"{one.losses[0]:.5f}, {one.losses[1]:.5f}"]
        cells += [f"{one.loss:.1e}", f"{one.weight:.1e}", average, "yes" if one.ok else "NO"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for item in fields(Form):
        flags.add_argument(f"--{item.name}", type=type(item.default), default=item.default)
    form = Form(**vars(flags.parse_args()))
    found = []
    for plan in PLANS:
        found.append(compare(plan, form))
        print(f"{plan.recipe}: {found[-1].loss:.1e}", flush=True)
    set_up = f"{form.model} at {form.size} pixels, batch {form.batch}, float64 on the CPU, {form.epochs} epochs, "
    set_up += f"started from the {form.start}."
    rows = table(found, form.steps)
    record("Parity of losses with the references", set_up, rows, installed_versions())
    return int(not all(one.ok for one in found))


if __name__ == "__main__":
    sys.exit(main())
