"""CIFAR in torchvision's files with 4 images in each, and torchvision made to take them for the published ones."""

import hashlib
import json
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torchvision.datasets import CIFAR10, CIFAR100

KINDS = {"CIFAR10": (CIFAR10, "labels", "label_names"), "CIFAR100": (CIFAR100, "fine_labels", "fine_label_names")}


def write(folder: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The pixels (4, 32, 32, 3) of each file by its name, and what `adopt` needs, which JSON can hold."""
    pixels: dict[str, np.ndarray] = {}
    facts: dict[str, Any] = {}
    for kind_name, (kind, key, names) in KINDS.items():
        base = folder / kind.base_folder
        base.mkdir(parents=True)

        def put(name: str, value: Any, base: Path = base) -> list[str]:
            data = pickle.dumps(value)
            (base / name).write_bytes(data)
            return [name, hashlib.md5(data).hexdigest()]

        lists = []
        for entries in (kind.train_list, kind.test_list):
            sums = []
            for name, _ in entries:
                flat = np.random.default_rng(len(pixels)).integers(0, 256, (4, 3072), np.uint8)
                pixels[f"{kind_name}/{name}"] = flat.reshape(4, 3, 32, 32).transpose(0, 2, 3, 1)
                sums.append(put(name, {"data": flat, key: [0, 1, 2, 3]}))
            lists.append(sums)
        meta = put(kind.meta["filename"], {names: [f"name {label}" for label in range(10)]})
        facts[kind_name] = {
            "train_list": lists[0],
            "test_list": lists[1],
            "meta": {"filename": meta[0], "key": names, "md5": meta[1]},
        }
    return pixels, facts


def pack(folder: Path, facts: dict[str, Any], archive: Path) -> None:
    """Writes CIFAR-10's files into an archive like the published one."""
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder / CIFAR10.base_folder, CIFAR10.base_folder)
    facts["CIFAR10"]["tgz_md5"] = hashlib.md5(archive.read_bytes()).hexdigest()


def adopt(facts: dict[str, Any], set_attribute: Callable[[Any, str, Any], None] = setattr) -> None:
    """Have torchvision take these files."""
    for kind_name, values in facts.items():
        for name, value in values.items():
            set_attribute(KINDS[kind_name][0], name, value)


def load_in_a_rank(folder: str, facts: str) -> None:
    """Prints how many images of CIFAR-10 a process finds that `distributed` may have joined to others."""
    import distributed
    from stream.local import load_cifar

    adopt(json.loads(Path(facts).read_text()))
    distributed.init("cpu")
    print([len(part) for part in load_cifar("cifar10", Path(folder))])
