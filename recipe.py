"""Recipes: files of settings that are known to reach a published accuracy."""

import difflib
import hashlib
import tomllib
from collections import ChainMap
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from choices import DATASETS
from errors import UsageError
from hints import inverse

FOLDER = Path(__file__).resolve().parent / "recipes"
NAMES = sorted(path.stem for path in FOLDER.glob("*.toml"))
EXCLUSIVE = {"lr": ("lr_from",), "val_split": ("val_share",)}  # a flag given for a setting that it excludes
PLACES = {"data_dir", "dataset_name"}  # which name a dataset by themselves


def load(
    source: str, known: Collection[str], parse: Callable[[list[str]], dict[str, Any]]
) -> tuple[dict[str, Any], str]:
    """The settings of a recipe, by name, and its name with the digest of its file.

    `source` is the name of a file in recipes/, or a path. `known` are the names that a recipe may set, and `parse`
    makes values of flags. Raises UsageError, which names the file, and for an unknown key the nearest name.
    """
    path = Path(source) if source.endswith(".toml") else FOLDER / f"{source}.toml"
    try:
        data = path.read_bytes()
        table = tomllib.loads(data.decode())
    except OSError as error:
        near = difflib.get_close_matches(source, NAMES, 1)
        hint = f"did you mean {near[0]}?" if near else f"give a .toml file or one of {', '.join(NAMES)}"
        raise UsageError(f"--recipe {source} cannot be read ({error.strerror}); {hint}") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"--recipe {path} is not TOML ({error}); mend it") from error
    settings: dict[str, Any] = {}
    for key, value in table.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean {near[0]}?" if near else "its keys are the names of flags"
            raise UsageError(f"--recipe {path} has the key {key}, which no recipe may set; {hint}")
        try:
            settings |= parse([_flag(key, value)])
        except UsageError as error:
            raise UsageError(f"--recipe {path}: {error}") from error
    return settings, f"{path.stem} sha256:{hashlib.sha256(data).hexdigest()[:16]}"


def _flag(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return f"--{name if value else inverse(name)}"
    return f"--{name}={value}"


def combined(recipe: Mapping[str, Any], given: Mapping[str, Any]) -> ChainMap[str, Any]:
    """The flags `given` before a recipe's settings, over which they win. Its rate follows the batch, linearly.

    A place of images that the recipe's dataset does not take is that of another dataset.
    """
    excluded = {name for name, others in EXCLUSIVE.items() if any(other in given for other in others)}
    if "dataset" in recipe and PLACES & given.keys() - {*DATASETS[recipe["dataset"]].takes}:
        excluded |= {"dataset", *PLACES}
    settings = {name: value for name, value in recipe.items() if name not in excluded}
    batch = given.get("batch_size", recipe.get("batch_size"))
    if "batch_size" in recipe and isinstance(settings.get("lr"), float) and batch != recipe["batch_size"]:
        settings["lr"] = recipe["lr"] * batch / recipe["batch_size"]
    return ChainMap(dict(given), settings)
