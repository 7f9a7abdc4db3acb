"""An exponential moving average of a model, which is evaluated beside it."""

import copy

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class EMA:
    """The average of a model's parameters and buffers, updated after the first of every `every` steps of an epoch.

    Each update is average = decay * average + (1 - decay) * model (Polyak and Juditsky 1992). With a `warmup`, in
    steps, updates are those of torchvision's reference: they copy the model while the rate warms up and once more
    after it, and then have the whole `decay`. Without one the decay grows as (1 + n) / (10 + n) with the number n of
    updates, up to `decay`, as in TensorFlow's ExponentialMovingAverage: the first weights are soon forgotten. It is a
    function of the step alone, so nothing but the averaged model needs to be kept.
    """

    def __init__(self, model: nn.Module, decay: float, every: int, steps_per_epoch: int, warmup: int = 0) -> None:
        self.decay, self.every, self.steps_per_epoch, self.warmup = decay, every, steps_per_epoch, warmup
        self.module = copy.deepcopy(model)  # the averaged model

    def decay_at(self, step: int) -> float:
        """The decay of the update after this step, 0 while it copies."""
        updates = self._updates(step) - self._updates(self.warmup)
        if self.warmup:
            return self.decay if updates > 1 else 0.0
        return min(self.decay, (1 + updates) / (10 + updates))

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the model after `step` steps, if its turn has come.

        Nothing waits for the device; an update of torch's AveragedModel does.
        """
        if (step - 1) % self.steps_per_epoch % self.every:
            return
        decay = self.decay_at(step)
        average = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        tensors = [[*module.parameters(), *module.buffers()] for module in (self.module, model)]
        for dtype in {tensor.dtype for tensor in tensors[0]}:
            averaged, current = ([tensor for tensor in part if tensor.dtype is dtype] for part in tensors)
            if decay:
                average(averaged, current, None)
            else:
                torch._foreach_copy_(averaged, current)

    def _updates(self, step: int) -> int:
        """The number of updates after so many steps."""
        epochs, rest = divmod(step - 1, self.steps_per_epoch)
        return epochs * -(-self.steps_per_epoch // self.every) + rest // self.every + 1
