"""Text, tables and the frame of a page as HTML. All text is escaped here.

page.css and page.js are put into every page, which loads nothing else.
"""

import base64
import html
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from errors import printable

HERE = Path(__file__).parent
NARROW = 900  # pixels of a picture that is legible on a phone
KEPT_AS_PNG = 150_000  # bytes of a picture, beyond which a JPEG takes its place
LARGEST = 450_000  # bytes of that, for which its quality is lowered as far as QUALITIES go
QUALITIES = (82, 65, 45, 25)


class Markup(str):
    """Text that is HTML already."""


def text(value: Any) -> Markup:
    """Any value as HTML: escaped, unless it is HTML already, and with escapes for what cannot be printed."""
    return value if isinstance(value, Markup) else Markup(html.escape(printable(str(value))))


def tag(name: str, *inside: Any, **attributes: Any) -> Markup:
    """An element. Of an attribute's name, a last _ is dropped and other ones become hyphens; None leaves it out."""
    told = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{text(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{name}{told}>{''.join(map(text, inside))}</{name}>")


def lines(parts: Iterable[Any]) -> Markup:
    return Markup("\n".join(map(text, parts)))


def section(title: str, *inside: Any) -> Markup:
    """A part of the page that its navigation leads to."""
    return tag("section", tag("h2", title), lines(inside), id=anchor(title))


def anchor(title: str) -> str:
    return title.lower().replace(" ", "-")


def table(head: Sequence[Any], rows: Iterable[Sequence[Any]], sorts: bool = False, filters: str = "") -> Markup:
    """A table that scrolls in itself. Numbers are set right; `sorts` by a click, `filters` by the named first column.

    A cell is a value, or a pair of what is shown and the number that it is sorted by.
    """
    headings = (tag("th", tag("button", name, type="button") if sorts else name, scope="col") for name in head)
    body = (tag("tr", *map(_cell, row)) for row in rows)
    result = tag(
        "table", tag("thead", tag("tr", *headings)), tag("tbody", lines(body)), class_="sorts" if sorts else None
    )
    result = tag("div", result, class_="scrolls", tabindex="0")
    if filters:
        told = Markup(f'<input type="search" placeholder="{text(filters)}" aria-label="{text(filters)}">')
        result = tag("div", tag("p", told, tag("output", "")), result, class_="filters")
    return result


def _cell(value: Any) -> Markup:
    shown, key = value if isinstance(value, tuple) else (value, value)
    is_number = isinstance(key, int | float)
    return tag(
        "td", shown, class_="number" if is_number else None, data_key=key if is_number and shown != key else None
    )


def cards(pairs: Iterable[tuple[str, str]]) -> Markup:
    """Figures in a row, each a name and a value."""
    return tag("dl", *(tag("div", tag("dt", name), tag("dd", value)) for name, value in pairs), class_="cards")


def details(title: str, *inside: Any) -> Markup:
    """What is shown only when asked for."""
    return tag("details", tag("summary", title), *inside)


def command(line: str, why: str) -> Markup:
    """A command line; a click selects it."""
    return tag("div", tag("p", why), tag("pre", tag("code", line)), class_="command")


def picture(path: Path, alt: str) -> Markup:
    """A PNG file inside the page, nothing if there is none; one of many bytes as JPEG. A phone scrolls a wide one."""
    if not path.is_file():
        return Markup()
    content, kind = path.read_bytes(), "png"
    is_wide = int.from_bytes(content[16:20], "big") > NARROW
    if len(content) > KEPT_AS_PNG:
        content, kind = _as_jpeg(content), "jpeg"
    source = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    image = Markup(f'<img alt="{text(alt)}" src="{source}">')
    return tag("figure", image, class_="picture wide" if is_wide else "picture")


def _as_jpeg(content: bytes) -> bytes:
    with Image.open(io.BytesIO(content)) as image:
        pixels = image.convert("RGB")
    result = b""
    for quality in QUALITIES:
        smaller = io.BytesIO()
        pixels.save(smaller, "JPEG", quality=quality, subsampling=0)
        result = smaller.getvalue()
        if len(result) <= LARGEST:
            break
    return result


def page(title: str, subtitle: Any, sections: Sequence[tuple[str, Sequence[Any]]]) -> bytes:
    """A whole page of named sections."""
    links = (tag("a", name, href=f"#{anchor(name)}") for name, _ in sections)
    head = (
        Markup('<!doctype html>\n<html lang="en">\n<meta charset="utf-8">'),
        Markup('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        Markup('<meta name="color-scheme" content="light dark">'),
        tag("title", title),
        Markup(f"<style>{(HERE / 'page.css').read_text(encoding='utf-8')}</style>"),
    )
    body = tag("header", tag("h1", title), tag("p", subtitle), tag("nav", *links))
    main = tag("main", *(section(name, *inside) for name, inside in sections))
    script = Markup(f"<script>{(HERE / 'page.js').read_text(encoding='utf-8')}</script>\n</html>\n")
    return lines([*head, body, main, script]).encode(errors="backslashreplace")
