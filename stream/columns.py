"""Which columns of a table hold images and labels."""

import re
from typing import Any

from datasets import ClassLabel, Features, Image, LargeList, List, Value

from errors import DataError, UsageError

IMAGE_NAME = re.compile("image|img|photo|picture|file|path", re.IGNORECASE)
LABEL_NAME = re.compile("label|class|categor|target|cls", re.IGNORECASE)
TEXT, BYTES = {"string", "large_string"}, {"binary", "large_binary"}
LABEL_TYPES = {*TEXT, "bool", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))}


def kind_of(feature: Any) -> str:
    """The type of a column in words."""
    if isinstance(feature, Value):
        return str(feature.dtype).removeprefix("large_")
    if isinstance(feature, List | LargeList):
        return f"list of {kind_of(feature.feature)}"
    if isinstance(feature, dict):
        return f"struct of {', '.join(feature)}"
    return type(feature).__name__


def label_feature(feature: Any) -> Any:
    """The type of the labels of a column, which may be lists of one; None for what holds no labels."""
    if isinstance(feature, List | LargeList):
        feature = feature.feature
    is_label = isinstance(feature, ClassLabel) or (isinstance(feature, Value) and feature.dtype in LABEL_TYPES)
    return feature if is_label else None


def find_image_column(features: Features, wanted: str | None, source: str) -> str:
    """The column of images: of the Image feature or of structs of bytes and path, else of bytes, else of paths by name.

    Raises DataError unless there is just one, UsageError if `wanted` is none.
    """
    whole = [
        name
        for name, feature in features.items()
        if isinstance(feature, Image) or (isinstance(feature, dict) and {"bytes", "path"} & {*feature})
    ]
    data = [name for name, feature in features.items() if isinstance(feature, Value) and feature.dtype in BYTES]
    paths = [name for name, feature in features.items() if isinstance(feature, Value) and feature.dtype in TEXT]
    if wanted is not None:
        return _wanted(features, wanted, [*whole, *data, *paths], "images", "--image_column", source)
    return _only(features, whole or data or list(filter(IMAGE_NAME.search, paths)), "images", "--image_column", source)


def find_label_column(features: Features, wanted: str | None, image: str, source: str) -> str:
    """The column of labels: of the ClassLabel feature, else of whole numbers, text or truth values.

    Of several, only those are looked at that are named like labels, if any are. Raises DataError unless there is just
    one, UsageError if `wanted` is none.
    """
    fitting = [name for name, feature in features.items() if label_feature(feature) is not None and name != image]
    if wanted is not None:
        return _wanted(features, wanted, fitting, "labels", "--label_column", source)
    classes = [name for name in fitting if isinstance(label_feature(features[name]), ClassLabel)]
    others = [name for name in fitting if not name.startswith("__")]  # as pandas names its index
    named = list(filter(LABEL_NAME.search, others))
    return _only(features, classes or named or others, "labels", "--label_column", source)


def told(features: Features, names: list[str]) -> str:
    return ", ".join(f"{name} ({kind_of(features[name])})" for name in names) or "none"


def _only(features: Features, fitting: list[str], what: str, flag: str, source: str) -> str:
    if len(fitting) > 1:
        raise DataError(f"{source} has several columns of {what}: {told(features, fitting)}; choose with {flag}")
    if not fitting:
        wanted = "numbers, text or classes" if what == "labels" else "encoded images or their paths"
        raise DataError(
            f"{source} has no column of {what}, only {told(features, list(features))}; add one of {wanted}, or choose "
            f"one with {flag}"
        )
    return fitting[0]


def _wanted(features: Features, wanted: str, fitting: list[str], what: str, flag: str, source: str) -> str:
    if wanted in fitting:
        return wanted
    held = f"holds {kind_of(features[wanted])} and not {what}" if wanted in features else "is not there"
    raise UsageError(f"column {wanted} of {source} {held}; {flag} may be {told(features, fitting)}")
