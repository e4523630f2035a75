"""Masked language modelling given the image, with distillation (ALBEF Eq. 3 and 7)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from data_tools.stream.order import uniforms
from data_tools.tokenizer import CaptionTokenizer
from pretrain.config import MaskedLanguageConfig
from pretrain.model.alignment_model import AlignmentModel, TextBatch
from pretrain.model.bert_layers import PreparedImages
from pretrain.objectives.state import MaskedText, StudentState
from runtime.ranks import sum_over_ranks


class MaskedLanguage:
    """Cross-entropy of the masked words. A share of it, `distill_weight`, takes the teacher's prediction as its target."""

    def __init__(self, config: MaskedLanguageConfig) -> None:
        pass  # the weight is the task's, and words are masked before the forward (`mask_captions`)

    def __call__(self, state: StudentState) -> dict[str, Tensor]:
        """Return `masked_language`, normalised by the count of masked words in the global batch."""
        masked = state.batch.masked
        assert masked is not None, "the task masks words where this objective is on"
        logits = word_logits(state.model, masked.text, masked.word_indices, state.prepared_images)
        return {"masked_language": masked_language_loss(logits, masked, state.batch.distill_weight)}


def mask_captions(
    words: TextBatch,
    mask: Tensor,
    positions: Tensor,
    tokenizer: CaptionTokenizer,
    config: MaskedLanguageConfig,
    seed: int,
    parts: list[slice],
    world_size: int,
) -> list[MaskedText]:
    """Mask words of a rank's captions; the teacher's logits are still to come. A collective.

    Args:
        words: (samples, words), on the host: which words are masked is then known without waiting for the device.
        mask: (samples, words) bool, a copy of `words.mask` on the device.
        positions: (samples,) int64, the samples' positions in the endless order.
        tokenizer: the run's.
        config: the share of words, and whether [SEP] may be chosen.
        seed: seed of these draws.
        parts: the rows of each micro-batch.
        world_size: ranks that share the global batch.

    Returns:
        One `MaskedText` for each micro-batch, on the device.
    """
    device = mask.device
    altered_ids, chosen = mask_words(words, positions, tokenizer, config.share, seed, config.separators)
    count = sum_over_ranks(chosen.sum().to(device, torch.float32)).clamp(min=1.0)
    normaliser = count / (world_size * len(parts))
    masked = []
    for part in parts:
        text = TextBatch(altered_ids[part].to(device, non_blocking=True), mask[part])
        word_indices = chosen[part].flatten().nonzero()[:, 0]
        labels = words.ids[part].flatten()[word_indices].to(device, non_blocking=True)
        masked.append(MaskedText(text, word_indices.to(device, non_blocking=True), labels, normaliser))
    return masked


def mask_words(
    text: TextBatch,
    positions: Tensor,
    tokenizer: CaptionTokenizer,
    share: float,
    seed: int,
    separators: bool = False,
) -> tuple[Tensor, Tensor]:
    """Choose `share` of the words; 80 % of them become [MASK], 10 % any other token, 10 % stay (BERT's rule).

    The choice is a function of (seed, position, word). Special tokens are never chosen, except [SEP] with `separators`.

    Args:
        text: captions, ids (batch, words).
        positions: (batch,) int64, the samples' positions in the endless order.
        tokenizer: names the special tokens.
        share: share of the words to choose, 0 to 1.
        seed: seed of these draws.
        separators: whether [SEP] may be chosen too.

    Returns:
        The altered ids (batch, words), and which words are chosen, (batch, words) bool.
    """
    ids = text.ids
    numbers = uniforms(seed, positions.cpu().numpy(), 3 * ids.shape[1]).reshape(len(positions), ids.shape[1], 3)
    # Three draws a word: whether it is chosen, what becomes of it, and which other token may replace it.
    draws = torch.from_numpy(np.ascontiguousarray(numbers)).to(ids.device)
    special = (ids == tokenizer.cls) | (ids == tokenizer.pad) | ~text.mask
    if not separators:
        special |= ids == tokenizer.sep
    chosen = (draws[..., 0] < share) & ~special
    altered = torch.where(draws[..., 1] < 0.8, tokenizer.mask, ids)
    other = (draws[..., 2] * tokenizer.vocabulary).long()
    altered = torch.where(draws[..., 1] >= 0.9, other, altered)
    return torch.where(chosen, altered, ids), chosen


def word_logits(
    model: AlignmentModel, text: TextBatch, word_indices: Tensor, prepared_images: PreparedImages
) -> Tensor:
    """Predict the words at `word_indices` alone: a full (batch, words, vocabulary) never exists.

    Args:
        model: student or teacher.
        text: the altered captions (batch, words).
        word_indices: (masked words,) int64, in the batch's words laid end to end.
        prepared_images: the batch's images as the fusion encoder reads them.

    Returns:
        (masked words, vocabulary)
    """
    states = model.text_encoder(text.ids, text.mask)
    fused = model.fusion_encoder(states, text.mask, prepared_images)
    return model.masked_language_logits(fused.flatten(0, 1)[word_indices])


def masked_language_loss(logits: Tensor, masked: MaskedText, distill_weight: float) -> Tensor:
    """Return the loss as a scalar from logits (masked words, vocabulary). It is 0, with a graph, where no word is masked."""
    log_probability = torch.log_softmax(logits, -1)
    loss = -log_probability.gather(-1, masked.labels[:, None]).sum() * (1 - distill_weight)
    if distill_weight and masked.teacher_logits is not None:
        loss = loss - distill_weight * (torch.softmax(masked.teacher_logits, -1) * log_probability).sum()
    return loss / masked.normaliser
