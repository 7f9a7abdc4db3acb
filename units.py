"""Figures as people read them: bytes, seconds, images a second."""


def as_size(count: float) -> str:
    """Bytes in MB or GB."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def as_rate(rate: float) -> str:
    """A number of images a second: 12,345, 123, 4.6 or 0.078."""
    return f"{rate:,.0f}" if rate >= 9.95 else f"{rate:.2g}"


def duration(seconds: float) -> str:
    """Seconds as 1.2s, 12s, 3m05s, 1h02m or 2d03h."""
    if seconds < 9.95:
        return f"{max(0.0, seconds):.1f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    for unit, size, smaller, small in (("d", 86400, "h", 3600), ("h", 3600, "m", 60), ("m", 60, "s", 1)):
        if whole >= size:
            return f"{whole // size}{unit}{whole % size // small:02}{smaller}"
    raise AssertionError(seconds)
