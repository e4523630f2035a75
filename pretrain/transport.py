"""Optimal transport between samples and codewords, in the log domain, batched over problems.

Axes in tensor names: n, the samples; k, the codewords. Leading axes ("…") are problems. D is the cost, a and b the marginals, f and g
the potentials (logarithms of the scaling vectors).

**The plan.** Entropy-regularised transport at regularisation eps has the plan `exp(-D / eps + f_i + g_j)`. Sinkhorn's sweep makes the
columns right, `g = log b - logsumexp_i(f - D / eps)`, then the rows, `f = log a - logsumexp_j(g - D / eps)`.

**IPOT is Sinkhorn at beta / t.** Proximal point (Xie et al., UAI 2019; CODIS, Algorithm 2) minimises `<T, D> + beta * KL(T | T_before)`
in each outer step. The minimum is `T_before * exp(-D / beta)`, rescaled to the marginals. So the plan after t outer steps is
`exp(-t * D / beta + f_i + g_j)`: with a converged inner loop, Sinkhorn's at regularisation beta / t. The code calls t / beta the
sharpness. Two potentials are the whole state: nothing of the plan's size is carried from step to step, and nothing under- or overflows.
(The slides' scale `1 / (n Q sigma)` is a slip that loses mass: the marginals here are right.)

**Fewer steps.** By that identity only the last t matters, not the steps before it. With `inner_steps`, `_paper_loop` takes every outer
step all the same. Otherwise `_solve` goes in two stages:

1. `_stride` takes many outer steps at once, with one sweep a stride. Each sweep starts from potentials extrapolated along the stride
   before. (IPOT's own warm start, which keeps its scaling vector, is that extrapolation.)
2. `_settle` stays at the last t until the columns are right within the tolerance. Where the smaller side has at most `DENSE` unknowns,
   it takes Newton steps (`_newton`): three to five do what a hundred sweeps would. Larger problems, and those that Newton steps do not
   settle, get over-relaxed sweeps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

STRIDES, GROWTH = 120, 1.02
"""Strides to reach `outer_steps`, and the factor by which each is longer than the one before."""
FEW_STRIDES = 20, 1.15
"""The same where Newton steps follow; this is tried first."""
MORE_SWEEPS, RELAXATION = 480, 1.7
"""Over-relaxed sweeps at the end (Thibault et al. 2017), at most, and their relaxation."""
CHECK_EVERY = 10
"""Sweeps between two checks of the column error: a check waits for the device."""
CACHED = 1 << 17
"""Entries of the kernel that a CPU works on at a time, so that they stay in its cache."""

DENSE = 1024
"""Largest number of unknowns, on the smaller side, that Newton steps are used for. Their linear system is dense."""
NEWTON_STEPS, DAMPING, SHORTEST = 30, 1e-3, 0.02
"""Most Newton steps, the share of the error in their regularisation, and the shortest fraction of a step that is tried."""

Potentials = tuple[Tensor, Tensor]


class Transport(NamedTuple):
    """A plan, and how well it keeps its marginals."""

    plan: Tensor
    """(…, n, k), non-negative. Rows sum to `a` exactly (the last update is on the sample side)."""
    potentials: Potentials
    """f (…, n) and g (…, k). Up to rounding the plan is `exp(-sharpness * cost + f_i + g_j)`, where the sharpness is
    outer_steps / beta, or 1 / regularisation."""
    marginal_errors: tuple[Tensor, Tensor]
    """(…) each: the sum of |row sums - a| and of |column sums - b|. Large values ask for more steps, or a larger beta."""


class _Problem(NamedTuple):
    """A batch of transport problems."""

    cost_nk: Tensor
    """(…, n, k), float32 or float64."""
    log_a_n: Tensor
    """(…, n)"""
    log_b_k: Tensor
    """(…, k)"""


Sweep = Callable[[_Problem, float, Tensor, Tensor, float], Potentials]
"""(problem, sharpness, f, g, relaxation) -> new f and g."""


class _Schedule(NamedTuple):
    """How far a problem is solved."""

    beta: float
    outer_steps: int
    tolerance: float | None
    """Column error at which a problem has settled; None: stop at the end of the strides."""

    @property
    def sharpness(self) -> float:
        """The last t / beta."""
        return self.outer_steps / self.beta


@torch.no_grad()
def proximal_point(
    cost: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    beta: float = 0.5,
    outer_steps: int = 200,
    inner_steps: int | None = None,
    tolerance: float | None = 1e-3,
    start: Tensor | None = None,
) -> Transport:
    """Approach the plan of least cost between `a` and `b` by `outer_steps` proximal steps of size `1 / beta`.

    Args:
        cost: (…, n, k), any float dtype; computed in float32, or float64 if it is float64.
        a: (…, n) masses of the samples; None: uniform.
        b: (…, k) masses of the codewords; None: uniform.
        beta: weight of each step's divergence from the plan before.
        outer_steps: the plan's entropy is that of a regularisation of beta / outer_steps.
        inner_steps: sweeps in each outer step of the paper's loop, which ignores the tolerance. None takes many outer steps at
            once, then settles the columns.
        tolerance: column error at which a problem has settled; None stops at the end of the strides.
        start: (…, k), the potential g of an earlier plan over nearly the same codewords, instead of the strides. Where a problem
            does not settle from it, or where there is no tolerance, the solver takes the strides as well.
    """
    problem = _prepare(cost, a, b)
    if inner_steps is not None:
        f, g = _paper_loop(problem, beta, outer_steps, inner_steps)
        return _finish(problem, outer_steps / beta, f, g)
    schedule = _Schedule(beta, outer_steps, tolerance)
    all_have_mass = all(marginal is None or bool((marginal > 0).all()) for marginal in (a, b))
    potentials = _solve(problem, schedule, start, _sweep) if all_have_mass else None
    if potentials is None:  # a marginal is 0, or a kernel left its range: take the largest term out of every sum first
        potentials = _solve(problem, schedule, start, _stable_sweep)
    assert potentials is not None, "logarithms of sums are finite"
    return _finish(problem, schedule.sharpness, *potentials)


@torch.no_grad()
def sinkhorn(
    cost: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    regularisation: float = 0.05,
    steps: int = 100,
    tolerance: float | None = None,
    start: Tensor | None = None,
) -> Transport:
    """Solve for the entropy-regularised plan (Cuturi 2013).

    Args:
        cost: (…, n, k), as in `proximal_point`.
        a: (…, n) masses of the samples; None: uniform.
        b: (…, k) masses of the codewords; None: uniform.
        regularisation: weight of the entropy.
        steps: most sweeps.
        tolerance: stop as soon as the column error of every problem is within it; None: never before `steps`.
        start: (…, k), the potential g of an earlier plan.
    """
    problem = _prepare(cost, a, b)
    cost_nk, log_a_n, log_b_k = problem
    kernel_nk = cost_nk / -regularisation
    f, g = torch.zeros_like(log_a_n), torch.zeros_like(log_b_k)
    if start is not None:
        f = log_a_n - _logsumexp(kernel_nk + start.to(cost_nk).unsqueeze(-2), dim=-1)
    for step in range(1, steps + 1):
        g = log_b_k - _logsumexp(kernel_nk + f.unsqueeze(-1), dim=-2)
        f = log_a_n - _logsumexp(kernel_nk + g.unsqueeze(-2), dim=-1)
        if tolerance is None or step % CHECK_EVERY:
            continue
        if bool((_column_error(problem, 1 / regularisation, f, g) <= tolerance).all()):
            break
    return _finish(problem, 1 / regularisation, f, g)


def _paper_loop(problem: _Problem, beta: float, outer_steps: int, inner_steps: int) -> Potentials:
    cost_nk, log_a_n, log_b_k = problem
    f, warm, g = torch.zeros_like(log_a_n), torch.zeros_like(log_a_n), torch.zeros_like(log_b_k)
    for step in range(1, outer_steps + 1):
        kernel_nk, base = cost_nk * (-step / beta), f
        for _ in range(inner_steps):
            # IPOT keeps its scaling vector from one outer step to the next: in potentials, an extrapolation of f.
            g = log_b_k - _logsumexp(kernel_nk + (base + warm).unsqueeze(-1), dim=-2)
            f = log_a_n - _logsumexp(kernel_nk + g.unsqueeze(-2), dim=-1)
            warm = f - base
    return f, g


def _solve(problem: _Problem, schedule: _Schedule, start: Tensor | None, sweep: Sweep) -> Potentials | None:
    """Settle every problem from a series of guesses, the cheapest first.

    Returns:
        f and g; None where a number left its range.
    """
    cost_nk, log_a_n, log_b_k = problem
    sharpness = schedule.sharpness
    newton = schedule.tolerance is not None and min(cost_nk.shape[-2:]) <= DENSE

    def guesses() -> Iterator[tuple[Tensor, Tensor, int]]:
        """Yield f, g, and the number of sweeps that may be spent on settling them."""
        if start is not None and schedule.tolerance is not None:  # settled already, except for what changed since
            g = start.to(cost_nk).expand_as(log_b_k)
            f = log_a_n - _logsumexp(cost_nk * -sharpness + g.unsqueeze(-2), dim=-1)
            yield f, g, 0 if newton else STRIDES
        if newton:
            yield *_stride(problem, schedule, *FEW_STRIDES, sweep), 0
        yield *_stride(problem, schedule, STRIDES, GROWTH, sweep), MORE_SWEEPS

    best: tuple[Tensor, Tensor, Tensor] | None = None
    for f, g, sweeps in guesses():
        if best:  # problems that have settled stay as they are
            best_f, best_g, settled = best
            f, g = torch.where(settled[..., None], best_f, f), torch.where(settled[..., None], best_g, g)
        if newton and schedule.tolerance is not None:
            f, g = _newton_each(problem, sharpness, f, g, schedule.tolerance)
        best = _settle(problem, schedule, f, g, sweeps, sweep)
        if best is None or bool(best[2].all()):
            break
    return best and best[:2]


def _stride(problem: _Problem, schedule: _Schedule, strides: int, growth: float, sweep: Sweep) -> Potentials:
    """Take all outer steps in `strides` strides, each longer than the one before by the factor `growth`."""
    outer_steps, beta = schedule.outer_steps, schedule.beta
    f, g = torch.zeros_like(problem.log_a_n), torch.zeros_like(problem.log_b_k)
    f_change, g_change = f, g
    # Strides are a geometric series that adds up to `outer_steps`.
    stride, step, previous = outer_steps * (growth - 1) / (growth**strides - 1), 0.0, 0.0
    for _ in range(strides):
        ahead = stride / previous if previous else 0.0
        step, previous, stride = step + stride, stride, stride * growth
        new_f, new_g = sweep(problem, step / beta, f + ahead * f_change, g + ahead * g_change, 1.0)
        f_change, g_change, f, g = new_f - f, new_g - g, new_f, new_g
    return f, g


def _settle(
    problem: _Problem, schedule: _Schedule, f: Tensor, g: Tensor, most: int, sweep: Sweep
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Sweep at the last sharpness until every problem is within the tolerance, at most `most` times.

    Returns:
        f, g, and which problems have settled, (…) bool; None where a number left its range.
    """
    tolerance, sharpness = schedule.tolerance, schedule.sharpness
    for number in range(most + 1):
        if number % CHECK_EVERY == 0:
            error = _column_error(problem, sharpness, f, g)
            if not bool(error.isfinite().all()):
                return None
            settled = torch.ones_like(error, dtype=torch.bool) if tolerance is None else error <= tolerance
            if bool(settled.all()) or number == most:
                break
        # The last sweep before a check is a plain one: after it the rows are exact, and the column error alone tells whether it has settled.
        relaxation = 1.0 if number % CHECK_EVERY == CHECK_EVERY - 1 else RELAXATION
        new_f, new_g = sweep(problem, sharpness, f, g, relaxation)
        # A problem that has settled stays as it is: its plan must not depend on those it is batched with.
        f, g = torch.where(settled[..., None], f, new_f), torch.where(settled[..., None], g, new_g)
    return f, g, settled


def _newton_each(problem: _Problem, sharpness: float, f: Tensor, g: Tensor, tolerance: float) -> Potentials:
    """Take Newton steps for each problem that has not settled. A problem that they do not settle keeps its f and g."""
    f, g = f.clone(), g.clone()
    for index in (~(_column_error(problem, sharpness, f, g) <= tolerance)).nonzero().tolist():
        at = tuple(index)
        cost_nk, log_a_n, log_b_k = (tensor[at] for tensor in problem)
        n, k = cost_nk.shape
        if k <= n:
            settled = _newton(cost_nk, sharpness, g[at], log_a_n, log_b_k, tolerance)
            f[at], g[at] = settled or (f[at], g[at])
        else:
            # The transposed problem has fewer unknowns. Making the rows exact afterwards does not increase the column error.
            settled = _newton(cost_nk.T.contiguous(), sharpness, f[at], log_b_k, log_a_n, tolerance)
            if settled:
                g[at] = settled[0]
                f[at] = log_a_n - _logsumexp(cost_nk * -sharpness + g[at], dim=-1)
    return f, g


class _Dual(NamedTuple):
    """The dual of one problem at some g, with the f that makes the rows right."""

    f: Tensor
    plan_nk: Tensor
    columns_k: Tensor
    """Column sums of the plan."""
    missing_k: Tensor
    """b - columns."""
    error: float
    """Sum of |missing|."""


def _newton(
    cost_nk: Tensor, sharpness: float, g: Tensor, log_a_n: Tensor, log_b_k: Tensor, tolerance: float
) -> Potentials | None:
    """Take regularised Newton steps (Li et al. 2004) on the dual of one problem, in g alone, from a guess near enough.

    The columns miss r = b - columns, and they change with g by H = diag(columns) - plan' diag(1 / a) plan. H is singular,
    because a constant added to g changes nothing. So H + c |r| is solved, where c |r| vanishes as fast as the error does.

    Steps go on to a tenth of the tolerance where they can, so that plans hardly depend on where they started. The last step
    squares the error, so this costs at most one more step.

    Args:
        cost_nk: (n, k) of one problem; or transposed, with f for g and b for a.
        sharpness: the last t / beta.
        g: (k,) the guess.
        log_a_n: (n,)
        log_b_k: (k,)
        tolerance: of the column error.

    Returns:
        f and g; None where they do not settle.
    """
    a, b = log_a_n.exp(), log_b_k.exp()

    def dual_at(g: Tensor) -> _Dual:
        kernel_nk = torch.add(g, cost_nk, alpha=-sharpness)
        largest_n = kernel_nk.amax(-1, keepdim=True)
        plan_nk = kernel_nk.sub_(largest_n).clamp_(min=_floor(cost_nk)).exp_()
        rows_n = plan_nk.sum(-1)
        plan_nk *= (a / rows_n).unsqueeze(-1)
        columns_k = plan_nk.sum(0)
        f = log_a_n - rows_n.log() - largest_n.squeeze(-1)
        return _Dual(f, plan_nk, columns_k, b - columns_k, float((b - columns_k).abs().sum()))

    dual = dual_at(g)
    for _ in range(NEWTON_STEPS):
        if dual.error <= tolerance / 10:
            break
        system_kk = -(dual.plan_nk.T @ (dual.plan_nk / a.unsqueeze(-1)))
        system_kk.diagonal().add_(dual.columns_k + DAMPING * dual.missing_k.norm().clamp(max=float(b.mean())))
        factor_kk, failed = torch.linalg.cholesky_ex(system_kk)
        if failed:
            break
        step_k = torch.cholesky_solve(dual.missing_k.unsqueeze(-1), factor_kk).squeeze(-1)
        length = 1.0
        while True:  # halve the step until the error falls as it should
            new_g = g + length * step_k
            new = dual_at(new_g)
            if new.error <= (1 - length / 10) * dual.error or length < SHORTEST:
                break
            length /= 2
        if not new.error < dual.error:
            break
        g, dual = new_g, new
    return (dual.f, g) if dual.error <= tolerance else None


def _sweep(problem: _Problem, sharpness: float, f: Tensor, g: Tensor, relaxation: float) -> Potentials:
    """Update g, then f, from guesses near enough for the kernel to stay in range: one exponential serves both."""
    cost_nk, log_a_n, log_b_k = problem
    n, k = cost_nk.shape[-2:]
    rows = n if cost_nk.device.type != "cpu" else max(1, CACHED // (k * max(1, cost_nk[..., 0, 0].numel())))
    kernel_nk = torch.empty_like(cost_nk)
    columns_k = torch.zeros_like(g)
    for first in range(0, n, rows):
        block = kernel_nk[..., first : first + rows, :]
        torch.add(g.unsqueeze(-2), cost_nk[..., first : first + rows, :], alpha=-sharpness, out=block)
        columns_k += block.add_(f[..., first : first + rows, None]).clamp_(min=_floor(cost_nk)).exp_().sum(-2)
    # A sum of little but floors has left its range: its logarithm becomes infinite, and the solve starts again with `_stable_sweep`.
    least = 1e3 * math.exp(_floor(cost_nk))
    change_k = relaxation * (log_b_k - columns_k.masked_fill_(columns_k < n * least, 0.0).log())
    scale_k = change_k.exp()
    rows_n = (kernel_nk @ scale_k.unsqueeze(-1)).squeeze(-1)
    rows_n.masked_fill_(rows_n < least * scale_k.sum(-1, keepdim=True), 0.0)
    return f + relaxation * (log_a_n - rows_n.log()), g + change_k


def _stable_sweep(problem: _Problem, sharpness: float, f: Tensor, g: Tensor, relaxation: float) -> Potentials:
    """Do the same as `_sweep`, from any guess of f, at the price of an exponential for each side."""
    cost_nk, log_a_n, log_b_k = problem
    kernel_nk = cost_nk * -sharpness
    new_g = log_b_k - _logsumexp(kernel_nk + f.unsqueeze(-1), dim=-2)
    g = new_g if relaxation == 1 else torch.lerp(g, new_g, relaxation)
    new_f = log_a_n - _logsumexp(kernel_nk + g.unsqueeze(-2), dim=-1)
    return new_f if relaxation == 1 else torch.lerp(f, new_f, relaxation), g


def _column_error(problem: _Problem, sharpness: float, f: Tensor, g: Tensor) -> Tensor:
    """Return the sum of |column sums - b|, (…)."""
    cost_nk = problem.cost_nk
    exponent_nk = torch.add(g.unsqueeze(-2), cost_nk, alpha=-sharpness).add_(f.unsqueeze(-1))
    plan_nk = exponent_nk.clamp_(min=_floor(cost_nk)).exp_()
    return (plan_nk.sum(-2) - problem.log_b_k.exp()).abs().sum(-1)


def _floor(values: Tensor) -> float:
    """Return the least exponent that is computed: -80 in float32. It stands for all below it.

    On a CPU an exponential that underflows takes a hundred times as long as any other, and sums of almost nothing are slow as well.
    Most entries of a plan are of that kind.
    """
    return math.log(torch.finfo(values.dtype).tiny) + 7


def _logsumexp(values: Tensor, dim: int) -> Tensor:
    largest = values.amax(dim, keepdim=True)
    return (values - largest).clamp_(min=_floor(values)).exp_().sum(dim).log_() + largest.squeeze(dim)


def _prepare(cost: Tensor, a: Tensor | None, b: Tensor | None) -> _Problem:
    cost = cost if cost.dtype == torch.float64 else cost.float()
    n, k = cost.shape[-2:]
    a = cost.new_full((*cost.shape[:-2], n), 1 / n) if a is None else a.to(cost)
    b = cost.new_full((*cost.shape[:-2], k), 1 / k) if b is None else b.to(cost)
    # The logarithm of no mass is a very low number instead of -inf: the difference of two infinite potentials is not a number.
    lowest = torch.finfo(cost.dtype).min / 8
    log_a, log_b = a.log().clamp(min=lowest), b.log().clamp(min=lowest)
    return _Problem(cost, log_a.expand(*cost.shape[:-1]).contiguous(), log_b.expand(*cost.shape[:-2], k).contiguous())


def _finish(problem: _Problem, sharpness: float, f: Tensor, g: Tensor) -> Transport:
    cost_nk, a_n, b_k = problem.cost_nk, problem.log_a_n.exp(), problem.log_b_k.exp()
    exponent_nk = torch.add(g.unsqueeze(-2), cost_nk, alpha=-sharpness).add_(f.unsqueeze(-1))
    nothing_nk = exponent_nk < _floor(cost_nk)
    plan_nk = exponent_nk.clamp_(min=_floor(cost_nk)).exp_().masked_fill_(nothing_nk, 0.0)
    # Neighbouring float32 numbers in the hundreds are a few 1e-5 apart, and these are exponents: one more division makes the rows exact.
    plan_nk = plan_nk * (a_n / plan_nk.sum(-1).clamp(min=torch.finfo(plan_nk.dtype).tiny)).unsqueeze(-1)
    row_error = (plan_nk.sum(-1) - a_n).abs().sum(-1)
    column_error = (plan_nk.sum(-2) - b_k).abs().sum(-1)
    return Transport(plan_nk, (f, g), (row_error, column_error))
