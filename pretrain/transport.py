"""Optimal transport between samples and codewords, in the log domain, batched over problems.

Proximal point (IPOT: Xie et al., UAI 2019; CODIS, Algorithm 2) runs mirror steps towards the exact plan. After t outer
steps its plan is `exp(-t * cost / beta + f_i + g_j)`, so two potentials are its whole state: nothing of the size of the
plan is carried from step to step, and nothing under- or overflows. With a converged inner loop it equals Sinkhorn at
regularisation beta / t. (The slides' scale `1 / (n Q sigma)` is a slip that loses mass: the marginals here are right.)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Transport(NamedTuple):
    """A plan and how well it keeps its marginals."""

    plan: Tensor
    """(…, n, k), non-negative. Rows sum to `a` exactly (the last update is on the sample side)."""
    potentials: tuple[Tensor, Tensor]
    """f (…, n) and g (…, k)."""
    marginal_errors: tuple[Tensor, Tensor]
    """(…) each: sum of |row sums - a| and of |column sums - b|. Large values say: more steps, or a larger beta."""


@torch.no_grad()
def proximal_point(
    cost: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    beta: float = 0.5,
    outer_steps: int = 50,
    inner_steps: int = 1,
) -> Transport:
    """The plan of least cost between `a` and `b`, approached by `outer_steps` proximal steps of size `1 / beta`.

    cost: (…, n, k), any float dtype, computed in float32 (float64 stays); a: (…, n) and b: (…, k), uniform unless given.
    """
    cost, log_a, log_b = _prepare(cost, a, b)
    f, warm = torch.zeros_like(log_a), torch.zeros_like(log_a)
    g = torch.zeros_like(log_b)
    for step in range(1, outer_steps + 1):
        kernel, base = cost * (-step / beta), f
        for _ in range(inner_steps):
            # IPOT keeps its scaling vector from one outer step to the next: in potentials, an extrapolation of f.
            g = log_b - torch.logsumexp(kernel + (base + warm).unsqueeze(-1), dim=-2)
            f = log_a - torch.logsumexp(kernel + g.unsqueeze(-2), dim=-1)
            warm = f - base
    return _finish(cost * (-outer_steps / beta), f, g, log_a, log_b)


@torch.no_grad()
def sinkhorn(
    cost: Tensor, a: Tensor | None = None, b: Tensor | None = None, regularisation: float = 0.05, steps: int = 100
) -> Transport:
    """The entropy-regularised plan (Cuturi 2013) after `steps` alternating updates. Shapes as in `proximal_point`."""
    cost, log_a, log_b = _prepare(cost, a, b)
    kernel, f, g = cost / -regularisation, torch.zeros_like(log_a), torch.zeros_like(log_b)
    for _ in range(steps):
        g = log_b - torch.logsumexp(kernel + f.unsqueeze(-1), dim=-2)
        f = log_a - torch.logsumexp(kernel + g.unsqueeze(-2), dim=-1)
    return _finish(kernel, f, g, log_a, log_b)


def _prepare(cost: Tensor, a: Tensor | None, b: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    cost = cost if cost.dtype == torch.float64 else cost.float()
    n, k = cost.shape[-2:]
    a = cost.new_full((*cost.shape[:-2], n), 1 / n) if a is None else a.to(cost)
    b = cost.new_full((*cost.shape[:-2], k), 1 / k) if b is None else b.to(cost)
    # No mass is a logarithm so low that nothing is left of it, not -inf: the difference of two infinite potentials is no number.
    lowest = torch.finfo(cost.dtype).min / 8
    log_a, log_b = a.log().clamp(min=lowest), b.log().clamp(min=lowest)
    return cost, log_a.expand(*cost.shape[:-1]).contiguous(), log_b.expand(*cost.shape[:-2], k).contiguous()


def _finish(kernel: Tensor, f: Tensor, g: Tensor, log_a: Tensor, log_b: Tensor) -> Transport:
    plan = (kernel + f.unsqueeze(-1) + g.unsqueeze(-2)).exp()
    row_error = (plan.sum(-1) - log_a.exp()).abs().sum(-1)
    column_error = (plan.sum(-2) - log_b.exp()).abs().sum(-1)
    return Transport(plan, (f, g), (row_error, column_error))
