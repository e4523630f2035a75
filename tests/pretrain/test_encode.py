"""Encoding a collection on several ranks gives what one gives, in the collection's order."""

from __future__ import annotations

import encode_jobs
import pytest
import torch


@pytest.mark.parametrize(("count", "each"), [(5, 2), (1, 1), (3, 1), (4, 5)], ids=str)
@pytest.mark.parametrize("keep_tokens", [True, False], ids=["tokens too", "features alone"])
def test_two_ranks_encode_like_one_even_where_one_rank_is_idle(gloo_pool, lone_process, count, each, keep_tokens):
    (alone,) = lone_process.run(encode_jobs.encode, count, each, keep_tokens)
    for together in gloo_pool.run(encode_jobs.encode, count, each, keep_tokens):
        assert together.keys() == alone.keys()
        for name, wanted in alone.items():
            found = together[name]
            if wanted is None:
                assert found is None and not keep_tokens, name
            else:
                assert found.dtype == wanted.dtype, name
                assert torch.equal(found, wanted), name  # to the last bit: batches hold the same items
    assert len(alone["image"]) == count and len(alone["text"]) == count * each
