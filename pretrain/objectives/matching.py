"""Image-text matching with hard negatives drawn by contrastive similarity (ALBEF Eq. 4).

Axes in tensor names: q, the queries; c, the candidates that a query's negative is drawn from. Leading axes ("…") are pools.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from pretrain.config import MatchingConfig
from pretrain.model.alignment_model import IMAGE, TEXT, AlignmentModel, TextBatch
from pretrain.model.bert_layers import PreparedImages
from pretrain.objectives.state import GlobalInputs, StudentState
from runtime.errors import RecipeError
from runtime.ranks import Ranks, gather_rows


def draw_negatives(similarity_qc: Tensor, same_qc: Tensor, draws_q: Tensor) -> tuple[Tensor, Tensor]:
    """Draw one candidate for each query, with probability softmax(similarity) over those that are not the same image.

    It is vectorised and does not wait for the device. It handles ties, equal captions and saturated similarities.

    Args:
        similarity_qc: (…, queries, candidates) logits.
        same_qc: (…, queries, candidates) bool, True where the candidate must not be drawn.
        draws_q: (…, queries) uniform in [0, 1).

    Returns:
        (…, queries) int64, the candidate drawn, and (…, queries) bool, whether the query has any candidate at all.
    """
    logits_qc = similarity_qc.detach().double().masked_fill(same_qc, -torch.inf)
    exists_q = ~same_qc.all(-1)
    # Softmax subtracts the largest allowed logit, so at least one weight is far from 0, whatever the temperature.
    weights_qc = torch.softmax(logits_qc.masked_fill(~exists_q[..., None], 0.0), -1)
    cumulative_qc = weights_qc.cumsum(-1)
    thresholds = (draws_q.double() * cumulative_qc[..., -1])[..., None]
    column_q = torch.searchsorted(cumulative_qc, thresholds, right=True)[..., 0]
    # A draw within rounding of the total can land behind the last allowed candidate.
    numbers_c = torch.arange(1, weights_qc.shape[-1] + 1, device=weights_qc.device)
    last_allowed_q = (weights_qc > 0).int().mul(numbers_c).amax(-1) - 1
    return torch.minimum(column_q, last_allowed_q), exists_q


@dataclass
class Triples:
    """Right and wrong pairs of a micro-batch, ready to be fused.

    Negative images are rows of `images`; negative texts are tensors of their own.
    """

    images: PreparedImages
    """The micro-batch's own images, and behind them those drawn from other ranks."""
    wrong_image: Tensor
    """(batch,) int64: the row in `images` of each text's negative image."""
    states: Tensor
    """(batch, words, width): the micro-batch's own texts."""
    mask: Tensor
    """(batch, words) bool"""
    wrong_states: Tensor
    """(batch, words, width): each image's negative text."""
    wrong_mask: Tensor
    """(batch, words) bool"""
    has_image: Tensor
    """(batch,) bool: there is a negative image."""
    has_text: Tensor
    """(batch,) bool: there is a negative text."""


@dataclass
class Negatives:
    """What is drawn for each sample of a micro-batch."""

    image: Tensor
    """(batch,) int64: the row of each text's negative image."""
    text: Tensor
    """(batch,) int64: the row of each image's negative text."""
    has_image: Tensor
    """(batch,) bool: there is a negative image."""
    has_text: Tensor
    """(batch,) bool: there is a negative text."""

    @property
    def pairs(self) -> Tensor:
        """How many pairs count, the right ones included; 0-d int64."""
        return len(self.image) + self.has_image.sum() + self.has_text.sum()


class Matching:
    """One positive and two negatives for each sample: its text with a wrong image, and its image with a wrong text."""

    def __init__(self, config: MatchingConfig) -> None:
        self.pool = config.pool
        self.all_ranks = config.negatives == "all_ranks"
        self.same_codeword = config.same_codeword

    def __call__(self, state: StudentState) -> dict[str, Tensor]:
        """Return `matching` (cross-entropy over the pairs) and `matching_accuracy`."""
        return judge(state.model, self._from_all_ranks(state) if self.all_ranks else self._from_micro_batch(state))

    def part(self, whole: StudentState, rows: slice, drawn: Negatives) -> dict[str, Tensor]:
        """Return the share of some rows in the figures of a micro-batch; those of all rows add up to `__call__`'s.

        Args:
            whole: the micro-batch. Its tokens and states are read, its own images are not prepared.
            rows: samples of it.
            drawn: the negatives of the micro-batch (`draw_nearby`).
        """
        own, fusion = whole.part(rows), whole.model.fusion_encoder
        images = fusion.prepare_images(torch.cat([own.image_tokens, whole.image_tokens[drawn.image[rows]]]))
        size = len(own.text_states)
        triples = Triples(
            images=images,
            wrong_image=torch.arange(size, 2 * size, device=own.text_states.device),
            states=own.text_states,
            mask=own.batch.text.mask,
            wrong_states=whole.text_states[drawn.text[rows]],
            wrong_mask=whole.batch.text.mask[drawn.text[rows]],
            has_image=drawn.has_image[rows],
            has_text=drawn.has_text[rows],
        )
        return judge(whole.model, triples, drawn.pairs)

    def draw_nearby(self, state: StudentState) -> Negatives:
        """Draw the negatives of a micro-batch within it."""
        batch = state.batch
        # As in ALBEF: the similarities of the contrastive loss, which are to the teacher's features.
        wrong_image, has_image = self.draw(state, state.text, batch.keys.image[batch.rows], batch.draws[:, 0], IMAGE)
        wrong_text, has_text = self.draw(state, state.image, batch.keys.text[batch.rows], batch.draws[:, 1], TEXT)
        return Negatives(wrong_image, wrong_text, has_image, has_text)

    def _from_micro_batch(self, state: StudentState) -> Triples:
        drawn, states, mask = self.draw_nearby(state), state.text_states, state.batch.text.mask
        return Triples(
            images=state.prepared_images,
            wrong_image=drawn.image,
            states=states,
            mask=mask,
            wrong_states=states[drawn.text],
            wrong_mask=mask[drawn.text],
            has_image=drawn.has_image,
            has_text=drawn.has_text,
        )

    def _from_all_ranks(self, state: StudentState) -> Triples:
        """Draw among the global batch, and encode the images and texts that were drawn with the student, once more."""
        batch, model = state.batch, state.model
        wrong_image, has_image = self.draw_from_all(state, state.text, batch.keys.image, batch.draws[:, 0], IMAGE)
        wrong_text, has_text = self.draw_from_all(state, state.image, batch.keys.text, batch.draws[:, 1], TEXT)
        assert batch.global_inputs is not None
        drawn_images = model.fusion_encoder.prepare_images(model.image_tokens(batch.global_inputs.images[wrong_image]))
        images: PreparedImages = [
            tuple(torch.cat(parts) for parts in zip(own_part, drawn_part, strict=True))
            for own_part, drawn_part in zip(state.prepared_images, drawn_images, strict=True)
        ]
        size = len(batch.image_ids)
        # The global batch's captions may be padded further than this micro-batch's.
        ids, mask = batch.global_inputs.text.ids[wrong_text], batch.global_inputs.text.mask[wrong_text]
        longest = max(ids.shape[1], batch.text.ids.shape[1])
        missing, own_missing = longest - ids.shape[1], longest - batch.text.ids.shape[1]
        return Triples(
            images=images,
            wrong_image=torch.arange(size, device=batch.rows.device) + size,
            states=functional.pad(state.text_states, (0, 0, 0, own_missing)),
            mask=functional.pad(batch.text.mask, (0, own_missing)),
            wrong_states=functional.pad(model.text_encoder(ids, mask), (0, 0, 0, missing)),
            wrong_mask=functional.pad(mask, (0, missing)),
            has_image=has_image,
            has_text=has_text,
        )

    def draw(
        self, state: StudentState, queries: Tensor, candidates: Tensor, draws: Tensor, modality: int = IMAGE
    ) -> tuple[Tensor, Tensor]:
        """Draw a wrong candidate for each query among its pool of neighbours.

        Args:
            state: of the micro-batch.
            queries: (batch, feature_dim) of one modality, the student's.
            candidates: (batch, feature_dim) of the other modality.
            draws: (batch,) uniform in [0, 1).
            modality: of the candidates.

        Returns:
            (batch,) int64, rows of the micro-batch, and (batch,) bool, whether there is any candidate.

        Raises:
            RecipeError: the pool does not divide the micro-batch.
        """
        ids = state.batch.image_ids
        pool = self.pool or len(ids)
        if len(ids) % pool:
            raise RecipeError(
                f"objectives.matching.pool {pool} does not divide the micro-batch {len(ids)}; set it to a divisor"
            )
        pools = len(ids) // pool
        with torch.no_grad():
            grouped = candidates.view(pools, pool, -1)
            similarity_qc = similarities(state, queries.view(pools, pool, -1), grouped)
            same_qc = ids.view(pools, pool, 1) == ids.view(pools, 1, pool)
            if self.same_codeword:
                codes = nearest_codeword(grouped, state, modality)
                same_qc = exclude_others(same_qc, codes[..., :, None] == codes[..., None, :])
            column_q, exists_q = draw_negatives(similarity_qc, same_qc, draws.view(pools, pool))
            first_row = torch.arange(0, len(ids), pool, device=ids.device)[:, None]
        return (first_row + column_q).flatten(), exists_q.flatten()

    @torch.no_grad()
    def draw_from_all(
        self, state: StudentState, queries: Tensor, keys: Tensor, draws: Tensor, modality: int = IMAGE
    ) -> tuple[Tensor, Tensor]:
        """Draw a wrong candidate for each query among the global batch.

        Arguments and results are those of `draw`, except for the candidates. `keys`, (keys, feature_dim), begin with the global
        batch, and the result holds rows of the global batch.

        Raises:
            RecipeError: the batch does not carry the global inputs (fine-tuning).
        """
        if state.batch.global_inputs is None:
            raise RecipeError(
                "matching.negatives all_ranks is for pretraining, which alone gathers all ranks' inputs; set it to nearby"
            )
        samples = len(state.batch.global_inputs.images)
        candidates = keys[:samples]
        similarity_qc = similarities(state, queries, candidates)
        same_qc = state.batch.image_ids[:, None] == state.batch.keys.image_ids[None, :samples]
        if self.same_codeword:
            codes = nearest_codeword(candidates, state, modality)
            same_qc = exclude_others(same_qc, codes[state.batch.rows][:, None] == codes[None])
        return draw_negatives(similarity_qc, same_qc, draws)


def judge(model: AlignmentModel, triples: Triples, pairs: Tensor | None = None) -> dict[str, Tensor]:
    """Return `matching`, the cross-entropy over the pairs, and `matching_accuracy`.

    Args:
        model: fuses and judges the pairs.
        triples: the pairs. A sample without a negative (a batch of one, or of one image) counts its positive alone.
        pairs: what the sums are divided by; None: the pairs that count.
    """
    own = torch.arange(len(triples.states), device=triples.states.device)
    states = torch.cat([triples.states, triples.states, triples.wrong_states])
    mask = torch.cat([triples.mask, triples.mask, triples.wrong_mask])
    logits = model.match(states, mask, triples.images, torch.cat([own, triples.wrong_image, own]))
    labels = torch.cat([torch.ones_like(own), torch.zeros_like(own), torch.zeros_like(own)])
    exists = torch.cat([torch.ones_like(triples.has_image), triples.has_image, triples.has_text]).to(logits.dtype)
    count = exists.sum() if pairs is None else pairs
    loss = (functional.cross_entropy(logits, labels, reduction="none") * exists).sum() / count
    accuracy = ((logits.detach().argmax(-1) == labels) * exists).sum() / count
    return {"matching": loss, "matching_accuracy": accuracy}


def similarities(state: StudentState, queries: Tensor, candidates: Tensor) -> Tensor:
    """Return the logits (…, queries, candidates) to draw by. They are all 0 where captions have no features (no text layers)."""
    similarity_qc = queries @ candidates.mT.to(queries.dtype) / state.model.temperature()
    return similarity_qc if state.model.config.text.layers else torch.zeros_like(similarity_qc)


def nearest_codeword(features: Tensor, state: StudentState, modality: int) -> Tensor:
    """Return the codeword nearest to each feature of a modality: (…, samples, feature_dim) -> (…, samples) int64."""
    if state.model.codebook is None:
        raise RecipeError(
            "matching.same_codeword needs a model with a codebook, and fine-tuning drops it; set same_codeword to false"
        )
    codewords = state.model.codewords()
    return (state.model.codebook_features(features.to(codewords.dtype), modality) @ codewords.T).argmax(-1)


def exclude_others(same_qc: Tensor, eligible_qc: Tensor) -> Tensor:
    """Exclude ineligible candidates too, in rows that keep an eligible one. Both are (…, queries, candidates) bool."""
    excluded_qc = same_qc | ~eligible_qc
    return torch.where(excluded_qc.all(-1, keepdim=True), same_qc, excluded_qc)


def gather_inputs(images: Tensor, text: TextBatch, ranks: Ranks) -> GlobalInputs:
    """Gather the student's inputs of all ranks, captions padded to the longest. A collective.

    Args:
        images: (samples, 3, size, size) uint8, this rank's.
        text: this rank's captions.
        ranks: the run's ranks.
    """
    gathered_images = gather_rows(images.contiguous())
    longest = torch.tensor(text.ids.shape[1], device=text.ids.device)
    if ranks.world > 1:
        torch.distributed.all_reduce(longest, op=torch.distributed.ReduceOp.MAX)
    padding = (0, int(longest) - text.ids.shape[1])
    ids, mask = functional.pad(text.ids, padding), functional.pad(text.mask, padding)
    return GlobalInputs(gathered_images, TextBatch(gather_rows(ids), gather_rows(mask.to(torch.uint8)).bool()))
