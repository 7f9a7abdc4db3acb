"""Products of matrices that are the same on every processor."""

import pytest
import torch


def round_each_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes `bmm` of three columns round every product and sum, as MKL does it on an AMD EPYC.

    torchvision finds the sources of pixels by it. A library that fuses them gives some places another last bit, and
    where a source lies halfway between two pixels, that decides which one it is.
    """

    def bmm(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        first, second, third = (left[:, :, i, None] * right[:, i, None] for i in range(3))
        return first + second + third

    monkeypatch.setattr(torch.Tensor, "bmm", bmm)
