"""HuggingFaceImageNetDataset: blocks of parquet row groups, on the Hub or on disk, and the order of training."""

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
from datasets import ClassLabel, Features, Image
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub import HfApi, HfFileSystem, constants, get_token, hf_hub_download
from huggingface_hub.errors import (
    GatedRepoError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from tqdm import tqdm

import distributed
from errors import DataError, UsageError

FETCH_THREADS = 8
FOOTER_THREADS = 16
BLOCKS_AHEAD = 8


def epoch_order(block_rows: np.ndarray, epoch: int, seed: int, streams: int, window: int) -> list[np.ndarray]:
    """The sample ids (int64) of each stream in one epoch: a pure function of its arguments.

    The blocks are permuted, their samples cut into `streams` equal spans, and each span shuffled in a rolling window:
    sample i of n goes where i + uniform(0, window / streams) sorts, so none moves further than its share of `window`
    and a reader holds no more than that. A window over everything gives a uniform permutation. Only raw bits of
    Philox and stable sorts are used, which no release of numpy may change.
    """

    def noise(count: int, use: int) -> np.ndarray:
        return np.random.Philox(np.random.SeedSequence((seed, epoch, use))).random_raw(count)

    permuted = np.argsort(noise(len(block_rows), 0), kind="stable")
    rows = block_rows[permuted]
    first_ids = (np.cumsum(block_rows) - block_rows)[permuted]
    total = int(rows.sum())
    ids = np.repeat(first_ids - (np.cumsum(rows) - rows), rows) + np.arange(total)
    result = []
    for stream in range(streams):
        span = ids[total * stream // streams : total * (stream + 1) // streams]
        bits = noise(len(span), 1 + stream)
        keys = bits if window >= total else np.arange(len(span)) + bits * (window / streams / 2**64)
        result.append(span[np.argsort(keys, kind="stable")])
    return result


def pick_blocks(rows: np.ndarray, limit: int | None) -> tuple[np.ndarray, np.ndarray]:
    """The fewest blocks, spread evenly, that hold `limit` samples: their indices, and the rows to use of each."""
    if limit is None or limit >= rows.sum():
        return np.arange(len(rows)), rows
    count = max(1, int(limit * len(rows) / rows.sum()))
    while True:
        picks = np.arange(count) * len(rows) // count
        filled = np.minimum(np.cumsum(rows[picks]), limit)
        if filled[-1] == limit:
            used = np.diff(filled, prepend=0)
            return picks[used > 0], used[used > 0]
        count += 1


@dataclass(frozen=True)
class Block:
    """Consecutive row groups of one file."""

    file: int
    groups: tuple[int, ...]
    rows: int


class HuggingFaceImageNetDataset:
    """One split of an image classification dataset in parquet files, read block by block.

    `source` is a Hub id or a local folder. `datasets` resolves the files, features and licence gate; the revision is
    pinned to its commit. With `streaming` off the files are downloaded first. `split` may list alternatives, of which
    the first that exists is taken. Raises DataError when the data is missing, unreachable, not authorised or not
    labelled, UsageError when a column that was asked for does not exist.
    """

    def __init__(
        self,
        source: str,
        *,
        split: list[str],
        revision: str = "main",
        image_column: str | None = None,
        label_column: str | None = None,
        block_bytes: int = 32 * 2**20,
        max_samples: int | None = None,
        streaming: bool = True,
    ) -> None:
        self.source = source
        self.revision = None if Path(source).is_dir() else _pin_revision(source, revision)
        with _one_line_errors(source):
            builder = datasets.load_dataset_builder(source, revision=self.revision)
        self._files = files = _split_files(builder, source, split)
        self._open = _opener(source, self.revision, files, streaming)
        self._footers = _read_footers(source, files, self._open, _footer_folder(source) if self.revision else None)
        features = builder.info.features or Features.from_arrow_schema(self._footers[0].schema.to_arrow_schema())
        self.image_column = _find_column(features, Image, image_column, "--image_column", source)
        self.label_column = _find_column(features, ClassLabel, label_column, "--label_column", source)
        self.classes: list[str] = list(features[self.label_column].names)
        self._check_label_range()
        blocks = _cut_into_blocks(self._footers, (self.image_column, self.label_column), block_bytes)
        picks, rows = pick_blocks(np.array([block.rows for block in blocks], np.int64), max_samples)
        self.blocks = [blocks[pick] for pick in picks]
        self.block_rows = rows
        self._ends = np.cumsum(rows)
        if not len(self):
            raise DataError(f"{source} has no images in split {'/'.join(split)}; give another split")

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def locate(self, sample_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The block of each sample, and its row there."""
        blocks = np.searchsorted(self._ends, sample_ids, side="right")
        return blocks, sample_ids - (self._ends - self.block_rows)[blocks]

    def read_block(self, number: int) -> list[tuple[bytes, int]]:
        """The encoded images and labels of a block, by one range request. Raises DataError."""
        block = self.blocks[number]
        columns = [f"{self.image_column}.bytes", self.label_column]
        with _one_line_errors(self.source, self._files[block.file]), self._open(block.file) as file:
            parquet = pq.ParquetFile(file, metadata=self._footers[block.file], pre_buffer=True)
            table = parquet.read_row_groups(list(block.groups), columns=columns)
        images = table[self.image_column].combine_chunks().field("bytes").to_pylist()
        labels = table[self.label_column].to_pylist()
        for label in labels:
            self._check_label(label, block.file)
        return list(zip(images, labels, strict=True))

    def _check_label_range(self) -> None:
        """Refuse a split without labels before it is read, as far as the footers tell its smallest and largest one."""
        for file, footer in enumerate(self._footers):
            for group in range(footer.num_row_groups):
                statistics = next(c for c in _chunks(footer, group) if c.path_in_schema == self.label_column).statistics
                if statistics is not None and statistics.has_min_max:
                    self._check_label(statistics.min, file)
                    self._check_label(statistics.max, file)

    def _check_label(self, label: int | None, file: int) -> None:
        if label is None or not 0 <= label < len(self.classes):
            raise DataError(
                f"{self._files[file]} has the label {label}, which is no class: a split without labels, "
                "such as the Hub's test split, is of no use here; give another split"
            )

    def reader(self, ids: np.ndarray) -> "BlockReader":
        return BlockReader(self, ids)


class BlockReader:
    """Reads each block of an epoch once, some blocks ahead of use, and forgets it when its last sample was used."""

    def __init__(self, dataset: HuggingFaceImageNetDataset, ids: np.ndarray) -> None:
        self._dataset = dataset
        blocks, first_use, counts = np.unique(dataset.locate(ids)[0], return_index=True, return_counts=True)
        self._left = dict(zip(blocks.tolist(), counts.tolist(), strict=True))
        self._queue = blocks[np.argsort(first_use)].tolist()
        self._place = {block: place for place, block in enumerate(self._queue)}
        self._asked = 0
        self._blocks: dict[int, Future[list[tuple[bytes, int]]]] = {}
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(FETCH_THREADS, "fetch")

    def read(self, sample_id: int) -> tuple[bytes, int]:
        blocks, rows = self._dataset.locate(np.array([sample_id]))
        block = int(blocks[0])
        with self._lock:
            ahead = self._place.get(block, 0) + BLOCKS_AHEAD
            for other in [*self._queue[self._asked : ahead + 1], block]:
                if other not in self._blocks:
                    self._blocks[other] = self._pool.submit(self._dataset.read_block, other)
            self._asked = max(self._asked, ahead + 1)
            future = self._blocks[block]
        return future.result()[int(rows[0])]

    def release(self, ids: np.ndarray) -> None:
        blocks, counts = np.unique(self._dataset.locate(ids)[0], return_counts=True)
        with self._lock:
            for block, count in zip(blocks.tolist(), counts.tolist(), strict=True):
                self._left[block] -= count
                if not self._left[block]:
                    del self._blocks[block]

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


def _pin_revision(source: str, revision: str) -> str:
    """The commit that `revision` stands for now, if this user may read the dataset."""
    with _one_line_errors(source):
        api = HfApi()
        sha = api.dataset_info(source, revision=revision).sha
        api.auth_check(source, repo_type="dataset")
    assert sha is not None
    return sha


class _one_line_errors(AbstractContextManager[None]):
    """Turns what the Hub's clients and pyarrow raise into a DataError that says what to do about it."""

    def __init__(self, source: str, file: str | None = None) -> None:
        self.source = source
        self.file = file or source

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None:
            return
        message = self._explain(error)
        if message:
            raise DataError(message) from error

    def _explain(self, error: BaseException) -> str | None:
        source, url = self.source, f"{constants.ENDPOINT}/datasets/{self.source}"
        response = getattr(error, "response", None)
        code = response.status_code if response is not None else None
        if isinstance(error, OfflineModeIsEnabled):
            return f"{source} is not on this machine and HF_HUB_OFFLINE is set; unset it to reach the Hub"
        if code == 401 and get_token() is None:
            return f"{source} needs a token, or does not exist; accept its licence at {url}, then set HF_TOKEN"
        if code == 401:
            return f"the Hub refused the token for {source}; make a new one and set HF_TOKEN"
        if isinstance(error, GatedRepoError) or code == 403:
            return f"the licence of {source} is not accepted by this token's account; accept it at {url}"
        if isinstance(error, RevisionNotFoundError):
            return f"{source} has no such revision; check --dataset_revision"
        if isinstance(error, RepositoryNotFoundError | DatasetNotFoundError):
            return f"{source} does not exist on the Hub, nor is it a folder here; check the name"
        if isinstance(error, HTTPError | ConnectionError | TimeoutError):
            return f"cannot reach {source} at {constants.ENDPOINT} ({error}); check the network, then resume"
        if isinstance(error, OSError | ValueError):
            return f"cannot read {self.file}: {' '.join(str(error).split())}"
        return None


def _split_files(builder: Any, source: str, split: list[str]) -> list[str]:
    available = builder.config.data_files or {}
    for name in split:
        if name in available:
            return [str(path) for path in available[name]]
    raise DataError(f"{source} has no split {' or '.join(split)}, only {', '.join(map(str, available)) or 'none'}")


def _opener(source: str, revision: str | None, files: list[str], streaming: bool) -> Callable[[int], Any]:
    """A function from a file's number to an open binary file that supports range reads."""
    if revision is None:
        return lambda number: open(files[number], "rb")
    prefix = f"hf://datasets/{source}@{revision}/"
    inside = [path.removeprefix(prefix) for path in files]
    if not streaming:
        local = [hf_hub_download(source, path, repo_type="dataset", revision=revision) for path in inside]
        return lambda number: open(local[number], "rb")
    hub = HfFileSystem()
    return lambda number: hub.open(files[number], "rb", cache_type="none")


def _footer_folder(source: str) -> Path:
    return Path(constants.HF_HOME) / "imagenet1k" / "footers" / source.replace("/", "--")


def _read_footers(
    source: str, files: list[str], open_file: Callable[[int], Any], cache: Path | None
) -> list[pq.FileMetaData]:
    """The metadata of every file: fetched in parallel, and of the Hub's files a copy kept for each revision."""

    def read(number: int) -> pq.FileMetaData:
        copy = cache / (files[number].rpartition("@")[2].replace("/", "--") + ".footer") if cache else None
        if copy is not None and copy.exists():
            return pq.read_metadata(copy)
        with _one_line_errors(source, files[number]), open_file(number) as file:
            footer = pq.ParquetFile(file).metadata
        if copy is not None:
            copy.parent.mkdir(parents=True, exist_ok=True)
            temporary = copy.with_suffix(f".{os.getpid()}")
            footer.write_metadata_file(temporary)
            os.replace(temporary, copy)
        return footer

    with ThreadPoolExecutor(FOOTER_THREADS) as pool:
        quiet = True if distributed.rank() else None
        return list(tqdm(pool.map(read, range(len(files))), "index", len(files), leave=False, disable=quiet))


def _find_column(features: Features, kind: type, wanted: str | None, flag: str, source: str) -> str:
    fitting = [name for name, feature in features.items() if isinstance(feature, kind)]
    if wanted is not None:
        if wanted not in fitting:
            raise UsageError(
                f"{source} has no {kind.__name__} column {wanted}; {flag} may be {', '.join(fitting) or 'none'}"
            )
        return wanted
    if len(fitting) != 1:
        found = (
            f"several {kind.__name__} columns ({', '.join(fitting)}); choose with {flag}"
            if fitting
            else f"no {kind.__name__} column"
        )
        raise DataError(f"{source} has {found}")
    return str(fitting[0])


def _chunks(footer: pq.FileMetaData, group: int) -> list[pq.ColumnChunkMetaData]:
    row_group = footer.row_group(group)
    return [row_group.column(number) for number in range(row_group.num_columns)]


def _cut_into_blocks(footers: list[pq.FileMetaData], columns: tuple[str, str], block_bytes: int) -> list[Block]:
    """Consecutive row groups of each file, up to `block_bytes` together and at least one."""
    blocks = []
    for file, footer in enumerate(footers):
        groups: list[int] = []
        size = rows = 0
        for group in range(footer.num_row_groups):
            chunks = _chunks(footer, group)
            group_bytes = sum(c.total_compressed_size for c in chunks if c.path_in_schema.split(".")[0] in columns)
            if groups and size + group_bytes > block_bytes:
                blocks.append(Block(file, tuple(groups), rows))
                groups, size, rows = [], 0, 0
            groups.append(group)
            size += group_bytes
            rows += footer.row_group(group).num_rows
        if rows:
            blocks.append(Block(file, tuple(groups), rows))
    return blocks
