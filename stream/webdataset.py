"""WebDataset tar shards of images and labels, read a whole shard at a time."""

import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from tqdm import tqdm

import distributed
from errors import DataError
from stream.explain import one_line_errors
from stream.parquet import Block, Keep
from stream.ranges import Files
from stream.retry import in_threads

INDEX_THREADS = 4
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")


@dataclass(frozen=True)
class Shard:
    """A tar file's size in bytes, its number of samples and, if it was read, their smallest and largest label."""

    size: int
    rows: int
    low: int | None = None
    high: int | None = None


class TarShards:
    """The shards of one split, each a block. The members of equal stem, an image and its `.cls`, make a sample.

    `lengths` has the number of samples of each shard by file name, if the dataset's `_info.json` has it; other shards
    are read once to count them. With `lengths`, `num_classes` is needed. Raises DataError.
    """

    def __init__(self, source: str, files: Files, keep: Keep, num_classes: int | None, lengths: dict[str, int]) -> None:
        self._source = source
        self._files = files
        self._shards = self._index(keep, lengths)
        highest = [shard.high for shard in self._shards if shard.high is not None]
        if num_classes is None and not highest:
            raise DataError(f"{source} does not tell how many classes it has; give --num_classes")
        if num_classes is None and max(highest) >= sum(shard.rows for shard in self._shards):
            raise DataError(f"{source} has the label {max(highest)}, more than it has images; give --num_classes")
        self.classes = [str(number) for number in range(num_classes or max(highest) + 1)]

    def blocks(self, most_bytes: int) -> list[Block]:
        """A block for each shard, whatever its size."""
        numbered = zip(self._files.names, range(len(self._shards)), self._shards, strict=True)
        return [Block(name, number, (), shard.rows, shard.size) for name, number, shard in numbered if shard.rows]

    def read(self, block: Block) -> pa.Table:
        """The columns `image`, encoded, and `label` of a shard. Raises DataError."""
        name = self._files.names[block.file]
        with one_line_errors(self._source, name):
            data = self._files.read(block.file, 0, block.size)
            samples = list(_samples(data))
        if len(samples) != block.rows:
            raise DataError(f"{name} has {len(samples)} samples and not {block.rows}; the dataset's index is wrong")
        images, labels = zip(*samples, strict=True)
        return pa.table({"image": pa.array(images, pa.large_binary()), "label": pa.array(labels, pa.int64())})

    def requests(self, block: Block) -> int:
        """How many requests a shard costs."""
        return int(self._files.by_request)

    def label_ranges(self, block: Block) -> list[tuple[int, int, int]] | None:
        """Samples, smallest and largest label of a shard, or None if the shard has not been read."""
        shard = self._shards[block.file]
        return None if shard.low is None or shard.high is None else [(shard.rows, shard.low, shard.high)]

    def _index(self, keep: Keep, lengths: dict[str, int]) -> list[Shard]:
        def look(number: int) -> Shard:
            name = self._files.names[number]

            def make() -> bytes:
                size = self._files.size(number)
                if name in lengths:
                    if not 0 <= lengths[name] <= size // tarfile.BLOCKSIZE:
                        raise DataError(f"{name} cannot hold {lengths[name]} samples; the dataset's index is wrong")
                    return json.dumps(vars(Shard(size, lengths[name]))).encode()
                with one_line_errors(self._source, name):
                    labels = [label for _, label in _samples(self._files.read(number, 0, size))]
                known = [-1 if label is None else label for label in labels] or [0]
                return json.dumps(vars(Shard(size, len(labels), min(known), max(known)))).encode()

            return Shard(**json.loads(bytes(keep(f"{name}.shard", make))))

        quiet = True if distributed.rank() else None
        numbers = range(len(self._files.names))
        return list(tqdm(in_threads(look, numbers, INDEX_THREADS), "index", len(numbers), leave=False, disable=quiet))


def _samples(data: bytes | memoryview) -> Iterator[tuple[bytes, int | None]]:
    """The image (empty if there is none) and label (None) of each sample of a tar file, in its order."""
    samples: dict[str, dict[str, bytes]] = {}
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
        for member in archive:
            file = archive.extractfile(member)
            if member.size < 0 or member.issparse():
                raise tarfile.ReadError(f"{member.name} is no plain file")
            if file is not None:
                folder, slash, base = member.name.rpartition("/")
                stem, _, suffix = base.partition(".")
                samples.setdefault(f"{folder}{slash}{stem}", {})[suffix.lower()] = file.read()
    for parts in samples.values():
        image = next((parts[suffix] for suffix in IMAGE_SUFFIXES if suffix in parts), b"")
        yield image, _label(parts)


def _label(parts: dict[str, bytes]) -> int | None:
    if "cls" in parts:
        return int(parts["cls"])
    told: Any = json.loads(parts["json"]) if "json" in parts else {}
    label = told.get("cls", told.get("label"))
    return label if isinstance(label, int) else None
