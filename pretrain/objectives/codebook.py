"""The shared codebook, learned from transport plans (CODIS L_code and Eq. 2).

Axes in tensor names: m, the modality (image, text); n, the samples of the plan (global batch, then queue); b, the micro-batch's
samples; c, the codewords; d, the feature dimension.
"""

from __future__ import annotations

import math
from collections import deque

import torch
from torch import Tensor

from pretrain.config import CodebookConfig, TransportConfig
from pretrain.objectives.contrastive import soft_cross_entropy
from pretrain.objectives.state import Plans, StudentState
from pretrain.transport import proximal_point, sinkhorn

FEATURES_PER_CODEWORD = 10
"""Features for each codeword over which usage is measured. With fewer, many codewords of
even the best codebook would be the nearest of no feature."""


class Codebook:
    """L_ot moves the codewords to the teacher's features. L_t2p and L_i2p teach each modality to predict the other's codewords."""

    def __init__(self, config: CodebookConfig) -> None:
        self.temperature, self.pairing, self.frozen = config.temperature, config.pairing, config.frozen

    def __call__(self, state: StudentState) -> dict[str, Tensor]:
        """Return `codebook` (the sum of its terms), and its two parts `transport_cost` and `codeword_prediction`."""
        batch, plans, codewords_cd = state.batch, state.batch.plans, state.model.codewords()
        assert plans is not None, "the task solves plans where this objective is on"
        if self.frozen:
            codewords_cd = codewords_cd.detach()
        text_target_bc, image_target_bc = (
            (plans.image, plans.text) if self.pairing == "cross" else (plans.text, plans.image)
        )
        prediction = soft_cross_entropy(state.text @ codewords_cd.T / self.temperature, text_target_bc)
        prediction = prediction + soft_cross_entropy(state.image @ codewords_cd.T / self.temperature, image_target_bc)
        teacher_image_bd, teacher_text_bd = batch.keys.image[batch.rows], batch.keys.text[batch.rows]
        # No gradient through plan or teacher: the transport cost trains the codewords alone.
        cost = (plans.image * (1 - teacher_image_bd @ codewords_cd.T)).sum(-1).mean()
        cost = cost + (plans.text * (1 - teacher_text_bd @ codewords_cd.T)).sum(-1).mean()
        return {
            "codebook": prediction + cost,
            "transport_cost": cost.detach(),
            "codeword_prediction": prediction.detach(),
        }


class CodebookUsage:
    """How evenly the codebook is used over the last steps, and how many features change their nearest codeword in a step."""

    def __init__(self, codewords: int, global_batch: int) -> None:
        steps = math.ceil(FEATURES_PER_CODEWORD * codewords / (2 * global_batch))
        self._counts: deque[Tensor] = deque(maxlen=max(1, steps))
        self._previous_codewords_cd: Tensor | None = None

    def update(self, features_mnd: Tensor, codewords_cd: Tensor, samples: int) -> dict[str, Tensor]:
        """Count each feature's nearest codeword, and return usage and churn.

        Usage is returned once enough steps are counted, churn from the second step on.

        Args:
            features_mnd: (2, n, feature_dim) unit-norm, images and texts.
            codewords_cd: (codewords, feature_dim) unit-norm, of this step.
            samples: number of leading samples that belong to this global batch. The others were counted in their own step.
        """
        figures: dict[str, Tensor] = {}
        nearest_mn = (features_mnd @ codewords_cd.T).argmax(-1)
        self._counts.append(torch.bincount(nearest_mn[:, :samples].flatten(), minlength=len(codewords_cd)))
        if len(self._counts) == self._counts.maxlen:
            figures |= usage_figures(torch.stack([*self._counts]).sum(0))
        if self._previous_codewords_cd is not None:
            # Churn: the share of these features that had another nearest codeword in the step before.
            previous_mn = (features_mnd @ self._previous_codewords_cd.T).argmax(-1)
            figures["codebook/churn"] = (nearest_mn != previous_mn).float().mean()
        self._previous_codewords_cd = codewords_cd
        return figures


def usage_figures(counts: Tensor) -> dict[str, Tensor]:
    """Return how evenly the codebook is used. counts: (codewords,), number of features nearest to each codeword."""
    share = counts / counts.sum()
    return {
        "codebook/perplexity": (-torch.special.xlogy(share, share).sum()).exp(),
        "codebook/dead": (counts == 0).float().mean(),
        "codebook/largest_share": share.max(),
    }


@torch.no_grad()
def solve_plans(
    image_nd: Tensor,
    text_nd: Tensor,
    codewords_cd: Tensor,
    samples: int,
    config: TransportConfig,
    start: Tensor | None = None,
) -> tuple[Plans, dict[str, Tensor], Tensor | None]:
    """Solve the plans of image and of text features with the codebook.

    Args:
        image_nd: (n, feature_dim) unit-norm; the first `samples` rows need a target.
        text_nd: (n, feature_dim), likewise.
        codewords_cd: (codewords, feature_dim) unit-norm.
        samples: rows that need a target.
        config: the solver and its settings.
        start: (2, codewords), potentials that an earlier call returned.

    Returns:
        The plans, with rows scaled to sum to 1 (a plan's own rows sum to 1 / n, so as targets they would be n times too weak);
        figures on their quality; and the codewords' potentials (2, codewords), or None with the solver `argmax`.
    """
    cost_mnc = 1 - torch.stack([image_nd, text_nd]) @ codewords_cd.T
    plan_mnc, potentials_mc, (row_error_m, column_error_m) = _solve(cost_mnc, config, start)
    targets_mnc = plan_mnc[:, :samples] / plan_mnc[:, :samples].sum(-1, keepdim=True)
    entropy_mn = -torch.special.xlogy(targets_mnc, targets_mnc).sum(-1)
    figures = {
        "codebook/effective_codes": entropy_mn.exp().mean(),
        "codebook/row_error": row_error_m.mean(),
        "codebook/column_error": column_error_m.mean(),
    }
    return Plans(*targets_mnc), figures, potentials_mc


def _solve(
    cost_mnc: Tensor, config: TransportConfig, start: Tensor | None
) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor]]:
    """Return the plan (2, n, codewords), the codewords' potentials (2, codewords), and the row and column errors, (2,) each."""
    if config.solver == "argmax":
        n, codewords = cost_mnc.shape[-2:]
        plan_mnc = torch.zeros_like(cost_mnc).scatter_(-1, cost_mnc.argmin(-1, keepdim=True), 1 / n)
        column_error_m = (plan_mnc.sum(-2) - 1 / codewords).abs().sum(-1)
        return plan_mnc, None, (torch.zeros_like(plan_mnc[:, 0, 0]), column_error_m)
    if config.solver == "sinkhorn":
        solved = sinkhorn(cost_mnc, None, None, config.regularisation, config.sinkhorn_steps, config.tolerance, start)
    else:
        solved = proximal_point(
            cost_mnc, None, None, config.beta, config.outer_steps, config.inner_steps, config.tolerance, start
        )
    return solved.plan, solved.potentials[1], solved.marginal_errors
