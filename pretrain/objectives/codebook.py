"""The shared codebook, learned from transport plans (CODIS L_code and Eq. 2).

Axes in tensor names: m, the modality (image, text); n, the samples of the plan (global batch, then queue); b, the micro-batch's
samples; c, the codewords; d, the feature dimension.
"""

from __future__ import annotations

import math
from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from pretrain.config import CodebookConfig, TransportConfig
from pretrain.model.alignment_model import IMAGE, TEXT
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
        if plans is None:  # before `from_epoch`: no loss, but every parameter keeps its place in the graph
            nothing = 0 * (state.image.sum() + state.text.sum() + codewords_cd.sum())
            return {"codebook": nothing, "transport_cost": nothing, "codeword_prediction": nothing}
        if self.frozen:
            codewords_cd = codewords_cd.detach()
        text_target_bc, image_target_bc = (
            (plans.image, plans.text) if self.pairing == "cross" else (plans.text, plans.image)
        )
        centred, temperature = state.model.codebook_features, self.temperature or state.model.temperature()
        image_bd, text_bd = centred(state.image, IMAGE), centred(state.text, TEXT)
        prediction = soft_cross_entropy(text_bd @ codewords_cd.T / temperature, text_target_bc)
        prediction = prediction + soft_cross_entropy(image_bd @ codewords_cd.T / temperature, image_target_bc)
        teacher_image_bd = centred(batch.keys.image[batch.rows], IMAGE)
        teacher_text_bd = centred(batch.keys.text[batch.rows], TEXT)
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


class Solved(NamedTuple):
    """The plans of a step, and what came with them."""

    plans: Plans
    """Of the samples that need a target. Rows are scaled to sum to 1: a plan's own sum to 1 / n, too weak for targets."""
    figures: dict[str, Tensor]
    """On the plans' quality."""
    potentials: Tensor | None
    """(2, codewords), of the codewords; None with the solver `argmax`."""
    averages: Tensor | None
    """(codewords, feature_dim) unit-norm: the mean of all features that the plans give to each codeword; None if not asked for."""


@torch.no_grad()
def solve_plans(
    image_nd: Tensor,
    text_nd: Tensor,
    codewords_cd: Tensor,
    samples: int,
    config: TransportConfig,
    start: Tensor | None = None,
    averages: bool = False,
) -> Solved:
    """Solve the plans of image and of text features with the codebook.

    Args:
        image_nd: (n, feature_dim) unit-norm; the first `samples` rows need a target.
        text_nd: (n, feature_dim), likewise.
        codewords_cd: (codewords, feature_dim) unit-norm.
        samples: rows that need a target.
        config: the solver and its settings.
        start: (2, codewords), potentials that an earlier call returned.
        averages: whether to return the codewords' averages.
    """
    features_mnd = torch.stack([image_nd, text_nd])
    cost_mnc = 1 - features_mnd @ codewords_cd.T
    plan_mnc, potentials_mc, (row_error_m, column_error_m) = _solve(cost_mnc, config, start)
    targets_mnc = plan_mnc[:, :samples] / plan_mnc[:, :samples].sum(-1, keepdim=True)
    entropy_mn = -torch.special.xlogy(targets_mnc, targets_mnc).sum(-1)
    figures = {
        "codebook/effective_codes": entropy_mn.exp().mean(),
        "codebook/row_error": row_error_m.mean(),
        "codebook/column_error": column_error_m.mean(),
    }
    means_cd = None
    if averages:
        means_cd = functional.normalize((plan_mnc.mT @ features_mnd.to(plan_mnc.dtype)).sum(0), dim=-1)
    return Solved(Plans(*targets_mnc), figures, potentials_mc, means_cd)


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
