"""How an export is loaded, as code for its card: it runs in the export's folder, with an image.jpg there."""

from results.formats import Order, channels_of, filter_of, has_cifar_stem, resnet_name, short_side

_PICTURE = 'picture = Image.open("image.jpg").convert("RGB")'
_NAME = 'classes = json.load(open("imagenet1k.json"))["classes"]'
_TRANSFORMERS = """import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

folder = "."  # or the id of its repository on the Hub
processor = AutoImageProcessor.from_pretrained(folder)
model = AutoModelForImageClassification.from_pretrained(folder, dtype=torch.float32).eval()
{picture}
with torch.inference_mode():
    probabilities = model(**processor(picture, return_tensors="pt")).logits.softmax(-1)[0]
print(model.config.id2label[int(probabilities.argmax())], float(probabilities.max()))"""
_TIMM = """import timm
import torch
from PIL import Image

model = timm.create_model("local-dir:.", pretrained=True).eval()  # or "hf-hub:" and the id of its repository
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
{picture}
with torch.inference_mode():
    probabilities = model(transform(picture)[None]).softmax(-1)[0]
print(model.pretrained_cfg["label_names"][int(probabilities.argmax())], float(probabilities.max()))"""
_TORCHVISION = """import json

import torch
from PIL import Image
from safetensors.torch import load_file
from torchvision import transforms
from torchvision.models import get_model
from torchvision.transforms import InterpolationMode

model = get_model({model}, weights=None, {arguments}){stem}
model.load_state_dict(load_file("model.safetensors"))
model.eval()
transform = transforms.Compose(
    [
        transforms.Resize({short}, InterpolationMode.{filter}),
        transforms.CenterCrop({size}),
        transforms.ToTensor(),
        transforms.Normalize({mean}, {std}),
    ]
)
{picture}
with torch.inference_mode():
    probabilities = model(transform(picture)[None]).softmax(-1)[0]
{name}
print(classes[int(probabilities.argmax())], float(probabilities.max()))"""
_STEM = """
model.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)
model.maxpool = torch.nn.Identity()"""
_ONNX = """import json

import numpy as np
import onnxruntime
from PIL import Image

session = onnxruntime.InferenceSession("model.onnx")
{picture}
probabilities = session.run(["probabilities"], {{"image": np.array(picture)}})[0]
{name}
print(classes[int(probabilities.argmax())], float(probabilities.max()))"""
_TORCH_EXPORT = """import json

import numpy as np
import torch
from PIL import Image

program = torch.export.load("model.pt2").module()
{picture}
probabilities = program(torch.tensor(np.array(picture)))
{name}
print(classes[int(probabilities.argmax())], float(probabilities.max()))"""
_CODE = {
    "transformers": _TRANSFORMERS,
    "timm": _TIMM,
    "torchvision": _TORCHVISION,
    "onnx": _ONNX,
    "torch_export": _TORCH_EXPORT,
}


def snippet_of(order: Order, classes: int) -> str:
    """A fenced block of Python that loads the export and classifies image.jpg."""
    source = order.source
    values = {"picture": _PICTURE, "name": _NAME}
    if order.format == "torchvision":
        mean, std = channels_of(source)
        values |= {
            "model": repr(resnet_name(source) or source.model.removeprefix("torchvision:")),
            "arguments": ", ".join(f"{key}={value!r}" for key, value in _arguments(order, classes).items()),
            "stem": _STEM if has_cifar_stem(source) else "",
            "short": str(short_side(source)),
            "size": str(source.settings["eval_size"]),
            "filter": filter_of(source).upper(),
            "mean": repr(mean),
            "std": repr(std),
        }
    return f"```python\n{_CODE[order.format].format(**values)}\n```"


def _arguments(order: Order, classes: int) -> dict[str, object]:
    if resnet_name(order.source):
        return {"num_classes": classes}
    return getattr(order.source.build(), "made_with", {}) | {"num_classes": classes}
