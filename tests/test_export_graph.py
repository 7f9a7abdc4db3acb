"""The preprocessing inside programs is that of evaluation, and evaluation's is that of the libraries."""

import functools
import io
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from exports import photographs
from PIL import Image

from config import resolve
from preprocess import eval_transform
from results.sampling import ResizedCrop
from stream.pipelines import Pipeline
from training.predictor import normalize_of
from training.preprocessing import of_processor, share_of

SIZES = [(8, 8), (5, 9), (50, 70), (64, 64), (73, 73), (73, 100), (100, 73), (146, 146), (146, 293), (219, 300)]
SIZES += [(292, 292), (375, 500), (500, 333), (2, 50), (3, 200), (200, 4), (1000, 31), (31, 992), (1, 40), (600, 801)]


def noisy(height: int, width: int) -> np.ndarray:
    generator = np.random.default_rng(height * 1000 + width)
    small = generator.integers(0, 256, (max(2, height // 8), max(2, width // 8), 3), np.uint8)
    smooth = cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC).astype(int)
    return (smooth + generator.integers(-20, 20, smooth.shape)).clip(0, 255).astype(np.uint8)


def evaluated(**settings: Any) -> Pipeline:
    return eval_transform(resolve({"image_size": 64, **settings}))


@pytest.mark.parametrize("kind", ["bilinear", "bicubic", "fast"])
@pytest.mark.parametrize("share", [None, 0.95, 1.0])
def test_the_graph_resizes_and_cuts_images_of_any_size_as_evaluation_does(kind: str, share: float | None) -> None:
    ours = evaluated(eval_interpolation=kind, eval_crop_pct=share)
    graph = ResizedCrop(int(64 / share) if share else 73, 64, kind)
    for height, width in SIZES:
        image = noisy(height, width)
        theirs = graph(torch.from_numpy(image)).permute(1, 2, 0).numpy()
        apart = np.abs(ours(image, (0, 0, 0)).astype(int) - theirs.astype(int))
        assert apart.max() <= 1, (height, width)
        assert apart.mean() <= 0.1, (height, width)


@functools.cache
def pictures() -> list[Image.Image]:
    """200 crops like photographs."""
    generator, found = np.random.default_rng(5), []
    for image in photographs(40, 224):
        picture = Image.open(io.BytesIO(image)).convert("RGB")
        for _ in range(5):
            width, height = (int(side * generator.uniform(0.6, 1)) for side in picture.size)
            left, top = (
                int(generator.integers(0, a - b + 1)) for a, b in zip(picture.size, (width, height), strict=True)
            )
            found.append(picture.crop((left, top, left + width, top + height)))
    return found


def mean_difference(settings: dict[str, Any], theirs: Any) -> float:
    """Between normalised images, in 1/255 of a pixel, over 200 crops."""
    config = resolve({name: value for name, value in settings.items() if value is not None})
    transform, normalize = eval_transform(config), normalize_of(config)
    std = normalize.std.view(3, 1, 1)
    apart = []
    for picture in pictures():
        ours = normalize(torch.from_numpy(transform(np.asarray(picture), (0, 0, 0)))[None])[0]
        apart.append(float(((ours - theirs(picture)).abs() * std).mean()))
    return float(np.mean(apart))


def test_evaluation_is_what_transformers_makes_of_images_for_microsofts_resnet(tmp_path: Any) -> None:
    import json

    from transformers import AutoImageProcessor

    told = {
        "crop_pct": 0.875,
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "ConvNextFeatureExtractor",
        "image_processor_type": "ConvNextImageProcessor",
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "resample": 3,
        "size": {"shortest_edge": 224},
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(told))
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    theirs = lambda picture: processor(picture, return_tensors="pt")["pixel_values"][0]
    assert mean_difference(of_processor(told), theirs) <= 1


@pytest.mark.parametrize("version", ["IMAGENET1K_V1", "IMAGENET1K_V2"])
def test_evaluation_is_what_torchvisions_presets_make_of_images(version: str) -> None:
    from torchvision.models import ResNet50_Weights

    preset = ResNet50_Weights[version].transforms()
    size, short = preset.crop_size[0], preset.resize_size[0]
    settings = {"image_size": size, "eval_crop_pct": share_of(size, short), "eval_interpolation": "bilinear"}
    assert mean_difference(settings, preset) <= 0.01


def test_fast_resizing_is_not_far_from_pillows() -> None:
    apart = []
    for picture in pictures()[:100]:
        image = np.asarray(picture)
        fast = evaluated(image_size=224)(image, (0, 0, 0)).astype(int)
        exact = evaluated(image_size=224, eval_interpolation="bilinear", eval_crop_pct=0.875)(image, (0, 0, 0))
        apart.append(np.abs(fast - exact.astype(int)).mean())
    print(f"fast against Pillow's bilinear: {np.mean(apart):.3f}/255")
    assert np.mean(apart) <= 2.5
