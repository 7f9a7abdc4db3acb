"""Batches on their way to the device."""

import logging
from collections import deque
from collections.abc import Callable
from typing import Any, ClassVar

import torch

from stream.shared import Pin

log = logging.getLogger(__name__)


class Transfer:
    """Copies batches to a device: to a GPU on a CUDA stream of its own, in parallel with the previous step.

    `pin` is how memory is made ready for that, None where it need not be.
    """

    _copying: ClassVar[deque[tuple[Any, torch.Tensor]]] = deque()  # what the GPU may still read, of all loaders

    def __init__(self, device: torch.device) -> None:
        self.device = device
        on_gpu = device.type == "cuda"
        self.pin: Pin | None = pinned if on_gpu else None
        self.stream: Any = torch.cuda.Stream(device) if on_gpu else None  # type: ignore[no-untyped-call]

    def __call__(
        self, images: torch.Tensor, labels: torch.Tensor, then: Callable[[torch.Tensor], torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The images, to which `then` is applied there, and the labels."""
        with torch.cuda.stream(self.stream):  # no stream at all on a CPU
            on_device, labels = (tensor.to(self.device, non_blocking=True) for tensor in (images, labels))
            if self.stream is not None:
                self._copying.append((self.stream.record_event(), images))
            on_device = then(on_device)
        if self.stream is not None:
            user = torch.cuda.current_stream(self.device)
            user.wait_stream(self.stream)
            on_device.record_stream(user)
            labels.record_stream(user)
            while self._copying[0][0].query() and len(self._copying) > 1:
                self._copying.popleft()
        return on_device, labels


def pinned(address: int, size: int) -> Callable[[], None]:
    """Pin memory for a GPU; returns what unpins it. Where it cannot be, copies wait for the GPU, and are right."""
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    refused = runtime.cudaHostRegister(address, size, 0)
    if int(refused):
        log.warning("memory cannot be pinned (%s); copies to the GPU are slower", refused)
        return lambda: None
    return lambda: runtime.cudaHostUnregister(address)
