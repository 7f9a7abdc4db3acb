"""A model and everything that trains it on one device, and the optimiser step."""

import contextlib
import math
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

import distributed
from config import Config
from distributed import print0
from errors import UsageError, UserError
from flags import size_points
from model_resnet50 import build_model, describe, load_weights
from model_zoo import try_out
from training.compiling import WITHOUT_COMPILE, can_compile, compile_for_training
from training.ema import EMA
from training.losses import build_loss, class_weights
from training.mixing import Mix, Mixing, partners
from training.optim import build_optimizer, build_scaler, restart
from training.predictor import Predictor, amp_dtype_of, normalize_of, precision
from training.snapshot import copy_to_host
from training.sources import OPTIONS, Source
from training.state import rng_state, seed_everything, set_rng_state

warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")  # a step that the scaler skips counts too
NOTHING_FITS = "not even a pass of two images fits into the device's memory; use a smaller model or image"
COMPILE_OPTIONS: dict[str, Any] = {}
T = TypeVar("T")


@dataclass(kw_only=True)
class Training(Predictor):
    """A model and everything that trains it on one device. On one process, `ddp` is the model itself."""

    ddp: nn.Module
    criterion: nn.Module
    optimizer: Optimizer
    scaler: torch.amp.GradScaler
    accumulate_steps: int
    max_grad_norm: float | None
    ema: EMA | None = None
    mixing: Mixing | None = None
    compiled: bool = False

    def eagerly(self) -> contextlib.AbstractContextManager[Any]:
        """A context in which nothing is compiled."""
        return torch.compiler.set_stance("force_eager") if self.compiled else contextlib.nullcontext()

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """As a Predictor's, and never compiled: that would take longer than it saves in an evaluation."""
        with self.eagerly():
            return super().logits(images)

    @property
    def average(self) -> nn.Module | None:
        """The averaged model, if there is one."""
        return self.ema.module if self.ema else None

    @property
    def kept(self) -> dict[str, Any]:
        """What a resume needs to know of how the run began, beside its settings: files and devices may be others."""
        weights = getattr(self.criterion, "weight", None)
        return {
            "precision": precision(self.amp_dtype),
            "class_weights": None if weights is None else weights.tolist(),
        }

    def mix(self, step: int, images: torch.Tensor) -> Mix | None:
        """How to mix the images (N, H, W, 3) of the step after `step` steps, if they are mixed."""
        return self.mixing.draw(step, *images.shape[1:3]) if self.mixing else None


def build_training(
    config: Config,
    classes: int,
    device: torch.device,
    steps_per_epoch: int = 1,
    labels: Callable[[], np.ndarray | None] = lambda: None,
    source: Source | None = None,
    began: Mapping[str, Any] | None = None,
) -> Training:
    """The model on its device with its optimiser, scaler and loss. The schedule sets the learning rate later.

    An average of the weights copies them while the learning rate warms up, which `steps_per_epoch` tells; balanced
    class weights are those of the training `labels`. A `source` is where the weights start from; `began` is what
    `Training.kept` told of a run that is resumed. Raises UsageError for an unknown model and for settings or weights
    that do not fit together, DataError for weights that are incomplete.
    """
    compiled = can_compile(config, device)
    mixing, began = _mixing(config), began or {}
    weights = _weights_of_classes(config, classes, labels, began.get("class_weights") or [])
    criterion = build_loss(config.loss, classes, config.label_smoothing, config.bce_threshold, weights)
    torch.manual_seed(config.seed)
    model = _new_model(config, classes, source)
    print0(f"model     {describe(model, config.image_size)}")
    dtype = amp_dtype_of(config, device, began.get("precision"))
    torch.backends.cudnn.benchmark = not config.deterministic
    torch.use_deterministic_algorithms(config.deterministic, warn_only=True)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it is first used
    torch.set_float32_matmul_precision("high")  # TF32, which cuDNN's convolutions use anyway
    model = model.to(device).to(memory_format=torch.channels_last)
    normalize = normalize_of(config).to(device)
    ema = None
    if config.ema_decay:
        warmup = round(config.warmup_epochs * steps_per_epoch)
        ema = EMA(model, config.ema_decay, config.ema_every, steps_per_epoch, warmup)
    if compiled:
        compile_for_training(config, model, normalize, **COMPILE_OPTIONS)
    given = {
        name: getattr(config, name) for name in ("head_lr_scale", "nesterov", "norm_weight_decay", "bias_weight_decay")
    }
    optimizer = build_optimizer(model, 0.1, config.momentum, config.weight_decay, config.optimizer, **given)
    told = f"{str(dtype or torch.float32).removeprefix('torch.')}{', compiled' if compiled else ''}"
    print0(f"device    {_device_name(device)}, {told}")
    seed_everything(config.seed)
    return Training(
        model=model,
        ddp=parallel(model, device),
        normalize=normalize,
        criterion=criterion.to(device),
        optimizer=optimizer,
        scaler=build_scaler(device, dtype),
        device=device,
        amp_dtype=dtype,
        accumulate_steps=config.accumulate_steps,
        max_grad_norm=config.max_grad_norm,
        ema=ema,
        mixing=mixing,
        mirrored=config.tta == "flip",
        compiled=compiled,
    )


def _weights_of_classes(
    config: Config, classes: int, labels: Callable[[], np.ndarray | None], began: list[float]
) -> torch.Tensor | None:
    """Those that a resumed run `began` with rather than those of a file, which may be another by now."""
    if config.class_weights is None:
        return None
    if config.class_weights != "balanced" and len(began) == classes:
        return torch.tensor(began)
    return class_weights(config.class_weights, labels(), classes)


def parallel(model: nn.Module, device: torch.device) -> nn.Module:
    """The model under DDP, or on one process the model itself."""
    if distributed.world_size() == 1:
        return model
    return DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)


def _new_model(config: Config, classes: int, source: Source | None) -> nn.Module:
    """Raises UsageError for an unknown model and for weights of another, DataError for incomplete ones."""
    model = build_model(classes, config.image_size, config.model, {name: getattr(config, name) for name in OPTIONS})
    if config.progressive_size:
        smallest = min(size for size, _ in size_points(config.progressive_size))
        try:
            try_out(model, classes, smallest)
        except UserError:
            raise
        except Exception as error:
            why = " ".join(str(error).split())[:160]
            raise UsageError(
                f"--model {config.model} takes images of one size ({why}); leave out --progressive_size"
            ) from error
    if source is not None:
        source.require_stem(config.image_size)
        is_new = load_weights(model, source.weights, source.told, new_head=True)
        print0(f"weights   {source.told}{f'; the head for {classes} classes is new' if is_new else ''}")
    return model


def _mixing(config: Config) -> Mixing | None:
    if not config.mixup and not config.cutmix:
        return None
    return Mixing(config.mixup, config.cutmix, config.seed, config.batch_size // config.streams)


def _device_name(device: torch.device) -> str:
    ranks = distributed.world_size()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{ranks} x {name}" if ranks > 1 else name


class StepNumbers(NamedTuple):
    """This rank's mean loss (float32), correct images (int64), whether the gradient scaler skipped the step (bool), and
    the global L2 norm of the gradient before clipping (float32), NaN unless it was asked for.

    They are 0-d tensors that stay on the device, so that the host does not wait for it.
    """

    loss: torch.Tensor
    correct: torch.Tensor
    skipped: torch.Tensor
    grad_norm: torch.Tensor


def train_step(
    training: Training, images: torch.Tensor, labels: torch.Tensor, mix: Mix | None = None, norm: bool = False
) -> StepNumbers:
    """One optimiser step on uint8 images (N, H, W, 3) and int64 labels (N,), both on the device.

    Of mixed images those count as correct that are taken for the class of their own label. `norm` asks for that of the
    gradient.
    """
    parts = training.accumulate_steps
    loss_sum = torch.zeros((), device=training.device)
    correct = torch.zeros((), dtype=torch.int64, device=training.device)
    training.optimizer.zero_grad(set_to_none=True)
    chunks = [tensor.chunk(parts) for tensor in (images, labels, *_partners(training, mix, images, labels))]
    for part, (x, y, *other) in enumerate(zip(*chunks, strict=True), 1):
        local = part < parts and isinstance(training.ddp, DistributedDataParallel)
        with training.ddp.no_sync() if local else contextlib.nullcontext():  # type: ignore[operator]
            with training.autocast():
                inputs = training.normalize(x)
                if mix is not None:
                    inputs = mix.apply(inputs, training.normalize(other[0]))
                logits = training.ddp(inputs)
                precision = torch.promote_types(logits.dtype, torch.float32)
                target = y if mix is None else mix.targets(y, other[1], logits.shape[1], precision)
                loss = training.criterion(logits, target) / parts
            training.scaler.scale(loss).backward()
        loss_sum += loss.detach()
        correct += (logits.detach().argmax(1) == y).sum()
    if training.max_grad_norm is not None:
        training.scaler.unscale_(training.optimizer)
        grad_norm = nn.utils.clip_grad_norm_(training.model.parameters(), training.max_grad_norm)
    else:
        grad_norm = _grad_norm(training) if norm else loss_sum.new_full((), math.nan)
    return StepNumbers(loss_sum, correct, _apply(training), grad_norm)


def _grad_norm(training: Training) -> torch.Tensor:
    """The global L2 norm of the gradient, without the scaler's factor; a 0-d tensor on the device."""
    gradients = [p.grad for p in training.model.parameters() if p.grad is not None]
    total, scaler = nn.utils.get_total_norm(gradients), training.scaler
    return total / cast(torch.Tensor, scaler._get_scale_async()) if scaler.is_enabled() else total


def _partners(training: Training, mix: Mix | None, *batch: torch.Tensor) -> list[torch.Tensor]:
    """The images and labels that those of a batch are mixed with; none if they are not."""
    if mix is None or training.mixing is None:
        return []
    return [partners(part, training.mixing.group) for part in batch]


def _apply(training: Training) -> torch.Tensor:
    """Step the optimiser through the scaler, and return whether it skipped the step, which lowers its scale."""
    scaler = training.scaler
    if not scaler.is_enabled():
        training.optimizer.step()
        return torch.zeros((), dtype=torch.bool, device=training.device)
    scale = cast(torch.Tensor, scaler._get_scale_async())  # the public getter waits for the device
    before = scale.clone()
    scaler.step(training.optimizer)
    scaler.update()
    return (scale < before).reshape(())


def within_memory(training: Training, config: Config, run: Callable[[], T]) -> T:
    """Return what `run` returns. Raises UsageError, with what would fit, when the device runs out of memory."""
    try:
        return run()
    except RuntimeError as error:
        _explain(error)
    share = config.batch_size // distributed.world_size()
    training.optimizer.zero_grad(set_to_none=True)  # the failed step itself is gone with its exception
    parts = _fewest_passes(training, config, training.accumulate_steps + 1)
    if parts == share:
        raise UsageError(NOTHING_FITS)
    raise UsageError(
        f"a pass of {share // training.accumulate_steps} images does not fit into the device's memory, one of "
        f"{share // parts} does; use --accumulate_steps {parts}, which keeps --batch_size {config.batch_size}"
    )


def passes_that_fit(training: Training, config: Config) -> int:
    """The fewest passes in which a step fits into every rank's memory; found by trying, of which nothing stays.

    Training must be as `build_training` left it. Raises UsageError, on all ranks, where not even two images fit.
    """
    weights, generators = copy_to_host(training.model.state_dict(), {}), rng_state()
    parts = distributed.largest_over_ranks(_fewest_passes(training, config, 1))
    training.model.load_state_dict(weights)
    training.optimizer.zero_grad(set_to_none=True)
    restart(training.optimizer)
    set_rng_state(generators)
    if parts == config.batch_size // distributed.world_size():
        raise UsageError(NOTHING_FITS)
    return parts


def _fewest_passes(training: Training, config: Config, first: int) -> int:
    """The fewest passes, from `first` on, of a step that fits; one for each image if none of two does."""
    share = config.batch_size // distributed.world_size()
    fewer = (parts for parts in range(first, share // 2 + 1) if share % parts == 0)
    return next((parts for parts in fewer if _fits(training, share, parts, config.image_size)), share)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether the error means that the device, or this machine, is out of memory."""
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)


def _explain(error: RuntimeError) -> None:
    """Raise the error of a step again, but where it means that memory is short; of a compiler in one line."""
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        why = next((line for line in reversed(str(error).split("\n\n")[0].splitlines()) if line.strip()), "")
        raise UsageError(f"--compile fails here: {why.strip()[:200]}; {WITHOUT_COMPILE}") from error
    if not is_out_of_memory(error):
        raise error


def _fits(training: Training, share: int, parts: int, size: int) -> bool:
    """Whether a step on `share` images in `parts` passes fits. It changes the weights, but involves no other rank."""
    scaler = build_scaler(training.device, training.amp_dtype)
    alone = replace(training, ddp=training.model, accumulate_steps=parts, scaler=scaler)
    try:
        images = torch.zeros((share, size, size, 3), dtype=torch.uint8, device=training.device)
        labels = torch.zeros(share, dtype=torch.int64, device=training.device)
        with training.eagerly():  # which needs no less memory
            train_step(alone, images, labels, training.mix(0, images))
    except RuntimeError as error:
        _explain(error)
        return False
    return True
