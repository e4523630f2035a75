"""The answers of a search as one HTML file that holds the pictures, so that it can be sent to anyone.

Tested in tests/finetune/search/test_query.py.
"""

from __future__ import annotations

from pathlib import Path

from data_tools.in_order.gallery import Gallery, open_gallery
from data_tools.pixels.decode import SOURCE_FORMATS, data_url, open_image, upright
from finetune.report.image_cards import STYLE, THUMBNAIL, card_html, missing_html, picture_html
from finetune.search.query import Answers, Hit, Query
from runtime.errors import DataError
from runtime.page import escape, write_page

CAPTIONS = 2
"""Captions shown of each image."""
QUERY_STYLE = (
    "h2 { display: flex; align-items: center; gap: 14px; font-size: 20px } h2 img { height: 72px; border-radius: 6px }"
)


def write_results_page(answers: Answers, page: Path) -> None:
    """Write the answers as a page. A card says so where a picture can no longer be read.

    Raises:
        LigatureError: the page cannot be written, or the picture of a query cannot be read.
    """
    source = answers.index.about["source"]
    gallery, problem = _open_source(source)
    title = answers.queries[0].text if len(answers.queries) == 1 else f"{len(answers.queries):,} queries"
    parts = [f"<h1>Search</h1><div class=soft>{escape(answers.description)}</div>"]
    if problem:
        parts.append(f"<p class=note>{escape(problem)}</p>")
    for query, hits in zip(answers.queries, answers.hits, strict=True):
        best = max((abs(hit.score) for hit in hits), default=1.0) or 1.0
        cards = [
            card_html(
                _hit_picture_html(hit, gallery, source),
                rank,
                hit.captions[:CAPTIONS],
                hit.score,
                max(0.0, hit.score / best),
                hit.name,
            )
            for rank, hit in enumerate(hits, start=1)
        ]
        parts.append(f"<h2>{_query_html(query)}</h2><div class=grid>{''.join(cards)}</div>")
    write_page(page, f"{title}: search", parts, STYLE + QUERY_STYLE)


def _open_source(source: dict[str, str]) -> tuple[Gallery | None, str]:
    """Open what was indexed; return it, or None and the reason. A folder needs no opening: its files have names."""
    if source["kind"] == "folder":
        return None, ""
    try:
        gallery = open_gallery(source["place"])
    except DataError as error:
        return None, str(error)
    if gallery.fingerprint != source["fingerprint"]:
        return None, f"{source['place']} has changed since it was indexed, so pictures are not shown"
    return gallery, ""


def _query_html(query: Query) -> str:
    words = f"<span>{escape(query.text)}</span>"
    return f'<img alt="" src="{_thumbnail_url(query.image.read_bytes())}">{words}' if query.image else words


def _hit_picture_html(hit: Hit, gallery: Gallery | None, source: dict[str, str]) -> str:
    try:
        if source["kind"] == "folder":  # by name: the folder may have other files by now, and so other numbers
            encoded = Path(source["place"], hit.name).read_bytes()
        elif gallery is not None:
            encoded = gallery.read(hit.number)
        else:
            return missing_html("no picture")
        return picture_html(_thumbnail_url(encoded))
    except (OSError, ValueError, DataError) as error:
        return missing_html(f"cannot be read: {error}")


def _thumbnail_url(encoded: bytes) -> str:
    return data_url(upright(open_image(encoded, SOURCE_FORMATS, least=THUMBNAIL)), THUMBNAIL)
