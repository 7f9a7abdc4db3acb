"""WebDataset tar shards of images and labels, read a whole shard at a time."""

import io
import json
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from tqdm import tqdm

import distributed
from errors import DataError, UsageError
from stream.explain import one_line_errors
from stream.folders import IMAGES, Layout, layout_of
from stream.footers import Keep
from stream.labels import Naming, check_range, consecutive, distinct, require_classes
from stream.parquet import Block
from stream.ranges import Files
from stream.retry import in_threads
from stream.samples import Sample, as_text, content, described, label_of, members_of, samples_of, uncompressed

INDEX_THREADS = 4
HEAD = 4  # bytes of the length of what is kept of a shard first
EXAMPLES = 3  # names of members that are told


@dataclass(frozen=True)
class Shard:
    """A tar file's size in bytes, its number of samples and, if it was read, their smallest and largest label or their
    distinct names, how many members were passed over with some of their names, and what these have for suffixes.

    Where nothing but the folders of images tells classes, `folders` has the number of samples in each.
    """

    size: int
    rows: int
    low: int | None = None
    high: int | None = None
    names: list[str] = field(default_factory=list)
    passed: int = 0
    examples: list[str] = field(default_factory=list)
    suffixes: str = ""
    folders: dict[str, int] = field(default_factory=dict)


def require_used(source: str, is_tars: bool, columns: tuple[str | None, str | None], num_classes: int | None) -> None:
    """Refuse columns of tar files, and a number of classes for other files, which have no use, with UsageError."""
    if is_tars and any(columns):
        raise UsageError(f"{source} is a WebDataset, which has no columns; leave out --image_column and --label_column")
    if not is_tars and num_classes is not None:
        raise UsageError(f"{source} tells its classes, as only a WebDataset may not; leave out --num_classes")


class TarShards:
    """The shards of one split, each a block. An image and what tells its label, of one key, make a sample.

    `lengths` has the number of samples of each shard by file name, if the dataset's `_info.json` has it; other shards
    are read once to index them. With `lengths`, `num_classes` is needed. Labels are the places of their classes in
    `classes`; `notes` are lines for the user about what was derived or passed over. Raises DataError.
    """

    index_bytes = 0

    def __init__(self, source: str, files: Files, keep: Keep, num_classes: int | None, lengths: dict[str, int]) -> None:
        self._source = source
        self._files = files
        self._keep = keep
        self._unread = {number for number, name in enumerate(files.names) if name in lengths}
        self.tells_labels = not self._unread  # without reading whole shards
        self._made: dict[int, bytes] = {}  # what was indexed just now
        self._shards = self._index(lengths)
        self._layout = self._lay_out()
        self._naming = self._name_classes(num_classes)
        self._numbers = {name: number for number, name in enumerate(self._naming.names)}
        self.classes = self._naming.names
        self.notes = [self._naming.note] if self._naming.note else []
        if self._layout is not None:
            folder = next(folder for shard in self._shards for folder in shard.folders if self._class_of(folder))
            self.notes = [f"{self._naming.note}, as {self._class_of(folder)} in {folder}"]
        passed = sum(shard.passed for shard in self._shards)
        if passed:
            some = ", ".join([name for shard in self._shards for name in shard.examples][:EXAMPLES])
            self.notes.append(f"{passed:,} members that are no samples were passed over ({some})")

    def blocks(self, most_bytes: int) -> list[Block]:
        """A block for each shard, whatever its size."""
        suffix = "" if self._naming.is_plain else f".{xxhash.xxh3_64_hexdigest(repr(self.classes).encode())}"
        numbered = zip(self._files.names, range(len(self._shards)), self._shards, strict=True)
        return [
            Block(f"{name}.members{suffix}", number, (), shard.rows, shard.size)
            for name, number, shard in numbered
            if shard.rows
        ]

    def read(self, block: Block) -> pa.Table:
        """The columns `image`, encoded, and `label` (int64) of a shard. Raises DataError."""
        with self._opened(block.file) as (archive, samples, _):
            labelled = [(sample, self._class_of(label_of(archive, sample))) for sample in samples]
            found = [(content(archive, sample.image), label) for sample, label in labelled if label is not None]
        if len(found) != block.rows:
            name = self._files.names[block.file]
            raise DataError(f"{name} has {len(found)} samples and not {block.rows}; the dataset's index is wrong")
        images, labels = zip(*found, strict=True)
        return pa.table({"image": pa.array(images, pa.large_binary()), "label": self._number(block, labels)})

    def requests(self, block: Block) -> int:
        """How many requests a shard costs."""
        return int(self._files.by_request)

    def label_ranges(self, blocks: Sequence[Block]) -> np.ndarray:
        """Samples, smallest and largest label of each shard (int64, (3, shards)); 0 of one not read or with names."""
        shards, first = [self._shards[block.file] for block in blocks], self._naming.first
        told = [self._naming.stored is None and None not in (shard.low, shard.high) for shard in shards]
        found = [(shard.rows, (shard.low or 0) - first, (shard.high or 0) - first) for shard in shards]
        return np.array(found, np.int64).T * told

    def labels(self, block: Block) -> np.ndarray:
        """The labels of a shard (int64); one whose index was not read is read for them. Raises DataError."""
        return np.asarray(self._number(block, self._samples(block.file)["label"].to_pylist()), np.int64)

    def names(self, block: Block, rows: np.ndarray) -> list[str]:
        """Samples in words: their shard and their keys. A shard whose index was not read is read for them."""
        name = self._files.names[block.file].removeprefix(self._files.root)
        return [f"{name} key {key}" for key in self._samples(block.file)["key"].take(rows).to_pylist()]

    @contextmanager
    def _opened(self, number: int) -> Iterator[tuple[tarfile.TarFile, list[Sample], list[str]]]:
        """A shard, its samples and the names of the members that are part of none."""
        name = self._files.names[number]
        with one_line_errors(self._source, name):
            data = uncompressed(self._files.read(number, 0, self._files.size(number)))
            with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
                yield archive, *samples_of(members_of(archive, len(data)))

    def _look(self, number: int) -> tuple[Shard, pa.Table]:
        """What the index has of a shard: `Shard`, and the columns `key` and `label` of its samples."""
        with self._opened(number) as (archive, samples, passed):
            labels = [label_of(archive, sample) for sample in samples]
        passed = passed + [sample.image.name for sample, label in zip(samples, labels, strict=True) if label is None]
        known = [label for label in labels if label is not None]
        numbers = [label for label in known if isinstance(label, int)]
        folders = dict(Counter(sample.folder for sample in samples if sample.folder is not None))
        names = sorted({str(label) for label in known}) if len(numbers) < len(known) else []
        if numbers and not names:
            values, low, high = pa.array(numbers, pa.int64()), min(numbers), max(numbers)
        else:
            values, low, high = pa.array(map(str, known), pa.string()), None, None
        keys = [as_text(sample.key) for sample, label in zip(samples, labels, strict=True) if label is not None]
        size, examples, suffixes = (
            self._files.size(number),
            list(map(as_text, passed[:EXAMPLES])),
            "" if known else described(passed),
        )
        shard = Shard(size, len(known), low, high, names, len(passed), examples, suffixes, folders)
        return shard, pa.table({"key": pa.array(keys, pa.string()), "label": values})

    def _index(self, lengths: dict[str, int]) -> list[Shard]:
        """What is known of each shard."""

        def look(number: int) -> Shard:
            name = self._files.names[number]
            if name not in lengths:
                return self._indexed(number)[0]
            size = self._files.size(number)
            if not 0 <= lengths[name] <= size // tarfile.BLOCKSIZE:
                raise DataError(f"{name} cannot hold {lengths[name]} samples; the dataset's index is wrong")
            return Shard(size, lengths[name])

        quiet = True if distributed.rank() else None
        numbers = range(len(self._files.names))
        return list(tqdm(in_threads(look, numbers, INDEX_THREADS), "index", len(numbers), leave=False, disable=quiet))

    def _indexed(self, number: int) -> tuple[Shard, bytes | memoryview]:
        """What the index has of a shard, and its samples as an Arrow stream of `_look`'s columns.

        They are kept in one, behind the length of the first, so that opening a set does not read the second.
        """
        name = self._files.names[number]

        def make() -> bytes:
            shard, table = self._look(number)
            head, sink = json.dumps(asdict(shard)).encode(), pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(table)
            self._made[number] = len(head).to_bytes(HEAD, "little") + head + bytes(sink.getvalue())
            return self._made[number]

        kept = self._made.get(number) or self._keep(f"{name}.members", make)
        with one_line_errors(self._source, name):
            end = HEAD + int.from_bytes(kept[:HEAD], "little")
            return Shard(**json.loads(bytes(kept[HEAD:end]))), kept[end:]

    def _samples(self, number: int) -> pa.Table:
        """The columns `key` and `label` of the samples of a shard."""
        _, samples = self._indexed(number)
        with one_line_errors(self._source, self._files.names[number]):
            table = pa.ipc.open_stream(samples).read_all()
        if self._layout is None:
            return table
        classes = pa.array([self._class_of(folder) for folder in table["label"].to_pylist()], pa.string())
        return table.set_column(1, "label", classes).filter(pc.is_valid(classes))

    def _lay_out(self) -> Layout | None:
        """Where the folders of images tell their classes, if nothing else does: as in one set of all shards."""
        in_folders = {folder for shard in self._shards for folder in shard.folders}
        if not in_folders:
            return None
        for name, shard in zip(self._files.names, self._shards, strict=True):
            if shard.rows and not shard.folders:
                raise DataError(f"{name} tells labels by its members, and other shards by folders; make them the same")
        layout = layout_of(f"{folder}/" for folder in in_folders)
        splits = sorted({split for folder in in_folders if (split := layout.split_of(f"{folder}/"))})
        if len(splits) > 1:
            raise DataError(
                f"{self._files.names[0]} has folders for the splits {', '.join(splits)}; a tar shard is of one split"
            )
        for number, shard in enumerate(self._shards):
            used = sum(rows for folder, rows in shard.folders.items() if layout.class_of(f"{folder}/"))
            outside = [folder for folder in shard.folders if not layout.class_of(f"{folder}/")]
            self._shards[number] = replace(
                shard, rows=used, passed=shard.passed + shard.rows - used, examples=[*outside, *shard.examples]
            )
        return layout

    def _class_of(self, label: int | str | None) -> int | str | None:
        """The class that a label tells, which may be a folder; None where it tells none."""
        return label if self._layout is None or not isinstance(label, str) else self._layout.class_of(f"{label}/")

    def _name_classes(self, num_classes: int | None) -> Naming:
        rows, what = sum(shard.rows for shard in self._shards), "the shards' labels"
        if any(shard.names for shard in self._shards):
            naming = distinct(self._distinct(), what)
            require_classes(naming, rows, f"{self._source} in its shards", "give them a .cls of numbers or names")
            if num_classes is not None and len(naming.names) > num_classes:
                raise DataError(f"{self._source} has {len(naming.names):,} classes; give no --num_classes")
            return naming
        for name, shard in zip(self._files.names, self._shards, strict=True):
            check_range(name, shard.low)
        known = [(shard.low, shard.high) for shard in self._shards if shard.low is not None and shard.high is not None]
        low, high = min((low for low, _ in known), default=0), max((high for _, high in known), default=0)
        if num_classes is not None:
            first = int(bool(known) and not self._unread and (low, high) == (1, num_classes))
            return consecutive(first, first + num_classes - 1, num_classes + 1, what) or Naming([])
        if not known and self._unread:
            raise DataError(f"{self._source} does not tell how many classes it has; give --num_classes")
        if not known:
            self._refuse_empty()
        return consecutive(low, high, rows, what) or distinct(self._distinct(), what)

    def _distinct(self) -> set[int | str]:
        read = [number for number in range(len(self._shards)) if number not in self._unread]
        return {value for number in read for value in self._samples(number)["label"].unique().to_pylist()}

    def _refuse_empty(self) -> None:
        for name, shard in zip(self._files.names, self._shards, strict=True):
            if shard.passed:
                raise DataError(
                    f"{name} has no sample: its members, such as {shard.examples[0]}, have the suffixes "
                    f"{shard.suffixes}; a sample is an image ({', '.join(IMAGES[:4])}, ...) and a cls, txt or json of "
                    "the same name, or an image in a folder for each class"
                )

    def _number(self, block: Block, labels: Sequence[int | str]) -> pa.Array:
        """The classes (int64) of labels as they are stored."""
        name, naming = self._files.names[block.file], self._naming
        if naming.stored is not None:
            return pa.array([self._numbers[str(label)] for label in labels], pa.int64())
        strange = next((label for label in labels if isinstance(label, str)), None)
        if strange is not None:
            raise DataError(
                f"{name} has the label {strange!r}, a name, and its classes are numbers; an _info.json without "
                "shard_lengths lets all shards be read for the names"
            )
        return pa.array([label - naming.first for label in labels if isinstance(label, int)], pa.int64())
