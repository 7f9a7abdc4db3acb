"""How fast this machine decodes photographs and trains on them, measured in a few seconds."""

import contextlib
import io
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from time import perf_counter

import cv2
import numpy as np
import torch

from config import Config
from errors import UserError
from preprocess import train_transform
from stream.decode_pool import Job, WorkerDied, pack, shared_pool
from stream.images import decode_into
from stream.loader import SAMPLES_PER_TASK
from stream.retry import first_line
from stream.shared import in_memory
from training.state import snapshot_bytes
from training.step import Training, build_training, train_step

DECODE_SECONDS = 5.0
STEP_SECONDS = 3.0
SLOW_SECONDS = 8.0  # of a first step, after which there is no second
CLASSES = 1000
PHOTOGRAPHS = 16
WIDTH, HEIGHT = 500, 375  # pixels, the most common size in ImageNet
JPEG_QUALITY = 90
OCTAVES = 9
BATCH = {"cpu": 2}  # images of a step, as slow ones take seconds for each
USUAL_BATCH = 64


@dataclass(frozen=True)
class Speed:
    """Images a second, None where something failed: decoded and cropped by `processes` ones, and trained on in steps of
    `batch` images. Bytes of a snapshot. `problem` is what failed.
    """

    processes: int
    decoded: float | None
    batch: int
    trained: float | None
    snapshot: int | None
    problem: str | None = None


def measure(config: Config, device: torch.device) -> Speed:
    """Decode and train for a few seconds, one after the other."""
    batch = min(config.batch_size, BATCH.get(device.type, USUAL_BATCH))
    decoded, trained, snapshot, problem = None, None, None, None
    try:
        decoded = decoding_rate(config)
    except (WorkerDied, threading.BrokenBarrierError):
        problem = "a decoding process died, for lack of memory perhaps; use fewer --num_workers"
    try:
        trained, snapshot = training_rate(config, device, batch)
    except (UserError, RuntimeError) as error:  # also of a GPU for which PyTorch has no kernels
        problem = f"a step of training fails: {first_line(error)}"
    return Speed(config.num_workers, decoded, batch, trained, snapshot, problem)


def draw_photograph(number: int) -> bytes:
    """A JPEG of WIDTH by HEIGHT pixels and about 100 kB, with detail of every size, as photographs have."""
    rng = np.random.default_rng(number)
    pixels = np.full((HEIGHT, WIDTH, 3), 128, np.float32)
    for octave in range(1, OCTAVES + 1):
        grain = rng.normal(0, 1, (max(2, HEIGHT * 2**octave // 512), max(2, WIDTH * 2**octave // 512), 3))
        detail = cv2.resize(grain.astype(np.float32), (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
        pixels += np.asarray(detail, np.float32) * (80 / 1.25**octave)
    encoded = cv2.imencode(".jpg", pixels.clip(0, 255).astype(np.uint8), [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1]
    return bytes(encoded)


def decoding_rate(config: Config) -> float:
    """Photographs a second that --num_workers processes decode and crop, in another epoch than the first.

    Raises WorkerDied.
    """
    transform, size, threads = train_transform(config), config.image_size, max(1, config.num_workers)
    photographs = [draw_photograph(number) for number in range(PHOTOGRAPHS)]
    pool, packed = (shared_pool(threads), pack(transform)) if config.num_workers else (None, b"")
    ready = threading.Barrier(threads)

    def decode_some(number: int, rounds: int) -> None:
        shape = (SAMPLES_PER_TASK, size, size, 3)
        out = np.empty(shape, np.uint8) if pool is None else pool.memory.array(shape)
        chosen = [photographs[(number + rounds + place) % PHOTOGRAPHS] for place in range(SAMPLES_PER_TASK)]
        jobs = [Job(image, (number, rounds, place), sound=True) for place, image in enumerate(chosen)]
        if pool is not None:
            pool.run(packed, jobs, out)
            return
        for row, job in zip(out, jobs, strict=True):
            decode_into(row, in_memory(job.image), transform, job.seed, job.sound)

    def decode(number: int) -> float:
        try:
            decode_some(number, 0)
            ready.wait()  # until all processes have started
        except BaseException:
            ready.abort()
            raise
        began, rounds = perf_counter(), 0
        while not rounds or perf_counter() < began + DECODE_SECONDS:
            rounds += 1
            decode_some(number, rounds)
        return rounds * SAMPLES_PER_TASK / (perf_counter() - began)

    with ThreadPoolExecutor(threads) as executor:
        return sum(executor.map(decode, range(threads)))


def training_rate(config: Config, device: torch.device, batch: int) -> tuple[float, int]:
    """Images a second that the device trains on in steps of `batch` black ones, and the bytes of a snapshot.

    Raises UserError, and RuntimeError where the device cannot do it.
    """
    amp = config.amp and device.type != "cpu"  # where it may be emulated, at many seconds an image
    plain = replace(config, compile=False, class_weights=None, accumulate_steps=1, amp=amp)
    with contextlib.redirect_stdout(io.StringIO()):  # which tells of the model
        training = build_training(plain, CLASSES, device)
    images = torch.zeros((batch, config.image_size, config.image_size, 3), dtype=torch.uint8, device=device)
    labels = torch.zeros(batch, dtype=torch.int64, device=device)
    training.model.train()
    rates: list[float] = []
    began = perf_counter()
    while len(rates) < 2 or perf_counter() - began < STEP_SECONDS:
        rates.append(batch / _step_seconds(training, images, labels))
        if len(rates) == 1 and perf_counter() - began > SLOW_SECONDS:
            break
    snapshot = snapshot_bytes(training.model, training.optimizer, training.average)
    return float(np.median(rates[1:] or rates)), snapshot


def _step_seconds(training: Training, images: torch.Tensor, labels: torch.Tensor) -> float:
    began = perf_counter()
    train_step(training, images, labels)
    if training.device.type != "cpu":
        torch.accelerator.synchronize(training.device)
    return perf_counter() - began
