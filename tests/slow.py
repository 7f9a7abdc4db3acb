"""Transforms of the tests' own, in a module that a decoding process imports in a moment."""

import ctypes
import os
import signal
import time
from collections.abc import Sequence
from typing import Any
from unittest import mock

import numpy as np
from PIL.TgaImagePlugin import TgaImageFile

from stream.images import EncodedImage, decode


class SlowTransform:
    """Decodes, and takes so many seconds about it."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __call__(self, image: EncodedImage, seed: tuple[int, ...], sound: bool) -> np.ndarray:
        time.sleep(self.seconds)
        return decode(image)


class Deadly:
    """Decodes pixels, but those that are all 13: these end the process, or take an hour."""

    def __init__(self, how: str) -> None:
        self.how = how

    def __call__(self, image: EncodedImage, seed: tuple[int, ...], sound: bool) -> np.ndarray:
        pixels = decode(image)
        if (pixels == 13).all():
            if self.how == "crash":
                os.kill(os.getpid(), signal.SIGSEGV)
            if self.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            ctypes.PyDLL(None).sleep(3600)  # as a decoder that hangs does, with the interpreter's lock
        return pixels


def deadly_conversion(image: bytes | memoryview) -> bytes:
    """The number of the process that makes it and the image; 13 ends the process."""
    if image == b"13":
        os.kill(os.getpid(), signal.SIGKILL)
    return b"%d %b" % (os.getpid(), bytes(image))


def slow_conversion(image: bytes | memoryview) -> bytes:
    """Nothing, after as many seconds as the image says."""
    time.sleep(int(bytes(image)))
    return b""


def process_number(image: EncodedImage, seed: tuple[int, ...], sound: bool) -> np.ndarray:
    """A uint8 image (1, 4, 3) that starts with the number of the process that makes it."""
    made = np.zeros((1, 4, 3), np.uint8)
    made.reshape(-1)[:8].view("<u8")[:] = os.getpid()
    return made


def told_sound(image: EncodedImage, seed: tuple[int, ...], sound: bool) -> np.ndarray:
    """A uint8 image (1, 1, 3) of ones if the image is said to be sound, else of zeros."""
    decode(image)
    return np.full((1, 1, 3), sound, np.uint8)


def out_of_memory(image: EncodedImage, seed: tuple[int, ...], sound: bool) -> np.ndarray:
    """Decodes, and has no memory for it."""
    with mock.patch.object(TgaImageFile, "load", side_effect=MemoryError):
        return decode(image)


def mean_byte(image: EncodedImage, seed: tuple[int, ...], sound: bool) -> np.ndarray:
    """The mean of an image's bytes as its only pixel, (1, 1, 3)."""
    return np.full((1, 1, 3), np.frombuffer(image, np.uint8).mean().astype(np.uint8))


def run_in(pool: Any, transform: bytes, jobs: Sequence[Any], out: np.ndarray, *given_up: Any) -> list[Any]:
    """`pool.run` with an array of any memory."""
    shared = pool.memory.array(out.shape)
    shared[:] = out
    found = list(pool.run(transform, jobs, shared, *given_up))
    out[:] = shared
    return found
