"""A fixture for the test modules that import it: most of the time of a short run goes to the pixels of its pictures."""

from collections.abc import Iterator
from typing import Any, BinaryIO

import pytest
from matplotlib.figure import Figure


@pytest.fixture(scope="module", autouse=True)
def unrendered() -> Iterator[None]:
    """Runs draw and write their pictures, but matplotlib does not turn them into pixels."""

    def save(figure: Figure, file: BinaryIO, **options: Any) -> None:
        file.write(b"no pixels")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", save)
        yield
