"""A page of flips: captions whose image one model finds first and another does not (VLDeformer's figure 4)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.in_order.collection import Collection, open_collection
from data_tools.pixels.decode import data_url
from finetune.report.image_cards import STYLE, THUMBNAIL, card_html, picture_html
from retrieval.protocols import folds_of
from retrieval.records import SETTING, read_outcome, read_record
from runtime.errors import DataError, RecipeError
from runtime.page import escape, write_page

TOP = 5
"""Images shown of the model that is wrong."""
FLIPS_STYLE = "@media (min-width: 641px) { .grid { --cell: 180px } }"
"""On a wide screen the best five and the right image fit one row."""


@dataclass
class Comparison:
    """Two score records of the same captions and images, with their scores."""

    records: list[dict[str, Any]]
    collection: Collection
    scores: list[np.ndarray]
    """Of each record, (captions, images)."""
    better_images: list[np.ndarray]
    """Of each record, the number of wrong images that each caption ranks before or beside the right one, (captions,)."""


def write_flips_page(first: Path, second: Path, data: str, images: str, page: Path, count: int = 24) -> str:
    """Write a page of the captions that the first model answers right and the second wrong, the worst errors first.

    Args:
        first: score record evaluated with `save_scores`.
        second: another one, of the same data and one gallery.
        data: the shard folder or caption file that both were scored on.
        images: folder or tar of a caption file's images, else empty.
        page: the file to write.
        count: captions on the page at most.

    Returns:
        One line about the page.

    Raises:
        RecipeError: the records do not belong together, or not to the data.
        DataError: scores are missing, or an image cannot be read.
    """
    comparison = _read_comparison(first, second, data, images)
    ours, theirs = comparison.better_images
    flipped = np.flatnonzero((ours == 0) & (theirs > 0))
    shown = flipped[np.argsort(-theirs[flipped], kind="stable")][:count]
    title = f"{comparison.records[0]['head']} right, {comparison.records[1]['head']} wrong"
    parts = [f"<h1>{escape(title)}</h1>", _counts_html(comparison)]
    parts += [_caption_html(comparison, caption) for caption in shown.tolist()]
    write_page(page, title, parts, STYLE + FLIPS_STYLE)
    return f"{page}: {len(shown):,} of {len(flipped):,} captions: {title}"


def _read_comparison(first: Path, second: Path, data: str, images: str) -> Comparison:
    """Read two records, their scores and their data; refuse what does not belong together."""
    records = [read_record(path) for path in (first, second)]
    for key in SETTING:
        if records[0][key] != records[1][key]:
            raise RecipeError(f"{first} and {second} differ in {key}: {records[0][key]} and {records[1][key]}")
    if len(np.unique(folds_of(records[0]["protocol"], records[0]["images"]))) > 1:
        raise RecipeError(
            f"{first} is of several galleries ({records[0]['protocol']}); evaluate both with --protocol full"
        )
    scores = [_read_scores(path) for path in (first, second)]
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
    better = [count_better_images(matrix, collection.caption_image) for matrix in scores]
    return Comparison(records, collection, scores, better)


def count_better_images(scores: np.ndarray, caption_image: np.ndarray) -> np.ndarray:
    """Count the other images that score as high as the right one or higher, (captions,).

    Args:
        scores: (captions, images).
        caption_image: each caption's right image, (captions,).
    """
    right = scores[np.arange(len(scores)), caption_image]
    return (scores >= right[:, None]).sum(1) - 1


def _read_scores(record: Path) -> np.ndarray:
    """Return the scores that a record ranks each caption's images by, (captions, images)."""
    path = record.with_name(f"{record.stem}.scores.npz")
    if not path.is_file():
        raise DataError(f"no {path}; evaluate {record} again with --save_scores true")
    with np.load(path) as arrays:
        return arrays["text_to_image"]


def _counts_html(comparison: Comparison) -> str:
    """Return what was compared, and a table of the number of captions that each model answers right."""
    first, second = (better == 0 for better in comparison.better_images)
    rows = {
        "both right": first & second,
        "first alone": first & ~second,
        "second alone": ~first & second,
        "neither": ~first & ~second,
    }
    cells = "".join(
        f"<tr><th>{name}<td class=number>{int(chosen.sum()):,}<td class=number>{100 * chosen.mean():.1f} %"
        for name, chosen in rows.items()
    )
    record, second_record = comparison.records
    description = (
        f"{record['dataset']} {record['split']}: each caption's image among {record['images']:,}. "
        f"First: {record['head']} ({record['training']}); second: {second_record['head']} ({second_record['training']}). "
        f"Below, captions that the first alone gets right: the second's best {TOP}, the right image framed."
    )
    return f"<p class=soft>{escape(description)}</p><table>{cells}</table>"


def _caption_html(comparison: Comparison, caption: int) -> str:
    """Return a caption and the second model's best images; the right image follows where it is not among them."""
    collection = comparison.collection
    right = int(collection.caption_image[caption])
    best = np.argsort(-comparison.scores[1][caption], kind="stable")[:TOP].tolist()
    ranks = {image: rank for rank, image in enumerate(best, start=1)}
    ranks.setdefault(right, int(comparison.better_images[1][caption]) + 1)
    cards = [_card(collection, image, rank, image == right) for image, rank in ranks.items()]
    return f"<h2>{escape(collection.captions[caption])}</h2><div class=grid>{''.join(cards)}</div>"


def _card(collection: Collection, number: int, rank: int, right: bool) -> str:
    image = collection[number]
    if isinstance(image, DataError):
        raise image
    own_caption = collection.captions[int(np.searchsorted(collection.caption_image, number))]
    return card_html(picture_html(data_url(image, THUMBNAIL)), rank, [own_caption], right=right)
