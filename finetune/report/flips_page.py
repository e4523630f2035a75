"""Captions whose image one model finds first and another does not, as an HTML page with the pictures (VLDeformer's figure 4)."""

from __future__ import annotations

import html
from pathlib import Path

import numpy as np

from data_tools.in_order.collection import Collection, open_collection
from data_tools.pixels.decode import data_url
from finetune.search.page import STYLE, THUMBNAIL
from retrieval.protocols import folds_of
from retrieval.records import SETTING, read_outcome, read_record
from runtime.errors import DataError, RecipeError
from runtime.files import write_text

TOP = 5
"""Images shown of the model that is wrong."""
FRAME = "figure.right { border: 3px solid #2e9e5b } td, th { padding: 2px 14px 2px 0; text-align: left; font-weight: normal }"


def write_flips_page(first: Path, second: Path, data: str, images: str, page: Path, count: int = 24) -> str:
    """Write the page: captions that `first` answers right and `second` wrong, those first where it errs by most. -> a line about it.

    first, second: score records evaluated with `save_scores`, of the same data and one gallery. Raises RecipeError or DataError.
    """
    records = [read_record(path) for path in (first, second)]
    for key in SETTING:
        if records[0][key] != records[1][key]:
            raise RecipeError(f"{first} and {second} differ in {key}: {records[0][key]} and {records[1][key]}")
    if len(np.unique(folds_of(records[0]["protocol"], records[0]["images"]))) > 1:
        raise RecipeError(
            f"{first} is of several galleries ({records[0]['protocol']}); evaluate both with --protocol full"
        )
    scores = [_scores(path) for path in (first, second)]
    policy = str(records[0]["captions_per_image"])
    limit = int(policy.removeprefix("first ")) if policy.startswith("first ") else None
    collection = open_collection(data, limit, images, records[0]["split"])
    if scores[0].shape != scores[1].shape or scores[0].shape != (len(collection.captions), len(collection)):
        raise RecipeError(
            f"{data} holds {len(collection):,} images and {len(collection.captions):,} captions; the scores are of others"
        )
    outcome, keys = read_outcome(first, records[0])
    if not np.array_equal(outcome.caption_image, collection.caption_image):
        raise RecipeError(
            f"{data} holds its captions in another order than those scored; give the data that was scored"
        )
    if policy != "as the file has them" and keys != collection.keys:
        raise RecipeError(
            f"{data} holds other images than those scored: its first is {collection.keys[0]}, theirs {keys[0]}"
        )
    beaten = [count_better_images(one, collection.caption_image) for one in scores]
    flipped = np.flatnonzero((beaten[0] == 0) & (beaten[1] > 0))
    order = flipped[np.argsort(-beaten[1][flipped], kind="stable")][:count]
    parts = [_counts(records, beaten)]
    for caption in order.tolist():
        right = int(collection.caption_image[caption])
        best = np.argsort(-scores[1][caption], kind="stable")[:TOP].tolist()
        shown = [*best, right] if right not in best else best
        cells = [
            _cell(
                collection,
                image,
                1 + shown.index(image) if image in best else int(beaten[1][caption]) + 1,
                image == right,
            )
            for image in shown
        ]
        parts.append(f"<h1>{html.escape(collection.captions[caption])}</h1><div class=grid>{''.join(cells)}</div>")
    title = f"{records[0]['head']} right, {records[1]['head']} wrong"
    write_text(
        page,
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{STYLE}{FRAME}</style><body>{''.join(parts)}</body></html>\n",
    )
    return f"{page}: {len(order):,} of {len(flipped):,} captions: {title}"


def count_better_images(scores: np.ndarray, caption_image: np.ndarray) -> np.ndarray:
    """(captions, images) -> (captions,) how many other images score as high as the right one or higher."""
    right = scores[np.arange(len(scores)), caption_image]
    return (scores >= right[:, None]).sum(1) - 1


def _scores(record: Path) -> np.ndarray:
    """What images a record's captions were ranked by: (captions, images)."""
    path = record.with_name(f"{record.stem}.scores.npz")
    if not path.is_file():
        raise DataError(f"no {path}; evaluate {record} again with --save_scores true")
    with np.load(path) as held:
        return held["text_to_image"]


def _counts(records: list[dict], beaten: list[np.ndarray]) -> str:
    one, other = (ranks == 0 for ranks in beaten)
    rows = {
        "both right": one & other,
        "first alone": one & ~other,
        "second alone": ~one & other,
        "neither": ~one & ~other,
    }
    told = "".join(
        f"<tr><td>{name}<td>{int(which.sum()):,}<td>{100 * which.mean():.1f} %" for name, which in rows.items()
    )
    about = (
        f"{records[0]['dataset']} {records[0]['split']}: each caption's image among {records[0]['images']:,}. First: "
    )
    about += (
        f"{records[0]['head']} ({records[0]['training']}); second: {records[1]['head']} ({records[1]['training']}). "
    )
    about += f"Below, captions that the first alone gets right: the second's best {TOP}, the right image framed."
    return f'<p class="soft">{html.escape(about)}</p><table class="soft">{told}</table>'


def _cell(collection: Collection, number: int, rank: int, right: bool) -> str:
    picture = collection[number]
    if isinstance(picture, DataError):
        raise picture
    source = data_url(picture, THUMBNAIL)
    said = html.escape(collection.captions[int(np.searchsorted(collection.caption_image, number))])
    return (
        f'<figure{" class=right" if right else ""}><img alt="" loading="lazy" src="{source}"><figcaption><div class=line>'
        f"<b>{rank}</b></div><p>{said}</p></figcaption></figure>"
    )
