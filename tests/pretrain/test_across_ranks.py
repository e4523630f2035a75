"""Two processes and one, in float64: the same losses, the same raw gradients, the same plans, the same queue."""

from __future__ import annotations

import across_ranks_jobs
import pytest
import torch

CASES = {
    "nearby negatives": {},
    "negatives from all ranks, levels": {
        "objectives__matching": {"negatives": "all_ranks", "same_codeword": True},
        "objectives__levels__weight": 1.0,
        "model__levels": [[1, 1]],
        "objectives__codebook__features": "student",
        "transport__samples": "batch+queue",
    },
}


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_two_ranks_compute_the_same_as_one_process_with_the_whole_batch(gloo_pool, lone_process, changes):
    told = gloo_pool.run(across_ranks_jobs.gradients, changes)
    losses, gradients, plan, queue = lone_process.run(
        across_ranks_jobs.gradients, changes | {"training__micro_batch": 16}
    )[0]
    # Image and text plan of the gathered batch are the one process's.
    torch.testing.assert_close(torch.cat([rank[2] for rank in told]), plan, rtol=1e-5, atol=1e-9)
    for found_losses, found, _, found_queue in told:
        assert found_losses == pytest.approx(losses, rel=1e-6)
        assert torch.equal(found_queue, queue)
        for name, gradient in gradients.items():
            scale = gradient.abs().max()
            # A bias of the keys shifts all logits of a query alike: its gradient is zero but for rounding.
            assert (found[name] - gradient).abs().max() <= 1e-5 * scale + 1e-9, name
    assert sum(bool(gradient.any()) for gradient in gradients.values()) == len(gradients)


def test_two_ranks_move_codewords_and_centres_as_one_process_does(gloo_pool, lone_process):
    changes = {"model__codebook_update": "average", "model__codebook_centered": True, "model__codewords": 4}
    changes |= {"transport__samples": "batch+queue"}
    first, second = gloo_pool.run(across_ranks_jobs.moving_codebook, changes)
    (alone,) = lone_process.run(across_ranks_jobs.moving_codebook, changes | {"training__micro_batch": 16})
    for mine, other, single in zip(first, second, alone, strict=True):
        assert torch.equal(mine, other)
        torch.testing.assert_close(mine, single, rtol=0, atol=1e-4)
