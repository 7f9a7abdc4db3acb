"""A blur before the strides of a network (Zhang 2019)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


class BlurConv2d(nn.Conv2d):
    """A convolution with a stride, of images (N, C, H, W) that a binomial filter of 3x3 has blurred before.

    Source: Zhang 2019, Making Convolutional Networks Shift-Invariant Again; placed as in ffcv-imagenet.
    """

    blur: torch.Tensor

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        line = torch.tensor([1.0, 2.0, 1.0]) / 4
        kernel = (line[:, None] * line).expand(self.in_channels, 1, 3, 3)
        self.register_buffer("blur", kernel.contiguous(), persistent=False)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(F.conv2d(input, self.blur.to(input.dtype), padding=1, groups=self.in_channels))


def blur_strides(block: nn.Module) -> None:
    """Put a `BlurConv2d` in place of each convolution with a stride; their weights are not initialised yet."""
    for parent in [*block.modules()]:
        for name, conv in parent.named_children():
            if isinstance(conv, nn.Conv2d) and conv.stride != (1, 1):
                size, padding = conv.kernel_size, conv.padding
                blurred = BlurConv2d(conv.in_channels, conv.out_channels, size, conv.stride, padding, bias=False)  # type: ignore[arg-type]
                setattr(parent, name, blurred)
