"""Exports compute what the model does, in their own library and when they come back, or they are not there."""

import contextlib
import errno
import io
import json
import os
import re
import resource
import runpy
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from exports import CLASSES, export_to, make_run, photographs, run_export
from PIL import Image

from results import agreement, card, exporting
from results.agreement import pipeline_of
from training.sources import open_source

WITH_WEIGHTS = ("transformers", "timm", "torchvision")
PROGRAMS = ("onnx", "torch_export")


@pytest.fixture(scope="module", autouse=True)
def _few_images() -> Iterator[None]:
    """Exports are compared in a moment."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agreement, "IMAGES", 8)
        yield


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "birds")


@pytest.fixture(scope="module")
def small_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a stem for small images."""
    return make_run(tmp_path_factory.mktemp("runs") / "small", image_size=32)


@pytest.fixture(scope="module")
def exports(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An export in each format."""
    folder = tmp_path_factory.mktemp("exports")
    for name in (*WITH_WEIGHTS, *PROGRAMS):
        done = export_to(source, name, folder / name, "--license", "apache-2.0")
        assert "compared  8 generated images and photographs" in done.out
    return {name: folder / name for name in (*WITH_WEIGHTS, *PROGRAMS)}


def logits_of(source: Path, images: list[bytes]) -> torch.Tensor:
    transform, predictor = pipeline_of(open_source(str(source)))
    pixels = np.stack([transform(image, (0, 0, 0)) for image in images])
    with torch.inference_mode():
        return predictor.logits(torch.from_numpy(pixels))


@pytest.mark.parametrize("name", WITH_WEIGHTS)
def test_an_export_comes_back_as_the_model_that_it_was(name: str, source: Path, exports: dict[str, Path]) -> None:
    images = photographs(6)
    assert torch.equal(logits_of(source, images), logits_of(exports[name], images))
    back = open_source(str(exports[name]))
    assert (back.model, back.classes) == ("resnet18", CLASSES)
    assert back.settings == open_source(str(source)).settings


@pytest.mark.parametrize("name", WITH_WEIGHTS)
def test_its_own_library_computes_the_models_logits(name: str, source: Path, exports: dict[str, Path]) -> None:
    model, process = loaded(name, exports[name])
    inputs = torch.stack([process(Image.open(io.BytesIO(image)).convert("RGB")) for image in photographs(6)])
    ours = open_source(str(source)).build()
    with torch.inference_mode():
        assert (model(inputs) - ours(inputs)).abs().max() < 1e-4


def loaded(name: str, folder: Path) -> tuple[Any, Any]:
    if name == "transformers":
        from transformers import AutoImageProcessor, AutoModelForImageClassification

        found = AutoModelForImageClassification.from_pretrained(folder).eval()
        assert found.config.id2label == dict(enumerate(CLASSES))
        assert found.config.label2id == {label: number for number, label in enumerate(CLASSES)}
        processor = AutoImageProcessor.from_pretrained(folder)
        return lambda inputs: found(inputs).logits, lambda picture: processor(picture, return_tensors="pt")[
            "pixel_values"
        ][0]
    if name == "timm":
        import timm

        made = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        told = timm.data.resolve_model_data_config(made)
        assert (tuple(told["input_size"]), told["interpolation"], int(64 / told["crop_pct"])) == (
            (3, 64, 64),
            "bilinear",
            73,
        )
        return made, timm.data.create_transform(**told)
    from safetensors.torch import load_file
    from torchvision import models, transforms

    plain = models.resnet18(num_classes=len(CLASSES)).eval()
    plain.load_state_dict(load_file(folder / "model.safetensors"))
    return plain, transforms.Compose([transforms.Resize(73), transforms.CenterCrop(64), transforms.ToTensor()])


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_gives_the_models_probabilities_for_encoded_images_of_any_size(
    name: str, source: Path, exports: dict[str, Path]
) -> None:
    images = photographs(8)
    ours = logits_of(source, images).softmax(1)
    program: Any
    if name == "onnx":
        import onnx
        import onnxruntime

        model = onnx.load(exports[name] / "model.onnx", load_external_data=False)
        assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 18)]
        assert not [tensor.name for tensor in model.graph.initializer if tensor.external_data]
        session = onnxruntime.InferenceSession(exports[name] / "model.onnx")
        assert session.get_inputs()[0].shape == ["height", "width", 3]
        program = lambda pixels: session.run(["probabilities"], {"image": pixels})[0]
    else:
        module: Any = torch.export.load(exports[name] / "model.pt2").module()
        program = lambda pixels: module(torch.tensor(pixels)).numpy()
    for image, expected in zip(images, ours, strict=True):
        pixels = np.array(Image.open(io.BytesIO(image)).convert("RGB"))
        assert np.abs(program(pixels) - expected.numpy()).max() < 1e-3


@pytest.mark.parametrize("name", [*WITH_WEIGHTS, *PROGRAMS])
def test_the_code_of_the_card_runs_and_names_the_class(
    name: str, source: Path, exports: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    image = photographs(1)[0]
    for path in exports[name].iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "image.jpg").write_bytes(image)
    code = re.search(r"```python\n(.*?)```", (exports[name] / "README.md").read_text(), re.DOTALL)
    assert code
    (tmp_path / "snippet.py").write_text(code[1])
    monkeypatch.chdir(tmp_path)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        runpy.run_path("snippet.py")
    best = int(logits_of(source, [image]).argmax())
    assert out.getvalue().split()[0] == CLASSES[best]


def test_a_card_tells_the_figures_of_these_weights_and_no_path(source: Path, exports: dict[str, Path]) -> None:
    for folder in exports.values():
        text = (folder / "README.md").read_text()
        front = yaml.safe_load(text.split("---\n")[1])
        assert (front["license"], front["datasets"]) == ("apache-2.0", ["someone/birds"])
        metrics = front["model-index"][0]["results"][0]["metrics"]
        assert {one["name"]: one["value"] for one in metrics} == {"top1": 0.75, "top5": 1.0, "loss": 0.5}
        assert "75.00%" in text
        assert "curves.png" in text
        assert (folder / "curves.png").read_bytes() == b"\x89PNG, a picture"
        for path in folder.iterdir():
            assert str(source.parent).encode() not in path.read_bytes()


@pytest.mark.parametrize(("name", "precision"), [("transformers", "fp16"), ("onnx", "fp16"), ("onnx", "int8")])
def test_smaller_weights_take_less_room_and_stay_close(
    name: str, precision: str, source: Path, exports: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "small"
    done = export_to(source, name, out, "--precision", precision)
    assert "top-1 equal in" in done.out
    sizes = [sum(path.stat().st_size for path in folder.glob("model.*")) for folder in (exports[name], out)]
    assert sizes[1] < sizes[0] * {"fp16": 0.55, "int8": 0.35}[precision]


def test_a_small_stem_goes_to_torchvision_and_programs_only(small_source: Path, tmp_path: Path) -> None:
    for name in ("transformers", "timm"):
        done = run_export(small_source, "--to", name, "--out", tmp_path / name)
        assert (done.status, done.err.count("\n")) == (2, 1)
        assert "export to torchvision, onnx or torch_export" in done.err
        assert not (tmp_path / name).exists()
    export_to(small_source, "torchvision", tmp_path / "out")
    assert "model.maxpool = torch.nn.Identity()" in (tmp_path / "out" / "README.md").read_text()
    images = photographs(4)
    assert torch.equal(logits_of(small_source, images), logits_of(tmp_path / "out", images))


@pytest.mark.parametrize(("size", "homes"), [(8, "onnx or torch_export"), (64, "transformers or onnx or torch_export")])
def test_a_resnet20_goes_where_there_is_one(size: int, homes: str, tmp_path: Path) -> None:
    small = make_run(tmp_path / "run", model="resnet20", image_size=size)
    for name in {*WITH_WEIGHTS} - {*homes.split(" or ")}:
        done = run_export(small, "--to", name, "--out", tmp_path / name)
        assert (done.status, done.err) == (2, f"error: {name} has no such resnet20; export to {homes}\n")
    if size == 64:
        export_to(small, "transformers", tmp_path / "out")


def test_blurs_have_no_place_in_a_folder_of_weights(tmp_path: Path) -> None:
    blurred = make_run(tmp_path / "run", blurpool=True)
    for name in WITH_WEIGHTS:
        done = run_export(blurred, "--to", name, "--out", tmp_path / name)
        assert done.status == 2
        assert "export to onnx or torch_export" in done.err


@pytest.mark.parametrize("to", ["timm", "transformers"])
def test_a_model_of_timm_goes_to_timm_and_transformers(to: str, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", model="timm:resnet10t")
    export_to(folder, to, tmp_path / "out")
    images = photographs(4)
    assert torch.equal(logits_of(folder, images), logits_of(tmp_path / "out", images))
    assert run_export(folder, "--to", "torchvision", "--out", tmp_path / "other").status == 2


def test_a_model_of_torchvision_goes_to_torchvision(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", model="torchvision:shufflenet_v2_x0_5")
    export_to(folder, "torchvision", tmp_path / "out")
    images = photographs(4)
    assert torch.equal(logits_of(folder, images), logits_of(tmp_path / "out", images))


def test_an_export_that_differs_is_an_error_and_leaves_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agreement, "TOLERANCES", {"fp32": -1.0})
    done = run_export(source, "--to", "torchvision", "--out", tmp_path / "new" / "out")
    assert (done.status, done.err.count("\n")) == (1, 1)
    assert "does not compute what the model does" in done.err
    assert [*(tmp_path / "new").iterdir()] == []


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP], ids=["SIGTERM", "SIGHUP"])
def test_an_export_that_is_stopped_leaves_nothing_new_and_the_earlier_one(
    signum: signal.Signals, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    export_to(source, "torchvision", out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def stopped(*given: object) -> None:
        signal.raise_signal(signum)

    monkeypatch.setattr(exporting, "compare", stopped)
    assert run_export(source, "--to", "torchvision", "--precision", "fp16", "--out", out).status == 128 + signum
    monkeypatch.undo()
    failures = [OSError(errno.EIO, "Input/output error")]

    def unnamed(path: Path, target: Path) -> None:
        if target == out and failures:
            raise failures.pop()
        os.rename(path, target)

    monkeypatch.setattr(Path, "rename", unnamed)
    monkeypatch.setattr(agreement, "IMAGES", 8)
    assert run_export(source, "--to", "torchvision", "--precision", "fp16", "--out", out).status == 5
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("to", ["torchvision", "transformers", "torch_export"])
def test_an_export_that_finds_no_room_is_one_line(to: str, source: Path, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, hard))
    try:
        done = run_export(source, "--to", to, "--out", tmp_path / "new" / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (done.status, done.err.count("\n")) == (5, 1), done.err
    assert "File too large" in done.err
    assert [*(tmp_path / "new").iterdir()] == []


def test_fifty_validation_images_of_the_run_are_compared_where_they_are_at_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(agreement, "IMAGES", 50)
    folder = make_run(tmp_path / "run", [*map(str, range(10))], dataset="digits", dataset_name=None, image_size=8)
    for name in ("torchvision", "torch_export"):
        assert "compared  50 validation images" in export_to(folder, name, tmp_path / name).out


def test_only_an_earlier_export_is_replaced(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    for _ in range(2):
        done = run_export(source, "--to", "torchvision", "--out", out)
        assert done.status == 2
        assert "thesis.txt" in done.err
        (out / "imagenet1k.json").write_text("{}")
    (out / "thesis.txt").unlink()
    export_to(source, "torchvision", out)
    export_to(source, "timm", out)
    assert (out / "config.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    done = run_export(source, "--to", "timm", "--out", out / "config.json" / "x")
    assert (done.status, done.err.count("\n")) == (2, 1)
    done = run_export(out, "--to", "onnx", "--out", out)
    assert done.status == 2
    assert "--out is the source itself" in done.err


def test_names_of_strangers_are_escaped_everywhere(tmp_path: Path) -> None:
    nasty = [
        "<script>alert(1)</script>",
        "a\nlicense: mit\n---\n# owned",
        "![x](https://evil.example/x.png)",
        "hf_" + "a" * 34,
        "`|*[]{}: #\u202e\x1b[31m",
    ]
    folder = make_run(tmp_path / "run", nasty, dataset_name='some"one\n- x: <b>/data')
    for name in ("transformers", "torchvision", "timm"):
        export_to(folder, name, tmp_path / name, "--license", "x\ny: z")
        text = (tmp_path / name / "README.md").read_text()
        front = yaml.safe_load(text.split("---\n")[1])
        assert front["license"] == "x\\ny: z"
        assert front.keys() <= {"license", "library_name", "pipeline_tag", "tags", "model-index", "datasets"}
        assert "<script" not in text
        assert "<b>" not in text
        assert "](https://evil" not in text
        assert "hf_aaaa" not in text
        assert "\x1b" not in text
        assert "\n# owned" not in text
        assert open_source(str(tmp_path / name)).classes == nasty


def test_what_is_escaped_reads_as_it_was() -> None:
    import html

    assert html.unescape(card.plain("a*b_c|d<e>&f#1")) == "a*b_c|d<e>&f#1"
    assert card.plain("great grey owl, Strix-nebulosa (1772)") == "great grey owl, Strix-nebulosa (1772)"


def test_a_program_is_no_source(source: Path, exports: dict[str, Path], tmp_path: Path) -> None:
    for given in (exports["onnx"], exports["onnx"] / "model.onnx", exports["torch_export"] / "model.pt2"):
        done = run_export(given, "--to", "timm", "--out", tmp_path / "out")
        assert (done.status, done.err.count("\n")) == (3, 1)


@pytest.mark.parametrize(
    "change", [{"eval_size": "64"}, {"eval_size": 10**9}, {"mean": "x"}, {"eval_interpolation": []}]
)
def test_a_sidecar_that_was_tampered_with_is_refused(
    change: dict[str, Any], exports: dict[str, Path], tmp_path: Path
) -> None:
    kept = json.loads((exports["torchvision"] / "imagenet1k.json").read_text())
    kept["settings"] |= change
    (tmp_path / "imagenet1k.json").write_text(json.dumps(kept))
    (tmp_path / "model.safetensors").symlink_to(exports["torchvision"] / "model.safetensors")
    done = run_export(tmp_path, "--to", "timm", "--out", tmp_path / "out")
    assert (done.status, done.err.count("\n")) == (3, 1)


def test_bad_arguments_are_one_line(source: Path, tmp_path: Path) -> None:
    for wrong in (
        ["--to", "caffe", "--out", tmp_path / "x"],
        ["--to", "timm"],
        ["--to", "timm", "--out", tmp_path / "x", "--precision", "int8"],
        ["--to", "timm", "--out", tmp_path / "x", "--push_to_hub", "https://huggingface.co/a/b"],
        ["--to", "timm", "--out", tmp_path / "x", "--private"],
        ["--to", "timm", "--out", tmp_path / "x", "--which", "7th"],
    ):
        done = run_export(source, *wrong)
        assert (done.status, done.err.count("\n")) == (2, 1), done.err
    assert run_export("https://example.org/model", "--to", "timm", "--out", tmp_path / "x").status == 2
    assert run_export(tmp_path / "none", "--to", "timm", "--out", tmp_path / "x").status == 3
