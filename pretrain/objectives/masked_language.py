"""Masked language modelling given the image, with distillation (ALBEF Eq. 3 and 7)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from data_tools.stream.order import uniforms
from data_tools.tokenizer import CaptionTokenizer
from pretrain.model.alignment_model import AlignmentModel, TextBatch
from pretrain.model.bert_layers import PreparedImages
from pretrain.objectives.state import MaskedText, StudentState


def mask_words(
    text: TextBatch,
    positions: Tensor,
    tokenizer: CaptionTokenizer,
    share: float,
    seed: int,
    separators: bool = False,
) -> tuple[Tensor, Tensor]:
    """Choose `share` of the words; of them 80 % become [MASK], 10 % any other token, 10 % stay (BERT's rule).

    Special tokens are never chosen, but for [SEP] where `separators` says so. text: (batch, words); positions: (batch,) the samples' places in the endless order: the
    choice is a function of (seed, position, word). -> altered ids (batch, words), and chosen (batch, words) bool.
    """
    ids = text.ids
    numbers = uniforms(seed, positions.cpu().numpy(), 3 * ids.shape[1]).reshape(len(positions), ids.shape[1], 3)
    draws = torch.from_numpy(np.ascontiguousarray(numbers)).to(ids.device)
    special = (ids == tokenizer.cls) | (ids == tokenizer.pad) | ~text.mask
    if not separators:
        special |= ids == tokenizer.sep
    chosen = (draws[..., 0] < share) & ~special
    altered = torch.where(draws[..., 1] < 0.8, tokenizer.mask, ids)
    other = (draws[..., 2] * tokenizer.vocabulary).long()
    altered = torch.where(draws[..., 1] >= 0.9, other, altered)
    return torch.where(chosen, altered, ids), chosen


def word_logits(model: AlignmentModel, text: TextBatch, places: Tensor, prepared_images: PreparedImages) -> Tensor:
    """Predictions for the words at `places` alone (masked words, vocabulary): the full batch x length x vocabulary never exists."""
    states = model.text_encoder(text.ids, text.mask)
    fused = model.fusion_encoder(states, text.mask, prepared_images)
    return model.masked_language_logits(fused.flatten(0, 1)[places])


class MaskedLanguage:
    """Cross-entropy of the masked words, `distill_weight` of it with the teacher's prediction as target."""

    def __call__(self, state: StudentState) -> dict[str, Tensor]:
        """-> `masked_language`, normalised by the count of masked words in the global batch."""
        masked = state.batch.masked
        assert masked is not None, "the task masks words where this objective is on"
        logits = word_logits(state.model, masked.text, masked.word_indices, state.prepared_images)
        return {"masked_language": masked_language_loss(logits, masked, state.batch.distill_weight)}


def masked_language_loss(logits: Tensor, masked: MaskedText, distill_weight: float) -> Tensor:
    """logits: (masked words, vocabulary) -> a scalar; 0 (with a graph) where no word is masked."""
    log_probability = torch.log_softmax(logits, -1)
    loss = -log_probability.gather(-1, masked.labels[:, None]).sum() * (1 - distill_weight)
    if distill_weight and masked.teacher_logits is not None:
        loss = loss - distill_weight * (torch.softmax(masked.teacher_logits, -1) * log_probability).sum()
    return loss / masked.normaliser
