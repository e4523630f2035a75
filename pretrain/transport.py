"""Optimal transport between samples and codewords, in the log domain, batched over problems.

Proximal point (IPOT: Xie et al., UAI 2019; CODIS, Algorithm 2) runs mirror steps towards the exact plan. After t outer
steps its plan is `exp(-t * cost / beta + f_i + g_j)`, so two potentials are its whole state: nothing of the size of the
plan is carried from step to step, and nothing under- or overflows. With a converged inner loop it equals Sinkhorn at
regularisation beta / t. (The slides' scale `1 / (n Q sigma)` is a slip that loses mass: the marginals here are right.)

By that identity the last t alone matters, not the steps on the way. Unless an inner loop is asked for, many outer steps are
taken at once: one sweep a stride, from potentials extrapolated along the stride before (IPOT's own warm start, which keeps
its scaling vector, is that extrapolation). Newton steps settle the columns then, or over-relaxed sweeps where those do not, or
would be dear.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

STRIDES, GROWTH = 120, 1.02
"""Strides to `outer_steps`, and how much longer each is than the one before."""
FEW_STRIDES = 20, 1.15
"""The same where Newton steps follow, and are tried first."""
MORE_SWEEPS, RELAXATION = 480, 1.7
"""Over-relaxed sweeps at its end (Thibault et al. 2017), at most, until the columns have settled."""
CHECK_EVERY = 10
"""Sweeps between two looks at the column error: a look waits for the device."""
CACHED = 1 << 17
"""Entries of the kernel that a CPU works on at a time, so that they stay in its cache."""

DENSE = 1024
"""Unknowns, on the side that has fewer, up to which Newton steps are taken: their linear system is dense."""
NEWTON_STEPS, DAMPING, SHORTEST = 30, 1e-3, 0.02
"""Newton steps at most, the share of the error in their regularisation, and the shortest part of one that is tried."""

Potentials = tuple[Tensor, Tensor]
Sweep = Callable[[Tensor, float, Tensor, Tensor, Tensor, Tensor, float], Potentials]


class Transport(NamedTuple):
    """A plan and how well it keeps its marginals."""

    plan: Tensor
    """(…, n, k), non-negative. Rows sum to `a` exactly (the last update is on the sample side)."""
    potentials: Potentials
    """f (…, n) and g (…, k): the plan is `exp(-sharpness * cost + f_i + g_j)`, up to rounding, where the sharpness is
    outer_steps / beta, or 1 / regularisation."""
    marginal_errors: tuple[Tensor, Tensor]
    """(…) each: sum of |row sums - a| and of |column sums - b|. Large values say: more steps, or a larger beta."""


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
    """The plan of least cost between `a` and `b`, approached by `outer_steps` proximal steps of size `1 / beta`.

    cost: (…, n, k), any float dtype, computed in float32 (float64 stays); a: (…, n) and b: (…, k), uniform unless given.
    inner_steps: None goes in strides, then on until the column error of every problem is within `tolerance` (None: no further). A
    number is the paper's loop, step by step, with so many sweeps in each, whatever the tolerance.
    start: (…, k), the potential g of an earlier plan over nearly the same codewords, instead of the strides; where a problem
    does not settle from it, or without a tolerance to settle within, they are taken all the same.
    """
    cost, log_a, log_b = _prepare(cost, a, b)
    if inner_steps is not None:
        f, g = _walk(cost, log_a, log_b, beta, outer_steps, inner_steps)
        return _finish(cost, outer_steps / beta, f, g, log_a, log_b)
    all_have_mass = all(marginal is None or bool((marginal > 0).all()) for marginal in (a, b))
    found = _solve(cost, log_a, log_b, beta, outer_steps, tolerance, start, _sweep) if all_have_mass else None
    if found is None:  # a marginal is 0, or a kernel left its range: every sum with its largest term taken out first
        found = _solve(cost, log_a, log_b, beta, outer_steps, tolerance, start, _stable_sweep)
    assert found is not None, "logarithms of sums are finite"
    return _finish(cost, outer_steps / beta, *found, log_a, log_b)


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
    """The entropy-regularised plan (Cuturi 2013) after `steps` alternating updates, or as soon as the column error of every
    problem is within `tolerance`. start: (…, k), the potential g of an earlier plan. Shapes as in `proximal_point`."""
    cost, log_a, log_b = _prepare(cost, a, b)
    kernel = cost / -regularisation
    f, g = torch.zeros_like(log_a), torch.zeros_like(log_b)
    if start is not None:
        f = log_a - _logsumexp(kernel + start.to(cost).unsqueeze(-2), dim=-1)
    for done in range(1, steps + 1):
        g = log_b - _logsumexp(kernel + f.unsqueeze(-1), dim=-2)
        f = log_a - _logsumexp(kernel + g.unsqueeze(-2), dim=-1)
        if tolerance is None or done % CHECK_EVERY:
            continue
        if bool((_column_error(cost, 1 / regularisation, f, g, log_b) <= tolerance).all()):
            break
    return _finish(cost, 1 / regularisation, f, g, log_a, log_b)


def _walk(cost: Tensor, log_a: Tensor, log_b: Tensor, beta: float, outer_steps: int, inner_steps: int) -> Potentials:
    """The paper's loop."""
    f, warm, g = torch.zeros_like(log_a), torch.zeros_like(log_a), torch.zeros_like(log_b)
    for step in range(1, outer_steps + 1):
        kernel, base = cost * (-step / beta), f
        for _ in range(inner_steps):
            # IPOT keeps its scaling vector from one outer step to the next: in potentials, an extrapolation of f.
            g = log_b - _logsumexp(kernel + (base + warm).unsqueeze(-1), dim=-2)
            f = log_a - _logsumexp(kernel + g.unsqueeze(-2), dim=-1)
            warm = f - base
    return f, g


def _solve(
    cost: Tensor,
    log_a: Tensor,
    log_b: Tensor,
    beta: float,
    outer_steps: int,
    tolerance: float | None,
    start: Tensor | None,
    sweep: Sweep,
) -> Potentials | None:
    """From one guess after another, each dearer than the one before. -> f, g; None where a number left its range."""
    sharpness, dense = outer_steps / beta, tolerance is not None and min(cost.shape[-2:]) <= DENSE

    def guesses() -> Iterator[tuple[Tensor, Tensor, int]]:
        """f, g, and how many sweeps they are worth."""
        if start is not None and tolerance is not None:  # settled already but for what has changed since
            g = start.to(cost).expand_as(log_b)
            yield log_a - _logsumexp(cost * -sharpness + g.unsqueeze(-2), dim=-1), g, 0 if dense else STRIDES
        if dense:
            yield *_stride(cost, log_a, log_b, beta, outer_steps, *FEW_STRIDES, sweep), 0
        yield *_stride(cost, log_a, log_b, beta, outer_steps, STRIDES, GROWTH, sweep), MORE_SWEEPS

    found = None
    for f, g, sweeps in guesses():
        if found:  # what has settled stays as it is
            f, g = torch.where(found[2][..., None], found[0], f), torch.where(found[2][..., None], found[1], g)
        found = _settle(cost, sharpness, f, g, log_a, log_b, tolerance, dense, sweeps, sweep)
        if found is None or bool(found[2].all()):
            break
    return found and found[:2]


def _stride(
    cost: Tensor,
    log_a: Tensor,
    log_b: Tensor,
    beta: float,
    outer_steps: int,
    strides: int,
    growth: float,
    sweep: Sweep,
) -> Potentials:
    """All outer steps in so many strides, each longer than the one before by a factor."""
    f, g = torch.zeros_like(log_a), torch.zeros_like(log_b)
    f_way, g_way = f, g
    stride, step, before = outer_steps * (growth - 1) / (growth**strides - 1), 0.0, 0.0
    for _ in range(strides):
        ahead = stride / before if before else 0.0
        step, before, stride = step + stride, stride, stride * growth
        new_f, new_g = sweep(cost, step / beta, f + ahead * f_way, g + ahead * g_way, log_a, log_b, 1.0)
        f_way, g_way, f, g = new_f - f, new_g - g, new_f, new_g
    return f, g


def _settle(
    cost: Tensor,
    sharpness: float,
    f: Tensor,
    g: Tensor,
    log_a: Tensor,
    log_b: Tensor,
    tolerance: float | None,
    dense: bool,
    most: int,
    sweep: Sweep,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Newton steps where the system is to be dense, and at most so many sweeps, at the end of the way. -> f, g and which problems have
    settled; None where a number left its range."""
    if dense and tolerance is not None:
        f, g = _newton_each(cost, sharpness, f, g, log_a, log_b, tolerance)
    for number in range(most + 1):
        if number % CHECK_EVERY == 0:
            error = _column_error(cost, sharpness, f, g, log_b)
            if not bool(error.isfinite().all()):
                return None
            settled = torch.ones_like(error, dtype=torch.bool) if tolerance is None else error <= tolerance
            if bool(settled.all()) or number == most:
                break
        relaxation = 1.0 if number % CHECK_EVERY == CHECK_EVERY - 1 else RELAXATION
        new_f, new_g = sweep(cost, sharpness, f, g, log_a, log_b, relaxation)
        # A problem that has settled stays as it is: its plan must not depend on those it was batched with.
        f, g = torch.where(settled[..., None], f, new_f), torch.where(settled[..., None], g, new_g)
    return f, g, settled


def _newton_each(
    cost: Tensor, sharpness: float, f: Tensor, g: Tensor, log_a: Tensor, log_b: Tensor, tolerance: float
) -> Potentials:
    """Newton steps for each problem that has not settled: as many as it needs, whatever it is batched with; one that does not settle
    by them stays where it was."""
    f, g = f.clone(), g.clone()
    for place in (~(_column_error(cost, sharpness, f, g, log_b) <= tolerance)).nonzero().tolist():
        at = tuple(place)
        n, k = cost[at].shape
        if k <= n:
            settled = _newton(cost[at], sharpness, g[at], log_a[at], log_b[at], tolerance)
            f[at], g[at] = settled or (f[at], g[at])
        else:  # fewer unknowns the other way round; making the rows exact again brings the columns no further away
            settled = _newton(cost[at].T.contiguous(), sharpness, f[at], log_b[at], log_a[at], tolerance)
            if settled:
                g[at] = settled[0]
                f[at] = log_a[at] - _logsumexp(cost[at] * -sharpness + g[at], dim=-1)
    return f, g


def _newton(
    cost: Tensor, sharpness: float, g: Tensor, log_a: Tensor, log_b: Tensor, tolerance: float
) -> Potentials | None:
    """Regularised Newton steps (Li et al. 2004) on the dual of one problem in g alone, f being what makes the rows right, from a guess
    near enough: three to five where sweeps would be a hundred. cost: (n, k). -> f, g; None where they do not settle.

    They go on to a tenth of the tolerance where they can: the error is squared by the last step, so that is a step more at most, and
    plans hardly know where they came from.

    The columns fall short by r, and change with g by H = diag(columns) - plan' diag(1 / a) plan, singular because a constant added to
    g changes nothing: H + c |r| is solved, c |r| vanishing as fast as the error does.
    """
    a, b = log_a.exp(), log_b.exp()

    def state(g: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
        kernel = torch.add(g, cost, alpha=-sharpness)
        largest = kernel.amax(-1, keepdim=True)
        plan = kernel.sub_(largest).clamp_(min=_floor(cost)).exp_()
        rows = plan.sum(-1)
        plan *= (a / rows).unsqueeze(-1)
        columns = plan.sum(0)
        return log_a - rows.log() - largest.squeeze(-1), plan, columns, b - columns, float((b - columns).abs().sum())

    f, plan, columns, short, error = state(g)
    for _ in range(NEWTON_STEPS):
        if error <= tolerance / 10:
            break
        system = -(plan.T @ (plan / a.unsqueeze(-1)))
        system.diagonal().add_(columns + DAMPING * short.norm().clamp(max=float(b.mean())))
        factor, failed = torch.linalg.cholesky_ex(system)
        if failed:
            break
        way = torch.cholesky_solve(short.unsqueeze(-1), factor).squeeze(-1)
        length = 1.0
        while True:
            new_g = g + length * way
            new = state(new_g)
            if new[-1] <= (1 - length / 10) * error or length < SHORTEST:
                break
            length /= 2
        if not new[-1] < error:
            break
        g, (f, plan, columns, short, error) = new_g, new
    return (f, g) if error <= tolerance else None


def _sweep(
    cost: Tensor, sharpness: float, f: Tensor, g: Tensor, log_a: Tensor, log_b: Tensor, relaxation: float
) -> Potentials:
    """g, then f, from guesses near enough for the kernel to stay in range: one exponential serves both."""
    n, k = cost.shape[-2:]
    rows = n if cost.device.type != "cpu" else max(1, CACHED // (k * max(1, cost[..., 0, 0].numel())))
    kernel = torch.empty_like(cost)
    columns = torch.zeros_like(g)
    for first in range(0, n, rows):
        part = kernel[..., first : first + rows, :]
        torch.add(g.unsqueeze(-2), cost[..., first : first + rows, :], alpha=-sharpness, out=part)
        columns += part.add_(f[..., first : first + rows, None]).clamp_(min=_floor(cost)).exp_().sum(-2)
    # A sum made of little but floors has left its range: no number, and the solve begins again with stabilised sums.
    least = 1e3 * math.exp(_floor(cost))
    change = relaxation * (log_b - columns.masked_fill_(columns < n * least, 0.0).log())
    scale = change.exp()
    row_sums = (kernel @ scale.unsqueeze(-1)).squeeze(-1)
    row_sums.masked_fill_(row_sums < least * scale.sum(-1, keepdim=True), 0.0)
    return f + relaxation * (log_a - row_sums.log()), g + change


def _stable_sweep(
    cost: Tensor, sharpness: float, f: Tensor, g: Tensor, log_a: Tensor, log_b: Tensor, relaxation: float
) -> Potentials:
    """The same from any guess of f."""
    kernel = cost * -sharpness
    new_g = log_b - _logsumexp(kernel + f.unsqueeze(-1), dim=-2)
    g = new_g if relaxation == 1 else torch.lerp(g, new_g, relaxation)
    new_f = log_a - _logsumexp(kernel + g.unsqueeze(-2), dim=-1)
    return new_f if relaxation == 1 else torch.lerp(f, new_f, relaxation), g


def _column_error(cost: Tensor, sharpness: float, f: Tensor, g: Tensor, log_b: Tensor) -> Tensor:
    plan = torch.add(g.unsqueeze(-2), cost, alpha=-sharpness).add_(f.unsqueeze(-1)).clamp_(min=_floor(cost)).exp_()
    return (plan.sum(-2) - log_b.exp()).abs().sum(-1)


def _floor(values: Tensor) -> float:
    """An exponent that stands for all below it: -80 in float32. On a CPU an exponential that underflows takes a hundred times as
    long as any other, and sums of what is almost nothing are slow as well; most entries of a plan are of that kind."""
    return math.log(torch.finfo(values.dtype).tiny) + 7


def _logsumexp(values: Tensor, dim: int) -> Tensor:
    largest = values.amax(dim, keepdim=True)
    return (values - largest).clamp_(min=_floor(values)).exp_().sum(dim).log_() + largest.squeeze(dim)


def _prepare(cost: Tensor, a: Tensor | None, b: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    cost = cost if cost.dtype == torch.float64 else cost.float()
    n, k = cost.shape[-2:]
    a = cost.new_full((*cost.shape[:-2], n), 1 / n) if a is None else a.to(cost)
    b = cost.new_full((*cost.shape[:-2], k), 1 / k) if b is None else b.to(cost)
    # No mass is a logarithm so low that nothing is left of it, not -inf: the difference of two infinite potentials is no number.
    lowest = torch.finfo(cost.dtype).min / 8
    log_a, log_b = a.log().clamp(min=lowest), b.log().clamp(min=lowest)
    return cost, log_a.expand(*cost.shape[:-1]).contiguous(), log_b.expand(*cost.shape[:-2], k).contiguous()


def _finish(cost: Tensor, sharpness: float, f: Tensor, g: Tensor, log_a: Tensor, log_b: Tensor) -> Transport:
    exponent = torch.add(g.unsqueeze(-2), cost, alpha=-sharpness).add_(f.unsqueeze(-1))
    nothing = exponent < _floor(cost)
    plan = exponent.clamp_(min=_floor(cost)).exp_().masked_fill_(nothing, 0.0)
    # Exponents of hundreds are a few 1e-5 apart in float32: one more division makes the rows exact.
    plan = plan * (log_a.exp() / plan.sum(-1).clamp(min=torch.finfo(plan.dtype).tiny)).unsqueeze(-1)
    row_error = (plan.sum(-1) - log_a.exp()).abs().sum(-1)
    column_error = (plan.sum(-2) - log_b.exp()).abs().sum(-1)
    return Transport(plan, (f, g), (row_error, column_error))
