"""The process pool of the distributed tests works."""

from __future__ import annotations

import pool_jobs
import pytest
from gloo_pool import RankFailed


def test_results_come_back_in_rank_order_and_collectives_work(gloo_pool):
    assert gloo_pool.run(pool_jobs.rank_and_sum, 5) == [(0, 15), (1, 15)]


def test_processes_stay_between_runs(gloo_pool):
    assert gloo_pool.run(pool_jobs.process_id) == gloo_pool.run(pool_jobs.process_id)


def test_a_lone_process_is_a_world_of_one(lone_process):
    assert lone_process.run(pool_jobs.rank_and_sum, value=5) == [(0, 5)]


def test_an_exception_in_one_rank_fails_with_its_traceback_and_the_pool_starts_afresh(gloo_pool):
    with pytest.raises(RankFailed, match=r"(?s)rank 1 of 2.*pool_jobs\.py.*ZeroDivisionError: on purpose"):
        gloo_pool.run(pool_jobs.fail_on, 1)
    assert gloo_pool.run(pool_jobs.rank_and_sum, 1) == [(0, 3), (1, 3)]


def test_a_rank_that_dies_is_reported(gloo_pool):
    with pytest.raises(RankFailed, match=r"rank 0 of 2 ---\nthe process died"):
        gloo_pool.run(pool_jobs.die_on, 0)
