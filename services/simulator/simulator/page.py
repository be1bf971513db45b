"""The HTML pages of result folders: one file each, pictures as data, no script, nothing loaded from elsewhere.

What a page links to lies beside it in the folder, so that a folder can be moved, sent and opened anywhere.
"""

import base64
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import quote

from fl_server.figures import Curve, draw_curves

STYLE: Final = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 62rem; padding: 0 1rem }
body { color: #1a1a1a; background: #fff; overflow-wrap: anywhere }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2rem }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1rem }
figure { margin: 0 } img { width: 100%; background: #fff } .square { max-width: 34rem }
.failed { border-left: .3rem solid #b3261e; padding-left: .7rem }
table { border-collapse: collapse; font-size: .9rem; overflow-wrap: normal }
td, th { padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #ddd }
td:first-child, th:first-child { text-align: left } .wide { overflow-x: auto }
@media (prefers-color-scheme: dark) {
  body { color: #e6e6e6; background: #16181c } td, th { border-color: #333 } a { color: #8ab4f8 }
}
"""


@dataclass(frozen=True)
class Link:
    """A text that leads to a file of the folder."""

    text: str
    path: str


def document(title: str, parts: Iterable[str]) -> str:
    """A whole page."""
    head = [
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>",
        f"<title>{text(title)}</title><style>{STYLE}</style>",
        f"<h1>{text(title)}</h1>",
    ]
    return "\n".join([*head, *(part for part in parts if part), "</html>\n"])


def heading(title: str) -> str:
    """Of a part of a page."""
    return f"<h2>{text(title)}</h2>"


def paragraph(*pieces: "str | Link", failed: bool = False) -> str:
    """A sentence, of text and links."""
    return f"<p{' class=failed' if failed else ''}>{''.join(map(cell, pieces))}</p>"


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table that scrolls by itself where the page is narrower."""
    head = "".join(f"<th>{text(name)}" for name in columns)
    body = "".join("<tr>" + "".join(f"<td>{cell(value)}" for value in row) for row in rows)
    return f"<div class=wide><table><tr>{head}{body}</table></div>"


def cell(value: object) -> str:
    """A number in four digits, a link, or a text."""
    if isinstance(value, Link):
        return f"<a href='{text(quote(value.path))}'>{text(value.text)}</a>"
    return text(f"{value:.4g}" if isinstance(value, float) else value)


def curves(panels: Mapping[str, Mapping[str, Curve]]) -> str:
    """Each panel a picture of its own, beside each other where there is room."""
    return (
        f"<div class=pictures>{''.join(_curves(name, found) for name, found in panels.items())}</div>" if panels else ""
    )


def _curves(name: str, found: Mapping[str, Curve]) -> str:
    drawn = io.BytesIO()
    draw_curves({name: found}, drawn)
    last = ", ".join(f"{label} {curve[-1][1]:.4g}" for label, curve in found.items())
    return _figure(drawn.getvalue(), f"curves of {name}; at the end: {last}")


def picture(path: Path, what: str) -> str:
    """A square PNG file of the folder; nothing where there is none."""
    return f"<div class=square>{_figure(path.read_bytes(), what)}</div>" if path.exists() else ""


def _figure(png: bytes, what: str) -> str:
    return f"<figure><img alt='{text(what)}' src='data:image/png;base64,{base64.b64encode(png).decode()}'></figure>"


def text(value: object) -> str:
    """Made harmless."""
    return html.escape(str(value), quote=True)
