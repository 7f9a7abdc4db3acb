"""What the paths of images tell: which split and which class they belong to."""

from stream.clutter import is_clutter
from stream.formats import IMAGE_SUFFIXES

USUAL = ("jpg", "jpeg", "png", "webp", "jpe", "jfif", "bmp", "gif", "tif", "tiff", "ppm", "avif", "jp2", "tga")
IMAGES = (*USUAL, *sorted({suffix[1:] for suffix in IMAGE_SUFFIXES} - {*USUAL}))
"""The suffixes of images; of several images of one sample, the one whose suffix comes first here is used."""

SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "dev"),
    "test": ("test", "testing", "eval"),
}
GENERAL = {
    *(word for words in SPLITS.values() for word in words),
    *("images", "image", "img", "imgs", "photos", "pictures", "data", "dataset"),
}


def suffix_of(name: str) -> str:
    """What follows the last dot of a file's name, in lower case; nothing if there is none."""
    base = name.rpartition("/")[2]
    return base.rpartition(".")[2].lower() if "." in base else ""


def is_image(path: str) -> bool:
    return suffix_of(path) in IMAGES and not is_clutter(path)


def class_of(path: str) -> str | None:
    """The class that the folders of a path tell: the last one that is not named in general, as a split is."""
    return next(
        (part for part in reversed(path.split("/")[:-1]) if part.strip(".") and part.lower() not in GENERAL), None
    )


def split_of(path: str) -> str | None:
    """The split that the folders of a path tell."""
    words = [part.lower() for part in path.split("/")[:-1]]
    return next((split for split, names in SPLITS.items() if any(word in names for word in words)), None)
