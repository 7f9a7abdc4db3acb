"""An exponential moving average of a model, which is evaluated beside it."""

from typing import Any

from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


class EMA:
    """The average of a model's parameters and buffers after every `every` steps.

    Each update is average = decay * average + (1 - decay) * model (Polyak and Juditsky 1992). For `warmup` steps the
    model is copied, as in torchvision's reference while the rate warms up. Then the decay grows as (1 + n) / (10 + n)
    with the n updates since, up to `decay`, as in TensorFlow's ExponentialMovingAverage: the first weights are soon
    forgotten. It is a function of the step alone, so nothing but the averaged model needs to be kept.
    """

    def __init__(self, model: nn.Module, decay: float, every: int, warmup: int = 0) -> None:
        self.decay, self.every, self.warmup = decay, every, warmup
        self._decay = 0.0  # of the update at hand
        self._average = AveragedModel(model, multi_avg_fn=self._update, use_buffers=True)

    @property
    def module(self) -> nn.Module:
        """The averaged model."""
        return self._average.module

    def decay_at(self, step: int) -> float:
        """The decay of the update after this step, 0 while it copies."""
        updates = step // self.every - self.warmup // self.every
        return min(self.decay, (1 + updates) / (10 + updates)) if updates > 0 else 0.0

    def update(self, model: nn.Module, step: int) -> None:
        """Take in the model after `step` steps, if its turn has come. Nothing waits for the device."""
        if step % self.every == 0:
            self._decay = self.decay_at(step)
            self._average.n_averaged.fill_(int(self._decay > 0))  # on the host; with 0 the model is copied
            self._average.update_parameters(model)

    def _update(self, average: Any, model: Any, updates: Any) -> None:
        get_ema_multi_avg_fn(self._decay)(average, model, updates)  # type: ignore[no-untyped-call]
