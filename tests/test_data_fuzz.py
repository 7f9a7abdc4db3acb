"""Some of the sets that data_fuzz.py draws; with --draws 500 it goes through more."""

from pathlib import Path

import pytest
from data_fuzz import check


@pytest.mark.parametrize("first", range(0, 90, 30))
def test_sets_drawn_at_random_are_read_right(first: int, tmp_path: Path) -> None:
    for seed in range(first, first + 30):
        (tmp_path / str(seed)).mkdir()
        check(seed, tmp_path / str(seed))
