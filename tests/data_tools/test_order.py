"""The order of samples and the numbers that belong to them: functions of the seed, and of nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some
from scipy import stats

from data_tools.order import SampleOrder, derived_seed, uniforms


def epoch_of(order: SampleOrder, epoch: int) -> list[int]:
    return [order[epoch * order.samples + place] for place in range(order.samples)]


@given(samples=some.integers(1, 50), seed=some.integers(0, 2**63), epoch=some.integers(0, 10**9))
def test_every_epoch_is_a_permutation(samples, seed, epoch):
    assert sorted(epoch_of(SampleOrder(samples, seed), epoch)) == list(range(samples))


def test_epochs_and_seeds_differ():
    order = SampleOrder(100, 3)
    seen = [epoch_of(order, 0), epoch_of(order, 1), epoch_of(SampleOrder(100, 4), 0), list(range(100))]
    assert len({tuple(one) for one in seen}) == 4


def test_seed_and_epoch_are_not_added_up():
    """With seed + epoch, the second epoch of one run would be the first of the next seed's."""
    assert epoch_of(SampleOrder(100, 3), 1) != epoch_of(SampleOrder(100, 4), 0)


def test_a_position_means_the_same_however_one_came_there():
    forwards, backwards = SampleOrder(13, 5), SampleOrder(13, 5)
    positions = list(range(60))
    assert [forwards[p] for p in positions] == [backwards[p] for p in reversed(positions)][::-1]


def test_the_order_is_the_one_of_every_machine():
    """Runs resume on other machines and versions: these numbers must never change."""
    assert epoch_of(SampleOrder(8, 0), 0) == [2, 4, 3, 6, 5, 0, 1, 7]
    assert derived_seed(0, 1, 2) == 1_535_930_435_702_422_785
    assert uniforms(7, np.array([0, 5]), 2).ravel() == pytest.approx(
        [0.9630732790958273, 0.44928742697528556, 0.8357234619419579, 0.796646640113069], abs=1e-15
    )


def test_derived_seeds_do_not_collide_and_fit_torch():
    seeds = {derived_seed(seed, step, sample) for seed in range(3) for step in range(20) for sample in range(20)}
    assert len(seeds) == 1200 and all(0 <= seed < 2**63 for seed in seeds)


def test_the_place_of_a_part_matters():
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
