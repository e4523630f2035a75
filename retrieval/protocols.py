"""Protocols: which images are ranked against which captions, and which figures are reported. Each protocol is a row of `PROTOCOLS`.

A gallery is the set of items that a query is ranked against. A fold is a part of the images, with their captions, that is a
gallery of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from retrieval.metrics import Ranks, bootstrap_means, chance, interval, precision_at_r, rank_positives
from runtime.errors import LigatureError

RECALL_AT = (1, 5, 10)
RECALLS = tuple(f"R@{k}" for k in RECALL_AT)
DIRECTIONS = ("image_to_text", "text_to_image")
"""`image_to_text`: an image is the query and captions are the gallery; `text_to_image`: the other way round."""


@dataclass(frozen=True)
class Protocol:
    """One gallery of the whole set, or `folds` consecutive parts of it with averaged figures."""

    images: int | None
    """Number of images that the protocol is defined on; None: any number."""
    folds: int
    """Number of galleries."""
    about: str
    """The protocol in words."""


PROTOCOLS = {
    "full": Protocol(None, 1, "every image against every caption"),
    "coco_5k": Protocol(5000, 1, "the whole Karpathy test split of COCO"),
    "coco_1k": Protocol(5000, 5, "the same, the mean of five consecutive folds of 1,000 images"),
    "flickr30k_1k": Protocol(1000, 1, "Flickr30K's Karpathy test split"),
    "flickr8k_1k": Protocol(1000, 1, "Flickr8k's test or dev split"),
}


@dataclass(frozen=True)
class Outcome:
    """The result of every query, by which two records can be compared."""

    ranks: dict[str, Ranks]
    """By direction: of the images in order, and of the captions in order."""
    folds: np.ndarray
    """(images,) the fold of each image."""
    caption_image: np.ndarray
    """(captions,) the image of each caption."""


def folds_of(protocol: str, images: int) -> np.ndarray:
    """Return the fold (images,) of each image.

    Args:
        protocol: a name in `PROTOCOLS`.
        images: number of images.

    Raises:
        LigatureError: the protocol is unknown or not defined on that number of images.
    """
    definition = PROTOCOLS.get(protocol)
    if definition is None:
        raise LigatureError(f"no protocol {protocol!r}; there is {', '.join(PROTOCOLS)}")
    if definition.images is not None and images != definition.images:
        raise LigatureError(
            f"protocol {protocol} is defined on {definition.images:,} images, not on {images:,}; use the whole test split, or "
            "protocol full"
        )
    if images % definition.folds:
        raise LigatureError(f"protocol {protocol}: {images:,} images do not divide into {definition.folds} folds")
    return np.arange(images) // (images // definition.folds)


def measure(
    image_to_text: np.ndarray,
    text_to_image: np.ndarray,
    caption_image: np.ndarray,
    *,
    protocol: str = "full",
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[dict[str, Any], Outcome]:
    """Measure two score matrices by a protocol.

    An image is a hit at K when any of its captions is among its first K. A caption is a hit at K when its image is among its first K.

    Args:
        image_to_text: scores `(images, captions)`; a row ranks the captions for one image.
        text_to_image: scores `(captions, images)`; a row ranks the images for one caption. For a dual encoder it is the
            transpose of `image_to_text`; after re-ranking it is a matrix of its own.
        caption_image: `(captions,)` integers, the image that each caption describes.
        protocol: a name in `PROTOCOLS`.
        resamples: resamples of the bootstrap over images, which stays within each fold.
        seed: seed of the bootstrap.

    Returns:
        The figures and the result of each query. Figures of several folds are means over the folds. They are:

        - `image_to_text` and `text_to_image`, each with `R@1`, `R@5` and `R@10` in percent; where a query has several
          positives, also `R-precision` and `mAP@R` in percent; the 95 % `interval` of each of these; `median_rank` and
          `mean_rank` of the expected ranks, counted from 1; and `mean_reciprocal_rank`, the mean of 1 / expected rank, which
          under ties is never above the expected reciprocal rank.
        - `rsum`, the sum of the six recalls.
        - by direction, `tie_fraction` (0 to 1) and `chance`, the exact R@K of a random ranking.

    Raises:
        LigatureError: an empty gallery, an image without a caption, shapes that do not fit, NaN or infinity.
    """
    caption_image = np.asarray(caption_image)
    images = _count_images(image_to_text, text_to_image, caption_image)
    folds = folds_of(protocol, images)
    result: dict[str, Any] = {"rsum": 0.0, "tie_fraction": {}, "chance": {}}
    outcome = Outcome({}, folds, caption_image)
    # Each side: the image (its group) and the fold of every item.
    image_side = np.arange(images), folds
    text_side = caption_image, folds[caption_image]
    for direction, scores, (query_image, query_folds), (gallery_image, gallery_folds) in (
        ("image_to_text", image_to_text, image_side, text_side),
        ("text_to_image", text_to_image, text_side, image_side),
    ):
        parts, counts = [], np.empty((3, len(query_image)), dtype=np.int64)
        for fold in range(int(folds[-1]) + 1):
            rows, columns = np.flatnonzero(query_folds == fold), np.flatnonzero(gallery_folds == fold)
            # A single fold is the whole matrix, which is not copied: it may be a memory map.
            block = scores if len(rows) == len(query_image) else scores[np.ix_(rows, columns)]
            ranks = rank_positives(block, query_image[rows], gallery_image[columns], f"{direction} scores")
            counts[:, rows] = ranks.above, ranks.tied_negatives, ranks.tied_positives
            # Both directions resample with one seed and so draw the same images: their intervals belong together.
            parts.append(_measure_fold(ranks, block, query_image[rows], gallery_image[columns], resamples, seed + fold))
        result[direction] = _average_folds(parts)
        result["rsum"] += sum(result[direction][name] for name in RECALLS)
        result["tie_fraction"][direction] = float(np.mean([part["tie_fraction"] for part in parts]))
        result["chance"][direction] = {
            name: float(np.mean([part["chance"][name] for part in parts])) for name in RECALLS
        }
        outcome.ranks[direction] = Ranks(*counts)
    return result, outcome


def recalls(image_to_text: np.ndarray, caption_image: np.ndarray) -> dict[str, float]:
    """Return R@K in percent in both directions (`image_to_text_R@1`, …) and their sum `rsum`, for validation during training.

    Args:
        image_to_text: scores (images, captions) of a dual encoder.
        caption_image: (captions,) integers, the image that each caption describes.
    """
    images = np.arange(len(image_to_text))
    ranks_by_direction = {
        "image_to_text": rank_positives(image_to_text, images, caption_image),
        "text_to_image": rank_positives(image_to_text.T, caption_image, images),
    }
    figures = {
        f"{direction}_{name}": value
        for direction, ranks in ranks_by_direction.items()
        for name, value in _recalls(ranks).items()
    }
    return figures | {"rsum": sum(figures.values())}


def per_image(values: np.ndarray, query_image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sum measures over the queries of each image.

    Args:
        values: (queries, measures).
        query_image: (queries,) integers, the image of each query. Images are numbered from the lowest number in it.

    Returns:
        The sums (images, measures) and the number of queries (images,).
    """
    first = int(query_image.min())
    counts = np.bincount(query_image - first)
    sums = np.stack([np.bincount(query_image - first, column, minlength=len(counts)) for column in values.T], axis=1)
    return sums, counts


def _measure_fold(
    ranks: Ranks, scores: np.ndarray, queries: np.ndarray, gallery: np.ndarray, resamples: int, seed: int
) -> dict[str, Any]:
    """Return the figures of one gallery and their resampled means."""
    columns = {f"R@{k}": ranks.hit(k) for k in RECALL_AT}
    if np.bincount(gallery).max() > 1:
        columns["R-precision"], columns["mAP@R"] = precision_at_r(scores, queries, gallery)
    values = np.stack(list(columns.values()), axis=1)
    first = int(min(queries.min(), gallery.min()))
    return {
        "figures": {name: 100 * float(column.mean()) for name, column in columns.items()},
        "means": 100 * bootstrap_means(*per_image(values, queries), resamples, seed),
        "median_rank": float(np.median(ranks.expected)),
        "mean_rank": float(ranks.expected.mean()),
        "mean_reciprocal_rank": float((1 / ranks.expected).mean()),
        "tie_fraction": ranks.tie_fraction,
        "chance": _recalls(chance(queries - first, gallery - first)),
    }


def _average_folds(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the means over the folds, and the intervals of those means."""
    names = list(parts[0]["figures"])
    # Averaged before the quantiles are taken, so that the interval is that of the mean over folds.
    low, high = interval(np.mean([part["means"] for part in parts], axis=0))
    return {
        **{name: float(np.mean([part["figures"][name] for part in parts])) for name in names},
        "interval": {name: [float(low[i]), float(high[i])] for i, name in enumerate(names)},
        **{
            name: float(np.mean([part[name] for part in parts]))
            for name in ("median_rank", "mean_rank", "mean_reciprocal_rank")
        },
    }


def _count_images(image_to_text: np.ndarray, text_to_image: np.ndarray, caption_image: np.ndarray) -> int:
    """Return the number of images. Raises LigatureError where the scores and the captions do not fit together."""
    if caption_image.ndim != 1 or caption_image.dtype.kind not in "iu":
        raise LigatureError(
            f"caption_image is {caption_image.dtype} of shape {caption_image.shape}, "
            "must be one integer a caption: the row of its image"
        )
    images, captions = len(image_to_text), len(caption_image)
    if not images or not captions:
        raise LigatureError(f"nothing to score: {images} images, {captions} captions")
    shapes = np.shape(image_to_text), np.shape(text_to_image)
    if shapes != ((images, captions), (captions, images)):
        raise LigatureError(
            f"image_to_text scores are {shapes[0]} and text_to_image scores {shapes[1]}; {images} images and "
            f"{captions} captions need {(images, captions)} and {(captions, images)}, queries first"
        )
    if caption_image.min() < 0 or caption_image.max() >= images:
        raise LigatureError(
            f"caption_image points to images {caption_image.min()} to {caption_image.max()}, but the rows of the "
            f"scores are images 0 to {images - 1}"
        )
    captions_of = np.bincount(caption_image, minlength=images)
    if not captions_of.all():
        raise LigatureError(
            f"{np.sum(captions_of == 0)} of {images} images have no caption, the first is row "
            f"{np.argmin(captions_of)}; leave such images out of the gallery"
        )
    return images


def _recalls(ranks: Ranks) -> dict[str, float]:
    """Return R@K in percent."""
    return {f"R@{k}": 100 * float(ranks.hit(k).mean()) for k in RECALL_AT}
