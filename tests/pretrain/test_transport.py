"""Transport plans against POT, and against IPOT written down literally in float64."""

from __future__ import annotations

import itertools
import math
from functools import partial

import numpy as np
import ot
import pytest
import tiny
import torch
from torch import Tensor

from pretrain import transport
from pretrain.transport import proximal_point, sinkhorn

SHAPES = [(20, 30), (30, 20), (24, 24), (1, 7), (7, 1), (1, 1)]


def cosine_cost(n: int, k: int, seed: int = 0, dtype: torch.dtype = torch.float64, width: int = 16) -> Tensor:
    """1 - cosine between random features and random codewords."""
    return 1 - tiny.unit(n, width, seed=seed, dtype=dtype) @ tiny.unit(k, width, seed=seed + 100, dtype=dtype).T


def clustered_cost(n: int, k: int, clusters: int = 8, seed: int = 0) -> Tensor:
    """Features in tight unbalanced clusters, codewords near the same centres: where a single inner step is weakest."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(clusters, 32, generator=generator)

    def near(rows: int) -> Tensor:
        of = (torch.rand(rows, generator=generator) ** 2 * clusters).long()
        return torch.nn.functional.normalize(centres[of] + 0.3 * torch.randn(rows, 32, generator=generator), dim=-1)

    return 1 - near(n) @ near(k).T


def marginal(size: int, seed: int) -> Tensor:
    weights = torch.rand(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.05
    return weights / weights.sum()


def rounded(plan: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """A plan with exactly these marginals near the given one (Altschuler et al. 2017, Algorithm 2)."""
    plan = plan * (a / plan.sum(1)).clamp(max=1)[:, None]
    plan = plan * (b / plan.sum(0)).clamp(max=1)
    missing_a, missing_b = a - plan.sum(1), b - plan.sum(0)
    return plan + missing_a[:, None] * missing_b / missing_a.sum().clamp(min=1e-300)


def gap(cost: Tensor, plan: Tensor, a: Tensor | None = None, b: Tensor | None = None) -> float:
    """Cost of the plan rounded to its marginals, less the least there is (`ot.emd`)."""
    cost, plan = cost.double(), plan.double()
    n, k = cost.shape
    a = torch.full((n,), 1 / n, dtype=torch.float64) if a is None else a
    b = torch.full((k,), 1 / k, dtype=torch.float64) if b is None else b
    least = ot.emd2(a.numpy(), b.numpy(), cost.numpy())
    return float((cost * rounded(plan, a, b)).sum()) - float(least)


def literal_ipot(cost: Tensor, a: Tensor, b: Tensor, beta: float, outer: int, inner: int) -> Tensor:
    """Xie et al. 2019, Algorithm 1, in plain numbers: kernel times plan, scaled by two vectors, the first of which is kept."""
    kernel, plan, rows = torch.exp(-cost / beta), torch.ones_like(cost), torch.ones_like(a)
    for _ in range(outer):
        product = kernel * plan
        for _ in range(inner):
            columns = b / (product.T @ rows)
            rows = a / (product @ columns)
        plan = rows[:, None] * product * columns
    return plan


@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("uneven", [False, True], ids=["uniform", "uneven marginals"])
def test_the_cost_is_within_2e_3_of_the_exact_plan_at_the_default(n, k, uneven):
    cost = cosine_cost(n, k, dtype=torch.float32)
    a, b = (marginal(n, 1), marginal(k, 2)) if uneven else (None, None)
    excess_cost = gap(cost, proximal_point(cost, a, b).plan, a, b)
    assert -1e-6 <= excess_cost <= 2e-3


@pytest.mark.parametrize(
    ("n", "k", "clusters", "seed"), [(48, 64, 8, 0), (48, 64, 8, 1), (128, 500, 16, 0), (100, 33, 5, 6)]
)
def test_clustered_features_are_within_2e_3_at_the_default_too(n, k, clusters, seed):
    """Mass has to move between clusters, which single sweeps do slowly: the paper's loop stands at 4 to 17e-3 after 50 steps."""
    cost = clustered_cost(n, k, clusters, seed)
    solved = proximal_point(cost)
    assert solved.marginal_errors[1] <= 1e-3 and -1e-6 <= gap(cost, solved.plan) <= 2e-3
    paper = proximal_point(cost, outer_steps=50, inner_steps=1)
    assert paper.marginal_errors[1] < 0.05 and 4e-3 < gap(cost, paper.plan) < 1.8e-2


def test_strides_end_at_the_plan_of_the_papers_converged_loop():
    cost, a, b = cosine_cost(12, 18), marginal(12, 1), marginal(18, 2)
    strides = proximal_point(cost, a, b, outer_steps=20, tolerance=1e-13)
    expected = proximal_point(cost, a, b, outer_steps=20, inner_steps=300)
    torch.testing.assert_close(strides.plan, expected.plan, atol=1e-11, rtol=1e-8)


def test_without_a_tolerance_strides_end_on_time_and_with_one_they_settle_the_columns():
    cost = clustered_cost(48, 64, 8, 2).double()
    loose, default, tight = (proximal_point(cost, tolerance=value).marginal_errors[1] for value in (None, 1e-3, 1e-9))
    assert loose > 1e-3 >= default > 1e-9 >= tight


def test_a_kernel_that_leaves_its_range_is_solved_again_with_its_maximum_taken_out():
    cost = cosine_cost(40, 60, dtype=torch.float32)
    log_a, log_b = (torch.full((size,), -torch.tensor(float(size)).log()) for size in (40, 60))
    problem = transport._Problem(cost, log_a, log_b)
    assert transport._solve(problem, transport._Schedule(0.001, 200, 1e-3), None, transport._sweep) is None
    assert proximal_point(cost, beta=0.001).plan.isfinite().all()


@pytest.mark.parametrize(("n", "k"), [(48, 64), (64, 48)])
@pytest.mark.parametrize("uniform", [True, False])
def test_newton_steps_come_to_the_plan_of_pots_sinkhorn(n, k, uniform):
    cost = clustered_cost(n, k, 8, 3).double()
    a, b = (
        [torch.full((size,), 1 / size, dtype=torch.float64) for size in (n, k)]
        if uniform
        else (marginal(n, 1), marginal(k, 2))
    )
    solved = proximal_point(cost, a, b, beta=2.0, outer_steps=40, tolerance=1e-9)
    assert solved.marginal_errors[1] <= 1e-9
    expected = ot.bregman.sinkhorn_log(a.numpy(), b.numpy(), cost.numpy(), 0.05, numItermax=100_000, stopThr=1e-11)
    np.testing.assert_allclose(solved.plan.numpy(), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("dense", [True, False])
def test_a_start_from_an_earlier_plan_of_the_same_samples_saves_most_of_the_work(monkeypatch, dense):
    cost, sweeps, newton = clustered_cost(48, 64, 8, 0), [], []
    nudged = cost + 0.003 * torch.randn(cost.shape, generator=torch.Generator().manual_seed(0))
    if not dense:
        monkeypatch.setattr(transport, "DENSE", 0)
    start = proximal_point(nudged).potentials[1]
    sweep, factor = transport._sweep, torch.linalg.cholesky_ex
    monkeypatch.setattr(transport, "_sweep", lambda *given: (sweeps.append(1), sweep(*given))[1])
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda system: (newton.append(1), factor(system))[1])
    solved = proximal_point(cost, start=start)
    assert (not sweeps and 1 <= len(newton) <= 5) if dense else (len(sweeps) <= 40 < transport.STRIDES and not newton)
    assert solved.marginal_errors[1] <= 1e-3 and -1e-6 <= gap(cost, solved.plan) <= 2e-3


def test_a_sinkhorn_plan_starts_from_an_earlier_one_too():
    cost = clustered_cost(48, 64, 8, 0)
    nudged = cost + 0.003 * torch.randn(cost.shape, generator=torch.Generator().manual_seed(0))
    cold = sinkhorn(cost, regularisation=0.02, steps=10)
    start = sinkhorn(nudged, regularisation=0.02, steps=500).potentials[1]
    assert sinkhorn(cost, regularisation=0.02, steps=10, start=start).marginal_errors[1] < cold.marginal_errors[1] / 2


def test_a_bad_warm_start_costs_time_but_not_the_plan():
    far = 40 * torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    costs = torch.stack([clustered_cost(48, 64, 8, seed) for seed in (0, 1)])
    near = proximal_point(costs[0]).potentials[1]
    solved = proximal_point(costs, start=torch.stack([near, far[1]]))
    torch.testing.assert_close(solved.plan[1], proximal_point(costs[1]).plan)
    torch.testing.assert_close(solved.plan[0], proximal_point(costs[0], start=near).plan, msg="as it is alone")
    assert (solved.marginal_errors[1] <= 1e-3).all()


def test_without_a_tolerance_the_start_does_not_change_the_plan():
    cost = clustered_cost(48, 64, 8, 0)
    far = 40 * torch.randn(64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        proximal_point(cost, start=far, tolerance=None).plan, proximal_point(cost, tolerance=None).plan
    )


def test_an_unsettled_result_is_still_the_plan_of_its_potentials():
    """Its rows are exact before the last division, which would hide that they were not."""
    cost = clustered_cost(48, 64, 8, 2).double()
    solved = proximal_point(cost, beta=0.02, tolerance=1e-30)
    f, g = solved.potentials
    plan = (f[:, None] + g - 200 / 0.02 * cost).exp()
    assert float((plan.sum(-1) - 1 / 48).abs().sum()) < 1e-9 and float(solved.marginal_errors[1]) > 1e-30


def test_newton_steps_that_end_between_the_tolerance_and_a_tenth_of_it_have_settled(monkeypatch):
    """No step at all here: the guess is within the tolerance, and that is enough."""
    cost = clustered_cost(48, 64, 8, 0).double()
    log_a, log_b = (torch.full((size,), -math.log(size), dtype=torch.float64) for size in (48, 64))
    g = proximal_point(cost, tolerance=1e-4).potentials[1]
    error = float(proximal_point(cost, tolerance=1e-4).marginal_errors[1])
    monkeypatch.setattr(transport, "NEWTON_STEPS", 0)
    potentials = transport._newton(cost, 400.0, g, log_a, log_b, 2 * error)
    assert potentials is not None and torch.equal(potentials[1], g)
    assert transport._newton(cost, 400.0, g, log_a, log_b, error / 2) is None


def test_sinkhorn_stops_at_its_tolerance():
    cost = cosine_cost(13, 8)
    stopped = sinkhorn(cost, steps=10_000, tolerance=1e-6).marginal_errors[1]
    assert 1e-9 < stopped <= 1e-6


def test_more_outer_steps_come_nearer_to_the_exact_plan():
    cost = cosine_cost(20, 30)
    gaps = [gap(cost, proximal_point(cost, outer_steps=steps).plan) for steps in (5, 20, 50, 200)]
    assert gaps == sorted(gaps, reverse=True) and gaps[-1] < 2e-4


@pytest.mark.parametrize(("n", "k"), [(12, 18), (18, 12)])
@pytest.mark.parametrize(("beta", "outer"), [(0.5, 1), (0.5, 10), (0.1, 3)])
@pytest.mark.parametrize("uneven", [False, True], ids=["uniform", "uneven marginals"])
def test_a_converged_inner_loop_gives_sinkhorn_at_beta_over_t(n, k, beta, outer, uneven):
    cost = cosine_cost(n, k)
    a, b = (marginal(n, 1), marginal(k, 2)) if uneven else (torch.full((n,), 1 / n), torch.full((k,), 1 / k))
    a, b = a.double() / a.double().sum(), b.double() / b.double().sum()
    plan = proximal_point(cost, a, b, beta, outer, inner_steps=400).plan
    expected = ot.sinkhorn(
        a.numpy(), b.numpy(), cost.numpy(), beta / outer, method="sinkhorn_log", numItermax=100_000, stopThr=1e-14
    )
    np.testing.assert_allclose(plan.numpy(), expected, atol=1e-10)


def test_one_outer_step_is_a_sinkhorn_whose_kernel_is_the_previous_plan():
    cost, beta = cosine_cost(9, 14), 0.5
    a, b = marginal(9, 1), marginal(14, 2)
    before = proximal_point(cost, a, b, beta, 4, inner_steps=500).plan
    after = proximal_point(cost, a, b, beta, 5, inner_steps=500).plan
    shifted = (cost - beta * before.log()).numpy()
    expected = ot.sinkhorn(
        a.numpy(), b.numpy(), shifted, beta, method="sinkhorn_log", numItermax=100_000, stopThr=1e-14
    )
    np.testing.assert_allclose(after.numpy(), expected, atol=1e-11)


@pytest.mark.parametrize("outer", [1, 2, 50])
@pytest.mark.parametrize("inner", [1, 2])
def test_the_potentials_give_ipots_own_plan_step_for_step(outer, inner):
    """Not only in the limit: the unfinished plan of one inner step is IPOT's, its warm start included."""
    cost, a, b = cosine_cost(11, 17), marginal(11, 1), marginal(17, 2)
    plan = proximal_point(cost, a, b, 0.5, outer, inner).plan
    torch.testing.assert_close(plan, literal_ipot(cost, a, b, 0.5, outer, inner), atol=1e-13, rtol=1e-9)


@pytest.mark.parametrize("steps", [1, 7, 500])
@pytest.mark.parametrize("regularisation", [1.0, 0.05])
def test_sinkhorn_equals_pots(steps, regularisation):
    cost, a, b = cosine_cost(13, 8), marginal(13, 1), marginal(8, 2)
    ours = sinkhorn(cost, a, b, regularisation, steps)
    kernel, rows = torch.exp(-cost / regularisation), torch.ones_like(a)
    for _ in range(steps):
        columns = b / (kernel.T @ rows)
        rows = a / (kernel @ columns)
    torch.testing.assert_close(ours.plan, rows[:, None] * kernel * columns, atol=1e-13, rtol=1e-9)
    if steps == 500:
        expected = ot.bregman.sinkhorn_log(
            a.numpy(), b.numpy(), cost.numpy(), regularisation, numItermax=10_000, stopThr=1e-13
        )
        np.testing.assert_allclose(ours.plan.numpy(), expected, atol=1e-9)


@pytest.mark.parametrize("solve", [proximal_point, sinkhorn])
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_rows_sum_to_their_marginal_and_both_errors_are_reported(solve, n, k):
    a, b = marginal(n, 1).float(), marginal(k, 2).float()
    plan, (f, g), (row_error, column_error) = solve(cosine_cost(n, k, dtype=torch.float32), a, b)
    assert plan.shape == (n, k) and f.shape == (n,) and g.shape == (k,) and (plan >= 0).all()
    torch.testing.assert_close(plan.sum(1), a, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(row_error, (plan.sum(1) - a).abs().sum())
    torch.testing.assert_close(column_error, (plan.sum(0) - b).abs().sum())
    assert row_error < 1e-5


def test_the_plan_is_the_potentials_and_nothing_else():
    cost = cosine_cost(6, 9)
    plan, (f, g), _ = proximal_point(cost, beta=0.5, outer_steps=50)
    torch.testing.assert_close(plan, (-50 * cost / 0.5 + f[:, None] + g).exp())


@pytest.mark.parametrize("solve", [proximal_point, sinkhorn])
def test_a_batch_of_problems_is_each_of_them_alone(solve):
    costs = torch.stack([cosine_cost(10, 15, seed) for seed in range(6)]).view(2, 3, 10, 15)
    together = solve(costs)
    for i, j in itertools.product(range(2), range(3)):
        alone = solve(costs[i, j])
        torch.testing.assert_close(together.plan[i, j], alone.plan, atol=1e-14, rtol=1e-12)
        torch.testing.assert_close(together.marginal_errors[1][i, j], alone.marginal_errors[1], atol=1e-12, rtol=1e-6)


def test_problems_of_a_batch_may_have_marginals_of_their_own():
    costs = torch.stack([cosine_cost(10, 15, seed) for seed in range(2)])
    a, b = torch.stack([marginal(10, 1), marginal(10, 3)]), marginal(15, 2)
    together = proximal_point(costs, a, b).plan
    for number in range(2):
        alone = proximal_point(costs[number], a[number], b).plan
        torch.testing.assert_close(together[number], alone, atol=1e-14, rtol=1e-12)


@pytest.mark.parametrize("beta", [1.0, 0.5, 0.1, 0.05, 0.01, 0.005, 0.001])
@pytest.mark.parametrize("cost", [cosine_cost(64, 400, dtype=torch.float32), clustered_cost(64, 400)])
def test_plans_stay_finite_in_float32_and_near_float64_for_any_beta(beta, cost):
    plan, potentials, errors = proximal_point(cost, beta=beta)
    assert plan.dtype == torch.float32
    assert all(part.isfinite().all() for part in (plan, *potentials, *errors))
    torch.testing.assert_close(plan.sum(1), torch.full((64,), 1 / 64), rtol=2e-3, atol=0)
    strides = proximal_point(cost, beta=beta, tolerance=None)
    assert errors[1] <= 1.001 * strides.marginal_errors[1]
    for tolerance in (
        [None, 1e-3] if beta >= 0.1 else [None]
    ):  # sharper, Newton steps may settle in one precision and not in the other
        near, expected = (proximal_point(given, beta=beta, tolerance=tolerance).plan for given in (cost, cost.double()))
        assert 64 * (near - expected).abs().max() < (1e-4 if beta >= 0.05 else 2e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_costs_are_solved_in_float32(dtype):
    cost = cosine_cost(8, 12, dtype=torch.float32).to(dtype)
    plan = proximal_point(cost).plan
    assert plan.dtype == torch.float32
    torch.testing.assert_close(plan, proximal_point(cost.float()).plan)


def test_permuting_samples_and_codewords_permutes_the_plan():
    cost, a, b = cosine_cost(15, 22), marginal(15, 1), marginal(22, 2)
    rows, columns = (torch.randperm(size, generator=torch.Generator().manual_seed(5)) for size in (15, 22))
    plan = proximal_point(cost, a, b).plan
    permuted = proximal_point(cost[rows][:, columns], a[rows], b[columns]).plan
    torch.testing.assert_close(permuted, plan[rows][:, columns], atol=1e-14, rtol=1e-9)


def test_duplicates_share_alike():
    cost = cosine_cost(6, 8)
    cost = torch.cat([cost, cost[:2]])
    cost = torch.cat([cost, cost[:, :3]], 1)
    plan = proximal_point(cost).plan
    torch.testing.assert_close(plan[:2], plan[6:])
    torch.testing.assert_close(plan[:, :3], plan[:, 8:])
    assert -1e-9 <= gap(cost, plan) <= 2e-3


def test_a_cost_without_preferences_spreads_the_mass():
    for value in (0.0, 2.0):
        plan = proximal_point(torch.full((4, 6), value)).plan
        torch.testing.assert_close(plan, torch.full((4, 6), 1 / 24))


def test_a_constant_added_to_the_cost_changes_nothing():
    cost = cosine_cost(9, 13)
    torch.testing.assert_close(proximal_point(cost + 7).plan, proximal_point(cost).plan, atol=1e-13, rtol=1e-8)


@pytest.mark.parametrize("solve", [partial(proximal_point, inner_steps=50), partial(sinkhorn, steps=500)])
def test_a_sample_or_codeword_without_mass_takes_none_and_disturbs_nothing(solve):
    cost, a, b = cosine_cost(10, 15), marginal(10, 1), marginal(15, 2)
    widened = cosine_cost(11, 16, seed=7)
    widened[:10, :15] = cost
    plan = solve(widened, torch.cat([a, torch.zeros(1)]), torch.cat([b, torch.zeros(1)])).plan
    torch.testing.assert_close(plan[:10, :15], solve(cost, a, b).plan, atol=1e-6, rtol=1e-6)
    assert not plan[10].any() and not plan[:, 15].any()


def test_no_gradient_goes_through_a_plan():
    cost = cosine_cost(4, 5).requires_grad_()
    assert not proximal_point(cost).plan.requires_grad and not sinkhorn(cost).plan.requires_grad


def test_a_target_is_never_sharper_than_samples_over_codewords():
    """Each entry of a plan is at most 1 / codewords, so N samples give targets of at most N / K (DESIGN section 5)."""
    plan = proximal_point(cosine_cost(16, 64, dtype=torch.float32), inner_steps=20).plan
    assert 16 * plan.max() <= 16 / 64 * 1.01
