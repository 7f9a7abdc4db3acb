"""The networks are torchvision's, weight for weight; transformers' weights give transformers' logits."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision.ops import StochasticDepth
from transformers import ResNetConfig, ResNetForImageClassification, ResNetModel, ViTConfig, ViTForImageClassification

from blurpool import BlurConv2d
from errors import DataError, UsageError
from model_resnet50 import (
    DEPTHS,
    BasicBlock,
    ResNet34,
    ResNet50,
    build_model,
    describe,
    load_pretrained_resnet50,
)
from training.sources import open_source, resolve_with_weights
from training.step import build_training

ROOT = Path(__file__).resolve().parent.parent
TOLERANCE = 1e-4  # float32 logits


def make(name: str, num_classes: int = 1000) -> ResNet34 | ResNet50:
    depth = DEPTHS[name]
    return (ResNet34 if depth < 50 else ResNet50)(num_classes, depth)


def make_images(count: int, image_size: int, seed: int) -> torch.Tensor:
    """Blotches of random colour: plain noise averages out, and any two images of it get the same logits."""
    coarse = torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return 2 * nn.functional.interpolate(coarse, size=(image_size, image_size), mode="bilinear")


@torch.no_grad()
def randomise_norms(model: nn.Module) -> None:
    """Give every BatchNorm its own scale, shift and statistics, so that swapping two of them shows in the logits.

    The statistics are those of real activations, then perturbed: else the signal is lost on its way through the depth.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.normal_(0, 0.2)
        norm.momentum = 1.0
    model.train()(make_images(8, 64, seed=0))
    for norm in norms:
        norm.momentum = 0.1
        assert norm.running_mean is not None
        assert norm.running_var is not None
        norm.running_mean += 0.2 * norm.running_var.sqrt() * torch.randn_like(norm.running_mean)
        norm.running_var *= torch.empty_like(norm.running_var).uniform_(0.7, 1.5)


@torch.no_grad()
def largest_difference(ours: nn.Module, theirs: nn.Module, image_size: int) -> float:
    """Largest absolute difference between logits in eval mode, once these are known to be worth comparing."""
    images = make_images(2, image_size, seed=1)
    found, expected = ours.eval()(images), theirs.eval()(images)
    expected = getattr(expected, "logits", expected)
    assert found.shape == expected.shape
    assert 0.1 < expected.std() < 10
    assert (expected[0] - expected[1]).abs().max() > 1000 * TOLERANCE  # the image matters
    return (found - expected).abs().max().item()


# ---- torchvision -----------------------------------------------------------------------------------------------------


def test_resnet50_has_the_published_number_of_parameters() -> None:
    assert sum(parameter.numel() for parameter in ResNet50().parameters()) == 25_557_032


@pytest.mark.parametrize("name", sorted(DEPTHS.keys() - {"resnet20"}))
def test_names_shapes_and_order_of_the_state_are_torchvisions(name: str) -> None:
    with torch.device("meta"):
        ours, theirs = make(name).state_dict(), getattr(torchvision.models, name)().state_dict()
    assert [(key, value.shape) for key, value in ours.items()] == [(key, value.shape) for key, value in theirs.items()]


@pytest.mark.parametrize(
    ("name", "image_size"),
    [("resnet18", 64), ("resnet34", 64), ("resnet50", 64), ("resnet50", 224), ("resnet101", 64), ("resnet152", 64)],
)
def test_logits_are_torchvisions_with_weights_carried_either_way(name: str, image_size: int) -> None:
    torch.manual_seed(0)
    ours, theirs = make(name), getattr(torchvision.models, name)()
    randomise_norms(theirs)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    difference = largest_difference(ours, theirs, image_size)
    print(f"{name} at {image_size}: from torchvision {difference:.1e}")
    assert difference <= TOLERANCE

    randomise_norms(ours)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert largest_difference(ours, theirs, image_size) <= TOLERANCE


def test_gradients_are_torchvisions_in_training_mode() -> None:
    """An in-place slip can leave the eval logits right and the training wrong."""
    torch.manual_seed(0)
    ours, theirs = ResNet34(10, depth=18), torchvision.models.resnet18(num_classes=10)
    randomise_norms(theirs)
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(4, 3, 64, 64)
    for model in (ours, theirs):
        model.train()(images).square().sum().backward()
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-3, atol=1e-4, msg=name)
    for (name, mine_buffer), other_buffer in zip(ours.named_buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(mine_buffer, other_buffer, rtol=1e-4, atol=1e-5, msg=name)


# ---- initialisation and shape ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_a_bottleneck_starts_as_the_identity_and_no_other_norm_is_zero(name: str) -> None:
    model = make(name)
    norms = {key: module for key, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    zero = {key for key, norm in norms.items() if not norm.weight.any()}
    assert zero == {key for key in norms if key.endswith(".bn3")}
    assert all((norms[key].weight == 1).all() for key in norms.keys() - zero)
    assert not any(norm.bias.any() for norm in norms.values())


def test_convolutions_start_with_he_fan_out_deviation() -> None:
    """Standard deviation sqrt(2 / (outputs * kernel area)): fan-in would differ by half or double in many of them."""
    torch.manual_seed(0)
    for name, module in ResNet50().named_modules():
        if isinstance(module, nn.Conv2d):
            expected = (2 / (module.out_channels * module.kernel_size[0] * module.kernel_size[1])) ** 0.5
            assert module.weight.std().item() == pytest.approx(expected, rel=0.05), name
            assert abs(module.weight.mean().item()) < 0.05 * expected, name


@pytest.mark.parametrize("depth", [50, 101, 152])
def test_a_bottleneck_strides_on_its_3x3_as_v1_5_does(depth: int) -> None:
    with torch.device("meta"):
        model = ResNet50(depth=depth)
    for stage, stride in (("layer1", 1), ("layer2", 2), ("layer3", 2), ("layer4", 2)):
        first, *rest = model.get_submodule(stage).children()
        strides = [getattr(first, conv).stride for conv in ("conv1", "conv2", "conv3")]
        assert strides == [(1, 1), (stride, stride), (1, 1)]
        assert first.conv2.kernel_size == (3, 3)  # type: ignore[union-attr]
        assert all(getattr(block, conv).stride == (1, 1) for block in rest for conv in ("conv1", "conv2", "conv3"))


@pytest.mark.parametrize(
    ("image_size", "name", "sizes"),
    [
        (224, "resnet50", [112, 56, 56, 28, 14, 7]),
        (33, "resnet50", [17, 9, 9, 5, 3, 2]),
        (32, "resnet34", [32, 32, 32, 16, 8, 4]),
        (32, "resnet50", [32, 32, 32, 16, 8, 4]),
        (8, "resnet18", [8, 8, 8, 4, 2, 1]),
        (8, "resnet20", [8, 8, 8, 4, 2, 2]),
    ],
)
def test_feature_maps_shrink_as_the_stem_promises(image_size: int, name: str, sizes: list[int]) -> None:
    with torch.device("meta"):
        model: Any = build_model(10, image_size, name)
        images = torch.empty(2, 3, image_size, image_size)
    seen: list[int] = []
    for part in (model.conv1, model.maxpool, model.layer1, model.layer2, model.layer3, model.layer4):
        part.register_forward_hook(lambda _module, _inputs, output: seen.append(output.shape[-1]))
    assert model(images).shape == (2, 10)
    assert seen == sizes


# ---- build_model -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("classes", "image_size", "name", "depth", "cifar_stem"),
    [
        (1000, 224, "auto", 50, False),
        (100, 64, "auto", 50, False),
        (10, 33, "auto", 50, False),
        (10, 32, "auto", 34, True),
        (100, 28, "auto", 34, True),
        (10, 9, "auto", 34, True),
        (10, 8, "auto", 20, True),
        (10, 8, "resnet18", 18, True),
        (1000, 224, "resnet18", 18, False),
        (7, 33, "resnet34", 34, False),
        (10, 32, "resnet50", 50, True),
        (10, 8, "resnet101", 101, True),
        (1000, 224, "resnet152", 152, False),
    ],
)
def test_the_model_suits_the_images(classes: int, image_size: int, name: str, depth: int, cifar_stem: bool) -> None:
    with torch.device("meta"):
        model: Any = build_model(classes, image_size, name)
    stages = [
        stage for stage in (model.layer1, model.layer2, model.layer3, model.layer4) if isinstance(stage, nn.Sequential)
    ]
    convs = 2 if isinstance(model.layer1[0], BasicBlock) else 3
    assert sum(len(stage) for stage in stages) * convs + 2 == depth  # every block, the stem and the head
    assert (convs == 3) == (depth >= 50)
    assert model.conv1.kernel_size == ((3, 3) if cifar_stem else (7, 7))
    assert model.conv1.stride == ((1, 1) if cifar_stem else (2, 2))
    assert any(isinstance(module, nn.MaxPool2d) for module in model.modules()) is not cifar_stem
    assert model.fc.out_features == classes


def test_the_cifar_stem_keeps_torchvisions_names() -> None:
    with torch.device("meta"):
        assert list(build_model(10, 32).state_dict()) == list(torchvision.models.resnet34().state_dict())


@pytest.mark.parametrize("name", ["resnet51", "ResNet50", ""])
def test_an_unknown_model_is_refused_in_one_line_with_the_choices(name: str) -> None:
    with pytest.raises(UsageError) as refusal:
        build_model(10, 224, name)
    message = str(refusal.value)
    assert "\n" not in message
    assert all(choice in message for choice in ("auto", *DEPTHS))


# ---- weights from transformers ---------------------------------------------------------------------------------------


def save_checkpoint(folder: Path, **settings: Any) -> ResNetForImageClassification:
    """A random model of microsoft/resnet-50's configuration, but for `settings`, saved as transformers does."""
    torch.manual_seed(0)
    config: dict[str, Any] = {
        "depths": [3, 4, 6, 3],
        "downsample_in_first_stage": False,
        "embedding_size": 64,
        "hidden_act": "relu",
        "hidden_sizes": [256, 512, 1024, 2048],
        "layer_type": "bottleneck",
        "num_channels": 3,
        "num_labels": 1000,
    }
    theirs = ResNetForImageClassification(ResNetConfig(**(config | settings)))
    randomise_norms(theirs)
    theirs.save_pretrained(folder)
    return theirs


def rewrite_weights(folder: Path, keep: Any) -> None:
    """Leave in the folder's safetensors only the tensors whose name `keep` accepts."""
    path = folder / "model.safetensors"
    weights = {name: tensor for name, tensor in load_file(path).items() if keep(name)}
    save_file(weights, path, metadata={"format": "pt"})


@pytest.mark.parametrize("image_size", [64, 224])
def test_a_transformers_checkpoint_gives_transformers_logits(tmp_path: Path, image_size: int) -> None:
    theirs = save_checkpoint(tmp_path)
    ours = load_pretrained_resnet50(str(tmp_path))
    difference = largest_difference(ours, theirs, image_size)
    print(f"from transformers at {image_size}: {difference:.1e}")
    assert difference <= TOLERANCE


def test_pretrained_weights_whose_stem_is_not_for_such_small_images_are_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path)
    config, source = resolve_with_weights({"dataset": "cifar10", "use_pretrained": str(tmp_path)})
    with pytest.raises(UsageError, match="--use_pretrained brings a stem for images of more than 32 pixels"):
        build_training(config, 10, torch.device("cpu"), source=source)


def test_another_number_of_classes_gets_a_new_head_on_the_same_body(tmp_path: Path) -> None:
    save_checkpoint(tmp_path)
    full = load_pretrained_resnet50(str(tmp_path)).state_dict()
    torch.manual_seed(1)
    first = load_pretrained_resnet50(str(tmp_path), num_classes=10)
    torch.manual_seed(2)
    second = load_pretrained_resnet50(str(tmp_path), num_classes=10)
    for name, tensor in first.state_dict().items():
        if not name.startswith("fc."):
            assert torch.equal(tensor, full[name]), name
    assert first.fc.weight.shape == (10, 2048)
    assert first.fc.bias.shape == (10,)
    assert not torch.equal(first.fc.weight, second.fc.weight)  # drawn, not cut from the old head
    assert first.fc.weight.abs().max() <= 2048**-0.5  # as nn.Linear draws it
    assert all(parameter.requires_grad for parameter in first.parameters())


def test_half_precision_weights_become_a_float32_model(tmp_path: Path) -> None:
    theirs: Any = save_checkpoint(tmp_path)
    theirs.half().save_pretrained(tmp_path)
    assert {p.dtype for p in load_pretrained_resnet50(str(tmp_path)).parameters()} == {torch.float32}


@pytest.mark.parametrize(
    "settings",
    [
        {"downsample_in_bottleneck": True},  # v1: the stride on the first 1x1; same shapes, other logits
        {"depths": [3, 4, 6, 4]},
        {"hidden_sizes": [128, 256, 512, 1024]},
        {"embedding_size": 32},
        {"num_channels": 1},
        {"hidden_act": "gelu"},  # same shapes, other logits, as is the next
        {"downsample_in_first_stage": True},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_a_checkpoint_that_is_no_resnet50_v1_5_is_refused(tmp_path: Path, settings: dict[str, Any]) -> None:
    ResNetConfig(**settings).save_pretrained(tmp_path)  # refused on its configuration, before any weights are fetched
    with pytest.raises(UsageError, match=r"no ResNet-50 v1\.5") as refusal:
        load_pretrained_resnet50(str(tmp_path))
    assert "\n" not in str(refusal.value)
    assert next(iter(settings)) in str(refusal.value)


def test_a_checkpoint_of_another_depth_is_no_resnet50(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, layer_type="basic", depths=[2, 2, 2, 2], hidden_sizes=[64, 128, 256, 512])
    with pytest.raises(UsageError, match="is a resnet18, no ResNet-50"):
        load_pretrained_resnet50(str(tmp_path))
    source = open_source(str(tmp_path))
    assert (source.model, source.count, source.classes) == ("resnet18", 1000, None)


def test_a_checkpoint_of_another_architecture_is_refused(tmp_path: Path) -> None:
    config = ViTConfig(num_hidden_layers=1, hidden_size=32, num_attention_heads=2, intermediate_size=32)
    ViTForImageClassification(config).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"no ResNet-50 v1\.5"):
        load_pretrained_resnet50(str(tmp_path))


def test_a_checkpoint_with_tensors_missing_is_not_completed_at_random(tmp_path: Path) -> None:
    save_checkpoint(tmp_path)
    rewrite_weights(tmp_path, lambda name: ".stages.2." not in name)
    for num_classes in (1000, 10):
        with pytest.raises(DataError, match=r"layer3\.0"):
            load_pretrained_resnet50(str(tmp_path), num_classes)


def test_a_checkpoint_without_a_head_serves_only_a_new_head(tmp_path: Path) -> None:
    config = ResNetConfig()
    config.num_labels = 1000
    body = ResNetModel(config)
    body.save_pretrained(tmp_path)
    with pytest.raises(DataError, match="fc"):
        load_pretrained_resnet50(str(tmp_path), num_classes=1000)
    ours = load_pretrained_resnet50(str(tmp_path), num_classes=10)
    assert torch.equal(ours.conv1.weight, body.embedder.embedder.convolution.weight)


def test_pickled_weights_are_never_opened(tmp_path: Path) -> None:
    theirs = save_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(DataError, match="safetensors"):
        load_pretrained_resnet50(str(tmp_path))


def damage_nothing_there(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "config.json").unlink()


def damage_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def damage_cut_short(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 1_000_000)


def damage_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


@pytest.mark.parametrize("damage", [damage_nothing_there, damage_no_weights, damage_cut_short, damage_config])
def test_a_damaged_folder_is_one_line_saying_what_to_do(tmp_path: Path, damage: Any) -> None:
    save_checkpoint(tmp_path)
    damage(tmp_path)
    with pytest.raises(DataError, match="check the folder or leave it out") as refusal:
        load_pretrained_resnet50(str(tmp_path))
    assert "\n" not in str(refusal.value)
    assert str(tmp_path) in str(refusal.value)


def test_a_missing_folder_is_one_line_saying_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="leave it out") as refusal:
        load_pretrained_resnet50(str(tmp_path / "nowhere"))
    assert "\n" not in str(refusal.value)
    assert str(tmp_path / "nowhere") in str(refusal.value)


@pytest.mark.slow
def test_an_unreachable_hub_is_one_line_saying_what_to_do(tmp_path: Path) -> None:
    """In a process of its own, as the client reads its settings at import; offline mode spares the client's retries."""
    program = (
        "from errors import DataError\n"
        "from model_resnet50 import load_pretrained_resnet50\n"
        "try: load_pretrained_resnet50('someone/resnet')\n"
        "except DataError as error: print('DataError', error)\n"
    )
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("DataError no pretrained weights from someone/resnet")
    assert done.stdout.count("\n") == 1


# ---- describe --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "classes", "image_size", "figures"),
    [
        ("resnet50", 1000, 224, ["25,557,032 parameters", "102.2 MB", "4.09 GMACs"]),
        ("resnet18", 1000, 224, ["11,689,512 parameters", "46.8 MB", "1.81 GMACs"]),  # torchvision's own table
        ("resnet152", 1000, 224, ["60,192,808 parameters", "240.8 MB", "11.51 GMACs"]),
        ("auto", 10, 8, ["ResNet-20", "272,474 parameters", "2.55 million MACs at 8x8"]),
        ("auto", 10, 32, ["21,282,122 parameters", "1.16 GMACs", "CIFAR stem"]),
    ],
)
def test_describe_gives_the_published_figures(name: str, classes: int, image_size: int, figures: list[str]) -> None:
    line = describe(build_model(classes, image_size, name), image_size)
    assert "\n" not in line
    assert [figure for figure in figures if figure not in line] == [], line


@pytest.mark.parametrize("training", [True, False])
def test_describe_leaves_weights_buffers_mode_and_random_numbers_alone(training: bool) -> None:
    model: Any = build_model(10, 32)
    model.train(training)
    model.layer1.eval()  # a part frozen by its user stays so
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    random_state = torch.get_rng_state()
    first = describe(model, 32)
    assert describe(model, 32) == first
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


# ---- ingredients -----------------------------------------------------------------------------------------------------


def test_blocks_are_left_out_as_timm_leaves_them_out() -> None:
    ours: Any = build_model(10, 64, "resnet50", {"drop_path": 0.3})
    theirs = timm.create_model("resnet50", num_classes=10, drop_path_rate=0.3)
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(4, 3, 64, 64)
    for model in (ours, theirs):
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum, module.weight.data = 0.0, torch.ones_like(module.weight)
    results = []
    for model in (ours.train(), theirs.train()):
        torch.manual_seed(3)
        results.append(model(images))
    assert torch.allclose(results[0], results[1], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(results[0], ours(images), rtol=1e-3, atol=1e-3)
    rates = [module.p for module in ours.modules() if isinstance(module, StochasticDepth)]
    assert rates == pytest.approx([0.3 * block / 15 for block in range(16)])
    assert list(ours.state_dict()) == list(torchvision.models.resnet50().state_dict())


def test_a_blur_before_a_stride_is_zhangs_and_keeps_names_and_sizes() -> None:
    conv = BlurConv2d(3, 5, 3, 2, 1, bias=False)
    image = torch.randn(2, 3, 9, 9)
    line = torch.tensor([1.0, 2.0, 1.0]) / 4
    padded = nn.functional.pad(image, (1, 1, 1, 1))
    blurred: Any = sum(line[i] * line[j] * padded[:, :, i : i + 9, j : j + 9] for i in range(3) for j in range(3))
    expected = nn.functional.conv2d(blurred, conv.weight, stride=2, padding=1)
    torch.testing.assert_close(conv(image), expected)
    plain: Any = build_model(10, 64, "resnet50")
    model: Any = build_model(10, 64, "resnet50", {"blurpool": True})
    assert list(model.state_dict()) == list(plain.state_dict())
    blurs = [name for name, module in model.named_modules() if isinstance(module, BlurConv2d)]
    assert blurs == [f"layer{stage}.0.{part}" for stage in (2, 3, 4) for part in ("conv2", "downsample.0")]
    assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 10)


@pytest.mark.parametrize(
    ("name", "given", "zeroed"),
    [("resnet50", None, True), ("resnet50", False, False), ("resnet18", None, False), ("resnet18", True, True)],
)
def test_residual_blocks_start_as_the_identity_where_asked(name: str, given: bool | None, zeroed: bool) -> None:
    model: Any = build_model(10, 64, name, {"zero_init_gamma": given})
    last = model.layer1[0].bn3 if name == "resnet50" else model.layer1[0].bn2
    assert bool((last.weight == 0).all()) is zeroed


@pytest.mark.parametrize(
    ("name", "size"),
    [("torchvision:mobilenet_v3_small", 64), ("torchvision:vit_b_32", 64), ("timm:vit_tiny_patch16_224", 32)],
)
def test_models_of_libraries_take_the_classes_and_the_size(name: str, size: int) -> None:
    model: Any = build_model(7, size, name)
    assert model.eval()(torch.zeros(2, 3, size, size)).shape == (2, 7)
    line = describe(model, size)
    assert line.startswith(f"{name}, {sum(p.numel() for p in model.parameters()):,} parameters")


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("torchvision:resnet5", {}, "did you mean resnet5"),
        ("timm:resnet5", {}, "timm has no model resnet5; did you mean"),
        ("keras:resnet50", {}, "no choice keras:NAME"),
        ("torchvision:fasterrcnn_resnet50_fpn", {}, "torchvision has no model"),
        ("torchvision:googlenet", {}, "gives more than logits"),
        ("timm:resnet18", {"blurpool": True}, "for this program's own models"),
        ("torchvision:resnet18", {"drop_path": 0.1}, "for this program's own models and timm's"),
        ("torchvision:vit_b_16", {}, "does not work with --image_size 33"),
    ],
)
def test_what_a_library_does_not_have_is_refused_in_one_line(name: str, options: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told) as caught:
        build_model(10, 33, name, options)
    assert "\n" not in str(caught.value)
