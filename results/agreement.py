"""Whether an export computes what our pipeline does: 50 images, from the encoded files on."""

import io
import math
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image, ImageOps

from choices import DATASETS
from config import Config, resolve
from errors import UserError
from open_data import open_sets
from preprocess import eval_transform
from results.formats import PROGRAMS, Loaded, Order, channels_of
from stream.formats import UnreadableImage
from stream.images import Transform
from stream.pipelines import Pipeline
from stream.shared import in_memory
from training.predictor import Predictor, normalize_of
from training.sources import Source

IMAGES = 50
SEED = 17
TOLERANCES = {"fp32": 1e-4, "fp16": 1e-2}  # logits over their largest, at least 1, from the same pixels
OF_PROGRAMS = {"fp32": 1e-3, "fp16": 1e-2, "int8": 0.1}  # probabilities from the encoded file on
LEAST_AGREEING = 0.9  # int8: share of the images with the same top-1


class DisagreementError(UserError):
    """An export that does not compute what the model does."""


@dataclass(frozen=True)
class Agreement:
    """How far an export is from our pipeline: the largest difference on the same pixels, or of a program from the file
    on; the mean difference of the library's own pixels, in 1/255, if it makes any; the share of equal top-1.
    """

    images: int
    told: str
    what: str
    difference: float
    tolerance: float
    pixels: float | None
    same_top1: float

    def __str__(self) -> str:
        own = "" if self.pixels is None else f"; its own pixels differ by {self.pixels:.3f}/255 on average"
        return (
            f"{self.images} {self.told}: {self.what} differ by at most {self.difference:.1e} (tolerance "
            f"{self.tolerance:.0e}){own}; top-1 equal in {self.same_top1:.0%}"
        )


def pipeline_of(source: Source) -> tuple[Pipeline, Predictor]:
    """The evaluation of a source on the CPU: encoded images to pixels, and pixels to logits."""
    config = settings_of(source)
    return eval_transform(config), Predictor(
        model=source.build(), normalize=normalize_of(config), device=torch.device("cpu")
    )


@torch.inference_mode()
def compare(order: Order, loaded: Loaded, images: list[bytes], told: str) -> Agreement:
    """Compare an export with our pipeline. Raises DisagreementError for a difference above the tolerance."""
    transform, ours = pipeline_of(order.source)
    pixels = torch.from_numpy(np.stack([_transformed(transform, image) for image in images]))
    logits = torch.cat([ours.logits(part) for part in pixels.split(10)])
    if order.format in PROGRAMS:
        found = _of_program(order, loaded, images, logits, told)
    else:
        found = _of_folder(order, loaded, images, pixels, logits, told)
    least = LEAST_AGREEING if order.precision == "int8" else 0.0
    if not found.difference <= found.tolerance or found.same_top1 < least:
        raise DisagreementError(f"the export does not compute what the model does, and was removed ({found})")
    return found


def _transformed(transform: Transform, image: bytes) -> np.ndarray:
    return transform(image, (0, 0, 0), False)


def _picture(image: bytes) -> Image.Image:
    return ImageOps.exif_transpose(Image.open(io.BytesIO(image))).convert("RGB")


def _of_program(order: Order, loaded: Loaded, images: list[bytes], logits: torch.Tensor, told: str) -> Agreement:
    assert loaded.probabilities is not None
    theirs = torch.tensor(np.stack([loaded.probabilities(np.array(_picture(image))) for image in images]))
    difference = float((theirs - logits.softmax(1)).abs().max())
    what = "probabilities from the encoded files on"
    return Agreement(
        len(images), told, what, difference, OF_PROGRAMS[order.precision], None, _share_of_same(theirs, logits)
    )


def _of_folder(
    order: Order, loaded: Loaded, images: list[bytes], pixels: torch.Tensor, logits: torch.Tensor, told: str
) -> Agreement:
    assert loaded.logits is not None
    assert loaded.inputs is not None
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in channels_of(order.source))
    exact = (pixels.permute(0, 3, 1, 2).float() / 255 - mean) / std
    same = torch.cat([loaded.logits(part) for part in exact.split(10)])
    largest = max(1.0, float(logits.abs().max()))
    own = torch.stack([loaded.inputs(_picture(image)) for image in images])
    theirs = torch.cat([loaded.logits(part) for part in own.split(10)])
    apart = float(((own - exact).abs() * std).mean()) * 255
    difference = float((same - logits).abs().max()) / largest
    what = f"logits of up to {largest:.1f}, relative to that," if largest > 1 else "logits"
    tolerance = TOLERANCES[order.precision]
    return Agreement(len(images), told, what, difference, tolerance, apart, _share_of_same(theirs, logits))


def _share_of_same(theirs: torch.Tensor, ours: torch.Tensor) -> float:
    return float((theirs.argmax(1) == ours.argmax(1)).double().mean())


def images_of(source: Source) -> tuple[list[bytes], str]:
    """Encoded images to compare an export on, and what they are: the source's validation images if they are at hand."""
    own = _validation_images(source)
    if len(own) == IMAGES:
        return own, "validation images"
    photographs = _sample_photographs()
    size = source.settings["eval_size"]
    made = [photograph(number, size) for number in range(IMAGES - len(photographs))]
    return photographs + made, "generated images" if not photographs else "generated images and photographs"


def _validation_images(source: Source) -> list[bytes]:
    """IMAGES readable ones, evenly spread, of a set that is on this machine; none where these are not at hand."""
    config = source.config
    if config is None or DATASETS[config.dataset].on_hub or DATASETS[config.dataset].downloads:
        return []
    try:
        _, val, _, _ = open_sets(config, None, source.classes)
    except (UserError, OSError):
        return []
    found: list[bytes] = []
    transform = eval_transform(settings_of(source))
    for place in np.linspace(0, len(val) - 1, min(2 * IMAGES, len(val))).astype(int).tolist():
        try:
            image = in_memory(val.reader([np.array([place])]).read(place)[0])
            encoded = _png(image) if isinstance(image, np.ndarray) else bytes(image)
            _picture(encoded)
            _transformed(transform, encoded)
        except (UnreadableImage, OSError, ValueError, Image.DecompressionBombError):
            continue
        found.append(encoded)
    return found[:: max(1, len(found) // IMAGES)][:IMAGES]


def settings_of(source: Source) -> Config:
    """A configuration with the preprocessing of a source; the rest of it is of no meaning."""
    return resolve({name: value for name, value in source.settings.items() if value is not None})


def _png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def _sample_photographs() -> list[bytes]:
    """The photographs that come with scikit-learn."""
    import sklearn.datasets

    folder = Path(sklearn.datasets.__file__).parent / "images"
    return [path.read_bytes() for path in sorted(folder.glob("*.jpg"))]


def photograph(number: int, size: int) -> bytes:
    """A JPEG like a photograph: clouds of all sizes with edges in them, its sides about `size` to 4 `size` pixels."""
    generator = np.random.default_rng((SEED, number))
    height, width = (int(side) for side in size * 2 ** generator.uniform(-0.2, 2, 2))
    picture = np.zeros((height, width, 3))
    for octave in range(max(2, int(math.log2(max(height, width))))):
        shape = (min(height, 2**octave + 1), min(width, 2**octave + 1), 3)
        picture += cv2.resize(generator.normal(0, 70 / (octave + 1), shape), (width, height))
    ys, xs = np.mgrid[:height, :width]
    for _ in range(6):
        row, column = generator.uniform(0, height), generator.uniform(0, width)
        inside = np.hypot(ys - row, (xs - column) * generator.uniform(0.5, 2)) < generator.uniform(0.05, 0.3) * height
        picture[inside] += generator.uniform(-80, 80, 3)
    file = io.BytesIO()
    Image.fromarray((picture + 128).clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()
