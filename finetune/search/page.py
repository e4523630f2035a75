"""The answers of a search as one HTML file with the pictures in it: nothing to fetch, so it can be sent to anyone."""

from __future__ import annotations

import html
from pathlib import Path

from data_tools.in_order.gallery import Gallery, open_gallery
from data_tools.pixels.decode import SOURCE_FORMATS, data_url, open_image, upright
from finetune.search.query import Answers, Hit, Query
from runtime.errors import DataError
from runtime.files import write_text

THUMBNAIL = 320
"""Pixels of a picture's longer side, at most."""

STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #667085; --line: #e3e7ee; --card: #fff; --page: #f6f7f9; --mark: #3b6fd4 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ef; --soft: #98a2b3; --line: #2c3442; --card: #171c25; --page: #0f131a; --mark: #6f9cf0 } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 1240px; padding: 28px 24px 60px; background: var(--page); color: var(--ink);
  font: 15px/1.45 system-ui, "Segoe UI", Roboto, sans-serif }
h1 { font-size: 20px; margin: 30px 0 12px; overflow-wrap: anywhere; display: flex; align-items: center; gap: 14px }
h1 img { height: 72px; border-radius: 6px }
.soft { color: var(--soft); font-size: 13px; overflow-wrap: anywhere }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(200px, 1fr)); gap: 14px }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 8px; overflow: hidden; font-size: 13px }
figure img, .gone { display: flex; width: 100%; height: 180px; object-fit: contain; background: var(--page) }
.gone { align-items: center; justify-content: center; padding: 12px; color: var(--soft); text-align: center }
figcaption { padding: 8px 12px 10px }
.line { display: flex; justify-content: space-between; font-variant-numeric: tabular-nums }
.bar { height: 3px; background: var(--mark); margin: 4px 0 6px; border-radius: 2px }
p { margin: 0 0 4px } code { font-size: 11px; color: var(--soft); overflow-wrap: anywhere }
"""


def write_results_page(answers: Answers, page: Path) -> None:
    """Write the page. A picture that is no longer where it was indexed is said to be gone, in its place."""
    source = answers.index.about["source"]
    gallery, told = None, ""
    if source["kind"] != "folder":  # whose pictures are found by their names
        try:
            gallery = open_gallery(source["place"])
            if gallery.fingerprint != source["fingerprint"]:
                gallery, told = None, f"{source['place']} is no longer what was indexed: no pictures"
        except DataError as error:
            told = str(error)
    parts = [f'<div class="soft">{html.escape(answers.description)}</div>']
    if told:
        parts.append(f'<div class="soft">{html.escape(told)}</div>')
    for query, hits in zip(answers.queries, answers.hits, strict=True):
        parts.append(f"<h1>{_asked(query)}</h1>")
        best = max((abs(hit.score) for hit in hits), default=1.0) or 1.0
        cells = [_cell(rank, hit, best, gallery, source) for rank, hit in enumerate(hits, start=1)]
        parts.append(f'<div class="grid">{"".join(cells)}</div>')
    title = answers.queries[0].text if len(answers.queries) == 1 else f"{len(answers.queries):,} queries"
    write_text(
        page,
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}: search</title><style>{STYLE}</style><body>{''.join(parts)}</body></html>\n",
    )


def _asked(query: Query) -> str:
    words = html.escape(query.text)
    return f'<img alt="" src="{_thumbnail(query.image.read_bytes())}">{words}' if query.image else words


def _cell(rank: int, hit: Hit, best: float, gallery: Gallery | None, source: dict[str, str]) -> str:
    said = "".join(f"<p>{html.escape(caption)}</p>" for caption in hit.captions[:2])
    share = max(0.0, hit.score / best)
    return (
        f"<figure>{_picture(hit, gallery, source)}<figcaption><div class=line><b>{rank}</b><span>{hit.score:.3f}</span></div>"
        f'<div class="bar" style="width:{share:.0%}"></div>{said}<code>{html.escape(hit.name)}</code></figcaption></figure>'
    )


def _picture(hit: Hit, gallery: Gallery | None, source: dict[str, str]) -> str:
    try:
        if source["kind"] == "folder":  # by its name: the folder may have got other files since
            raw = Path(source["place"], hit.name).read_bytes()
        elif gallery is not None:
            raw = gallery.read(hit.number)
        else:
            return '<div class="gone">no picture</div>'
        return f'<img alt="" loading="lazy" src="{_thumbnail(raw)}">'
    except (OSError, ValueError, DataError) as error:
        return f'<div class="gone">cannot be read: {html.escape(str(error))}</div>'


def _thumbnail(raw: bytes) -> str:
    return data_url(upright(open_image(raw, SOURCE_FORMATS, least=THUMBNAIL)), THUMBNAIL)
