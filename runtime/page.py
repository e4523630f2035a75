"""The shell of every HTML page: one file that fetches nothing, follows the reader's dark mode and fits a narrow screen.

    parts = [f"<h1>{escape(name)}</h1>", render_table([("images", 1200), ("captions", 6000)])]
    write_page(Path("page.html"), f"{name}: shards", parts, style=".chart { padding: 12px }")

The caller writes the body as pieces of HTML and passes every text from outside through `escape`. The shell brings the
document head and a base style. A page's own `style` comes after it and takes its colours from the variables:

    --ink text, --soft secondary text, --line borders, --card surfaces, --page background, --mark bars and other accents

Classes of the base style: `soft` (small secondary text), `note` (a highlighted remark), `grid` (cards side by side, as many as
fit; a page sets `--cell`, the least width of one) and `card` (a bordered surface; `figure` and `table` are cards already).
"""

from __future__ import annotations

import html
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from runtime.files import write_text

# Dark colours are for the screen alone: paper is white. `min(100%, …)` lets a column shrink to a screen that is narrower than a cell. A table that is too wide scrolls by itself.
STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #667085; --line: #e3e7ee; --card: #fff; --page: #f6f7f9;
  --mark: #3b6fd4; --note: #fff6d6; --cell: 200px }
@media screen and (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ef; --soft: #98a2b3; --line: #2c3442; --card: #171c25; --page: #0f131a; --mark: #6f9cf0; --note: #3a3216 } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 1240px; padding: 28px 24px 60px; background: var(--page); color: var(--ink);
  font: 15px/1.45 system-ui, "Segoe UI", Roboto, sans-serif }
h1 { font-size: 24px; margin: 0 0 2px; overflow-wrap: anywhere }
h2 { font-size: 16px; margin: 34px 0 12px; overflow-wrap: anywhere }
img { max-width: 100% }
figure, table, .card { background: var(--card); border: 1px solid var(--line); border-radius: 8px }
figure { margin: 0 }
code { font-size: 11px; color: var(--soft); overflow-wrap: anywhere }
table { border-collapse: collapse; border-spacing: 0; display: block; width: fit-content; max-width: 100%; overflow-x: auto }
td, th { padding: 6px 14px; text-align: left; border-top: 1px solid var(--line); font-weight: 400; vertical-align: top }
tr:first-child > * { border-top: 0 } th { color: var(--soft) } td.number { text-align: right; font-variant-numeric: tabular-nums }
.soft { color: var(--soft); font-size: 13px; overflow-wrap: anywhere }
.note { background: var(--note); padding: 10px 14px; border-radius: 8px }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, var(--cell)), 1fr)); gap: 14px }
pre { padding: 10px 14px; overflow-x: auto; font-size: 12px }
@media (max-width: 640px) { body { padding: 16px 12px 40px } td, th { padding: 6px 8px } }
@media print { :root { --page: #fff } body { max-width: none; padding: 0; font-size: 11pt } h1, h2 { break-after: avoid } figure, .card, tr { break-inside: avoid } }
"""


def escape(value: object) -> str:
    """Return a value's text so that HTML shows it as it is, between tags and inside a quoted attribute."""
    return html.escape(str(value))


def render_table(rows: Iterable[tuple[Any, Any]]) -> str:
    """Return a table of two columns, a name and its value, as HTML. Both are escaped."""
    cells = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows)
    return f"<table>{cells}</table>"


def render_page(title: str, parts: Iterable[str], style: str = "") -> str:
    """Return a whole HTML document.

    Args:
        title: plain text for the browser's tab; it is escaped here.
        parts: the body, piece by piece, as HTML.
        style: CSS of this page alone, after the base style.
    """
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}{style}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def write_page(path: Path, title: str, parts: Iterable[str], style: str = "") -> None:
    """Write a whole HTML document, complete or not at all; see `render_page`.

    Raises:
        LigatureError: the file cannot be written.
    """
    write_text(path, render_page(title, parts, style))
