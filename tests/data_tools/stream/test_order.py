"""The order of samples and their random numbers are functions of the seed alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some
from scipy import stats

from data_tools.stream.order import SampleOrder, derived_seed, uniforms


def whole(samples: int, seed: int) -> SampleOrder:
    return SampleOrder(np.array([samples]), seed)


def epoch_of(order: SampleOrder, epoch: int) -> list[int]:
    return order.at(epoch * order.samples + np.arange(order.samples)).tolist()


@given(
    counts=some.lists(some.integers(0, 30), min_size=1, max_size=12).filter(any),
    seed=some.integers(0, 2**63),
    epoch=some.integers(0, 10**9),
    block=some.integers(0, 12),
    window=some.integers(2, 70),
)
def test_every_epoch_is_a_permutation(counts, seed, epoch, block, window):
    order = SampleOrder(np.array(counts), seed, block, window)
    assert sorted(epoch_of(order, epoch)) == list(range(sum(counts)))


def test_epochs_and_seeds_differ():
    order = whole(100, 3)
    orders = [epoch_of(order, 0), epoch_of(order, 1), epoch_of(whole(100, 4), 0), list(range(100))]
    assert len({tuple(one) for one in orders}) == 4


def test_seed_and_epoch_are_not_added_up():
    """With seed + epoch, the second epoch of one run would be the first of the next seed's."""
    assert epoch_of(whole(100, 3), 1) != epoch_of(whole(100, 4), 0)


@given(positions=some.lists(some.integers(0, 400), max_size=60), block=some.integers(0, 9), window=some.integers(2, 50))
def test_a_position_means_the_same_however_it_was_reached(positions, block, window):
    """One by one, in bulk, over windows and epochs, forwards and backwards."""
    counts = np.array([13, 0, 7, 30])
    order = SampleOrder(counts, 5, block, window)
    in_bulk = order.at(np.array(positions, np.int64)).tolist()
    assert in_bulk == [SampleOrder(counts, 5, block, window)[position] for position in positions]


def test_the_order_is_the_same_on_every_machine():
    """Runs resume on other machines and versions: these numbers must never change."""
    assert epoch_of(whole(8, 0), 0) == [0, 2, 6, 3, 5, 7, 4, 1]
    assert epoch_of(SampleOrder(np.array([5, 3, 6]), 1, 2, 4), 3) == [8, 0, 5, 6, 2, 9, 7, 1, 13, 11, 4, 10, 12, 3]
    assert derived_seed(0, 1, 2) == 1_535_930_435_702_422_785
    assert uniforms(7, np.array([0, 5]), 2).ravel() == pytest.approx(
        [0.9630732790958273, 0.44928742697528556, 0.8357234619419579, 0.796646640113069], abs=1e-15
    )


def test_a_set_no_larger_than_half_a_window_is_shuffled_uniformly():
    """Every sample is as likely at every place (chi-squared over 1,000 seeds), in blocks of 3 all the same."""
    counts = np.zeros((12, 12))
    for seed in range(1000):
        counts[np.arange(12), epoch_of(SampleOrder(np.array([7, 5]), seed, 3, 24), 0)] += 1
    assert stats.chi2.sf(((counts - 1000 / 12) ** 2 / (1000 / 12)).sum(), 11 * 11) > 1e-3


def test_blocks_come_from_everywhere_and_samples_slide_over_the_windows():
    """Ten thousand neighbours on the disk, in windows of 512 with blocks of 16: a batch holds many blocks, neighbours end up
    in different batches, and a sample moves farther than its window's borders."""
    order = SampleOrder(np.full(10, 1000), 0, 16, 512)
    samples = order.at(np.arange(10_000))
    batches = samples.reshape(-1, 100)
    blocks = np.array([len(set(batch // 16)) for batch in batches])
    assert blocks.mean() > 40  # of 100 at most; read in order it would be 7
    spread = np.array([len(set(batch // 1000)) for batch in batches])
    assert spread.mean() > 8.5  # of ten shards
    place = np.argsort(samples)
    distance = np.abs(place - np.arange(10_000))
    assert np.median(distance) > 2000  # a third of all, as if drawn by lot
    inside = [np.ptp(place[start : start + 16]) for start in range(0, 992, 16)]
    assert max(inside) > 512 and np.mean(inside) > 300  # a block is torn over more than one window


@pytest.mark.parametrize(("block", "window"), [(-1, 10), (3, 1)])
def test_an_impossible_shuffle_is_refused(block, window):
    with pytest.raises(ValueError, match="they must be at least 0 and 2"):
        SampleOrder(np.array([3]), 0, block, window)


def test_derived_seeds_do_not_collide_and_fit_torch():
    seeds = {derived_seed(seed, step, sample) for seed in range(3) for step in range(20) for sample in range(20)}
    assert len(seeds) == 1200 and all(0 <= seed < 2**63 for seed in seeds)


def test_derived_seeds_depend_on_the_order_of_their_parts():
    assert derived_seed(1, 2) != derived_seed(2, 1)


def test_numbers_belong_to_their_sample_not_to_their_batch():
    positions = np.random.default_rng(0).integers(0, 2**40, 64)
    whole = uniforms(3, positions, 5)
    assert np.array_equal(whole, np.concatenate([uniforms(3, part, 5) for part in np.split(positions, 8)]))
    assert np.array_equal(whole[::-1], uniforms(3, positions[::-1], 5))
    assert np.array_equal(whole[:, :2], uniforms(3, positions, 2))


@pytest.mark.parametrize("seed", [0, 1, 2**62])
def test_numbers_are_uniform(seed):
    numbers = uniforms(seed, np.arange(20_000), 3)
    assert numbers.min() >= 0 and numbers.max() < 1
    for column in numbers.T:
        assert stats.kstest(column, "uniform").pvalue > 1e-4


def test_numbers_of_neighbours_columns_and_seeds_are_unrelated():
    numbers = uniforms(0, np.arange(20_000), 2)
    pairs = {
        "columns": (numbers[:, 0], numbers[:, 1]),
        "neighbours": (numbers[:-1, 0], numbers[1:, 0]),
        "seeds": (numbers[:, 0], uniforms(1, np.arange(20_000), 2)[:, 0]),
    }
    for name, (one, other) in pairs.items():
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.03, name  # four standard errors
