"""ResNet-18 to -152 and ResNet-20 with torchvision's parameter names, and ResNet-50 weights from the Hub.

Source: He et al. 2016, Deep Residual Learning; v1.5 puts a bottleneck's stride on its 3x3 convolution. ResNet-20 is
that of section 4.2, for small images: three stages of 16 to 64 channels, but with projections as shortcuts.
"""

import copy
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from blurpool import blur_strides
from choices import MODELS
from errors import DataError, UsageError, printable
from model_zoo import build_model as build_model

CIFAR_STEM_UP_TO = 32
LAYERS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3), 20: (3, 3, 3)}
FIRST_WIDTH = {3: 16, 4: 64}  # channels of the first of so many stages; each has twice those of the one before


def conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    """3x3 convolution that keeps the image size at stride 1."""
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)


def conv1x1(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    """1x1 convolution."""
    return nn.Conv2d(inputs, outputs, 1, stride, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: (N, inputs, H, W) -> (N, width, H / stride, W / stride)."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = conv3x3(inputs, width, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(width, width)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = downsample
        self.drop_path: nn.Module = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        return self.relu(self.drop_path(x) + shortcut)


class Bottleneck(nn.Module):
    """1x1, 3x3 with the stride (v1.5), 1x1, and a shortcut.

    (N, inputs, H, W) -> (N, 4 width, H / stride, W / stride).
    """

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = conv1x1(inputs, width)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = conv1x1(width, width * self.expansion)
        self.bn3 = nn.BatchNorm2d(width * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.drop_path: nn.Module = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        x = self.bn3(self.conv3(x))
        return self.relu(self.drop_path(x) + shortcut)


class ResNet(nn.Module):
    """float (N, 3, H, W) -> logits (N, num_classes).

    The ImageNet stem (7x7 stride 2, max pool) reduces the size fourfold before the blocks; the CIFAR stem (3x3,
    no pool) keeps it, as images of 32 pixels need (He et al. 2016, section 4.2). With `zero_init_gamma` blocks are
    initialised to the identity (Goyal et al. 2017, section 5.1); by default bottlenecks are, and basic blocks are not,
    because small networks of them start too slowly. In training, blocks are left out at random, the last one of them
    with probability `drop_path` and earlier ones linearly less (Huang et al. 2016, Stochastic Depth). `blurpool` puts
    a blur before the strides that follow the stem.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        layers: tuple[int, ...],
        num_classes: int,
        cifar_stem: bool = False,
        drop_path: float = 0.0,
        blurpool: bool = False,
        zero_init_gamma: bool | None = None,
    ) -> None:
        super().__init__()
        self._blurpool = blurpool
        self._inputs = width = FIRST_WIDTH[len(layers)]
        self.conv1 = conv3x3(3, width) if cifar_stem else nn.Conv2d(3, width, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if cifar_stem else nn.MaxPool2d(3, 2, padding=1)
        self.layer1 = self._layer(block, width, layers[0], stride=1)
        self.layer2 = self._layer(block, 2 * width, layers[1], stride=2)
        self.layer3 = self._layer(block, 4 * width, layers[2], stride=2)
        self.layer4: nn.Module = nn.Identity()
        if len(layers) > 3:
            self.layer4 = self._layer(block, 8 * width, layers[3], stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(self._inputs, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, Bottleneck) and zero_init_gamma in (None, True):
                nn.init.zeros_(module.bn3.weight)
            elif isinstance(module, BasicBlock) and zero_init_gamma:
                nn.init.zeros_(module.bn2.weight)
        if drop_path:
            from torchvision.ops import StochasticDepth

            blocks = [module for module in self.modules() if isinstance(module, BasicBlock | Bottleneck)]
            for number, one in enumerate(blocks):
                one.drop_path = StochasticDepth(drop_path * number / (len(blocks) - 1), "row")

    def _layer(self, block: type[BasicBlock] | type[Bottleneck], width: int, blocks: int, stride: int) -> nn.Sequential:
        outputs = width * block.expansion
        downsample = None
        if stride != 1 or self._inputs != outputs:
            downsample = nn.Sequential(conv1x1(self._inputs, outputs, stride), nn.BatchNorm2d(outputs))
        first = block(self._inputs, width, stride, downsample)
        if self._blurpool and stride > 1:
            blur_strides(first)
        self._inputs = outputs
        return nn.Sequential(first, *(block(outputs, width, 1, None) for _ in range(blocks - 1)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.avgpool(x).flatten(1))


class ResNet34(ResNet):
    """ResNet-34, -20 or -18, made of basic blocks."""

    def __init__(self, num_classes: int = 1000, depth: int = 34, cifar_stem: bool = False, **options: Any) -> None:
        super().__init__(BasicBlock, LAYERS[depth], num_classes, cifar_stem, **options)
        self.name = f"ResNet-{depth}"


class ResNet50(ResNet):
    """ResNet-50 v1.5, -101 or -152, made of bottlenecks."""

    def __init__(self, num_classes: int = 1000, depth: int = 50, cifar_stem: bool = False, **options: Any) -> None:
        super().__init__(Bottleneck, LAYERS[depth], num_classes, cifar_stem, **options)
        self.name = f"ResNet-{depth}"


DEPTHS = {"resnet20": 20, "resnet18": 18, "resnet34": 34, "resnet50": 50, "resnet101": 101, "resnet152": 152}


def _resnet(name: str, num_classes: int, image_size: int, **options: Any) -> ResNet:
    kind = ResNet34 if DEPTHS[name] < 50 else ResNet50
    return kind(num_classes, DEPTHS[name], image_size <= CIFAR_STEM_UP_TO, **options)


for _name in DEPTHS:
    MODELS.define(_name)(partial(_resnet, _name))


@MODELS.define("auto")
def _resnet_by_size(num_classes: int, image_size: int, **options: Any) -> ResNet:
    name = "resnet20" if image_size <= 8 else "resnet34" if image_size <= CIFAR_STEM_UP_TO else "resnet50"
    return _resnet(name, num_classes, image_size, **options)


def transformers_config(depth: int) -> dict[str, Any]:
    """The configuration of transformers' ResNet that computes what this ResNet of the ImageNet stem computes."""
    layers, expansion = LAYERS[depth], 4 if depth >= 50 else 1
    width = FIRST_WIDTH[len(layers)]
    return {
        "layer_type": "bottleneck" if depth >= 50 else "basic",
        "depths": [*layers],
        "hidden_sizes": [width * 2**stage * expansion for stage in range(len(layers))],
        "embedding_size": width,
        "num_channels": 3,
        "hidden_act": "relu",
        "downsample_in_bottleneck": False,
        "downsample_in_first_stage": False,
    }


def read_transformers_resnet(source: str) -> tuple[str, dict[str, torch.Tensor], dict[int, str]]:
    """The model's name, its weights (float32, by torchvision's names) and class names, of a transformers checkpoint.

    `source` is a folder or a Hub id with safetensors. Raises DataError when the weights are unavailable, damaged or
    incomplete, UsageError when they are not those of a ResNet v1.5.
    """
    from transformers import ResNetConfig, ResNetForImageClassification

    try:
        config = ResNetConfig.from_pretrained(source)
        named = {depth: transformers_config(depth) for depth in LAYERS}
        found = {key: getattr(config, key) for key in named[50]}
        found |= {key: list(found[key] or ()) for key in ("depths", "hidden_sizes")}  # tuples when not from a file
        depth = next((depth for depth in LAYERS if named[depth] == found), None)
        if depth is None or config.model_type != "resnet":
            differing = [key for key, value in named[50].items() if found[key] != value]
            raise UsageError(
                f"{source} is no ResNet-50 v1.5, nor another depth of it (see its "
                f"{', '.join(differing) or 'model_type'}); microsoft/resnet-50 is one"
            )
        loaded: Any = ResNetForImageClassification.from_pretrained(
            source, use_safetensors=True, output_loading_info=True
        )
        theirs, report = loaded
    except UsageError:
        raise
    except Exception as error:  # a damaged file raises SafetensorError or RuntimeError, neither an OSError
        kind = "the folder" if Path(source).is_dir() else "the Hub, or a folder here,"
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"no pretrained weights from {source} ({reason}); check {kind} or leave it out") from error
    lacking = {_torchvision_name(name) for name in report["missing_keys"] if not name.endswith("num_batches_tracked")}
    weights = {_torchvision_name(name): tensor.float() for name, tensor in theirs.state_dict().items()}
    for name in lacking:  # transformers fills these with random numbers and only warns
        del weights[name]
    return f"resnet{depth}", weights, {int(number): str(name) for number, name in (config.id2label or {}).items()}


def load_pretrained_resnet50(source: str = "microsoft/resnet-50", num_classes: int = 1000, **options: Any) -> ResNet50:
    """ResNet-50 v1.5 with the safetensors weights of a transformers checkpoint: a Hub id or a local folder.

    The head is newly initialised when the number of classes differs. Raises DataError when the weights are unavailable,
    damaged or incomplete, UsageError when they are not those of a ResNet-50 v1.5.
    """
    name, weights, names = read_transformers_resnet(source)
    if name != "resnet50":
        raise UsageError(f"{source} is a {name}, no ResNet-50; microsoft/resnet-50 is one")
    model = ResNet50(num_classes, **options)
    load_weights(model, weights, source, new_head=num_classes != len(names))
    return model


def head_of(model: nn.Module) -> str:
    """The name of a model's classifier, its last linear layer or, without one, its last convolution.

    Raises UsageError for a model that has neither.
    """
    kinds = [
        [name for name, part in model.named_modules() if isinstance(part, kind)] for kind in (nn.Linear, nn.Conv2d)
    ]
    found = next((names[-1] for names in kinds if names), None)
    if found is None:
        raise UsageError(f"{model.name} has no linear layer and no convolution to be its classifier")
    return found


def load_weights(model: nn.Module, weights: Mapping[str, torch.Tensor], where: str, new_head: bool = False) -> bool:
    """Load weights by name, strictly, and return whether the head did not come with them.

    With `new_head` a head that is missing, or is for another number of classes, stays the model's own. Raises DataError
    for weights that lack some of the model's, UsageError for those of another model; the model is then as it was.
    """
    own = model.state_dict()
    wanted, other = list(own), False
    if new_head:
        head = head_of(model)
        first = weights.get(f"{head}.weight")
        other = first is None or first.shape[:1] != own[f"{head}.weight"].shape[:1]
        wanted = [name for name in own if not (other and name.startswith(f"{head}."))]
    lacking = [name for name in wanted if name not in weights and not name.endswith("num_batches_tracked")]
    misfits = [name for name in wanted if name in weights and weights[name].shape != own[name].shape]
    strange = [name for name in weights if name not in own]
    if misfits or strange or len(lacking) * 2 > len(wanted):
        why = printable((misfits or strange or lacking)[0])
        raise UsageError(f"the weights in {where} are not those of {model.name} (see {why}); name their --model")
    if lacking:
        raise DataError(f"{where} lacks {len(lacking)} tensors of {model.name} ({min(lacking)}); fetch it again")
    model.load_state_dict(own | {name: weights[name] for name in wanted if name in weights})
    return other


def _torchvision_name(name: str) -> str:
    """A parameter's name in transformers' ResNet -> its name in torchvision's, which is ours."""
    if name.startswith("classifier.1."):
        return name.replace("classifier.1.", "fc.")
    *path, part, leaf = name.split(".")
    is_norm = part == "normalization"
    if path[:2] == ["resnet", "embedder"]:
        return f"{'bn1' if is_norm else 'conv1'}.{leaf}"
    _, _, _, stage, _, block, *inner = path
    prefix = f"layer{int(stage) + 1}.{block}"
    if inner[0] == "shortcut":
        return f"{prefix}.downsample.{int(is_norm)}.{leaf}"
    return f"{prefix}.{'bn' if is_norm else 'conv'}{int(inner[1]) + 1}.{leaf}"


def transformers_name(name: str) -> str:
    """A parameter's name in torchvision's ResNet -> its name in transformers', the inverse of `_torchvision_name`."""
    first, *path = name.split(".")
    if first == "fc":
        return f"classifier.1.{path[-1]}"
    if not first.startswith("layer"):
        part = "normalization" if first == "bn1" else "convolution"
        return f"resnet.embedder.embedder.{part}.{path[-1]}"
    block, inner, *rest = path
    prefix = f"resnet.encoder.stages.{int(first[-1]) - 1}.layers.{block}"
    if inner == "downsample":
        part = "normalization" if rest[0] == "1" else "convolution"
        return f"{prefix}.shortcut.{part}.{rest[-1]}"
    part = "normalization" if inner.startswith("bn") else "convolution"
    return f"{prefix}.layer.{int(inner[-1]) - 1}.{part}.{rest[-1]}"


def describe(model: nn.Module, image_size: int) -> str:
    """One line: name, stem, parameters, size in float32, and GMACs (billions of multiply-adds) of a forward pass."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    with FlopCounterMode(display=False) as counter:
        copy.deepcopy(model).to("meta").eval()(torch.empty(1, 3, image_size, image_size, device="meta"))
    stem = "CIFAR stem, " if isinstance(model, ResNet) and model.conv1.stride == (1, 1) else ""
    macs = counter.get_total_flops() / 2e9
    told = f"{macs:.2f} GMACs" if macs >= 0.01 else f"{macs * 1000:.2f} million MACs"
    size = f"{parameters:,} parameters, {parameters * 4 / 1e6:.1f} MB"
    return f"{model.name}, {stem}{size}, {told} at {image_size}x{image_size}"
