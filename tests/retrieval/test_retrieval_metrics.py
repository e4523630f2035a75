"""Ranks, re-ranking and the bootstrap, held against brute force, argsort, scipy and arithmetic done by hand."""

from itertools import pairwise, permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import bootstrap, hypergeom

from retrieval import metrics
from retrieval.metrics import Ranks, bootstrap_means, chance, interval, precision_at_r, rank_positives, rerank
from runtime.errors import LigatureError


def grouped(positives):
    """Groups for one query whose positives are marked."""
    return np.array([1]), np.asarray(positives).astype(int)


# --- ties ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scores", "positives"),
    [
        ([1, 1, 1, 1, 1], [1, 0, 0, 0, 0]),
        ([1, 1, 1, 1, 1], [1, 1, 0, 0, 0]),
        ([3, 2, 2, 2, 1, 2], [0, 1, 0, 0, 1, 0]),
        ([3, 2, 2, 2, 1, 2], [0, 1, 1, 0, 1, 1]),
        ([3, 3, 2, 2, 2, 1], [0, 0, 1, 1, 0, 1]),
        ([5, 4, 3, 2, 1], [0, 0, 0, 1, 1]),
        ([1, 1], [1, 1]),
        ([7], [1]),
    ],
)
def test_every_order_of_a_tie_counts_equally(scores, positives):
    """All permutations, each sorted stably: the average over them is the definition of random tie-breaking."""
    scores = np.array(scores, dtype=float)
    first = []
    for order in permutations(range(len(scores))):
        by_score = sorted(order, key=lambda item: -scores[item])
        first.append(1 + next(place for place, item in enumerate(by_score) if positives[item]))
    ranks = rank_positives(scores[None], *grouped(positives))
    assert ranks.expected[0] == pytest.approx(np.mean(first), abs=1e-12)
    for k in range(len(scores) + 3):
        assert ranks.hit(k)[0] == pytest.approx(np.mean([place <= k for place in first]), abs=1e-12)


@settings(max_examples=100, deadline=None)
@given(above=st.integers(0, 30), negatives=st.integers(0, 30_000), positives=st.integers(1, 40), k=st.integers(0, 60))
def test_hit_is_hypergeometric(above, negatives, positives, k):
    ranks = Ranks(np.array([above]), np.array([negatives]), np.array([positives]))
    places = np.clip(k - above, 0, negatives + positives)
    expected = 1 - hypergeom.pmf(0, negatives + positives, positives, places)
    assert ranks.hit(k)[0] == pytest.approx(expected, abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(arrays(np.float32, (4, 7), elements=st.integers(0, 3)), st.permutations(range(7)))
def test_properties_of_ranks(scores, shuffle):
    queries, gallery = np.arange(4), np.array([0, 1, 2, 3, 0, 1, 1])
    ranks = rank_positives(scores, queries, gallery)
    hits = np.stack([ranks.hit(k) for k in range(8)])
    assert (np.diff(hits, axis=0) >= -1e-12).all()
    assert (hits[0] == 0).all() and (hits[-1] == 1).all()
    np.testing.assert_allclose((1 - hits).sum(axis=0), ranks.expected, atol=1e-12)  # E[rank] = sum of P(rank > k)
    for other in (
        rank_positives(scores[:, shuffle], queries, gallery[shuffle]),
        rank_positives(np.exp(scores) - 40, queries, gallery),
    ):
        np.testing.assert_array_equal([ranks.above, ranks.tied_negatives], [other.above, other.tied_negatives])


def test_rounded_scores_cannot_flatter():
    """The expectation stays near the truth, where counting strictly greater scores multiplies it."""
    scores = np.random.default_rng(0).normal(size=(400, 400)) * 0.003
    queries = np.arange(400)
    exact, rounded = (rank_positives(s, queries, queries) for s in (scores, scores.round(2)))
    assert exact.tie_fraction == 0
    assert rounded.tie_fraction > 0.9
    assert rounded.hit(10).mean() == pytest.approx(exact.hit(10).mean(), abs=0.02)
    assert (rounded.above == 0).mean() > 0.03 and rounded.hit(1).mean() < 0.01


# --- without ties -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_agrees_with_argsort_where_nothing_is_tied(dtype, monkeypatch):
    monkeypatch.setattr(metrics, "BLOCK_ELEMENTS", 150)  # a few rows at a time, the last block short
    random = np.random.default_rng(1)
    scores = np.stack([random.permutation(60) for _ in range(23)]).astype(dtype)
    gallery = np.concatenate([np.arange(23), random.integers(23, size=37)])
    ranks = rank_positives(scores, np.arange(23), gallery)
    for query in range(23):
        is_positive = gallery[np.argsort(-scores[query])] == query
        assert ranks.expected[query] == np.argmax(is_positive) + 1
        for k in (1, 5, 10, 60, 100):
            assert ranks.hit(k)[query] == is_positive[:k].any()
    assert ranks.tie_fraction == 0


def test_chance_is_what_constant_scores_get():
    gallery = np.array([0, 0, 0, 1, 2, 2])
    random, constant = chance(np.arange(3), gallery), rank_positives(np.ones((3, 6)), np.arange(3), gallery)
    for k in (1, 3, 6, 9):
        np.testing.assert_array_equal(random.hit(k), constant.hit(k))
    np.testing.assert_allclose(random.hit(1), [3 / 6, 1 / 6, 2 / 6])
    np.testing.assert_allclose(random.expected, [7 / 4, 7 / 2, 7 / 3])
    assert constant.tie_fraction == 1


# --- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_refuses_what_is_not_finite_and_says_where(bad, monkeypatch):
    monkeypatch.setattr(metrics, "BLOCK_ELEMENTS", 8)
    scores = np.zeros((5, 4), dtype=np.float32)
    scores[3, 2] = bad
    with pytest.raises(LigatureError, match=f"text scores: {bad} at query 3, item 2"):
        rank_positives(scores, np.arange(5) % 4, np.arange(4), "text scores")


@pytest.mark.parametrize(
    ("scores", "queries", "gallery", "message"),
    [
        (np.zeros((2, 0)), [0, 1], [], "empty"),
        (np.zeros((0, 2)), [], [0, 1], "empty"),
        (np.zeros((2, 3)), [0, 1], [0, 1], "shape"),
        (np.zeros((2, 2), dtype=int), [0, 1], [0, 1], "floating"),
        (np.zeros((2, 2)), [0, 7], [0, 1], "query 1 has no positive"),
    ],
)
def test_refuses_what_cannot_be_ranked(scores, queries, gallery, message):
    with pytest.raises(LigatureError, match=message):
        rank_positives(scores, queries, gallery)


# --- re-ranking ---------------------------------------------------------------------------------------------------


def test_rerank_by_hand():
    scores = np.array([[0.9, 0.8, 0.7, 0.6], [0.1, 0.2, 0.3, 0.4]], dtype=np.float32)
    new = rerank(scores, np.array([[0, 1], [3, 2]]), np.array([[-5.0, 2.0], [0.5, 0.5]]))
    assert np.argsort(-new[0]).tolist() == [1, 0, 2, 3]
    assert new[1, 2] == new[1, 3] > new[1, 1] > new[1, 0]
    np.testing.assert_array_equal(new[0, 2:], scores[0, 2:])
    assert scores[0, 0] == np.float32(0.9)  # the input is left alone


@settings(max_examples=150, deadline=None)
@given(st.data(), st.sampled_from([np.float16, np.float32, np.float64]), st.integers(1, 9))
def test_rerank_keeps_both_orders(data, dtype, k):
    """Against sorting by (in the shortlist, its score, else the first stage's score), on scales that lose digits."""
    width = np.finfo(dtype).bits
    values = st.floats(-1e4, 1e4, width=width) | st.sampled_from([0.0, 1.0, 1e-7, 6e4, -6e4])
    if dtype != np.float16:
        values |= st.sampled_from([np.float32(2.0**100).item(), 2.0**-100, -(2.0**60)])
    scores = data.draw(arrays(dtype, (3, 8), elements=values))
    indices = np.argsort(-scores, axis=1)[:, : min(k, 8)]
    shortlist = data.draw(arrays(dtype, indices.shape, elements=values))
    new = rerank(scores, indices, shortlist)
    assert np.isfinite(new).all() and new.dtype == np.promote_types(dtype, np.float32)
    for query in range(3):
        key = [(0, value) for value in scores[query].tolist()]
        for item, value in zip(indices[query], shortlist[query].tolist(), strict=True):
            key[item] = (1, value)
        for a in range(8):
            for b in range(8):
                assert (new[query, a] > new[query, b]) == (key[a] > key[b])


def test_rerank_of_one_item_changes_no_rank():
    scores = np.random.default_rng(2).normal(size=(6, 6))
    new = rerank(scores, scores.argmax(axis=1)[:, None], np.full((6, 1), -1e9))
    np.testing.assert_array_equal(np.argsort(new), np.argsort(scores))


def test_rerank_clamps_the_shortlist_to_the_gallery():
    scores, order = np.random.default_rng(3).normal(size=(2, 4, 5))
    indices = np.argsort(-scores, axis=1)
    padded = np.pad(indices, ((0, 0), (0, 3)), constant_values=-1)
    values = np.pad(np.take_along_axis(order, indices, axis=1), ((0, 0), (0, 3)), constant_values=np.nan)
    np.testing.assert_array_equal(np.argsort(rerank(scores, padded, values)), np.argsort(order))


@pytest.mark.parametrize(
    ("scores", "indices", "values", "message"),
    [
        (np.zeros((1, 3)), [[0, 0]], [[1.0, 2.0]], "query 0.*distinct"),
        (np.zeros((1, 3)), [[0, 3]], [[1.0, 2.0]], "between 0 and 2"),
        (np.zeros((1, 3)), [[-1, 0]], [[1.0, 2.0]], "between 0 and 2"),
        (np.zeros((1, 3)), [[1, 0]], [[1.0, np.nan]], "shortlist scores: nan at query 0, item 1"),
        (np.full((1, 3), np.nan), [[1, 0]], [[1.0, 2.0]], "first-stage scores: nan"),
        (np.zeros((1, 3)), [[0, 1]], [[1.0]], "cannot re-rank"),
        (np.zeros((2, 3)), [[0, 1]], [[1.0, 2.0]], "cannot re-rank"),
        (np.zeros((1, 3)), np.zeros((1, 0), dtype=int), np.zeros((1, 0)), "k at least 1"),
        (np.zeros(3), [0], [1.0], "cannot re-rank"),
    ],
)
def test_rerank_refuses_invalid_shortlists(scores, indices, values, message):
    with pytest.raises(LigatureError, match=message):
        rerank(scores, indices, values)


# --- bootstrap ----------------------------------------------------------------------------------------------------


def test_bootstrap_agrees_with_scipy():
    sample = np.random.default_rng(4).exponential(size=50)
    low, high = interval(bootstrap_means(sample[:, None], np.ones(50), resamples=4000, seed=1))
    theirs = bootstrap((sample,), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(5))
    np.testing.assert_allclose([low[0], high[0]], theirs.confidence_interval, atol=0.02)


def test_bootstrap_covers_the_truth_where_captions_of_an_image_agree():
    """Five captions that stand or fall with their image: intervals by image cover 95 %, by caption far fewer."""
    random, truth, trials = np.random.default_rng(6), 0.4, 200
    covered = np.zeros(2)
    for trial in range(trials):
        sums = 5.0 * (random.random(150) < truth)
        by_image = interval(bootstrap_means(sums[:, None], np.full(150, 5), resamples=200, seed=trial))
        captions = np.repeat(sums / 5, 5)
        by_caption = interval(bootstrap_means(captions[:, None], np.ones(750), resamples=200, seed=trial))
        covered += [low[0] <= truth <= high[0] for low, high in (by_image, by_caption)]
    assert 0.90 <= covered[0] / trials <= 0.99
    assert covered[1] / trials < 0.75


def test_bootstrap_is_seeded_and_weights_images_by_their_queries():
    sums, counts = np.array([[1.0, 0.0], [0.0, 9.0]]), np.array([1, 9])
    low, high = interval(bootstrap_means(sums, counts, seed=7))
    np.testing.assert_array_equal([low, high], interval(bootstrap_means(sums, counts, seed=7)))
    np.testing.assert_array_equal([low, high], [[0, 0], [1, 1]])  # a resample of one image alone happens half the time
    low, high = interval(bootstrap_means(np.ones((1, 1)), np.array([2])))
    assert low == high == 0.5


# --- R-precision and mAP@R ----------------------------------------------------------------------------------------


def by_definition(relevant):
    """Of one ranking: a list of whether each place holds a positive."""
    size = sum(relevant)
    hits = np.cumsum(relevant[:size])
    return hits[-1] / size, sum(hits[k] / (k + 1) for k in range(size) if relevant[k]) / size


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=6).filter(
        lambda row: any(p for _, p in row)
    )
)
def test_precision_at_r_is_the_mean_over_all_orders_of_the_ties(row):
    values, positive = np.array([value for value, _ in row], float), np.array([fits for _, fits in row])
    orders = [
        by_definition(positive[list(order)].tolist())
        for order in permutations(range(len(row)))
        if all(values[a] >= values[b] for a, b in pairwise(order))
    ]
    precision, average = precision_at_r(values[None], np.array([1]), positive.astype(int))
    np.testing.assert_allclose([precision[0], average[0]], np.mean(orders, axis=0), atol=1e-12)


def test_precision_at_r_where_queries_have_different_numbers_of_positives():
    scores = np.array([[5.0, 4, 3, 2, 1], [1, 2, 3, 4, 5]])
    precision, average = precision_at_r(scores, np.array([0, 1]), np.array([0, 1, 0, 1, 1]))
    np.testing.assert_allclose(precision, [1 / 2, 2 / 3])
    np.testing.assert_allclose(average, [1 / 2, 2 / 3])
