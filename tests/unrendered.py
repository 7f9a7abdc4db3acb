"""Most of the time of a short run goes to the pixels of its pictures; a test module does without by this fixture."""

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
