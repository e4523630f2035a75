"""Ranked images on a page, as cards side by side: the pages of a search and of a comparison share them.

Tested in tests/finetune/search/test_query.py.
"""

from __future__ import annotations

from runtime.page import escape

THUMBNAIL = 320
"""Pixels of a picture's longer side, at most."""

STYLE = """
figure { overflow: hidden; font-size: 13px }
figure img, .missing { display: flex; width: 100%; height: 180px; object-fit: contain; background: var(--page) }
.missing { align-items: center; justify-content: center; padding: 12px; color: var(--soft); text-align: center; overflow-wrap: anywhere }
figcaption { padding: 8px 12px 10px; overflow-wrap: anywhere } figcaption p { margin: 0 0 4px }
.line { display: flex; justify-content: space-between; font-variant-numeric: tabular-nums }
.bar { height: 3px; background: var(--mark); margin: 4px 0 6px; border-radius: 2px }
figure.right { border: 3px solid #2e9e5b }
@media (max-width: 640px) { .grid { --cell: 150px } figure img, .missing { height: 140px } }
"""
"""CSS of the cards, for `runtime.page.write_page`."""


def card_html(
    picture: str,
    rank: int,
    captions: list[str],
    score: float | None = None,
    share: float = 0.0,
    name: str = "",
    right: bool = False,
) -> str:
    """Return one image as a card.

    Args:
        picture: HTML of `picture_html` or `missing_html`.
        rank: its rank, from 1.
        captions: texts below it.
        score: a figure beside the rank; None: neither a figure nor a bar.
        share: length of the bar under the score, 0 to 1.
        name: the image's name, below the captions.
        right: whether to frame it as the right answer.
    """
    figure = f"<span>{score:.3f}</span>" if score is not None else ""
    bar = f'<div class="bar" style="width:{share:.0%}"></div>' if score is not None else ""
    texts = "".join(f"<p>{escape(caption)}</p>" for caption in captions)
    code = f"<code>{escape(name)}</code>" if name else ""
    return (
        f"<figure{' class=right' if right else ''}>{picture}<figcaption><div class=line><b>{rank}</b>{figure}</div>"
        f"{bar}{texts}{code}</figcaption></figure>"
    )


def picture_html(url: str) -> str:
    """Return an image element. `url`: the picture's data URL."""
    return f'<img alt="" loading="lazy" src="{url}">'


def missing_html(reason: str) -> str:
    """Return what stands in for a picture that cannot be shown."""
    return f'<div class="missing">{escape(reason)}</div>'
