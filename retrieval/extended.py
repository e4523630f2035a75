"""COCO's extended positives: CxC and ECCV Caption, by the package that publishes them (an optional extra)."""

from __future__ import annotations

import re
import warnings
from typing import Any

import numpy as np

from runtime.errors import LigatureError


def extended_positives(
    image_to_text: np.ndarray, text_to_image: np.ndarray, caption_image: np.ndarray, image_keys: list[str]
) -> dict[str, Any]:
    """Figures in percent by COCO's wider judgements of what fits: `cxc_r1`, `_r5`, `_r10`, `eccv_r1`, `eccv_map_at_r`,
    `eccv_rprecision`, each `{"i2t": …, "t2i": …}`; ties are in the order of the matrix's columns.

    The whole Karpathy test split is needed, images named as COCO names them (`COCO_val2014_000000391895`) and captions in the
    annotation's order; of each image the first five count, which are the ones that the package has numbers for.

    Raises LigatureError where the package is not installed or the data is not that split.
    """
    known, kept, images, captions = match_coco_captions(caption_image, image_keys)
    deepest = max(
        len(fitting)
        for truth in (known.cxc_gts, known.eccv_gts)
        for side in truth.values()
        for fitting in side.values()
    )
    depth = max(10, deepest)
    to_text = _ranked(image_to_text[:, kept], images, captions, depth)
    to_image = _ranked(text_to_image[kept], captions, images, depth)
    wanted = ["cxc_recalls", "eccv_r1", "eccv_map_at_r", "eccv_rprecision"]
    found = known.compute_all_metrics(to_text, to_image, wanted, Ks=[1, 5, 10])
    return {name: {way: 100 * float(value) for way, value in ways.items()} for name, ways in found.items()}


def match_coco_captions(
    caption_image: np.ndarray, image_keys: list[str]
) -> tuple[Any, np.ndarray, list[int], list[int]]:
    """-> the package's metrics, the captions (rows) that it knows, its numbers of the images, and of those captions.

    Raises LigatureError as `extended_positives` does: worth asking before anything is scored.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it would like a faster JSON
            from eccv_caption import Metrics
    except ImportError:
        raise LigatureError(
            "extended positives need the package eccv_caption; install it with `pip install '.[extended]'` in Ligature's checkout"
        ) from None
    known = Metrics()
    caption_ids, image_of = known.coco_ids.tolist(), known.coco_gts["t2i"]
    by_image: dict[int, list[int]] = {}
    for caption in caption_ids:
        by_image.setdefault(image_of[caption][0], []).append(caption)
    images = [_coco_id(key) for key in image_keys]
    if set(images) != set(by_image) or len(images) != len(by_image):
        raise LigatureError(
            f"extended positives are for COCO's Karpathy test split, {len(by_image):,} images named by their COCO ids; "
            f"these are {len(images):,} images, the first {image_keys[0]!r}"
        )
    order = np.argsort(caption_image, kind="stable")
    place = np.empty(len(order), dtype=np.int64)
    starts = np.searchsorted(caption_image[order], np.arange(len(images)))
    place[order] = np.arange(len(order)) - starts[caption_image[order]]
    kept = np.flatnonzero(place < 5)
    if len(kept) != 5 * len(images):
        raise LigatureError(
            "extended positives need five captions of each image; score with captions_per_image 5 or all"
        )
    captions = [by_image[images[caption_image[row]]][place[row]] for row in kept]
    return known, kept, images, captions


def _coco_id(key: str) -> int:
    digits = re.search(r"(\d+)$", key)
    return int(digits[1]) if digits else -1


def _ranked(scores: np.ndarray, queries: list[int], gallery: list[int], depth: int) -> dict[int, list[int]]:
    """Each query's best items by COCO's numbers."""
    numbers = np.array(gallery)
    ranked = {}
    for row, query in zip(scores, queries, strict=True):
        ranked[query] = numbers[np.argsort(-row, kind="stable")[:depth]].tolist()
    return ranked
