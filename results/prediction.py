"""The classes of image files, one after another, from folders of any size."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from config import Config
from errors import DataError, printable
from preprocess import eval_transform
from stream.loader import UNREADABLE, StreamingDataLoader
from stream.local import LocalDataset
from train import scored
from training.predictor import Predictor
from training.signals import StopRequest

FEW_IMAGES = 64  # decoded in this process, as processes of their own take longer to start


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of an image, as numbers (int64) and probabilities (float32), both (K,), likeliest first."""

    image: str
    indices: list[int]
    probabilities: list[float]


def image_loader(paths: Sequence[Path], config: Config, device: torch.device) -> StreamingDataLoader:
    """The files as evaluation batches; those that cannot be read are named on stderr and have the label UNREADABLE."""
    dataset = LocalDataset([*paths], [0] * len(paths), ["unknown"])
    return StreamingDataLoader(
        dataset,
        eval_transform(config),
        lambda epoch: [np.arange(len(paths))],
        batch_size=min(config.batch_size, len(paths)),
        image_size=config.eval_size,
        train=False,
        device=device,
        seed=0,
        num_workers=config.num_workers if len(paths) > FEW_IMAGES else 0,
        max_bad_fraction=1.0,
    )


def predictions(predictor: Predictor, loader: StreamingDataLoader, top: int) -> Iterator[Prediction]:
    """The `top` likeliest classes of each image that can be read. Raises DataError if none can."""
    read = False
    for logits, labels, batch in scored(predictor, loader, StopRequest()):
        likeliest = logits.float().softmax(1).topk(min(top, logits.shape[1]), dim=1)
        rows = zip(
            labels.tolist(), batch.ids.tolist(), likeliest.indices.tolist(), likeliest.values.tolist(), strict=False
        )
        for label, number, indices, probabilities in rows:
            if label != UNREADABLE:
                read = True
                yield Prediction(str(loader.dataset.images[number]), indices, probabilities)
    if not read:
        raise DataError("not one of the images can be read; see the messages above")


def as_line(one: Prediction, classes: Sequence[str]) -> str:
    """The name of an image, then its classes with their probabilities."""
    pairs = zip(one.indices, one.probabilities, strict=True)
    told = [f"{100 * share:6.2f} % {printable(classes[index])}" for index, share in pairs]
    return "  ".join([f"{printable(one.image):<32}", *(f"{text:<24}" for text in told)]).rstrip()


def as_json(one: Prediction, classes: Sequence[str]) -> dict[str, object]:
    """What --json tells of an image."""
    pairs = zip(one.indices, one.probabilities, strict=True)
    top = [{"class": classes[index], "index": index, "probability": share} for index, share in pairs]
    return {"image": one.image, "top": top}
