"""COCO's extended positives (CxC and ECCV Caption), by the package that publishes them, an optional extra.

COCO marks five captions per image as fitting, although others fit too. CxC and ECCV Caption are wider judgements of what fits.

Tested in tests/finetune/test_evaluate.py.
"""

from __future__ import annotations

import re
import warnings
from typing import Any

import numpy as np

from runtime.errors import LigatureError

CAPTIONS_PER_IMAGE = 5
"""The package has numbers for the first five captions of each image."""


def extended_positives(
    image_to_text: np.ndarray, text_to_image: np.ndarray, caption_image: np.ndarray, image_keys: list[str]
) -> dict[str, Any]:
    """Score by COCO's extended positives. Ties are ordered by the matrix's columns.

    They are defined on the whole Karpathy test split. Of each image the first five captions count.

    Args:
        image_to_text: scores (images, captions).
        text_to_image: scores (captions, images).
        caption_image: (captions,) integers, the image that each caption describes.
        image_keys: the images' names as COCO has them (`COCO_val2014_000000391895`), with captions in the annotation's order.

    Returns:
        `cxc_r1`, `cxc_r5`, `cxc_r10`, `eccv_r1`, `eccv_map_at_r` and `eccv_rprecision`, each `{"i2t": …, "t2i": …}` in percent.

    Raises:
        LigatureError: the package is not installed, or the data is not that split.
    """
    metrics, rows, image_ids, caption_ids = match_coco_captions(caption_image, image_keys)
    most_positives = max(
        len(positives)
        for judgements in (metrics.cxc_gts, metrics.eccv_gts)
        for by_query in judgements.values()
        for positives in by_query.values()
    )
    depth = max(10, most_positives)
    to_text = _best_items(image_to_text[:, rows], image_ids, caption_ids, depth)
    to_image = _best_items(text_to_image[rows], caption_ids, image_ids, depth)
    names = ["cxc_recalls", "eccv_r1", "eccv_map_at_r", "eccv_rprecision"]
    figures = metrics.compute_all_metrics(to_text, to_image, names, Ks=[1, 5, 10])
    return {
        name: {direction: 100 * float(value) for direction, value in by_direction.items()}
        for name, by_direction in figures.items()
    }


def match_coco_captions(
    caption_image: np.ndarray, image_keys: list[str]
) -> tuple[Any, np.ndarray, list[int], list[int]]:
    """Find the package's ids of the images and captions. Evaluation calls it first, so that a mistake costs no scoring.

    Args:
        caption_image: (captions,) integers, the image that each caption describes.
        image_keys: the images' names; see `extended_positives`.

    Returns:
        The package's metrics, the rows of the captions that it knows, its ids of the images, and its ids of those captions.

    Raises:
        LigatureError: the package is not installed, or the data is not the Karpathy test split.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the package recommends a faster JSON library
            from eccv_caption import Metrics
    except ImportError:
        raise LigatureError(
            "extended positives need the package eccv_caption; install it with `pip install '.[extended]'` in Ligature's checkout"
        ) from None
    metrics = Metrics()
    all_captions, images_of = metrics.coco_ids.tolist(), metrics.coco_gts["t2i"]
    captions_of: dict[int, list[int]] = {}
    for caption in all_captions:
        captions_of.setdefault(images_of[caption][0], []).append(caption)
    images = [_coco_id(key) for key in image_keys]
    if set(images) != set(captions_of) or len(images) != len(captions_of):
        raise LigatureError(
            f"extended positives are for COCO's Karpathy test split, {len(captions_of):,} images named by their COCO ids; "
            f"these are {len(images):,} images, the first {image_keys[0]!r}"
        )
    # Number each image's captions from 0, in the order of the rows.
    order = np.argsort(caption_image, kind="stable")
    number = np.empty(len(order), dtype=np.int64)
    starts = np.searchsorted(caption_image[order], np.arange(len(images)))
    number[order] = np.arange(len(order)) - starts[caption_image[order]]
    rows = np.flatnonzero(number < CAPTIONS_PER_IMAGE)
    if len(rows) != CAPTIONS_PER_IMAGE * len(images):
        raise LigatureError(
            "extended positives need five captions of each image; score with captions_per_image 5 or all"
        )
    captions = [captions_of[images[caption_image[row]]][number[row]] for row in rows]
    return metrics, rows, images, captions


def _coco_id(key: str) -> int:
    """Return the number at the end of a COCO image's name, or -1 where there is none."""
    digits = re.search(r"(\d+)$", key)
    return int(digits[1]) if digits else -1


def _best_items(scores: np.ndarray, queries: list[int], gallery: list[int], depth: int) -> dict[int, list[int]]:
    """Return the ids of each query's `depth` best items, by the query's id. `scores` is (queries, gallery)."""
    ids = np.array(gallery)
    best = {}
    for row, query in zip(scores, queries, strict=True):
        best[query] = ids[np.argsort(-row, kind="stable")[:depth]].tolist()
    return best
