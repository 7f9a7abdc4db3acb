"""ResidentLoader: a small dataset kept in the device's memory, where its batches are made."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from stream.loader import Batch, Loader, ids_of


class ResidentLoader(Loader):
    """A `Loader` of uint8 images of one size, which are copied to the device once and then selected by index.

    `dataset` has `images` (count, H, W, 3) and `labels`. Images are resized to `image_size` batch by batch.
    """

    def __init__(
        self, dataset: Any, order: Callable[[int], list[np.ndarray]], *, image_size: int, **options: Any
    ) -> None:
        super().__init__(dataset, order, **options)
        self.image_size = image_size
        self._images = torch.from_numpy(np.asarray(dataset.images)).to(self.device)
        self._labels = torch.tensor(dataset.labels).to(self.device)

    def __iter__(self) -> Iterator[Batch]:
        epoch, streams = self.epoch, self.order(self.epoch)
        if self.of_epoch is not None:
            self.image_size, _ = self.of_epoch(epoch)
        for parts in self._spans(streams):
            yield self._on_device(self._pick(torch.from_numpy(ids_of(streams, parts))), epoch)

    def _pick(self, ids: torch.Tensor) -> Batch:
        with torch.cuda.stream(self.transfer.stream):
            places = self.real(ids).to(self.device, non_blocking=True)
            return Batch(_resize(self._images[places], self.image_size), self._labels[places], ids)


def _resize(images: torch.Tensor, size: int) -> torch.Tensor:
    """uint8 images (N, H, W, 3) resized to `size` by `size` pixels."""
    if images.shape[1:3] == (size, size):
        return images
    resized = F.interpolate(images.permute(0, 3, 1, 2).float(), (size, size), mode="bilinear", antialias=True)
    return resized.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
