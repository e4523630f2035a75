"""Two score records held against each other, query by query: a paired test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from retrieval.metrics import Ranks, bootstrap_means, interval
from retrieval.protocols import DIRECTIONS, RECALL_AT, RECALLS, Outcome, per_image
from retrieval.records import SETTING, read_outcome, read_record
from runtime.errors import LigatureError

MEASURES = (*RECALLS, "reciprocal rank")


def compare(first: Path, second: Path, resamples: int = 2000, flips: int = 10_000, seed: int = 0) -> dict[str, Any]:
    """The second record minus the first, each measure in percentage points.

    The interval resamples images (with their captions, within their fold), the same ones for both records; `p` is of a
    permutation test that exchanges the two records' results image by image. Both see the images as the sample and the gallery
    as fixed; measures are not corrected for being several.

    Returns:
        `first`, `second` (what they are), and `differences`: a list of `direction`, `measure`, `first`, `second`, `difference`,
        `interval` (95 %), `p`, and `verdict`: `higher` or `lower` where the interval leaves out zero, else `unresolved`.

    Raises:
        LigatureError: records of different data, protocols or images, or without their ranks.
    """
    paths = Path(first), Path(second)
    records = [read_record(path) for path in paths]
    for key in SETTING:
        one, other = (record[key] for record in records)
        if one != other:
            raise LigatureError(
                f"{first} and {second} cannot be compared: {key} is {one!r} in one and {other!r} in the other"
            )
    (one, keys), (other, other_keys) = (read_outcome(path, record) for path, record in zip(paths, records, strict=True))
    if keys != other_keys or not np.array_equal(one.caption_image, other.caption_image):
        raise LigatureError(f"{first} and {second} were not scored on the same images and captions in the same order")
    rows, totals = [], []
    for direction in DIRECTIONS:
        sums = [_by_image(outcome, direction) for outcome in (one, other)]
        weights = _weights(one, direction)
        differences = weights[:, None] * (sums[1][0] - sums[0][0])
        spread = np.zeros((resamples, len(MEASURES)))
        for fold in np.unique(one.folds):
            part = one.folds == fold
            apart = sums[1][0][part] - sums[0][0][part]
            spread += bootstrap_means(apart, sums[0][1][part], resamples, seed + int(fold)) / (one.folds.max() + 1)
        levels = [weights @ figures for figures, _ in sums]
        totals.append((differences[:, : len(RECALLS)].sum(1), spread[:, : len(RECALLS)].sum(1), levels))
        rows += _rows(direction, MEASURES, levels, differences, spread, flips, seed)
    both = totals[0][0] + totals[1][0], totals[0][1] + totals[1][1]
    rsums = [np.array([sum(total[2][side][: len(RECALLS)].sum() for total in totals)]) for side in (0, 1)]
    rows += _rows("both", ("rsum",), rsums, both[0][:, None], both[1][:, None], flips, seed)
    about = [f"{record['head']}, {record['training']} ({record['checkpoint']})" for record in records]
    return {"first": about[0], "second": about[1], **{key: records[0][key] for key in SETTING}, "differences": rows}


def describe(found: dict[str, Any]) -> str:
    """A comparison as text: what against what, then a line a measure."""
    header = ["", "first", "second", "second - first [95 %]", "p", ""]
    lines = [header]
    for row in found["differences"]:
        short = {"image_to_text": "TR ", "text_to_image": "IR ", "both": ""}[row["direction"]]
        low, high = row["interval"]
        change = f"{row['difference']:+.2f} [{low:+.2f}, {high:+.2f}]"
        numbers = [f"{row['first']:.2f}", f"{row['second']:.2f}", change, f"{row['p']:.4f}"]
        verdict = row["verdict"] if row["verdict"] == "unresolved" else f"second {row['verdict']}"
        lines.append([short + row["measure"], *numbers, verdict])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    body = [
        "  ".join(
            cell.ljust(width) if i in (0, 5) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    title = f"{found['dataset']} {found['split']}, protocol {found['protocol']}, {found['images']:,} images"
    return "\n".join([title, f"first:  {found['first']}", f"second: {found['second']}", "", *body])


def _measures(ranks: Ranks) -> np.ndarray:
    """(queries, measures), in percent."""
    return 100 * np.stack([*(ranks.hit(k) for k in RECALL_AT), 1 / ranks.expected], axis=1)


def _by_image(outcome: Outcome, direction: str) -> tuple[np.ndarray, np.ndarray]:
    """Sums (images, measures) and number of queries (images,)."""
    queries = np.arange(len(outcome.folds)) if direction == "image_to_text" else outcome.caption_image
    return per_image(_measures(outcome.ranks[direction]), queries)


def _weights(outcome: Outcome, direction: str) -> np.ndarray:
    """(images,) what a query of each image counts for in the mean over folds."""
    queries = outcome.folds if direction == "image_to_text" else outcome.folds[outcome.caption_image]
    sizes = np.bincount(queries)
    return (1 / (len(sizes) * sizes))[outcome.folds]


def _rows(
    direction: str,
    names: tuple[str, ...],
    levels: list[np.ndarray],
    differences: np.ndarray,
    spread: np.ndarray,
    flips: int,
    seed: int,
) -> list[dict[str, Any]]:
    """differences: (images, measures), each image's part of the difference of means; spread: (resamples, measures)."""
    random, found = np.random.default_rng(seed), differences.sum(axis=0)
    beyond = np.zeros(len(names))
    for _ in range(0, flips, 500):
        signs = random.integers(0, 2, size=(500, len(differences)), dtype=np.int8) * 2.0 - 1.0
        beyond += (np.abs(signs @ differences) >= np.abs(found) - 1e-9).sum(axis=0)
    drawn = -(-flips // 500) * 500
    low, high = interval(spread)
    return [
        {
            "direction": direction,
            "measure": name,
            "first": float(levels[0][i]),
            "second": float(levels[1][i]),
            "difference": float(found[i]),
            "interval": [float(low[i]), float(high[i])],
            "p": float((beyond[i] + 1) / (drawn + 1)),
            "verdict": "higher" if low[i] > 0 else "lower" if high[i] < 0 else "unresolved",
        }
        for i, name in enumerate(names)
    ]
