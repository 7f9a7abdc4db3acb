"""Model sources: a run, a snapshot, folders and files of other libraries, each read back to the same logits."""

import io
import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from program import run, snapshot_path, tensors, train
from safetensors.torch import save_file

from errors import DataError, SnapshotError, UsageError
from model_resnet50 import build_model
from training.preprocessing import share_of
from training.sources import open_source, resolve_with_weights

DIGITS = ("--max_samples", 48, "--batch_size", 16, "--epochs", 2, "--num_workers", 0, "--save_best")


@pytest.fixture(scope="module")
def averaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("averaged") / "run"
    train(*DIGITS, "--ema_decay", 0.5, "--snapshot_steps", 2, "--keep_snapshots", 9, "--run_dir", folder)
    return folder


def logits(model: torch.nn.Module, size: int = 64) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(torch.linspace(-2, 2, 2 * 3 * size * size).view(2, 3, size, size))


def resnet18(classes: int = 10) -> torch.nn.Module:
    torch.manual_seed(3)
    model: torch.nn.Module = torchvision.models.resnet18(num_classes=classes)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean = torch.rand(module.num_features) / 5 - 0.1
    return model.eval()


@pytest.mark.parametrize(
    ("which", "file", "part"),
    [
        (None, "best", "ema."),
        ("best", "best", "ema."),
        ("last", "step-000000006", "model."),
        ("ema", "step-000000006", "ema."),
        ("4", "step-000000004", "model."),
    ],
)
def test_a_run_gives_the_weights_that_are_asked_for(averaged: Path, which: str | None, file: str, part: str) -> None:
    source = open_source(str(averaged), which)
    held = tensors(averaged / "snapshots" / f"{file}.safetensors")
    built = source.build().state_dict()
    assert [name for name in built if not torch.equal(built[name], held[part + name])] == []
    assert (source.run, source.model, source.classes) == (averaged, "resnet20", [str(digit) for digit in range(10)])


def test_a_snapshot_file_is_a_source_wherever_it_lies(averaged: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere.safetensors"
    copy.write_bytes(snapshot_path(averaged, 4).read_bytes())
    source = open_source(str(copy), "last")
    assert source.run is None
    held = tensors(copy)
    assert all(torch.equal(tensor, held[f"model.{name}"]) for name, tensor in source.weights.items())


@pytest.mark.parametrize(
    ("which", "kind", "words"),
    [
        ("7", SnapshotError, "has no snapshot of step 7; it has those of 2, 3, 4, 6"),
        ("worst", UsageError, "--which worst is not best, last, ema or the number of a step"),
    ],
)
def test_what_a_run_does_not_have_is_refused(averaged: Path, which: str, kind: Any, words: str) -> None:
    with pytest.raises(kind, match=words):
        open_source(str(averaged), which)


def test_a_run_without_an_average_has_none_to_give(tmp_path: Path) -> None:
    train(*DIGITS, "--run_dir", tmp_path / "run")
    with pytest.raises(UsageError, match="holds no average of the weights, which --ema_decay keeps"):
        open_source(str(tmp_path / "run"), "ema")
    assert torch.equal(
        open_source(str(tmp_path / "run")).weights["fc.weight"],
        tensors(tmp_path / "run" / "snapshots" / "best.safetensors")["model.fc.weight"],
    )


WRAPPINGS: dict[str, Any] = {
    "plain": lambda weights: weights,
    "state_dict": lambda weights: {"state_dict": weights, "epoch": 3},
    "model": lambda weights: {"model": weights, "optimizer": {"state": {}}},
    "ddp": lambda weights: {f"module.{name}": tensor for name, tensor in weights.items()},
    "compiled": lambda weights: {"model": {f"module._orig_mod.{name}": tensor for name, tensor in weights.items()}},
    "half": lambda weights: {
        name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in weights.items()
    },
}


@pytest.mark.parametrize("kind", WRAPPINGS)
def test_weight_files_are_unwrapped(kind: str, tmp_path: Path) -> None:
    model = resnet18()
    torch.save(WRAPPINGS[kind](model.state_dict()), tmp_path / "weights.pth")
    source = open_source(str(tmp_path / "weights.pth"))
    assert source.model == "resnet18"
    assert torch.allclose(logits(source.build()), logits(model), atol=1e-2 if kind == "half" else 0)


def test_the_average_of_a_foreign_checkpoint_is_asked_for_by_name(tmp_path: Path) -> None:
    model, other = resnet18(), resnet18()
    torch.nn.init.ones_(other.fc.weight)  # type: ignore[arg-type, union-attr]
    average = {f"module.{name}": tensor for name, tensor in other.state_dict().items()}
    torch.save(
        {"model": model.state_dict(), "model_ema": average | {"n_averaged": torch.tensor(3)}}, tmp_path / "w.pth"
    )
    assert torch.equal(logits(open_source(str(tmp_path / "w.pth")).build()), logits(model))
    assert torch.equal(logits(open_source(str(tmp_path / "w.pth"), "ema").build()), logits(other))
    torch.save(model.state_dict(), tmp_path / "w.pth")
    with pytest.raises(DataError, match="holds no average"):
        open_source(str(tmp_path / "w.pth"), "ema")


def test_a_file_of_another_model_is_read_where_its_model_is_named(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = torchvision.models.squeezenet1_1(num_classes=7)
    save_file(theirs.state_dict(), tmp_path / "weights.safetensors")
    with pytest.raises(UsageError, match="does not tell its model; name it with --model"):
        open_source(str(tmp_path / "weights.safetensors"))
    source = open_source(str(tmp_path / "weights.safetensors"), model="torchvision:squeezenet1_1")
    assert torch.equal(logits(source.build()), logits(theirs))
    with pytest.raises(UsageError, match="have no fc, as --model torchvision:resnet18 has"):
        open_source(str(tmp_path / "weights.safetensors"), model="torchvision:resnet18").build()


def test_a_wider_network_with_the_same_names_is_not_taken_for_a_resnet50(tmp_path: Path) -> None:
    torch.save(torchvision.models.wide_resnet50_2(num_classes=3).state_dict(), tmp_path / "wide.pth")
    with pytest.raises(UsageError, match=r"are not those of ResNet-50 .*; name their --model"):
        open_source(str(tmp_path / "wide.pth")).build()
    assert open_source(str(tmp_path / "wide.pth"), model="torchvision:wide_resnet50_2").build() is not None


def test_published_files_bring_the_preprocessing_of_their_figures(tmp_path: Path) -> None:
    weights = resnet18(1000).state_dict()
    for name, expected in {
        "resnet18-f37072fd.pth": (224, 256, "bilinear"),
        "another.pth": (224, 256, "bilinear"),
    }.items():
        torch.save(weights, tmp_path / name)
        source = open_source(str(tmp_path / name))
        size, share = source.settings["eval_size"], source.settings["eval_crop_pct"]
        assert (size, int(size / share), source.settings["eval_interpolation"]) == expected
        assert (source.classes is not None) == (name != "another.pth")
    torch.manual_seed(0)
    torch.save(torchvision.models.resnet50().state_dict(), tmp_path / "resnet50-11ad3fa6.pth")
    source = open_source(str(tmp_path / "resnet50-11ad3fa6.pth"))
    assert (source.settings["eval_size"], int(224 / source.settings["eval_crop_pct"])) == (224, 232)
    assert source.classes is not None
    assert source.classes[0] == "tench"


def test_timm_folders_bring_their_preprocessing_and_names(tmp_path: Path) -> None:
    import timm

    torch.manual_seed(0)
    theirs: Any = timm.create_model("mobilenetv3_small_050", num_classes=3)
    cfg = {
        "input_size": [3, 160, 160],
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": [0.5] * 3,
        "std": [0.25] * 3,
    }
    config = {"architecture": "mobilenetv3_small_050", "num_classes": 3, "label_names": ["a", "b", "c"]}
    (tmp_path / "config.json").write_text(json.dumps(config | {"pretrained_cfg": cfg | {"classifier": "classifier"}}))
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    source = open_source(str(tmp_path))
    assert source.classes == ["a", "b", "c"]
    assert source.settings == {
        "image_size": 160,
        "eval_size": 160,
        "eval_crop_pct": 0.9,
        "eval_interpolation": "bicubic",
        "mean": "0.5,0.5,0.5",
        "std": "0.25,0.25,0.25",
    }
    assert torch.equal(logits(source.build(), 160), logits(theirs, 160))


def test_a_share_gives_back_the_side_that_it_was_made_of() -> None:
    for size in range(1, 400):
        for short in range(size, size + 200):
            assert int(size / share_of(size, short)) == short


def test_training_from_weights_takes_their_model_and_preprocessing(averaged: Path, tmp_path: Path) -> None:
    config, source = resolve_with_weights({"use_pretrained": str(averaged)})
    assert source is not None
    assert (config.model, config.eval_crop_pct, config.image_size) == ("resnet20", 1.0, 8)
    config, _ = resolve_with_weights({"use_pretrained": str(averaged), "eval_interpolation": "bicubic"})
    assert config.eval_interpolation == "bicubic"
    with pytest.raises(UsageError, match="holds a resnet20; leave out --model resnet34"):
        resolve_with_weights({"use_pretrained": str(averaged), "model": "resnet34"})


def test_fine_tuning_starts_from_the_weights_and_a_resume_needs_them_no_more(averaged: Path, tmp_path: Path) -> None:
    folder, flags = tmp_path / "run", (*DIGITS, "--lr", 1e-12, "--epochs", 3, "--freeze_backbone", 1, "--ledger")
    weights = tmp_path / "weights.safetensors"
    save_file(open_source(str(averaged)).weights, weights)
    done = train(*flags, "--use_pretrained", weights, "--snapshot_steps", 1, "--keep_snapshots", 9, "--run_dir", folder)
    assert f"weights   {weights}" in done.out
    first, given = tensors(snapshot_path(folder, 1)), tensors(weights)
    body = [name for name in given if not name.startswith("fc.")]
    assert [name for name in body if not torch.equal(first[f"model.{name}"], given[name])] == []  # BatchNorm's too
    weights.unlink()
    for path in (folder / "snapshots").glob("*"):
        if path != snapshot_path(folder, 4):
            path.unlink()
    whole = (folder / "ledger.jsonl").read_text()
    train("--resume_from", folder)
    assert (folder / "ledger.jsonl").read_text() == whole


def test_only_the_head_learns_while_the_backbone_is_frozen(averaged: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    flags = (
        *DIGITS,
        "--use_pretrained",
        averaged,
        "--freeze_backbone",
        1,
        "--optimizer",
        "adamw",
        "--weight_decay",
        0.1,
    )
    train(*flags, "--snapshot_steps", 1, "--keep_snapshots", 9, "--run_dir", folder)
    given = open_source(str(averaged)).weights
    for step, frozen in ((3, True), (4, False)):
        now = {
            n.removeprefix("model."): t for n, t in tensors(snapshot_path(folder, step)).items() if n[:6] == "model."
        }
        body = [name for name in given if not name.startswith("fc.") and not name.endswith("num_batches_tracked")]
        assert all(torch.equal(now[name], given[name]) for name in body) == frozen
        assert not torch.equal(now["fc.weight"], given["fc.weight"])


def test_a_head_for_other_classes_is_replaced_aloud(tmp_path: Path) -> None:
    model = build_model(3, 8)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    done = train(
        *DIGITS, "--lr", 1e-12, "--use_pretrained", tmp_path / "weights.safetensors", "--run_dir", tmp_path / "run"
    )
    assert "; the head for 10 classes is new" in done.out
    assert tensors(snapshot_path(tmp_path / "run", 6))["model.fc.weight"].shape == (10, 64)


def test_a_stem_for_other_sizes_is_refused_with_the_size_that_fits(tmp_path: Path) -> None:
    torch.save(resnet18().state_dict(), tmp_path / "large.pth")
    save_file(build_model(10, 32, "resnet18").state_dict(), tmp_path / "small.safetensors")
    done = run(*DIGITS, "--use_pretrained", tmp_path / "large.pth", "--run_dir", tmp_path / "run")
    assert done.status == 2
    assert "for images of more than 32 pixels; give a larger --image_size than 8" in done.err
    done = run(*DIGITS, "--image_size", 64, "--use_pretrained", tmp_path / "small.safetensors")
    assert done.status == 2
    assert "for images of up to 32 pixels; give a smaller --image_size than 64" in done.err


class Canary:
    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


def bomb() -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("weights/data.pkl", b"\0" * 10_000_000)
    return packed.getvalue()


def test_files_made_to_harm_are_refused_and_run_nothing(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    huge = torch.zeros(1).expand(10**12)
    cycle: dict[str, Any] = {}
    cycle["model"] = {"state_dict": cycle}
    files: dict[str, Any] = {
        "pickle.pth": pickle.dumps(Canary(canary)),
        "wrapped.pth": {"state_dict": {"fc.weight": torch.zeros(2)}, "hook": Canary(canary)},
        "bomb.pth": bomb(),
        "expanded.pth": {"fc.weight": huge},
        "torn.safetensors": b"\xff" * 100,
        "cycle.pth": cycle,
        "empty.pth": {},
        "deep.pth": {"state_dict": [torch.zeros(1)]},
        "sparse.pth": {"fc.weight": torch.eye(2).to_sparse()},
        "complex.pth": {"fc.weight": torch.eye(2, dtype=torch.complex64)},
        "absent.pth": {"fc.weight": torch.empty(2, 2, device="meta")},
        "program.onnx": b"\x08\x07",
        "text.safetensors": b"",
    }
    for name, content in files.items():
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        with pytest.raises(DataError) as refusal:
            open_source(str(path))
        assert "\n" not in str(refusal.value), name
        assert ("unpacks to 10 MB" in str(refusal.value)) == (name == "bomb.pth")
    assert not canary.exists()


@pytest.mark.parametrize("head", [torch.zeros(()), torch.zeros(0, 512)], ids=["number", "empty"])
def test_a_head_without_classes_is_none(head: torch.Tensor, tmp_path: Path) -> None:
    save_file(build_model(2, 64, "resnet18").state_dict() | {"fc.weight": head}, tmp_path / "weights.safetensors")
    with pytest.raises(UsageError, match="have no fc"):
        open_source(str(tmp_path / "weights.safetensors")).build()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("http://example.com/weights.pth", "is a URL"),
        ("nowhere/at/all", "there is no nowhere/at/all"),
        ("weights.pth", "there is no weights.pth"),
    ],
)
def test_what_is_not_there_is_told_in_one_line(text: str, words: str) -> None:
    with pytest.raises((DataError, UsageError), match=words):
        open_source(text)


def test_a_folder_that_holds_no_weights_is_refused(tmp_path: Path) -> None:
    for content in ({}, {"model_type": "vit"}, {"architecture": "resnet18"}):
        (tmp_path / "config.json").write_text(json.dumps(content))
        with pytest.raises((DataError, UsageError)):
            open_source(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        open_source(str(tmp_path))


@pytest.mark.parametrize(
    "place", ["weights.safetensors", "weights.pth", "folder/config.json", "folder/imagenet1k.json"]
)
def test_a_pipe_in_the_place_of_a_model_holds_nothing_up(place: str, tmp_path: Path) -> None:
    path = tmp_path / place
    path.parent.mkdir(exist_ok=True)
    os.mkfifo(path)
    with pytest.raises(DataError):
        open_source(str(path if path.suffix != ".json" else path.parent))
