"""A transform that takes its time, in a module that a decoding process imports in a moment."""

import time

import numpy as np


class SlowTransform:
    """Gives the image back after so many seconds."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __call__(self, image: np.ndarray, seed: tuple[int, ...]) -> np.ndarray:
        time.sleep(self.seconds)
        return image
