"""Programs with the whole preprocessing inside: one image, uint8 (H, W, 3) of any size, in; probabilities out."""

import importlib.util
import io
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from errors import UsageError
from results.formats import Loaded, Order, channels_of, short_side
from results.sampling import ResizedCrop
from stream.augment import Normalize

OPSET = 18
LARGEST_ONNX = 2**31 - 2**20  # bytes: a protocol buffer's
MISSING = "this export needs onnx, onnxscript and onnxruntime: pip install onnx onnxscript onnxruntime"


class Program(nn.Module):
    """uint8 image (H, W, 3) -> probabilities float32 (classes). With `half`, the model computes in float16."""

    def __init__(self, crop: ResizedCrop, normalize: Normalize, model: nn.Module, half: bool) -> None:
        super().__init__()
        self.crop, self.normalize = crop, normalize
        self.dtype = torch.float16 if half else torch.float32
        self.model = model.to(self.dtype)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        pixels = self.crop(image).permute(1, 2, 0)[None]
        logits: torch.Tensor = self.model(self.normalize(pixels).to(self.dtype))
        return logits[0].float().softmax(0)


def write_program(order: Order, model: nn.Module, folder: Path) -> None:
    """Write model.onnx or model.pt2. Raises UsageError without the packages, and for a model that is too large."""
    if order.format == "onnx":
        _require_onnx()
    settings = order.source.settings
    mean, std = channels_of(order.source)
    crop = ResizedCrop(short_side(order.source), settings["eval_size"], settings["eval_interpolation"])
    model.requires_grad_(False)  # so that what a loaded program returns is free of it
    program = Program(crop, Normalize(tuple(mean), tuple(std)), model, order.precision == "fp16").eval()
    example = torch.zeros(96, 80, 3, dtype=torch.uint8)
    sizes = {"image": {0: torch.export.Dim("height"), 1: torch.export.Dim("width")}}
    traced = torch.export.export(program, (example,), dynamic_shapes=sizes, strict=False)
    if order.format == "torch_export":
        program_file = io.BytesIO()  # torch's own writing of files aborts the process when the disk is full
        torch.export.save(traced, program_file)
        (folder / "model.pt2").write_bytes(program_file.getbuffer())
    else:
        _write_onnx(order, traced, folder)


def _write_onnx(order: Order, traced: Any, folder: Path) -> None:
    size = sum(tensor.nbytes for tensor in traced.state_dict.values())
    if size > LARGEST_ONNX:
        raise UsageError(f"{size / 1e9:.1f} GB of weights do not fit into one .onnx file; export to torch_export")
    made: Any = torch.onnx.export(
        traced,
        dynamo=True,
        opset_version=OPSET,
        input_names=["image"],
        output_names=["probabilities"],
        external_data=False,
        verbose=False,
    )
    whole = folder / "model.onnx"
    for side, name in enumerate(("height", "width")):
        made.model.graph.inputs[0].shape[side] = name
    made.save(whole, external_data=False)
    if order.precision == "int8":
        from onnxruntime.quantization import QuantType, quantize_dynamic

        exact = whole.with_suffix(".fp32")
        whole.rename(exact)
        logging.disable(logging.WARNING)  # it advises a preparation that the exporter has done
        try:
            quantize_dynamic(exact, whole, weight_type=QuantType.QUInt8)
        finally:
            logging.disable(logging.NOTSET)
        exact.unlink()


def load_program(order: Order, folder: Path, classes: int) -> Loaded:
    """The program as onnxruntime or torch.export loads it."""
    if order.format == "torch_export":
        module = torch.export.load(folder / "model.pt2").module()
        return Loaded(probabilities=lambda image: module(torch.tensor(image)).numpy())
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    return Loaded(probabilities=lambda image: np.asarray(session.run(None, {"image": image})[0]))


def _require_onnx() -> None:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(name) is None:
            raise UsageError(f"{MISSING} ({name} is missing)")
