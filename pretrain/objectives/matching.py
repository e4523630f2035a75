"""Image-text matching with hard negatives drawn by contrastive similarity (ALBEF Eq. 4)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from pretrain.config import MatchingConfig
from pretrain.objectives.state import StudentState
from runtime.errors import RecipeError


def draw_negatives(similarity: Tensor, same: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
    """For each row one column, with probability softmax(similarity) over the columns that are not the same image.

    similarity: (…, rows, columns) logits; same: (…, rows, columns) bool, never drawn; draws: (…, rows) uniform in [0, 1).
    -> (…, rows) column, and (…, rows) bool: whether the row has any negative at all. Vectorised, without host
    synchronisation; ties, equal captions and saturated similarities are no trouble.
    """
    logits = similarity.detach().double().masked_fill(same, -torch.inf)
    exists = ~same.all(-1)
    # Subtracting the largest allowed logit first keeps at least one weight at 1, whatever the temperature.
    weights = torch.softmax(logits.masked_fill(~exists[..., None], 0.0), -1)
    cumulative = weights.cumsum(-1)
    column = torch.searchsorted(cumulative, (draws.double() * cumulative[..., -1])[..., None], right=True)[..., 0]
    # A draw within rounding of the total can land behind the last allowed column.
    last_allowed = (weights > 0).int().mul(torch.arange(1, weights.shape[-1] + 1, device=weights.device)).amax(-1) - 1
    return torch.minimum(column, last_allowed), exists


class Matching:
    """One positive and two negatives a sample: its text with a wrong image, its image with a wrong text."""

    def __init__(self, config: MatchingConfig) -> None:
        self.pool = config.pool

    def __call__(self, state: StudentState) -> dict[str, Tensor]:
        """-> `matching` (cross-entropy over the pairs) and `matching_accuracy`."""
        batch, model, size = state.batch, state.model, len(state.batch.image_ids)
        # As in ALBEF: the similarities of the contrastive loss, which are to the teacher's features.
        wrong_image, has_image = self.draw(state, state.text, batch.keys.image[batch.rows], batch.draws[:, 0])
        wrong_text, has_text = self.draw(state, state.image, batch.keys.text[batch.rows], batch.draws[:, 1])
        own = torch.arange(size, device=batch.rows.device)
        states = torch.cat([state.text_states, state.text_states, state.text_states[wrong_text]])
        mask = torch.cat([batch.text.mask, batch.text.mask, batch.text.mask[wrong_text]])
        fused = model.fusion_encoder(states, mask, state.images_read, torch.cat([own, wrong_image, own]))
        logits = model.matching_logits(fused)
        labels = torch.cat([torch.ones_like(own), torch.zeros_like(own), torch.zeros_like(own)])
        exists = torch.cat([torch.ones_like(has_image), has_image, has_text]).float()
        loss = (functional.cross_entropy(logits, labels, reduction="none") * exists).sum() / exists.sum()
        right = ((logits.detach().argmax(-1) == labels) * exists).sum() / exists.sum()
        return {"matching": loss, "matching_accuracy": right}

    def draw(self, state: StudentState, queries: Tensor, candidates: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        """A wrong candidate for each query, among its pool of neighbours: rows of the micro-batch (batch,), and whether there is one."""
        ids = state.batch.image_ids
        pool = self.pool or len(ids)
        if len(ids) % pool:
            raise RecipeError(f"objectives.matching.pool {pool} does not divide the micro-batch {len(ids)}")
        pools = len(ids) // pool
        with torch.no_grad():
            similarity = queries.view(pools, pool, -1) @ candidates.view(pools, pool, -1).mT / state.model.temperature()
            same = ids.view(pools, pool, 1) == ids.view(pools, 1, pool)
            column, exists = draw_negatives(similarity, same, draws.view(pools, pool))
            first = torch.arange(0, len(ids), pool, device=ids.device)[:, None]
        return (first + column).flatten(), exists.flatten()
