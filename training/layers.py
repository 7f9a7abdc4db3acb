"""A table of a model's layers: shapes, parameters, multiply-adds and the memory of what they put out."""

import copy

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchinfo import summary
from torchinfo.layer_info import LayerInfo

MOST_ROWS = 40
DEEPEST = 4
HEADER = ("layer", "type", "output", "parameters", "multiply-adds", "outputs, MB")


def layer_table(model: nn.Module, image_size: int, images: int) -> list[str]:
    """Lines of a table of the layers, as deep as MOST_ROWS allow, and of what the columns mean.

    Output shapes and multiply-adds are those of one image, memory that of a pass of `images` ones in float32. The model
    is copied without its memory. Names, shapes and parameters are torchinfo's; multiply-adds are PyTorch's own count,
    because torchinfo's takes a linear layer on many tokens for one on a single one.
    """
    twin = copy.deepcopy(model).to("meta").eval()
    batch = torch.empty(images, 3, image_size, image_size, device="meta")
    with FlopCounterMode(display=False) as counter:
        told = summary(twin, input_data=batch, device="meta", depth=DEEPEST, col_names=(), verbose=0)
    counts = counter.get_flop_counts()
    layers = told.summary_list
    depth = next(
        (depth for depth in range(DEEPEST, 1, -1) if sum(layer.depth <= depth for layer in layers) <= MOST_ROWS), 1
    )
    rows: list[tuple[str, ...]] = [HEADER]
    for layer in layers:
        if layer.depth <= depth:
            operations = sum(counts.get(_path(layer), {}).values()) // (2 * images)
            rows.append(_row(layer, operations))
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    lines = [_line(row, widths) for row in rows]
    return [
        f"layers    output and multiply-adds of one image; outputs of a pass of {images} images, in float32",
        *(f"          {line}" for line in lines),
    ]


def _path(layer: LayerInfo) -> str:
    """The name that the counter gives a module."""
    parent = layer.parent_info
    return f"{_path(parent)}.{layer.var_name}" if parent else layer.class_name


def _row(layer: LayerInfo, operations: int) -> tuple[str, ...]:
    name = f"{'  ' * (layer.depth - 1)}{layer.var_name}" if layer.depth else "whole model"
    kind = layer.class_name if layer.depth else str(getattr(layer.module, "name", layer.class_name))
    shape = " x ".join(map(str, layer.output_size[1:]))
    outputs = sum(map(_output_bytes, [layer, *layer.children])) / 1e6
    return name, kind, shape, f"{layer.num_params:,}", f"{operations:,}", f"{outputs:,.1f}"


def _output_bytes(layer: LayerInfo) -> int:
    """The new memory that a layer without others in it puts its result into."""
    keeps = isinstance(layer.module, nn.Identity) or getattr(layer.module, "inplace", False)
    return layer.output_bytes if layer.is_leaf_layer and not keeps else 0


def _line(row: tuple[str, ...], widths: list[int]) -> str:
    cells = [
        cell.ljust(width) if at < 3 else cell.rjust(width)
        for at, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
    return "  ".join(cells).rstrip()
