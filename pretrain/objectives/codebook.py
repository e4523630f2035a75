"""The shared codebook, learned from transport plans (CODIS L_code and Eq. 2)."""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.config import CodebookConfig, TransportConfig
from pretrain.objectives.contrastive import soft_cross_entropy
from pretrain.objectives.state import Plans, StudentState
from pretrain.transport import proximal_point, sinkhorn


class Codebook:
    """L_ot moves the codewords to the teacher's features; L_t2p and L_i2p teach both modalities to name each other's codewords."""

    def __init__(self, config: CodebookConfig) -> None:
        self.temperature, self.pairing, self.frozen = config.temperature, config.pairing, config.frozen

    def __call__(self, state: StudentState) -> dict[str, Tensor]:
        """-> `codebook` (the sum of the four terms), `transport_cost` and `codeword_prediction` (its parts)."""
        batch, plans, codewords = state.batch, state.batch.plans, state.model.codewords()
        assert plans is not None, "the task solves plans where this objective is on"
        if self.frozen:
            codewords = codewords.detach()
        text_target, image_target = (plans.image, plans.text) if self.pairing == "cross" else (plans.text, plans.image)
        prediction = soft_cross_entropy(state.text @ codewords.T / self.temperature, text_target)
        prediction = prediction + soft_cross_entropy(state.image @ codewords.T / self.temperature, image_target)
        teacher_image, teacher_text = batch.keys.image[batch.rows], batch.keys.text[batch.rows]
        cost = (plans.image * (1 - teacher_image @ codewords.T)).sum(-1).mean()
        cost = cost + (plans.text * (1 - teacher_text @ codewords.T)).sum(-1).mean()
        return {
            "codebook": prediction + cost,
            "transport_cost": cost.detach(),
            "codeword_prediction": prediction.detach(),
        }


@torch.no_grad()
def solve_plans(
    image: Tensor, text: Tensor, codewords: Tensor, samples: int, config: TransportConfig, start: Tensor | None = None
) -> tuple[Plans, dict[str, Tensor], Tensor | None]:
    """Plans of image and of text features with the codebook, figures that tell their health, and where the next may start.

    image, text: (n, feature_dim) unit-norm, the first `samples` of which need a target; codewords: (codewords, feature_dim)
    unit-norm; start: (2, codewords), the potentials that an earlier call gave. -> Plans with rows scaled to sum to 1 (a row of a
    plan sums to 1 / n: as a target it would be n times too weak), figures, potentials (None where `argmax` has none).
    """
    cost = 1 - torch.stack([image, text]) @ codewords.T
    plan, potentials, (row_error, column_error) = _solve(cost, config, start)
    targets = plan[:, :samples] / plan[:, :samples].sum(-1, keepdim=True)
    entropy = -torch.special.xlogy(targets, targets).sum(-1)
    figures = {
        "codebook/effective_codes": entropy.exp().mean(),
        "codebook/row_error": row_error.mean(),
        "codebook/column_error": column_error.mean(),
    }
    return Plans(*targets), figures, potentials


def usage(nearest: Tensor) -> dict[str, Tensor]:
    """nearest: (codewords,), how many features have each as their nearest -> how evenly the codebook is used."""
    share = nearest / nearest.sum()
    return {
        "codebook/perplexity": (-torch.special.xlogy(share, share).sum()).exp(),
        "codebook/dead": (nearest == 0).float().mean(),
        "codebook/largest_share": share.max(),
    }


def _solve(
    cost: Tensor, config: TransportConfig, start: Tensor | None
) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor]]:
    """-> plan (2, n, codewords), the codewords' potentials (2, codewords), and the errors of rows and of columns, (2,) each."""
    if config.solver == "argmax":
        n, codewords = cost.shape[-2:]
        plan = torch.zeros_like(cost).scatter_(-1, cost.argmin(-1, keepdim=True), 1 / n)
        return plan, None, (torch.zeros_like(plan[:, 0, 0]), (plan.sum(-2) - 1 / codewords).abs().sum(-1))
    if config.solver == "sinkhorn":
        solved = sinkhorn(cost, None, None, config.regularisation, config.sinkhorn_steps, config.tolerance, start)
    else:
        solved = proximal_point(
            cost, None, None, config.beta, config.outer_steps, config.inner_steps, config.tolerance, start
        )
    return solved.plan, solved.potentials[1], solved.marginal_errors
