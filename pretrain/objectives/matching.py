"""Image-text matching with hard negatives drawn by contrastive similarity (ALBEF Eq. 4)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from pretrain.config import MatchingConfig
from pretrain.model.bert_layers import PreparedImages
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
        self.pool, self.all_ranks, self.same_codeword = (
            config.pool,
            config.negatives == "all_ranks",
            config.same_codeword,
        )

    def __call__(self, state: StudentState) -> dict[str, Tensor]:
        """-> `matching` (cross-entropy over the pairs) and `matching_accuracy`."""
        batch, model, size = state.batch, state.model, len(state.batch.image_ids)
        own = torch.arange(size, device=batch.rows.device)
        if self.all_ranks:
            wrong_image, has_image = self.draw_from_all(state, state.text, batch.keys.image, batch.draws[:, 0])
            wrong_text, has_text = self.draw_from_all(state, state.image, batch.keys.text, batch.draws[:, 1])
            assert batch.global_inputs is not None
            others = model.fusion_encoder.prepare_images(model.image_encoder(batch.global_inputs.images[wrong_image]))
            images: PreparedImages = [
                tuple(torch.cat(parts) for parts in zip(own_part, other_part, strict=True))
                for own_part, other_part in zip(state.prepared_images, others, strict=True)
            ]
            wrong_image = own + size
            # The global batch's captions may be padded further than this micro-batch's.
            ids, mask = batch.global_inputs.text.ids[wrong_text], batch.global_inputs.text.mask[wrong_text]
            longest = max(ids.shape[1], batch.text.ids.shape[1])
            wrong_states = functional.pad(model.text_encoder(ids, mask), (0, 0, 0, longest - ids.shape[1]))
            wrong_mask = functional.pad(mask, (0, longest - ids.shape[1]))
            own_states = functional.pad(state.text_states, (0, 0, 0, longest - batch.text.ids.shape[1]))
            own_mask = functional.pad(batch.text.mask, (0, longest - batch.text.ids.shape[1]))
        else:
            # As in ALBEF: the similarities of the contrastive loss, which are to the teacher's features.
            wrong_image, has_image = self.draw(state, state.text, batch.keys.image[batch.rows], batch.draws[:, 0])
            wrong_text, has_text = self.draw(state, state.image, batch.keys.text[batch.rows], batch.draws[:, 1])
            images, own_states, own_mask = state.prepared_images, state.text_states, batch.text.mask
            wrong_states, wrong_mask = own_states[wrong_text], own_mask[wrong_text]
        states = torch.cat([own_states, own_states, wrong_states])
        mask = torch.cat([own_mask, own_mask, wrong_mask])
        logits = model.match(states, mask, images, torch.cat([own, wrong_image, own]))
        labels = torch.cat([torch.ones_like(own), torch.zeros_like(own), torch.zeros_like(own)])
        exists = torch.cat([torch.ones_like(has_image), has_image, has_text]).to(logits.dtype)
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
            grouped = candidates.view(pools, pool, -1)
            similarity = similarities(state, queries.view(pools, pool, -1), grouped)
            same = ids.view(pools, pool, 1) == ids.view(pools, 1, pool)
            if self.same_codeword:
                codes = nearest_codeword(grouped, state)
                same = narrow(same, codes[..., :, None] == codes[..., None, :])
            column, exists = draw_negatives(similarity, same, draws.view(pools, pool))
            first = torch.arange(0, len(ids), pool, device=ids.device)[:, None]
        return (first + column).flatten(), exists.flatten()

    @torch.no_grad()
    def draw_from_all(self, state: StudentState, queries: Tensor, keys: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        """The same among the global batch: rows of it (batch,)."""
        if state.batch.global_inputs is None:
            raise RecipeError(
                "matching.negatives all_ranks is for pretraining, whose task gathers all inputs; use nearby"
            )
        samples = len(state.batch.global_inputs.images)
        candidates = keys[:samples]
        similarity = similarities(state, queries, candidates)
        same = state.batch.image_ids[:, None] == state.batch.keys.image_ids[None, :samples]
        if self.same_codeword:
            codes = nearest_codeword(candidates, state)
            same = narrow(same, codes[state.batch.rows][:, None] == codes[None])
        return draw_negatives(similarity, same, draws)


def similarities(state: StudentState, queries: Tensor, candidates: Tensor) -> Tensor:
    """Logits (…, queries, candidates) to draw by: all alike where captions have no feature of their own (no text layers)."""
    found = queries @ candidates.mT.to(queries.dtype) / state.model.temperature()
    return found if state.model.config.text.layers else torch.zeros_like(found)


def nearest_codeword(features: Tensor, state: StudentState) -> Tensor:
    """(…, samples, feature_dim) -> (…, samples)."""
    if state.model.codebook is None:
        raise RecipeError("matching.same_codeword needs a model with a codebook, which fine-tuning leaves behind")
    codewords = state.model.codewords()
    return (features.to(codewords.dtype) @ codewords.T).argmax(-1)


def narrow(same: Tensor, wanted: Tensor) -> Tensor:
    """Rule out what is not wanted as well, in rows that have something wanted left. Both (…, rows, columns) bool."""
    narrowed = same | ~wanted
    return torch.where(narrowed.all(-1, keepdim=True), same, narrowed)
