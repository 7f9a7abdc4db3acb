"""Line charts as SVG inside a page: told apart by dashes and marks as well as by colour, with the legend above."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pages.markup import Markup, tag, text

WIDTH, HEIGHT = 440, 260  # in units of the drawing, in which letters are 12 high
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 10, 38
MARKS = 24  # of a line at most; a longer one has some
STYLES = 8  # in page.css
LOG_FROM = 15.0  # times the smallest value that the largest is, from which an axis of losses is logarithmic
SHAPES = ("circle", "square", "triangle", "diamond", "down", "plus", "cross", "bar")
PATHS = {
    "circle": "M-3.2 0a3.2 3.2 0 1 0 6.4 0a3.2 3.2 0 1 0-6.4 0z",
    "square": "M-3-3h6v6h-6z",
    "triangle": "M0-4l3.8 6.6h-7.6z",
    "diamond": "M0-4.2l4.2 4.2-4.2 4.2-4.2-4.2z",
    "down": "M0 4l3.8-6.6h-7.6z",
    "plus": "M-1.2-4h2.4v2.8h2.8v2.4h-2.8v2.8h-2.4v-2.8h-2.8v-2.4h2.8z",
    "cross": "M-3.5-2l1.5-1.5 2 2 2-2 1.5 1.5-2 2 2 2-1.5 1.5-2-2-2 2-1.5-1.5 2-2z",
    "bar": "M-1.5-4.5h3v9h-3z",
    "star": "M0-8l2 5.5h5.8l-4.6 3.6 1.7 5.6L0 3.4l-4.9 3.3 1.7-5.6-4.6-3.6h5.8z",
}


@dataclass(frozen=True)
class Line:
    """A line of a chart; `style` is its number in the page. `plain` and `faint` ones have no marks, `best` a star."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    style: int
    faint: bool = False
    plain: bool = False
    best: tuple[float, float] | None = None


def chart(title: str, lines: Sequence[Line], x_label: str, y_label: str, logarithmic: bool = False) -> Markup:
    """A chart with its title and legend. Values that are not finite are left out; faint lines may leave the frame.

    With `logarithmic`, the y axis is so where the values differ much.
    """
    drawn = [(line, [(x, y) for x, y in zip(line.x, line.y, strict=True) if math.isfinite(y)]) for line in lines]
    framed = [y for line, points in drawn if not line.faint for _, y in points]
    framed = framed or [y for _, points in drawn for _, y in points]
    across = [x for _, points in drawn for x, _ in points]
    if not framed:
        return tag("figure", tag("figcaption", tag("strong", title)), tag("p", "No finite value yet."), class_="chart")
    log = logarithmic and min(framed) > 0 and max(framed) > LOG_FROM * min(framed)
    left, right = min(across), max(across)
    right += (right == left) * 1.0
    if log:
        low, high = min(framed) / 1.3, max(framed) * 1.3
        scale: Callable[[float], float] = lambda y: math.log(max(y, 1e-30))
        y_ticks = log_ticks(low, high)
    else:
        y_ticks = ticks(
            min(0.0, *framed) if min(framed) < 0.6 * max(framed) or min(framed) == max(framed) else min(framed),
            max(framed),
        )
        low, high = min(y_ticks[0], *framed), max(y_ticks[-1], *framed)
        scale = lambda y: y
    place = lambda x, y: (
        LEFT + (WIDTH - LEFT - RIGHT) * (x - left) / (right - left),
        HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (scale(y) - scale(low)) / (scale(high) - scale(low)),
    )
    inside = [*_axes(ticks(left, right, whole=True), y_ticks, place, (left, right, low)), _label(x_label)]
    inside += [_draw(line, [(x, min(max(y, low), high)) for x, y in points], place) for line, points in drawn]
    picture = tag("svg", *inside, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=f"{title}: {y_label}")
    keys = (tag("li", _swatch(line), line.name) for line in lines)
    unit = f"{y_label}{', logarithmic' if log else ''}"
    caption = tag("figcaption", tag("strong", title), " ", tag("small", unit), tag("ul", *keys))
    return tag("figure", caption, picture, class_="chart")


def _axes(
    x_ticks: Sequence[float],
    y_ticks: Sequence[float],
    place: Callable[[float, float], tuple[float, float]],
    corner: tuple[float, float, float],
) -> list[Markup]:
    left, right, low = corner
    parts = []
    for y in y_ticks:
        _, at = place(left, y)
        parts.append(Markup(f'<path class="grid" d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}"/>'))
        parts.append(tag("text", number(y), x=LEFT - 6, y=f"{at + 4:.1f}", text_anchor="end"))
    for x in x_ticks:
        if left <= x <= right:
            at, _ = place(x, low)
            parts.append(tag("text", number(x), x=f"{at:.1f}", y=HEIGHT - BOTTOM + 16, text_anchor="middle"))
    return parts


def _label(told: str) -> Markup:
    return tag("text", told, x=(LEFT + WIDTH - RIGHT) // 2, y=HEIGHT - 5, text_anchor="middle")


def _draw(
    line: Line, points: list[tuple[float, float]], place: Callable[[float, float], tuple[float, float]]
) -> Markup:
    at = [place(x, y) for x, y in points]
    style = line.style % STYLES
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
    parts = [Markup(f'<polyline points="{path}"/>')]
    if not (line.faint or line.plain):
        every = max(1, -(-len(at) // MARKS))
        for (x, y), (right, up) in list(zip(at, points, strict=True))[::-1][::every][::-1]:
            told = tag("title", f"{line.name}: {number(up)} at {number(right)}")
            mark = f"translate({x:.1f} {y:.1f})"
            parts.append(tag("path", told, d=PATHS[SHAPES[style]], transform=mark))
    if line.best is not None:
        x, y = place(*line.best)
        told = tag("title", f"{line.name}, best: {number(line.best[1])} at {number(line.best[0])}")
        parts.append(tag("path", told, class_="best", d=PATHS["star"], transform=f"translate({x:.1f} {y:.1f})"))
    return tag("g", *parts, class_=f"s{style}{' faint' if line.faint else ''}")


def _swatch(line: Line) -> Markup:
    style = line.style % STYLES
    mark = "" if line.faint or line.plain else f'<path d="{PATHS[SHAPES[style]]}" transform="translate(14 6)"/>'
    inside = Markup(f'<polyline points="0,6 28,6"/>{mark}')
    name = f"s{style}{' faint' if line.faint else ''}"
    return tag("svg", tag("g", inside, class_=name), viewBox="0 0 28 12", class_="swatch", aria_hidden="true")


def number(value: float) -> str:
    """A number with at most four digits that matter."""
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return text(f"{value:.3g}")


def ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """Some five round numbers from at most `low` to at least `high`; with `whole`, integers from within."""
    high = high if high > low else low + (abs(low) or 1.0)
    raw = (high - low) / 5
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= raw * 0.999)
    if whole:
        step = max(1.0, step)
        first, last = math.ceil(low / step), math.floor(high / step)
    else:
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5, 10 ... or, over many decades, powers of ten."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if len(decades) <= 4 else (1,)
    every = max(1, len(decades) // 8)
    return [f * 10.0**decade for decade in decades[::every] for f in factors if low <= f * 10.0**decade <= high]
