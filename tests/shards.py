"""Small image sets in the form of ILSVRC/imagenet-1k: parquet shards and a dataset card.

By hand: `python tests/shards.py ROOT --train 600` writes ROOT/datasets/ILSVRC/imagenet-1k for tests/hub.py to serve.
"""

import argparse
import json
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from sklearn.datasets import load_sample_images

REPO_ID = "ILSVRC/imagenet-1k"
JPEG_QUALITY = 90


def class_names(classes: int) -> list[str]:
    return [f"class {label}" for label in range(classes)]


def make_imagenet_like(
    root: Path,
    *,
    train: int = 600,
    validation: int = 97,
    test: int = 10,
    classes: int = 10,
    files: int = 3,
    rows_per_group: int = 20,
    size: tuple[int, int] = (80, 160),
    seed: int = 0,
    sort_by_class: bool = False,
    repo_id: str = REPO_ID,
) -> Path:
    """Writes root/datasets/<repo_id> and returns it: the same bytes for the same arguments.

    `train`, `validation` and `test` count images, the last labelled -1; `train` is cut into `files` files and each
    file into groups of `rows_per_group` rows. Both sides of an image lie in `size` (pixels).
    """
    folder = root / "datasets" / repo_id
    (folder / "data").mkdir(parents=True, exist_ok=True)
    counts = {"train": train, "validation": validation, "test": test}
    sizes = {}
    for number, (split, count) in enumerate(counts.items()):
        rng = np.random.default_rng((seed, number))
        labels = rng.permutation(np.arange(count) % classes)
        labels = np.sort(labels) if sort_by_class else labels
        images = [encode(draw(int(label), classes, size, rng)) for label in labels]
        shown = np.full(count, -1) if split == "test" else labels
        parts = np.array_split(np.arange(count), files if split == "train" else 1)
        for part, rows in enumerate(parts):
            table = to_table([images[row] for row in rows], shown[rows], f"{split}_{part}", classes)
            path = folder / "data" / f"{split}-{part:05d}-of-{len(parts):05d}.parquet"
            pq.write_table(table, path, row_group_size=rows_per_group)
        sizes[split] = sum(map(len, images))
    (folder / "README.md").write_text(card(counts, sizes, classes))
    return folder


def make_small_set(root: Path, repo_id: str = REPO_ID) -> None:
    """`make_imagenet_like` with 8 images to train on in one file and 8 for validation in another."""
    make_imagenet_like(root, train=8, validation=8, test=0, files=1, rows_per_group=8, size=(20, 30), repo_id=repo_id)


def draw(label: int, classes: int, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """A (H, W, 3) uint8 BGR crop of a photograph: the class decides the photograph, roughly the place, and the tint."""
    photos = photographs()
    photo = photos[label % len(photos)]
    height, width = rng.integers(size[0], size[1] + 1, 2)
    scale = max(1.0, height / photo.shape[0], width / photo.shape[1])
    photo = cv2.resize(photo, None, fx=scale, fy=scale) if scale > 1 else photo
    free = np.array([photo.shape[0] - height, photo.shape[1] - width])
    corner = np.clip((label + 0.5) / classes + rng.uniform(-0.1, 0.1, 2), 0, 1) * free
    top, left = corner.astype(int)
    tint = 1 + 0.35 * np.cos(2 * np.pi * (label / classes + np.arange(3) / 3))
    return np.clip(photo[top : top + height, left : left + width] * tint, 0, 255).astype(np.uint8)


@cache
def photographs() -> list[np.ndarray]:
    """scikit-learn's two sample photographs, 427x640x3, BGR."""
    return [np.ascontiguousarray(image[..., ::-1]) for image in load_sample_images().images]


def encode(image: np.ndarray) -> bytes:
    return bytes(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1])


def to_table(images: list[bytes], labels: np.ndarray, stem: str, classes: int) -> pa.Table:
    """Columns and schema metadata as `datasets` writes them; the images are named `stem` and their row."""
    names = [f"{stem}_{row:08d}.JPEG" for row in range(len(images))]
    structs = [{"bytes": image, "path": name} for image, name in zip(images, names, strict=True)]
    features = {"image": {"_type": "Image"}, "label": {"names": class_names(classes), "_type": "ClassLabel"}}
    fields = [("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("label", pa.int64())]
    schema = pa.schema(fields, metadata={"huggingface": json.dumps({"info": {"features": features}})})
    return pa.table([structs, labels], schema=schema)


def card(counts: dict[str, int], sizes: dict[str, int], classes: int) -> str:
    """The README.md: YAML front matter with the features, the splits and which files hold them."""
    names = "".join(f"          '{label}': {name}\n" for label, name in enumerate(class_names(classes)))
    splits = "".join(
        f"  - name: {split}\n    num_bytes: {sizes[split]}\n    num_examples: {count}\n"
        for split, count in counts.items()
    )
    files = "".join(f"  - split: {split}\n    path: data/{split}-*\n" for split in counts)
    return (
        "---\nlicense: other\ntask_categories:\n- image-classification\npretty_name: Crops of two photographs\n"
        "dataset_info:\n  features:\n  - name: image\n    dtype: image\n  - name: label\n    dtype:\n"
        f"      class_label:\n        names:\n{names}  splits:\n{splits}"
        f"  download_size: {sum(sizes.values())}\n  dataset_size: {sum(sizes.values())}\n"
        f"configs:\n- config_name: default\n  data_files:\n{files}---\n\n"
        "Tinted crops of scikit-learn's two sample photographs, in the form of ILSVRC/imagenet-1k.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path)
    for name, default in (("train", 600), ("validation", 97), ("test", 10), ("classes", 10), ("files", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rows_per_group", type=int, default=20)
    parser.add_argument("--size", type=int, nargs=2, default=(80, 160), help="smallest and largest side, pixels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sort_by_class", action="store_true")
    args = vars(parser.parse_args())
    print(make_imagenet_like(args.pop("root"), **args | {"size": tuple(args["size"])}))


if __name__ == "__main__":
    main()
