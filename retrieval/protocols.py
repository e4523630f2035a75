"""Which images meet which captions, and what is reported of it. A protocol is a row of `PROTOCOLS`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from retrieval.metrics import Ranks, bootstrap_means, chance, interval, precision_at_r, rank_positives
from runtime.errors import LigatureError

RECALL_AT = (1, 5, 10)
RECALLS = tuple(f"R@{k}" for k in RECALL_AT)
DIRECTIONS = ("image_to_text", "text_to_image")


@dataclass(frozen=True)
class Protocol:
    """Galleries are the whole set, or `folds` consecutive parts of it whose figures are averaged."""

    images: int | None
    """How many images it is defined on; None: any number."""
    folds: int
    about: str


PROTOCOLS = {
    "full": Protocol(None, 1, "every image against every caption"),
    "coco_5k": Protocol(5000, 1, "COCO's Karpathy test split, whole"),
    "coco_1k": Protocol(5000, 5, "the same, the mean of five consecutive folds of 1,000 images"),
    "flickr30k_1k": Protocol(1000, 1, "Flickr30K's Karpathy test split"),
    "flickr8k_1k": Protocol(1000, 1, "Flickr8k's test or dev split"),
}


@dataclass(frozen=True)
class Outcome:
    """What every query came to, beside the figures: two records can be compared by it."""

    ranks: dict[str, Ranks]
    """By direction: images in order, captions in order."""
    folds: np.ndarray
    """(images,)"""
    caption_image: np.ndarray
    """(captions,)"""


def folds_of(protocol: str, images: int) -> np.ndarray:
    """The fold (images,) of each image. Raises LigatureError for an unknown protocol or one that is not for so many images."""
    if protocol not in PROTOCOLS:
        raise LigatureError(f"no protocol {protocol!r}; there is {', '.join(PROTOCOLS)}")
    wanted = PROTOCOLS[protocol]
    if wanted.images is not None and images != wanted.images:
        raise LigatureError(
            f"protocol {protocol} is defined on {wanted.images:,} images, not on {images:,}; use the whole test split, or "
            "protocol full"
        )
    if images % wanted.folds:
        raise LigatureError(f"protocol {protocol}: {images:,} images do not divide into {wanted.folds} folds")
    return np.arange(images) // (images // wanted.folds)


def measure(
    image_to_text: np.ndarray,
    text_to_image: np.ndarray,
    caption_image: np.ndarray,
    *,
    protocol: str = "full",
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[dict[str, Any], Outcome]:
    """Score two matrices by a protocol.

    An image has found its text when any of its captions is among the first K, a caption its image when that one is.

    Args:
        image_to_text: scores `(images, captions)`, a row ranks the captions for one image.
        text_to_image: scores `(captions, images)`, a row ranks the images for one caption: the transpose of
            `image_to_text` for a dual encoder, a matrix of its own after re-ranking.
        caption_image: `(captions,)` integers, the image that each caption describes.
        protocol: a name in `PROTOCOLS`.
        resamples, seed: of the bootstrap over images (within each fold).

    Returns:
        `image_to_text` and `text_to_image` (each `R@1`, `R@5`, `R@10` in percent and, where a query has several positives,
        `R-precision` and `mAP@R`; their 95 % `interval`s; `median_rank` and `mean_rank` of the expected ranks counted from 1,
        `mean_reciprocal_rank` as the mean of 1 / expected rank, which under ties is never above the expected reciprocal rank),
        `rsum` (the six recalls' sum), and by direction `tie_fraction` (0 to 1) and `chance` (R@K of a random ranking, exact).
        Of several folds, all of these are means. Then what each query came to.

    Raises:
        LigatureError: an empty gallery, an image without a caption, shapes that do not fit, NaN or infinity.
    """
    caption_image = np.asarray(caption_image)
    images = _count_images(image_to_text, text_to_image, caption_image)
    folds = folds_of(protocol, images)
    caption_folds = folds[caption_image]
    result: dict[str, Any] = {"rsum": 0.0, "tie_fraction": {}, "chance": {}}
    outcome = Outcome({}, folds, caption_image)
    sides = np.arange(images), caption_image
    for direction, scores, (queries, query_folds), (gallery, gallery_folds) in zip(
        DIRECTIONS,
        (image_to_text, text_to_image),
        zip(sides, (folds, caption_folds), strict=True),
        zip(sides[::-1], (caption_folds, folds), strict=True),
        strict=True,
    ):
        parts, ranked = [], np.empty((3, len(queries)), dtype=np.int64)
        for fold in range(int(folds[-1]) + 1):
            rows, columns = np.flatnonzero(query_folds == fold), np.flatnonzero(gallery_folds == fold)
            block = scores if len(rows) == len(queries) else scores[np.ix_(rows, columns)]
            found = rank_positives(block, queries[rows], gallery[columns], f"{direction} scores")
            ranked[:, rows] = found.above, found.tied_negatives, found.tied_positives
            # Both directions resample with one seed, so the same images: their intervals belong together.
            parts.append(_fold(found, block, queries[rows], gallery[columns], resamples, seed + fold))
        result[direction] = _joined(parts)
        result["rsum"] += sum(result[direction][name] for name in RECALLS)
        result["tie_fraction"][direction] = float(np.mean([part["tie_fraction"] for part in parts]))
        result["chance"][direction] = {
            name: float(np.mean([part["chance"][name] for part in parts])) for name in RECALLS
        }
        outcome.ranks[direction] = Ranks(*ranked)
    return result, outcome


def recalls(image_to_text: np.ndarray, caption_image: np.ndarray) -> dict[str, float]:
    """R@K in percent both ways (`image_to_text_R@1`, …) and their sum `rsum`, of one matrix (images, captions): for validation."""
    images = np.arange(len(image_to_text))
    ways = {
        "image_to_text": rank_positives(image_to_text, images, caption_image),
        "text_to_image": rank_positives(image_to_text.T, caption_image, images),
    }
    found = {f"{way}_{name}": value for way, ranks in ways.items() for name, value in _recalls(ranks).items()}
    return found | {"rsum": sum(found.values())}


def per_image(values: np.ndarray, query_image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Measures (queries, measures) -> their sums (images, measures) and the number of queries (images,). The images that
    `query_image` names are numbered from its least one."""
    first = int(query_image.min())
    counts = np.bincount(query_image - first)
    sums = np.stack([np.bincount(query_image - first, column, minlength=len(counts)) for column in values.T], axis=1)
    return sums, counts


def _fold(
    ranks: Ranks, scores: np.ndarray, queries: np.ndarray, gallery: np.ndarray, resamples: int, seed: int
) -> dict[str, Any]:
    """The figures of one gallery, and their resampled means."""
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


def _joined(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """The means over the folds."""
    names = list(parts[0]["figures"])
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
    """The number of images, once everything fits together."""
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
    return {f"R@{k}": 100 * float(ranks.hit(k).mean()) for k in RECALL_AT}
