"""Writes the logs that a run would have left, without the run."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from config import resolve

COLUMNS = "epoch,step,train_loss,train_top1,val_loss,val_top1,val_top5,lr,images_per_s,seconds"
LAUNCH: dict[str, Any] = {
    "command": "main.py --dataset imagenet1k --amp",
    "time": "2026-01-02T03:04:05+0000",
    "git": "0" * 40,
    "python": "3.11.7",
    "packages": {"torch": "2.10.0"},
    "gpu": "NVIDIA H100",
    "cuda": "12.8",
    "ranks": 8,
}


def write_logs(folder: Path, epochs: int = 3, steps: int = 20, done: int | None = None, **flags: Any) -> Path:
    """config.json, results.csv and metrics.jsonl of a run of `epochs`, `done` of which are finished."""
    config = vars(resolve({"epochs": epochs, **flags}))
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"config": config, "launches": [LAUNCH]}))
    with open(folder / "metrics.jsonl", "w") as file:
        for step in range(1, steps * epochs + 1):
            at = step / steps
            row = f'"lr": {0.1 + at / 1e3}, "momentum": 0.9, "loss": {7 * math.exp(-at / 30)}, "top1": 0.5'
            skipped = "true" if step == 2 else "false"
            file.write(f'{{"step": {step}, "epoch": {1 + (step - 1) // steps}, {row}, "skipped": {skipped}}}\n')
    rows = [COLUMNS]
    for epoch in range(1, (epochs if done is None else done) + 1):
        right = 0.8 * (1 - math.exp(-epoch / 20))
        losses = f"{7 * math.exp(-epoch / 30)},{right},{20 * math.exp(-epoch / 20)},{right - 0.01},{right + 0.1}"
        rows.append(f"{epoch},{epoch * steps},{losses},0.1,9000,150")
    (folder / "results.csv").write_text("\n".join(rows) + "\n")
    return folder


def write_evaluation(run: Path, names: list[str]) -> Path:
    """What evaluate.py writes about a model of these classes, with pictures of noise, which no format makes small."""
    folder, rng = run / "evaluation" / "set-validation", np.random.default_rng(0)
    folder.mkdir(parents=True)
    shares = rng.random((len(names), 3))
    classes = [
        {"name": name, "images": 50, "top1": share[0], "precision": share[1], "recall": share[0], "f1": share[2]}
        for name, share in zip(names, shares.tolist(), strict=True)
    ]
    found: dict[str, Any] = {
        "images": 50 * len(names),
        "top1": 0.75,
        "top5": 0.9,
        "loss": 1.25,
        "macro_f1": 0.7,
        "ece": 0.03,
    }
    found |= {"classes": classes, "source": str(run), "data": {"id": "set", "split": "validation"}, "unreadable": 1}
    found["confused"] = [{"label": names[0], "prediction": names[1], "images": 9}]
    (folder / "evaluation.json").write_text(json.dumps(found))
    quoted = [json.dumps(name, ensure_ascii=False).replace('\\"', '""') for name in names[:2]]
    (folder / "confusion.csv").write_text(f'"label","prediction","images"\n{quoted[0]},{quoted[1]},9\n')
    for name, size in (("reliability", (748, 682)), ("hardest", (1265, 1485)), ("confusion", (1210, 1672))):
        tiles = rng.integers(0, 256, (-(-size[0] // 4), -(-size[1] // 4), 3), dtype=np.uint8)
        noise = tiles.repeat(4, 0).repeat(4, 1)[: size[0], : size[1]]
        Image.fromarray(noise if name == "hardest" else noise // 128 * 255).save(folder / f"{name}.png")
    return folder
