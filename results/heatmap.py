"""Grad-CAM: where in an image the network sees its class."""

import torch
import torch.nn.functional as F

from errors import UsageError
from model_resnet50 import head_of
from training.predictor import Predictor


def heatmaps(predictor: Predictor, images: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """uint8 images (N, H, W, 3) and their classes (N,), on the device -> float32 (N, H, W) in 0..1.

    The last feature maps of more than one place, weighted by the mean gradient of the class's logit (Selvaraju et al.
    2017, Grad-CAM). Raises UsageError for a model without feature maps.
    """
    maps: list[torch.Tensor] = []

    def keep(module: torch.nn.Module, inputs: object, output: object) -> None:
        if isinstance(output, torch.Tensor) and output.ndim == 4 and output[0, 0].numel() > 1:
            maps[:] = [output]

    hooks = [module.register_forward_hook(keep) for module in predictor.model.modules()]
    try:
        with torch.enable_grad():
            logits = predictor.model(predictor.normalize(images).requires_grad_())
            if not maps:
                raise UsageError("--heatmap needs a model with feature maps; leave it out")
            (gradient,) = torch.autograd.grad(logits.gather(1, classes[:, None]).sum(), maps[0])
    finally:
        for hook in hooks:
            hook.remove()
    features = predictor.model.get_submodule(head_of(predictor.model)).in_features
    if maps[0].shape[1] != features == maps[0].shape[3]:  # Swin's maps have their channels last
        maps[0], gradient = (part.permute(0, 3, 1, 2) for part in (maps[0], gradient))
    weighted = F.relu((gradient.mean((2, 3), keepdim=True) * maps[0]).sum(1, keepdim=True)).detach()
    sized = F.interpolate(weighted, images.shape[1:3], mode="bilinear")[:, 0]
    return sized / sized.amax((1, 2), keepdim=True).clamp(min=1e-12)
