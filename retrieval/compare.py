"""Compare two score records query by query, with a paired test."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from retrieval.metrics import Ranks, bootstrap_means, interval
from retrieval.protocols import DIRECTIONS, RECALL_AT, RECALLS, Outcome, per_image
from retrieval.records import SETTING, read_outcome, read_record
from runtime.errors import LigatureError

MEASURES = (*RECALLS, "reciprocal rank")
"""What is compared in each direction; the sum of all six recalls, `rsum`, comes after both."""


def compare_records(
    first: Path, second: Path, resamples: int = 2000, flips: int = 10_000, seed: int = 0
) -> dict[str, Any]:
    """Subtract the first record from the second, each measure in percentage points.

    The interval resamples images, with their captions and within their fold, and draws the same images for both records.
    `p` is that of a permutation test that exchanges the two records' results image by image. Both treat the images as the
    sample and the gallery as fixed. There is no correction for multiple comparisons.

    Args:
        first: path of a score record, with its ranks beside it.
        second: path of the other one.
        resamples: resamples of the interval.
        flips: exchanges of the permutation test, rounded up to a multiple of 500.
        seed: seed of both.

    Returns:
        `first` and `second` (what they are), what both share (`SETTING`), and `differences`: a list of `direction`, `measure`,
        `first`, `second`, `difference`, `interval` (95 %), `p` and `verdict`. The verdict is `higher` or `lower` where the
        interval leaves out zero, else `unresolved`.

    Raises:
        LigatureError: the records differ in data, protocol or images, or have no ranks.
    """
    paths = Path(first), Path(second)
    records = [read_record(path) for path in paths]
    for key in SETTING:
        ours, theirs = (record[key] for record in records)
        if ours != theirs:
            raise LigatureError(
                f"{first} and {second} cannot be compared: {key} is {ours!r} in one and {theirs!r} in the other"
            )
    (outcome, keys), (other, other_keys) = (
        read_outcome(path, record) for path, record in zip(paths, records, strict=True)
    )
    if keys != other_keys or not np.array_equal(outcome.caption_image, other.caption_image):
        raise LigatureError(f"{first} and {second} were not scored on the same images and captions in the same order")
    rows, sums = [], []
    for direction in DIRECTIONS:
        measured = _compare_direction(direction, (outcome, other), resamples, seed)
        rows += _rows(direction, MEASURES, measured, flips, seed)
        sums.append(measured.sum_of_recalls())
    # The six recalls' sum: images and resamples are the same in both directions, so their parts add up.
    rsum = Differences(
        *(to_text + to_image for to_text, to_image in zip(*(astuple(part) for part in sums), strict=True))
    )
    rows += _rows("both", ("rsum",), rsum, flips, seed)
    about = [f"{record['head']}, {record['training']} ({record['checkpoint']})" for record in records]
    return {"first": about[0], "second": about[1], **{key: records[0][key] for key in SETTING}, "differences": rows}


@dataclass
class Differences:
    """Measures of two records, in percent, and how they differ."""

    first: np.ndarray
    """(measures,) means of the first record."""
    second: np.ndarray
    """(measures,) means of the second record."""
    by_image: np.ndarray
    """(images, measures), each image's part of the difference of the means; they sum to the difference."""
    resampled: np.ndarray
    """(resamples, measures), the difference of the means under resampling of the images."""

    def sum_of_recalls(self) -> Differences:
        """Return the sum of R@1, R@5 and R@10 as the only measure. They are the first three of `MEASURES`."""
        count = len(RECALLS)
        return Differences(*(part[..., :count].sum(-1, keepdims=True) for part in astuple(self)))


def _compare_direction(direction: str, outcomes: tuple[Outcome, Outcome], resamples: int, seed: int) -> Differences:
    (first, counts), (second, _) = (_sum_by_image(outcome, direction) for outcome in outcomes)
    outcome = outcomes[0]
    weights = _weights(outcome, direction)
    folds = int(outcome.folds.max()) + 1
    resampled = np.zeros((resamples, len(MEASURES)))
    for fold in np.unique(outcome.folds):
        part = outcome.folds == fold
        resampled += bootstrap_means(second[part] - first[part], counts[part], resamples, seed + int(fold)) / folds
    return Differences(weights @ first, weights @ second, weights[:, None] * (second - first), resampled)


def describe(comparison: dict[str, Any]) -> str:
    """Return a comparison as text: what is compared, then one line per measure."""
    header = ["", "first", "second", "second - first [95 %]", "p", ""]
    lines = [header]
    for row in comparison["differences"]:
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
    title = f"{comparison['dataset']} {comparison['split']}, protocol {comparison['protocol']}, {comparison['images']:,} images"
    return "\n".join([title, f"first:  {comparison['first']}", f"second: {comparison['second']}", "", *body])


def _measures(ranks: Ranks) -> np.ndarray:
    """Return (queries, measures) in percent."""
    return 100 * np.stack([*(ranks.hit(k) for k in RECALL_AT), 1 / ranks.expected], axis=1)


def _sum_by_image(outcome: Outcome, direction: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the sums of the measures (images, measures) and the number of queries (images,)."""
    queries = np.arange(len(outcome.folds)) if direction == "image_to_text" else outcome.caption_image
    return per_image(_measures(outcome.ranks[direction]), queries)


def _weights(outcome: Outcome, direction: str) -> np.ndarray:
    """Return (images,) the weight of a query of each image in the mean over the folds."""
    query_folds = outcome.folds if direction == "image_to_text" else outcome.folds[outcome.caption_image]
    fold_sizes = np.bincount(query_folds)
    return (1 / (len(fold_sizes) * fold_sizes))[outcome.folds]


def _rows(
    direction: str, measures: tuple[str, ...], differences: Differences, flips: int, seed: int
) -> list[dict[str, Any]]:
    """Return one row per measure, with its interval and its permutation test."""
    random, difference = np.random.default_rng(seed), differences.by_image.sum(axis=0)
    # Under the null hypothesis each image's difference could as well have the other sign.
    as_extreme = np.zeros(len(measures))
    for _ in range(0, flips, 500):
        signs = random.integers(0, 2, size=(500, len(differences.by_image)), dtype=np.int8) * 2.0 - 1.0
        # 1e-9 forgives rounding: a sum that equals the observed one must count as no less extreme.
        as_extreme += (np.abs(signs @ differences.by_image) >= np.abs(difference) - 1e-9).sum(axis=0)
    permutations = -(-flips // 500) * 500
    low, high = interval(differences.resampled)
    return [
        {
            "direction": direction,
            "measure": measure,
            "first": float(differences.first[i]),
            "second": float(differences.second[i]),
            "difference": float(difference[i]),
            "interval": [float(low[i]), float(high[i])],
            # The observed signs count as one of the permutations, so p is never 0.
            "p": float((as_extreme[i] + 1) / (permutations + 1)),
            "verdict": "higher" if low[i] > 0 else "lower" if high[i] < 0 else "unresolved",
        }
        for i, measure in enumerate(measures)
    ]
