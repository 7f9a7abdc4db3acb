"""Draws layout.png: which module imports which, from the front doors at the top to the errors at the bottom.

    uv run python docs/draw_layout.py

The table of layers and the reading of imports come from tests/test_layers.py. An arrow that others imply is left out:
main.py imports config.py too. Long arrows pass between the boxes of a layer as if they had a thin box there (Sugiyama
et al. 1981, Methods for Visual Understanding of Hierarchical System Structures).
"""

import ast
import random
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.path import Path as Curve

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from test_layers import LAYERS, LEVEL, ROOT, WINGS, imported, modules

DPI = 100
INCHES_WIDE = 12.0
CHARACTER, LINE = 0.094, 0.19  # inches: the pitch of FONT and the distance of its lines
FONT: dict[str, Any] = {"family": "DejaVu Sans Mono", "fontsize": 11.2, "va": "center_baseline"}
PAD, GAP, LAYER_GAP, LANE = 0.12, 0.3, 0.42, 0.12  # inches: inside boxes, between them, between layers; a thin box
LANE_GAP = 0.06  # inches beside an arrow that passes
KEY = 0.8  # inches for the key below
SWEEPS, ATTEMPTS = 60, 20
COLOURS = {"front door": "#f6d58e", "module": "#ffffff", "wing": "#b9dcf2"}  # after Okabe and Ito 2008, lightened


@dataclass
class Box:
    """A module or a wing, or the place where a long arrow crosses a layer. Sizes and places are in inches."""

    name: str
    kind: str
    columns: list[list[str]] = field(default_factory=list)
    x: float = 0.0  # of the middle
    top: float = 0.0
    bottom: float = 0.0

    @property
    def widths(self) -> list[float]:
        return [CHARACTER * max(map(len, column)) for column in self.columns]

    @property
    def width(self) -> float:
        if self.kind == "lane":
            return LANE
        inside = sum(self.widths) + 2 * PAD * (len(self.columns) - 1)
        return 2 * PAD + max(inside, CHARACTER * len(self.name))

    @property
    def height(self) -> float:
        lines = 1 + max((len(column) for column in self.columns), default=0)
        return 0.0 if self.kind == "lane" else LINE * lines + 1.6 * PAD


def read_imports() -> dict[str, set[str]]:
    """The modules and wings that each module or wing imports, without those that others imply."""
    imports: dict[str, set[str]] = defaultdict(set)
    for name, source in modules().items():
        place = name.partition(".")[0]
        imports[place] |= {other.partition(".")[0] for other in imported(source)} & {*LEVEL} - {place}

    def reached(name: str) -> set[str]:
        return imports[name].union(*map(reached, imports[name]))

    return {name: others - set().union(*map(reached, others)) for name, others in imports.items()}


def map_of(wing: str) -> list[list[str]]:
    """The headings of a wing's docstring, each with the modules below it."""
    docstring = ast.get_docstring(ast.parse((ROOT / wing / "__init__.py").read_text())) or ""
    columns: list[list[str]] = []
    for line in docstring.splitlines()[1:]:
        if line.startswith("    "):
            columns[-1].append(f"  {line.split()[0]}")
        elif line:
            columns.append([line])
    return columns


def make_box(name: str) -> Box:
    if name in WINGS:
        return Box(f"{name}/", "wing", map_of(name))
    is_door = '__name__ == "__main__"' in (ROOT / f"{name}.py").read_text()
    return Box(f"{name}.py", "front door" if is_door else "module")


def build() -> tuple[list[list[Box]], list[list[Box]]]:
    """The boxes of each layer, and each arrow as the boxes that it leads through."""
    boxes = {name: make_box(name) for name in LEVEL}
    layers = [[boxes[name] for name in sorted(names)] for names in LAYERS]
    arrows = []
    for name, others in read_imports().items():
        for other in sorted(others):
            lanes = [Box(other, "lane") for _ in range(LEVEL[name] + 1, LEVEL[other])]
            for level, lane in enumerate(lanes, LEVEL[name] + 1):
                layers[level].append(lane)
            arrows.append([boxes[name], *lanes, boxes[other]])
    return layers, arrows


def place(layers: list[list[Box]], arrows: list[list[Box]]) -> None:
    """Give every box its place, near what it is connected with, in the order with the fewest crossings of some."""
    orders = []
    for seed in range(ATTEMPTS):
        rng = random.Random(seed)
        for layer in layers:
            rng.shuffle(layer)
        settle(layers, arrows)
        orders.append((crossings(arrows), seed, [layer.copy() for layer in layers]))
    layers[:] = min(orders)[2]
    settle(layers, arrows, keep_order=True)
    top = 0.0
    for layer in layers:
        height = max(box.height for box in layer)
        for box in layer:
            margin = 0.0 if box.kind == "lane" else (height - box.height) / 2
            box.top, box.bottom = top - margin, top - height + margin
        top -= height + LAYER_GAP


def settle(layers: list[list[Box]], arrows: list[list[Box]], keep_order: bool = False) -> None:
    """Move every box, again and again, to the mean of its neighbours above and below, first freely, then in order."""
    neighbours: dict[int, list[Box]] = defaultdict(list)
    for arrow in arrows:
        for upper, lower in pairwise(arrow):
            neighbours[id(upper)].append(lower)
            neighbours[id(lower)].append(upper)
    for layer in layers:
        spread(layer, [float(number) for number in range(len(layer))])
    for sweep in range(SWEEPS):
        for layer in layers if sweep % 2 else layers[::-1]:
            wanted = {id(box): float(np.mean([other.x for other in neighbours[id(box)]])) for box in layer}
            if sweep < SWEEPS // 2 and not keep_order:
                layer.sort(key=lambda box: wanted[id(box)])
            spread(layer, [wanted[id(box)] for box in layer])


def crossings(arrows: list[list[Box]]) -> int:
    """How many pairs of arrows cross between two layers."""
    parts: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for arrow in arrows:
        for level, (upper, lower) in enumerate(pairwise(arrow), LEVEL[arrow[0].name.rstrip("/").removesuffix(".py")]):
            parts[level].append((upper.x, lower.x))
    pairs = (pair for part in parts.values() for pair in combinations(part, 2))
    return sum((a[0] - b[0]) * (a[1] - b[1]) < 0 for a, b in pairs)


def spread(layer: list[Box], wanted: list[float]) -> None:
    """Place a layer's boxes in order and apart, as near to where they are wanted as that allows (least squares)."""
    room = [(left.width + right.width) / 2 + gap(left, right) for left, right in pairwise(layer)]
    offsets = np.cumsum([0.0, *room])
    pools: list[list[float]] = []  # boxes that touch, by where each wants the first one: pool adjacent violators
    for place in np.array(wanted) - offsets:
        pools.append([place])
        while len(pools) > 1 and np.mean(pools[-2]) >= np.mean(pools[-1]):
            pools[-2:] = [pools[-2] + pools[-1]]
    places = [float(np.mean(pool)) for pool in pools for _ in pool]
    for box, place, offset in zip(layer, places, offsets, strict=True):
        box.x = place + float(offset)


def gap(left: Box, right: Box) -> float:
    return LANE_GAP if "lane" in (left.kind, right.kind) else GAP


def draw(layers: list[list[Box]], arrows: list[list[Box]], path: Path) -> None:
    """Draw what `place` has placed."""
    every = [box for layer in layers for box in layer]
    left, right = min(box.x - box.width / 2 for box in every), max(box.x + box.width / 2 for box in every)
    bottom = min(box.bottom for box in every) - KEY
    margin = (INCHES_WIDE - (right - left)) / 2
    if margin < PAD:
        raise SystemExit(f"the layers are {right - left:.1f} inches wide, and the picture {INCHES_WIDE}")
    figure = Figure(figsize=(INCHES_WIDE, 2 * PAD - bottom))
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(left - margin, right + margin), ylim=(bottom - PAD, PAD))
    axes.axis("off")
    for start in every:
        own = [arrow for arrow in arrows if arrow[0] is start]
        for share, arrow in zip(shares(len(own)), sorted(own, key=lambda arrow: arrow[1].x), strict=True):
            others = sorted((other for other in arrows if other[-1] is arrow[-1]), key=lambda other: other[-2].x)
            end = arrow[-1].x + arrow[-1].width * list(shares(len(others)))[others.index(arrow)]
            line = curve(arrow, start.x + start.width * share, end)
            axes.add_patch(
                FancyArrowPatch(path=line, arrowstyle="-|>", mutation_scale=13, color="#444444", linewidth=1.1)
            )
    for box in every:
        if box.kind != "lane":
            draw_box(axes, box)
    for number, kind in enumerate(COLOURS):
        example = Box(kind, kind, x=left + 0.7 + 1.2 * number, top=bottom + KEY / 2)
        example.bottom = example.top - example.height
        draw_box(axes, example)
    figure.savefig(path, dpi=DPI, metadata={"Software": None})


def shares(count: int) -> np.ndarray:
    """Where arrows meet the edge of a box: fractions of its width, from its middle."""
    return (np.arange(count) - (count - 1) / 2) * 0.7 / max(1, count)


def curve(arrow: list[Box], start: float, end: float) -> Curve:
    """A line straight down through each layer, and bent between them."""
    points, codes = [(start, arrow[0].bottom)], [Curve.MOVETO]
    for lower in arrow[1:]:
        x, (before, y) = end if lower is arrow[-1] else lower.x, points[-1]
        middle = (y + lower.top) / 2
        points += [(before, middle), (x, middle), (x, lower.top)]
        codes += [Curve.CURVE4] * 3
        if lower is not arrow[-1]:
            points.append((x, lower.bottom))
            codes.append(Curve.LINETO)
    return Curve(points, codes)


def draw_box(axes: Axes, box: Box) -> None:
    left, right = box.x - box.width / 2, box.x + box.width / 2
    edge = 2.0 if box.kind == "front door" else 1.0
    frame: dict[str, Any] = {
        "boxstyle": f"round,pad=0,rounding_size={PAD / 2}",
        "linewidth": edge,
        "edgecolor": "black",
    }
    axes.add_patch(
        FancyBboxPatch((left, box.bottom), box.width, box.height, facecolor=COLOURS[box.kind], zorder=3, **frame)
    )
    y = box.top - 0.8 * PAD - LINE / 2
    axes.text(box.x, y, box.name, ha="center", fontweight="bold" if box.columns else "normal", zorder=4, **FONT)
    space = (right - left - sum(box.widths)) / (len(box.columns) + 1)
    for column, width in zip(box.columns, box.widths, strict=True):
        left += space
        for number, line in enumerate(column, 1):
            axes.text(left, y - LINE * number, line, ha="left", zorder=4, **FONT)
        left += width


def main() -> None:
    layers, arrows = build()
    place(layers, arrows)
    draw(layers, arrows, ROOT / "docs" / "layout.png")


if __name__ == "__main__":
    main()
