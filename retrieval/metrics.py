"""Scores in, ranks out: what a score matrix says about each query, with ties reported honestly.

Every matrix is `(queries, gallery)`. Query i and item j belong together when `query_group[i] == gallery_group[j]`. The items
that belong to a query are its positives, and the others are its negatives.

Tested in tests/retrieval/test_retrieval_metrics.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from runtime.errors import LigatureError

BLOCK_ELEMENTS = 1 << 22
"""Scores that are compared at a time, which bounds the temporary arrays to some tens of MB."""


@dataclass(frozen=True)
class Ranks:
    """The rank of each query's best positive, as three int64 arrays `(queries,)`.

    The order within a tie is taken as uniformly random. So every figure below is an expectation, and no implementation's
    sort can flatter it.
    """

    above: np.ndarray
    """Negatives that score strictly higher than the best positive."""
    tied_negatives: np.ndarray
    """Negatives that score the same."""
    tied_positives: np.ndarray
    """Positives that score the same, the best one included, so at least 1."""

    def hit(self, k: int) -> np.ndarray:
        """Return the probability `(queries,)` that a positive is among the first `k`; 1 where `k` reaches the gallery's size.

        With g negatives above, and t negatives and p positives tied: 1 - C(t, k - g) / C(t + p, k - g).
        """
        t, p = self.tied_negatives, self.tied_positives
        miss = np.ones(len(t))
        # The quotient is the chance that each position of the tie in turn goes to a negative. Every factor is in [0, 1],
        # and the (t + 1)-th, if there is one, is 0. So no factorial can overflow or cancel.
        for position in range(min(k, int(t.max()) + 1)):
            factor = np.maximum(t - position, 0) / np.maximum(t + p - position, 1)
            miss *= np.where(position < k - self.above, factor, 1.0)
        return 1.0 - miss

    @property
    def expected(self) -> np.ndarray:
        """The expected rank `(queries,)` of the first positive, counted from 1: g + (t + p + 1) / (p + 1)."""
        return self.above + (self.tied_negatives + self.tied_positives + 1) / (self.tied_positives + 1)

    @property
    def tie_fraction(self) -> float:
        """The share of queries whose best positive ties with a negative."""
        return float(np.mean(self.tied_negatives > 0))


def require_finite(scores: np.ndarray, name: str, first_query: int = 0) -> None:
    """Refuse NaN and infinite scores. A NaN wins or loses by an accident of the sort, never by merit.

    Args:
        scores: `(queries, items)`.
        name: what the error calls the matrix.
        first_query: number of the first row, where `scores` is a block of a larger matrix.

    Raises:
        LigatureError: a score is not finite; the message names the query and the item.
    """
    bad = ~np.isfinite(scores)
    if bad.any():
        query, item = np.argwhere(bad)[0]
        raise LigatureError(
            f"{name}: {scores[query, item]} at query {first_query + query}, item {item}; "
            "scores must be finite; look for an overflow (fp16?) or a diverged model"
        )


def rank_positives(
    scores: np.ndarray, query_group: np.ndarray, gallery_group: np.ndarray, name: str = "scores"
) -> Ranks:
    """Rank each query's best positive among the negatives.

    Args:
        scores: `(queries, gallery)` floating point, higher is better; read in blocks of rows, so a memory map is fine.
        query_group: `(queries,)` integers.
        gallery_group: `(gallery,)` integers; the items of a query's group are its positives.
        name: what errors call the matrix.

    Returns:
        The ranks of all queries.

    Raises:
        LigatureError: empty or misshapen scores, NaN or infinity, a query without a positive.
    """
    scores, query_group, gallery_group = np.asarray(scores), np.asarray(query_group), np.asarray(gallery_group)
    if scores.shape != (len(query_group), len(gallery_group)) or scores.dtype.kind != "f":
        raise LigatureError(
            f"{name}: {scores.dtype} of shape {scores.shape}, "
            f"must be floating point of shape ({len(query_group)}, {len(gallery_group)}) (queries, gallery)"
        )
    if not scores.size:
        raise LigatureError(f"{name}: nothing to rank, the gallery or the set of queries is empty {scores.shape}")
    counts = np.empty((3, len(scores)), dtype=np.int64)
    rows = max(1, BLOCK_ELEMENTS // scores.shape[1])
    for start in range(0, len(scores), rows):
        block = scores[start : start + rows]
        require_finite(block, name, start)
        positive = query_group[start : start + rows, None] == gallery_group
        best = np.where(positive, block, -np.inf).max(axis=1, keepdims=True)
        tied = block == best
        tied_positives = (tied & positive).sum(axis=1)
        # No positive is above the best one, so everything above it is a negative.
        counts[:, start : start + rows] = (block > best).sum(axis=1), tied.sum(axis=1) - tied_positives, tied_positives
    if not counts[2].all():
        raise LigatureError(f"{name}: query {np.argmin(counts[2])} has no positive in the gallery; leave it out")
    return Ranks(*counts)


def precision_at_r(
    scores: np.ndarray, query_group: np.ndarray, gallery_group: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return R-precision and mAP@R of each query (Musgrave et al. 2020), where R is the number of its positives.

    R-precision is the share of positives among the first R items. mAP@R sums the precision at each of the first R positions
    that holds a positive, and divides by R. The order within a tie is taken as uniformly random, and both figures are exact
    expectations over it. Let a tie of n items, p of them positive, follow g items, r of them positive. Then position g + j
    holds a positive with probability p / n, and if so, r + 1 + (j - 1)(p - 1) / (n - 1) positives are expected up to there.

    Args:
        scores: `(queries, gallery)`, which `rank_positives` has accepted.
        query_group: as in `rank_positives`.
        gallery_group: as in `rank_positives`.

    Returns:
        R-precision `(queries,)` and mAP@R `(queries,)`, from 0 to 1.
    """
    precision, average = np.zeros(len(scores)), np.zeros(len(scores))
    rows = max(1, BLOCK_ELEMENTS // scores.shape[1])
    for start in range(0, len(scores), rows):
        block = np.asarray(scores[start : start + rows])
        positive = query_group[start : start + rows, None] == gallery_group
        size = positive.sum(axis=1)
        # The scores of each query's positives, best first. Rows with fewer positives end in -inf, which `here` leaves out.
        most = int(size.max())
        best = -np.sort(np.partition(-np.where(positive, block, -np.inf), most - 1, axis=1)[:, :most], axis=1)
        for column in range(best.shape[1]):
            here = column < size
            value = best[:, [column]]
            above, tied = (block > value).sum(axis=1), (block == value).sum(axis=1)
            positives_above, positives_tied = (best > value).sum(axis=1), (best == value).sum(axis=1)
            positions = np.clip(size - above, 0, tied)  # those of the tie that lie within the first R
            precision[start : start + rows] += np.where(here, positions / np.maximum(tied, 1) / size, 0.0)
            for position in range(1, int(positions[here].max(initial=0)) + 1):
                expected = positives_above + 1 + (position - 1) * (positives_tied - 1) / np.maximum(tied - 1, 1)
                term = expected / (above + position) / np.maximum(tied, 1) / size
                average[start : start + rows] += np.where(here & (position <= positions), term, 0.0)
    return precision, average


def chance(query_group: np.ndarray, gallery_group: np.ndarray) -> Ranks:
    """Return the ranks under a random order of the gallery: everything ties. Groups as in `rank_positives`, from 0 upward."""
    positives = np.bincount(gallery_group)[query_group]
    return Ranks(np.zeros_like(positives), len(gallery_group) - positives, positives)


def rerank(scores: np.ndarray, shortlist_indices: np.ndarray, shortlist_scores: np.ndarray) -> np.ndarray:
    """Return scores that order each query's shortlist by a re-ranker, and everything else by the first stage.

    Args:
        scores: `(queries, gallery)` of the first stage (the dual head).
        shortlist_indices: `(queries, k)` gallery items, distinct within a row. Columns past the gallery's size are ignored.
        shortlist_scores: `(queries, k)` of the re-ranker, on any scale.

    Returns:
        `(queries, gallery)`, float32 or wider, for ranking only. Outside the shortlist the scores are the first stage's. The
        shortlist lies strictly above them, at steps that keep its order and its ties.

    Raises:
        LigatureError: shapes that do not fit, NaN or infinity, or indices that are repeated or outside the gallery.
    """
    scores, indices, values = np.asarray(scores), np.asarray(shortlist_indices), np.asarray(shortlist_scores)
    fits = scores.ndim == indices.ndim == 2 and len(scores) == len(indices) and indices.shape == values.shape
    if not (fits and scores.size and indices.size and scores.dtype.kind == "f" and indices.dtype.kind in "iu"):
        raise LigatureError(
            f"cannot re-rank {scores.dtype} scores {scores.shape} by a shortlist of {indices.dtype} items "
            f"{indices.shape} with scores {values.shape}; need (queries, gallery) and twice (queries, k), k at least 1"
        )
    gallery = scores.shape[1]
    indices, values = indices[:, :gallery], values[:, :gallery]
    require_finite(scores, "first-stage scores")
    require_finite(values, "shortlist scores")
    in_order = np.sort(indices, axis=1)
    wrong = (in_order[:, 0] < 0) | (in_order[:, -1] >= gallery) | (np.diff(in_order, axis=1) == 0).any(axis=1)
    if wrong.any():
        raise LigatureError(
            f"shortlist of query {np.argmax(wrong)}: its items must be distinct and between 0 and {gallery - 1}"
        )

    # The dense ranks of the values (equal values, equal rank) go above the rest, not the values themselves. Values shifted
    # by an offset would be rounded into ties: in float32, 1000.1 and 1000.10001 are one number.
    order = np.argsort(values, axis=1, kind="stable")
    ascending = np.take_along_axis(values, order, axis=1)
    rises = ascending[:, 1:] > ascending[:, :-1]
    dense_rank = np.empty(indices.shape, dtype=np.int64)
    np.put_along_axis(dense_rank, order, np.pad(np.cumsum(rises, axis=1), ((0, 0), (1, 0))), axis=1)

    reranked = scores.astype(np.promote_types(scores.dtype, np.float32))  # a copy; fp16 has no room for the steps
    np.put_along_axis(reranked, indices, -np.inf, axis=1)
    top = reranked.max(axis=1, keepdims=True)
    top[np.isneginf(top)] = 0.0  # the shortlist is the whole gallery, so there is no rest
    step = np.maximum(1.0, 2 * np.spacing(np.abs(top)))  # two units in the last place: never rounded away
    np.put_along_axis(reranked, indices, top + (dense_rank + 1).astype(top.dtype) * step, axis=1)
    return reranked


def bootstrap_means(sums: np.ndarray, counts: np.ndarray, resamples: int = 1000, seed: int = 0) -> np.ndarray:
    """Return means over queries under resampling of images, because captions of one image are not independent.

    The gallery stays fixed.

    Args:
        sums: `(images, measures)`, each image's sum of a measure over its queries.
        counts: `(images,)`, the number of queries of each image.
        resamples: how often to draw as many images as there are, with replacement.
        seed: the same seed draws the same images, so that two sets of measures can be compared pairwise.

    Returns:
        `(resamples, measures)`.
    """
    random, images = np.random.default_rng(seed), len(sums)
    means = np.empty((resamples, sums.shape[1]))
    for resample in range(resamples):
        # How often each image was drawn is enough: the sums of a resample need no copy of its rows.
        weights = np.bincount(random.integers(images, size=images), minlength=images)
        means[resample] = weights @ sums / (weights @ counts)
    return means


def interval(means: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the lower and upper ends of the 95 % percentile interval of each column.

    Where all images agree (0 % or 100 %) the interval has no width: this bootstrap cannot draw what it has not seen.
    """
    low, high = np.percentile(means, [2.5, 97.5], axis=0)
    return low, high
