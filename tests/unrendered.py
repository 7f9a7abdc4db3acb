"""Most of the time of a short run would go to the pixels of its pictures.

A module whose tests look at pictures has a fixture of the same name that does nothing.
"""

from collections.abc import Iterator
from typing import Any, BinaryIO

import pytest
from matplotlib.figure import Figure


def save_without_pixels(figure: Figure, file: BinaryIO, **options: Any) -> None:
    """In place of `Figure.savefig`."""
    file.write(b"no pixels")


@pytest.fixture(scope="module", autouse=True)
def unrendered() -> Iterator[None]:
    """Runs draw and write their pictures, but matplotlib does not turn them into pixels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", save_without_pixels)
        yield
