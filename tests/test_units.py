"""Figures for people have units that fit."""

import pytest

from units import as_rate, as_size, duration


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        *((-1, "0.0s"), (0.51, "0.5s"), (9.96, "10s"), (59.4, "59s"), (59.6, "1m00s"), (185, "3m05s")),
        *((3599.6, "1h00m"), (3723, "1h02m"), (86399.9, "1d00h"), (183600, "2d03h"), (10_000_000, "115d17h")),
    ],
)
def test_durations_are_short_and_name_their_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_slow_rate_is_not_told_as_0() -> None:
    assert [as_rate(rate) for rate in (12345.6, 9.96, 4.56, 0.078)] == ["12,346", "10", "4.6", "0.078"]


def test_bytes_are_told_in_mb_or_gb() -> None:
    assert [as_size(count) for count in (0, 1.5e6, 2_345_000_000)] == ["0.0 MB", "1.5 MB", "2.3 GB"]
