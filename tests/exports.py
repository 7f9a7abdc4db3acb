"""A small trained-looking run for the tests of exports: ResNet-18 at 64 pixels, without any training."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from program import Outcome, run

import config
import export
from model_resnet50 import build_model
from results.agreement import photograph
from training import snapshot

CLASSES = ["tench", "goldfish", "cock", "hen", "ostrich"]


def make_run(folder: Path, classes: list[str] = CLASSES, **flags: Any) -> Path:
    """A run folder with one snapshot, results.csv and a picture of curves; its BatchNorms have seen images."""
    given: dict[str, Any] = {"dataset": "hf", "dataset_name": "someone/birds", "model": "resnet18", "image_size": 64}
    settings = config.resolve(given | flags)
    torch.manual_seed(3)
    options = {name: getattr(settings, name) for name in ("drop_path", "blurpool", "zero_init_gamma")}
    model = build_model(len(classes), settings.image_size, settings.model, options)
    with torch.no_grad():
        for _ in range(30):
            model(torch.randn(8, 3, settings.image_size, settings.image_size))
    tensors = {f"model.{name}": tensor.contiguous() for name, tensor in model.state_dict().items()}
    state = {"config": asdict(settings), "classes": classes, "step": 20, "lr": 0.1, "revision": "0123456"}
    (folder / "snapshots").mkdir(parents=True)
    parts = snapshot.encode(tensors, state)
    (folder / "snapshots" / "step-000000020.safetensors").write_bytes(b"".join(bytes(part) for part in parts))
    (folder / "results.csv").write_text("epoch,step,val_loss,val_top1,val_top5\n1,10,1.6,0.2,1.0\n2,20,0.5,0.75,1.0\n")
    (folder / "plots").mkdir()
    (folder / "plots" / "curves.png").write_bytes(b"\x89PNG, a picture")
    return folder


def run_export(*arguments: object) -> Outcome:
    """Call export.py in this process."""
    return run(*arguments, entry=export.main)


def export_to(source: Path, format: str, out: Path, *more: object) -> Outcome:
    """An export that must succeed."""
    done = run_export(source, "--to", format, "--out", out, *more)
    assert done.status == 0, done.err
    return done


def photographs(count: int, size: int = 64) -> list[bytes]:
    return [photograph(100 + number, size) for number in range(count)]
