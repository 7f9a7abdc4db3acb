"""Loaders: batches in the order of an epoch. StreamingDataLoader fetches and decodes images in parallel."""

import contextlib
import logging
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import torch

from errors import DataError, printable
from stream.augment import BatchAugment
from stream.decode_pool import DIED, EndsProcess, Job, WorkerDied, pack, shared_pool
from stream.images import EncodedImage, Transform, UnreadableImage, decode_into
from stream.shared import InFile, in_memory
from stream.source import ImageDataset
from stream.transfer import Transfer

log = logging.getLogger(__name__)

BATCHES_AHEAD = 4
PARTS = 8  # in which the ids of an epoch are put into the order of its batches, to save memory
SAMPLES_PER_TASK = 32  # at most: each task costs this process the interpreter lock for a while
TASKS_PER_WORKER = 2  # in flight at least, where there are so many samples
UNREADABLE = -1
FEW_BAD = 10  # images that cannot be read end no run, however small the set is
POLL_SECONDS = 0.2


class Cancelled(Exception):
    """Waiting for data ended because `should_stop()` is true, or because the reader was closed."""


class Batch(NamedTuple):
    """Images uint8 (N, H, W, 3), labels int64 (N,), dataset-wide sample ids int64 (N,)."""

    images: torch.Tensor
    labels: torch.Tensor
    ids: torch.Tensor


class Loader(ABC):
    """Batches of `(images, labels, ids)` on `device`, in an order that is a function of the epoch alone.

    `order(epoch)` returns this process's streams as int64 arrays of sample ids. In training a batch takes an equal
    share of each stream, and the incomplete last batch is dropped, so that each of the `ranks` processes that share the
    dataset has the same number of batches. Otherwise nothing is dropped. `augment` is applied to whole batches on the
    device. Ids stay on the host.

    Iterating yields the batches of the epoch given to `set_epoch`, from step `start` on; there is no other state. On a
    GPU a batch is copied and augmented on a CUDA stream of its own, in parallel with the previous step.
    """

    def __init__(
        self,
        dataset: Any,
        order: Callable[[int], list[np.ndarray]],
        *,
        batch_size: int,
        train: bool,
        ranks: int = 1,
        device: torch.device = torch.device("cpu"),  # noqa: B008 (immutable)
        augment: BatchAugment | None = None,
    ) -> None:
        self.dataset = dataset
        self.order = order
        self.batch_size = batch_size
        self.train = train
        self.device = device
        self.augment = augment
        self.should_stop: Callable[[], bool] = lambda: False
        self.report: Callable[[str, str], None] = lambda name, reason: None
        self.of_epoch: Callable[[int], tuple[int, Transform]] | None = None  # size and transform, where these change
        self.epoch = 0
        self.start = 0
        self.transfer = Transfer(device)
        self._steps = len(dataset) // (batch_size * ranks) if train else -(-sum(map(len, order(0))) // batch_size)

    def __len__(self) -> int:
        """The number of batches in a whole epoch; in training it is the same on every rank."""
        return self._steps

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Set the epoch (from 0) that the next iteration yields, and the step to start from."""
        self.epoch = epoch
        self.start = start

    def real(self, ids: Any) -> Any:
        """The ids in the dataset of ids that may be those of copies, see `stream.order.repeated`."""
        return ids % len(self.dataset)

    @abstractmethod
    def __iter__(self) -> Iterator[Batch]: ...

    def _spans(self, streams: list[np.ndarray]) -> Iterator[list[tuple[int, int]]]:
        """The part of each stream that goes into each batch from `start` on."""
        share = self.batch_size // len(streams)
        for step in range(self.start, self._steps):
            yield [(step * share, min((step + 1) * share, len(stream))) for stream in streams]

    def _scheduled(self, streams: list[np.ndarray]) -> Iterator[np.ndarray]:
        """The ids in the dataset of the samples of all batches from `start` on, those of several batches at a time."""
        share, each = self.batch_size // len(streams), -(-self._steps // PARTS)
        for first in range(self.start, self._steps, each):
            span = slice(first * share, min(first + each, self._steps) * share)
            parts = [stream[span].reshape(-1, share if self.train else 1) for stream in streams]
            yield self.real(np.stack(parts, 1).ravel())

    def _on_device(self, batch: Batch, epoch: int) -> Batch:
        def augmented(images: torch.Tensor) -> torch.Tensor:
            return images if self.augment is None else self.augment(images, batch.ids, epoch)

        return Batch(*self.transfer(batch.images, batch.labels, augmented), batch.ids)


def ids_of(streams: list[np.ndarray], spans: list[tuple[int, int]]) -> np.ndarray:
    """The sample ids of a batch."""
    return np.concatenate([stream[first:end] for stream, (first, end) in zip(streams, spans, strict=True)])


class StreamingDataLoader(Loader):
    """A `Loader` that reads, decodes and transforms images in the background.

    It has `num_workers` reading threads, each with a worker process that decodes for it; without workers the calling
    thread does everything. A training sample that cannot be read is replaced by the next readable one of its stream, or
    of another one where it has none; in evaluation an unreadable image gets label -1. `read_seconds` is the time that
    the threads have spent waiting for encoded images since the iteration began. `report` is called with the name of
    each image that cannot be read, and why. Raises DataError when these are more than `max_bad_fraction` of the dataset
    and more than FEW_BAD (with a fraction of 0: when there is one), when no image is left, or when a label is no class;
    and Cancelled when it has to wait while `should_stop()` is true.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        transform: Transform,
        order: Callable[[int], list[np.ndarray]],
        *,
        image_size: int,
        seed: int,
        num_workers: int,
        max_bad_fraction: float,
        **options: Any,
    ) -> None:
        super().__init__(dataset, order, **options)
        self.transform = transform
        self.image_size = image_size
        self.seed = seed
        self.num_workers = num_workers
        self.pool = shared_pool(num_workers) if num_workers else None
        self.packed = pack(transform) if num_workers else b""
        self.max_bad = max(FEW_BAD, int(max_bad_fraction * len(dataset))) if max_bad_fraction else 0
        self.read_seconds = 0.0
        self.sound = np.zeros(len(dataset), bool)  # the samples that were read without complaint
        self.ends_process: dict[int, EndsProcess] = {}  # samples that are not tried again

    def __iter__(self) -> Iterator[Batch]:
        epoch, streams = self.epoch, self.order(self.epoch)
        if self.of_epoch is not None:
            self.image_size, self.transform = self.of_epoch(epoch)
            self.packed = pack(self.transform) if self.num_workers else b""
        if self.start < self._steps:
            self.read_seconds = 0.0
            with contextlib.closing(_EpochReader(self, epoch, streams)) as reader:
                for batch in reader.batches():
                    yield self._on_device(batch, epoch)


class _Begun(NamedTuple):
    """A batch, the tasks that fill it, and its scheduled ids, some of which may be replaced."""

    batch: Batch
    tasks: list[Future[None]]
    scheduled: np.ndarray


class _EpochReader:
    """Makes the batches of an epoch, with workers in threads and some batches ahead of use.

    A place is a stream and a position in it.
    """

    def __init__(self, loader: StreamingDataLoader, epoch: int, streams: list[np.ndarray]) -> None:
        self._loader = loader
        self._epoch = epoch
        self._streams = streams
        self._spans = loader._spans(streams)
        self._reader = loader.dataset.reader(loader._scheduled(streams))
        self._reader.should_stop = lambda: loader.should_stop()
        self._threads = ThreadPoolExecutor(loader.num_workers, "decode") if loader.num_workers else None
        self._closed = False
        self._bad: set[int] = set()
        self._lock = threading.Lock()

    def batches(self) -> Iterator[Batch]:
        """The batches, on the host."""
        begun: deque[_Begun] = deque()
        for parts in self._spans:
            begun.append(self._begin(parts))
            if len(begun) > (BATCHES_AHEAD if self._threads else 0):
                yield self._finish(begun.popleft())
        while begun:
            yield self._finish(begun.popleft())

    def close(self) -> None:
        """Cancel the tasks that have not started."""
        self._closed = True
        self._reader.close()
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)

    def _given_up(self) -> bool:
        return self._closed or self._loader.should_stop()

    def _begin(self, parts: list[tuple[int, int]]) -> _Begun:
        """Start filling a batch; without threads, fill it at once."""
        places = [(stream, position) for stream, span in enumerate(parts) for position in range(*span)]
        size, pin = self._loader.image_size, self._loader.transfer.pin is not None
        shape, tasks, each = (len(places), size, size, 3), [], len(places)
        if self._loader.pool is None:
            pixels = torch.empty(shape, dtype=torch.uint8, pin_memory=pin)
        else:
            pixels = torch.from_numpy(self._loader.pool.memory.array(shape, self._loader.transfer.pin))
            in_flight = BATCHES_AHEAD * len(places)
            each = min(SAMPLES_PER_TASK, -(-in_flight // (TASKS_PER_WORKER * self._loader.num_workers)))
        numbers = (torch.empty(len(places), dtype=torch.int64, pin_memory=pinned) for pinned in (pin, False))
        batch = Batch(pixels, *numbers)
        arrays = [tensor.numpy() for tensor in batch]
        for first in range(0, len(places), each):
            rows = slice(first, first + each)
            images, labels, ids = (array[rows] for array in arrays)
            fill = partial(self._fill, images, labels, ids, places[rows])
            if self._threads is None:
                fill()
            else:
                tasks.append(self._threads.submit(fill))
        return _Begun(batch, tasks, ids_of(self._streams, parts))

    def _finish(self, begun: _Begun) -> Batch:
        """Wait until a batch is full, and release its samples."""
        for task in begun.tasks:
            while not task.done():
                wait([task], POLL_SECONDS)
                if self._loader.should_stop():
                    raise Cancelled
            task.result()
        self._reader.release(self._loader.real(begun.scheduled))
        return begun.batch

    def _fill(self, images: np.ndarray, labels: np.ndarray, ids: np.ndarray, places: list[tuple[int, int]]) -> None:
        """Fill these rows of a batch with the samples at these places."""
        if self._closed:
            return
        encoded, asked = [], perf_counter()
        for row, (stream, position) in enumerate(places):
            ids[row] = self._streams[stream][position]
            image, labels[row] = self._read(int(ids[row]))
            encoded.append(image)
        with self._lock:
            self._loader.read_seconds += perf_counter() - asked
        for row, error in enumerate(self._decode(encoded, ids, images)):
            if error is None:
                continue
            self._count_bad(int(ids[row]), error)
            if self._loader.train:
                self._fill_with_next(images[row : row + 1], labels[row:], ids[row : row + 1], *places[row])
            else:
                images[row], labels[row] = 0, UNREADABLE

    def _fill_with_next(
        self, image: np.ndarray, label: np.ndarray, sample_id: np.ndarray, stream: int, position: int
    ) -> None:
        """Fill a row with the next readable sample after a place: of its stream, or else of the streams behind it."""
        for candidate in self._after(stream, position):
            sample_id[0] = candidate
            encoded, label[0] = self._read(candidate)
            (error,) = self._decode([encoded], sample_id, image)
            if error is None:
                return
            self._count_bad(candidate, error)
        raise DataError("not one image can be read; check the dataset")

    def _after(self, stream: int, position: int) -> Iterator[int]:
        """The samples after a place: those of its stream, then those from the same position on of each other one."""
        for number, order in enumerate((*self._streams[stream:], *self._streams[:stream])):
            yield from order[position + (number == 0) :].tolist()
            yield from order[:position].tolist()

    def _read(self, sample_id: int) -> tuple[EncodedImage | InFile | UnreadableImage, int]:
        """A sample, or the reason why it cannot be read, with a label of no use."""
        sample_id = self._loader.real(sample_id)
        if sample_id in self._loader.ends_process:
            return self._loader.ends_process[sample_id], 0
        try:
            image, label = self._reader.read(sample_id)
        except UnreadableImage as error:
            return error, 0
        dataset = self._loader.dataset
        if not 0 <= label < len(dataset.classes):
            raise DataError(f"{dataset.name(sample_id)} has the label {label}, which is no class; mend the dataset")
        return image, label

    def _decode(
        self, found: list[EncodedImage | InFile | UnreadableImage], ids: np.ndarray, out: np.ndarray
    ) -> list[Exception | None]:
        loader = self._loader
        encoded = [b"" if isinstance(image, UnreadableImage) else image for image in found]
        seeds = [(loader.seed, self._epoch, sample_id) for sample_id in ids.tolist()]
        jobs = list(map(Job, encoded, seeds, loader.sound[loader.real(ids)].tolist()))
        reasons: list[Exception | None]
        try:
            if loader.pool is None:
                reasons = [
                    decode_into(row, in_memory(job.image), loader.transform, job.seed, job.sound)
                    for row, job in zip(out, jobs, strict=True)
                ]
            else:
                reasons = loader.pool.run(loader.packed, jobs, out, self._given_up)
        except WorkerDied as error:
            if self._given_up():
                raise Cancelled from error
            raise DataError(DIED) from error
        pairs = zip(found, reasons, strict=True)
        told = [image if isinstance(image, UnreadableImage) else reason for image, reason in pairs]
        loader.sound[loader.real(ids)] = [reason is None for reason in told]
        return told

    def _count_bad(self, sample_id: int, error: Exception) -> None:
        sample_id = self._loader.real(sample_id)
        with self._lock:
            if sample_id in self._bad:
                return
            self._bad.add(sample_id)
            if isinstance(error, EndsProcess):
                self._loader.ends_process[sample_id] = error
            name, total = self._loader.dataset.name(sample_id), len(self._loader.dataset)
            shown, bad = printable(name), len(self._bad)
            log.warning("%s cannot be read (%s); %d so far of %d", shown, error, bad, total)
            self._loader.report(name, str(error))
            if bad > self._loader.max_bad:
                raise DataError(
                    f"{bad} of {total} images cannot be read, the last one {shown}; mend them, or raise "
                    "--max_bad_fraction"
                )
