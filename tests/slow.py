"""A transform that takes its time, in a module that a decoding process imports in a moment."""

import time

import numpy as np

from pictures import EncodedImage, decode


class SlowTransform:
    """Decodes, and takes so many seconds about it."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __call__(self, image: EncodedImage, seed: tuple[int, ...]) -> np.ndarray:
        time.sleep(self.seconds)
        return decode(image)
