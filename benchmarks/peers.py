"""The other projects' loaders, each set up as its own documentation does for ImageNet and run by its own interpreter.

Their environments are looked for in benchmarks/.peers, made for instance like this (FFCV needs Python 3.11 and Debian's
libopencv-dev libturbojpeg0-dev pkg-config):

    cd benchmarks/.peers && for name in dali ffcv litdata mosaic; do uv venv --python 3.11 $name; done
    uv pip install --python dali nvidia-dali-cuda130 numpy
    uv pip install --python litdata litdata torchvision albumentations opencv-python-headless turbojpeg
    uv pip install --python mosaic mosaicml-streaming torchvision albumentations opencv-python-headless turbojpeg
    uv pip install --python ffcv torch==2.13.0 torchvision==0.28.0 'numpy<2' 'numba<0.60' pillow setuptools wheel
    uv pip install --python ffcv --no-build-isolation ffcv
"""

import itertools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

BATCH = 64
SIZE = 224
WORKERS = 2
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ROOT = Path(__file__).resolve().parent.parent
READ_THE_HUB = ("dataset", "local", "parquet", "retry", "synthetic")  # modules of stream/ that our decode does not use

Epoch = Callable[[int], Iterator[int]]


def reference_transform() -> Callable[[Any], Any]:
    """torchvision's reference augmentation for ImageNet: a Pillow image to a normalised float tensor."""
    from torchvision import transforms as T

    return T.Compose([T.RandomResizedCrop(SIZE), T.RandomHorizontalFlip(), T.ToTensor(), T.Normalize(MEAN, STD)])


def dali(folder: Path) -> Epoch:
    """DALI on the CPU alone: decode the crop, resize and flip, with uint8 batches (N, H, W, 3) as its result."""
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=BATCH, num_threads=WORKERS, device_id=None)  # type: ignore[untyped-decorator]
    def pipeline() -> tuple[Any, Any]:
        jpegs, labels = fn.readers.file(name="files", file_root=str(folder / "images"), random_shuffle=True)
        images = fn.decoders.image_random_crop(
            jpegs, device="cpu", output_type=types.RGB, random_aspect_ratio=[3 / 4, 4 / 3], random_area=[0.08, 1.0]
        )
        images = fn.resize(images, resize_x=SIZE, resize_y=SIZE, interp_type=types.INTERP_LINEAR, antialias=False)
        return fn.flip(images, horizontal=fn.random.coin_flip()), labels

    def epoch(number: int) -> Iterator[int]:
        built = pipeline(seed=number)
        built.build()
        for _ in range(built.epoch_size("files") // BATCH):
            images, _ = built.run()
            yield images.as_tensor().shape()[0]

    return epoch


def ffcv(folder: Path, mode: str, **image_options: Any) -> Epoch:
    """FFCV: its file in memory, its fused decode and crop, and uint8 batches; `mode` names its file."""
    from ffcv.fields.decoders import IntDecoder, RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import RandomHorizontalFlip, ToTensor, ToTorchImage

    path = folder / f"{mode}.beton"
    if not path.exists():
        write_beton(folder, path, **image_options)
    image = [RandomResizedCropRGBImageDecoder((SIZE, SIZE)), RandomHorizontalFlip(), ToTensor(), ToTorchImage()]
    pipelines = {"image": image, "label": [IntDecoder(), ToTensor()]}
    loader = Loader(
        str(path),
        batch_size=BATCH,
        num_workers=WORKERS,
        order=OrderOption.RANDOM,
        os_cache=True,
        drop_last=True,
        pipelines=pipelines,
    )
    return lambda number: (len(images) for images, _ in loader)


def write_beton(folder: Path, path: Path, **image_options: Any) -> None:
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter
    from torchvision.datasets import ImageFolder

    writer = DatasetWriter(
        str(path), {"image": RGBImageField(**image_options), "label": IntField()}, num_workers=WORKERS
    )
    writer.from_indexed_dataset(ImageFolder(str(folder / "images")))


def litdata(folder: Path, our_decode: bool) -> Epoch:
    """LitData's own benchmark on ImageNet, from chunks on the local disk, or the same with our decode and transform."""
    import torch
    from litdata import StreamingDataLoader, StreamingDataset, optimize
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2 as T

    recipe = T.Compose(
        [T.RandomResizedCrop(SIZE, antialias=True), T.RandomHorizontalFlip(), T.ToDtype(torch.float32, scale=True)]
    )
    transform = our_transform() if our_decode else recipe
    chunks = folder / ("litdata_bytes" if our_decode else "litdata_jpeg")
    if not chunks.exists():
        samples = ImageFolder(str(folder / "images")).samples
        read = read_bytes if our_decode else read_jpeg
        optimize(read, samples, output_dir=str(chunks), chunk_bytes="64MB", num_workers=WORKERS)

    class Images(StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, index: Any) -> tuple[Any, int]:
            image, label = super().__getitem__(index)
            return transform(image), label

    dataset = Images(str(chunks), shuffle=True)
    loader = StreamingDataLoader(
        dataset, batch_size=BATCH, num_workers=WORKERS, drop_last=True, multiprocessing_context="fork"
    )
    return lambda number: (len(images) for images, _ in loader)


def read_bytes(sample: tuple[str, int]) -> tuple[bytes, int]:
    return Path(sample[0]).read_bytes(), sample[1]


def read_jpeg(sample: tuple[str, int]) -> tuple[Any, int]:
    """An image that LitData and Mosaic store as it is, in the bytes of its file."""
    from PIL import Image

    return Image.open(sample[0]), sample[1]


def mosaic(folder: Path, our_decode: bool) -> Epoch:
    """MosaicML Streaming's ImageNet, from shards on the local disk, with uint8 tensors or our decode and transform."""
    import streaming.vision
    from torch.utils.data import DataLoader
    from torchvision import transforms as T
    from torchvision.datasets import ImageFolder

    recipe = T.Compose(
        [T.Lambda(to_rgb), T.RandomResizedCrop(SIZE), T.RandomHorizontalFlip(), T.PILToTensor()],
    )
    transform = our_transform() if our_decode else recipe
    shards = folder / ("mosaic_bytes" if our_decode else "mosaic_jpeg")
    if not shards.exists():
        read = read_bytes if our_decode else read_jpeg
        columns = {"x": "bytes" if our_decode else "jpeg", "y": "int"}
        with streaming.MDSWriter(out=str(shards), columns=columns) as writer:
            for sample in ImageFolder(str(folder / "images")).samples:
                image, label = read(sample)
                writer.write({"x": image, "y": label})
    dataset = streaming.vision.StreamingImageNet(local=str(shards), shuffle=True, batch_size=BATCH, transform=transform)
    loader = DataLoader(dataset, BATCH, num_workers=WORKERS, drop_last=True, multiprocessing_context="fork")
    return lambda number: (len(images) for images, _ in loader)


def to_rgb(image: Any) -> Any:
    return image.convert("RGB")


def anything(name: str) -> Any:
    """What an empty module has under any name but Python's own."""
    if name.startswith("__"):
        raise AttributeError(name)
    return object


def our_transform() -> Callable[[bytes], Any]:
    """This repository's decode and training transform: a JPEG to a uint8 array (H, W, 3).

    Modules that it does not use are replaced by empty ones meanwhile: what reads the Hub wants a newer client than
    Mosaic allows.
    """
    unused = [f"stream.{name}" for name in READ_THE_HUB]
    for name in unused:
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__dict__["__getattr__"] = anything
    from config import resolve
    from preprocess import train_transform

    for name in unused:
        del sys.modules[name]
    transform = train_transform(resolve({"dataset": "imagenet1k", "image_size": SIZE}))
    calls = itertools.count()
    return lambda encoded: transform(encoded, (os.getpid(), next(calls)))
