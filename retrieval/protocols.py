"""Which images meet which captions, and what is reported of it. A protocol is a function listed in `PROTOCOLS`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from retrieval.metrics import Ranks, bootstrap_interval, chance, rank_positives
from runtime.errors import LigatureError

RECALL_AT = (1, 5, 10)
DIRECTIONS = ("image_to_text", "text_to_image")


def full(
    image_to_text: np.ndarray,
    text_to_image: np.ndarray,
    caption_image: np.ndarray,
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """All images against all captions.

    An image has found its text when any of its captions is among the first K, a caption its image when that one is.

    Args:
        image_to_text: scores `(images, captions)`, a row ranks the captions for one image.
        text_to_image: scores `(captions, images)`, a row ranks the images for one caption: the transpose of
            `image_to_text` for a dual encoder, a matrix of its own after re-ranking.
        caption_image: `(captions,)` integers, the image that each caption describes.
        resamples, seed: of the bootstrap over images.

    Returns:
        `image_to_text` and `text_to_image` (each `R@1`, `R@5`, `R@10` in percent, their 95 % `interval`s,
        `median_rank` and `mean_rank` of the expected ranks counted from 1, `mean_reciprocal_rank` as the mean of
        1 / expected rank, which under ties is never above the expected reciprocal rank), `rsum` (the six recalls'
        sum), and by direction `tie_fraction` (0 to 1) and `chance` (R@K of a random ranking, exact).

    Raises:
        LigatureError: an empty gallery, an image without a caption, shapes that do not fit, NaN or infinity.
    """
    caption_image = np.asarray(caption_image)
    images = _count_images(image_to_text, text_to_image, caption_image)
    image = np.arange(images)
    result: dict[str, Any] = {"rsum": 0.0, "tie_fraction": {}, "chance": {}}
    for direction, scores, queries, gallery in zip(
        DIRECTIONS, (image_to_text, text_to_image), (image, caption_image), (caption_image, image), strict=True
    ):
        ranks = rank_positives(scores, queries, gallery, f"{direction} scores")
        # Both directions resample with one seed, so the same images: their intervals belong together.
        result[direction] = _measures(ranks, queries, images, resamples, seed)
        result["rsum"] += sum(result[direction][f"R@{k}"] for k in RECALL_AT)
        result["tie_fraction"][direction] = ranks.tie_fraction
        result["chance"][direction] = _recalls(chance(queries, gallery))
    return result


# COCO 1K (the mean of five consecutive folds) and other protocols join here, with `full`'s signature and result.
PROTOCOLS: dict[str, Callable[..., dict[str, Any]]] = {"full": full}


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


def _measures(ranks: Ranks, query_image: np.ndarray, images: int, resamples: int, seed: int) -> dict[str, Any]:
    sums = np.stack([np.bincount(query_image, ranks.hit(k), minlength=images) for k in RECALL_AT], axis=1)
    low, high = bootstrap_interval(sums, np.bincount(query_image, minlength=images), resamples, seed)
    return {
        **_recalls(ranks),
        "interval": {f"R@{k}": [100 * float(low[i]), 100 * float(high[i])] for i, k in enumerate(RECALL_AT)},
        "median_rank": float(np.median(ranks.expected)),
        "mean_rank": float(ranks.expected.mean()),
        "mean_reciprocal_rank": float((1 / ranks.expected).mean()),
    }
