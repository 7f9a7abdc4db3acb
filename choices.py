"""What --dataset, --model, --augment, --scheduler and --track choose from, and what a file in extensions/ adds to it.

See docs/EXTENDING.md. What is built in is registered here by name, and gets its meaning where it is made, so that
--help imports nothing large.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from defaults import CIFAR, DIGITS, FASHION_MNIST, IMAGENET, MNIST, Preset
from registry import Registry

if TYPE_CHECKING:
    import torch
    from torch import nn

Function = TypeVar("Function", bound=Callable[..., Any])
SPLITS_AND_COLUMNS = ("train_split", "val_split", "image_column", "label_column", "num_classes")


@dataclass
class Dataset:
    """A dataset as --dataset knows it: its defaults, how it is opened, and which other flags go with it.

    `open(config)` gives a set to train on and one to validate on; or a single one, or None for the second, of which a
    share is then held out. Sets are `LocalDataset`s or whatever has the methods of `ImageDataset` (stream/source.py).
    `open_validation(config)`, where there is one, opens the second alone. Those on the Hub are streamed instead.
    """

    preset: Preset
    open: Callable[[Any], Any] | None = None
    open_validation: Callable[[Any], Any] | None = None
    in_memory: bool = False  # kept whole on the device, as one array of images of one size
    flips: bool = True  # an image may be mirrored in training
    takes: tuple[str, ...] = ("data_dir", *SPLITS_AND_COLUMNS)  # of the flags that only some datasets take
    needs: Mapping[str, str] = field(default_factory=dict)  # flags, and what they are to name
    id: str | None = None  # what it is called where it comes from, if that is not its name
    named_by: str | None = None  # the flag that tells where it comes from
    on_hub: bool = False
    downloads: bool = False  # where its files are missing
    evaluated_only: bool = False


@dataclass(frozen=True)
class Moment:
    """Where a run is when its schedule is asked for the learning rate of the next step. Numbers are optimiser steps.

    `step` of `total` are done, `begin` is the first one after the warm-up (0 where the warm-up overlaps the schedule),
    and `least` is --min_lr over the learning rate.
    """

    step: int
    total: int
    begin: int
    steps_per_epoch: int
    least: float

    @property
    def share(self) -> float:
        """How much of the schedule is done: 0 at its begin, less than 1 at the last step."""
        return (self.step - self.begin) / (self.total - self.begin)

    def above_least(self, height: float) -> float:
        """A height in 0..1 as a factor between `least` and 1."""
        return self.least + (1 - self.least) * height


@dataclass(frozen=True)
class Schedule:
    """A learning rate schedule: `factor(moment, config)` of the learning rate, or what `build` makes of PyTorch's."""

    factor: Callable[[Moment, Any], float] | None = None
    build: Callable[..., Any] | None = None


@dataclass(frozen=True)
class Augmentation:
    """A function of uint8 images (N, H, W, 3) and random numbers (N, draws), see `augmentation`."""

    function: "Callable[[torch.Tensor, torch.Tensor], torch.Tensor]"
    draws: int


_CLASS_FOLDERS = {"data_dir": "a folder with a folder a class"}
_SPLITS = {"data_dir": "a folder with a folder a class, or with train/ and val/ of such"}
_HUB_ID = {"dataset_name": "a Hub id such as timm/mini-imagenet, or a local folder"}
_EVALUATED = ("imagenet_v2", "imagenet_a", "imagenet_r", "imagenet_sketch")

DATASETS = Registry[Dataset]("--dataset")
for _name, _dataset in {
    "imagenet1k": Dataset(IMAGENET, on_hub=True, id="ILSVRC/imagenet-1k", takes=("dummy_data", *SPLITS_AND_COLUMNS)),
    "cifar10": Dataset(CIFAR, in_memory=True, downloads=True, takes=("data_dir",)),
    "cifar100": Dataset(CIFAR, in_memory=True, downloads=True, takes=("data_dir",)),
    "fashion_mnist": Dataset(FASHION_MNIST, in_memory=True, downloads=True, takes=("data_dir",)),
    "mnist": Dataset(MNIST, in_memory=True, downloads=True, flips=False, takes=("data_dir",)),
    "digits": Dataset(DIGITS, in_memory=True, flips=False, takes=()),
    "imagefolder": Dataset(
        IMAGENET, takes=("data_dir", "val_labels", "train_split", "val_split"), needs=_SPLITS, named_by="data_dir"
    ),
    "hf": Dataset(
        IMAGENET,
        on_hub=True,
        takes=("dataset_name", "dataset_config", *SPLITS_AND_COLUMNS),
        needs=_HUB_ID,
        named_by="dataset_name",
    ),
    **{
        name: Dataset(IMAGENET, evaluated_only=True, takes=("data_dir",), needs=_CLASS_FOLDERS, named_by="data_dir")
        for name in _EVALUATED
    },
}.items():
    DATASETS.register(_name)(_dataset)

MODELS = Registry[Callable[..., "nn.Module"]](
    "--model",
    (
        *("auto", "resnet18", "resnet20", "resnet34", "resnet50", "resnet101", "resnet152"),
        *("torchvision:NAME", "timm:NAME"),
    ),
)
BUILT_IN_SCHEDULES = ("onecycle", "cosine", "linear", "step", "trapezoid")
SCHEDULES = Registry[Schedule]("--scheduler", BUILT_IN_SCHEDULES)
AUGMENTATIONS = Registry[Augmentation]("--augment")
TRACKERS = Registry[type[Any]]("--track", ("tensorboard", "wandb", "trackio", "mlflow"))


def model_choice(name: str) -> str:
    """The choice of `MODELS` that a --model means: its name, or LIBRARY:NAME for a model of a library."""
    library, colon, _ = name.partition(":")
    return f"{library}:NAME" if colon else name


def dataset_named(given: Mapping[str, Any]) -> str | None:
    """The dataset that flags name, be it only by where its images are."""
    return given.get("dataset") or ("hf" if "dataset_name" in given else "imagefolder" if "data_dir" in given else None)


def dataset(name: str, preset: Preset, **facts: Any) -> Callable[[Function], Function]:
    """Registers `open(config)` of a `Dataset`; `facts` are other fields of it."""

    def register(function: Function) -> Function:
        DATASETS.register(name)(Dataset(preset, function, **facts))
        return function

    return register


def model(name: str) -> Callable[[Function], Function]:
    """Registers a function `(num_classes, image_size) -> nn.Module` of float images (N, 3, H, W) to logits.

    It gets --drop_path, --blurpool and --zero_init_gamma too, if it has parameters of these names.
    """
    return MODELS.register(name)  # type: ignore[return-value]


def schedule(name: str) -> Callable[[Function], Function]:
    """Registers a function `(moment, config) -> factor` of the learning rate, which depends on these two alone."""

    def register(function: Function) -> Function:
        SCHEDULES.register(name)(Schedule(function))
        return function

    return register


def augmentation(name: str, draws: int = 1) -> Callable[[Function], Function]:
    """Registers a function `(images, random) -> images` of training batches.

    Images are uint8 (N, H, W, 3) on the device, before and after, in new memory. `random` is float32 (N, draws) there,
    uniform in 0..1, less than 1: of each image its own, which follow from the seed, the name, the epoch and the image.
    """

    def register(function: Function) -> Function:
        AUGMENTATIONS.register(name)(Augmentation(function, draws))
        return function

    return register


def tracker(name: str) -> Callable[[type[Any]], type[Any]]:
    """Registers a class that takes the numbers and pictures of a run, see `Tracker` in tracking/tracker.py."""
    return TRACKERS.register(name)
