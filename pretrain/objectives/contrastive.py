"""Image-text contrastive loss with intra-modal terms, against teacher keys and queue (ALBEF Eq. 1-2 and 6; CODIS L_ica)."""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.config import ContrastiveConfig
from pretrain.objectives.state import StudentState


def soft_targets(teacher_logits: Tensor, positives: Tensor, distill_weight: float) -> Tensor:
    """`distill_weight` of the teacher's softmax, the rest spread evenly over the positives.

    teacher_logits: (batch, keys), -inf where a key is left out; positives: (batch, keys) bool. Rows sum to 1.
    """
    hard = positives.to(teacher_logits.dtype) / positives.sum(-1, keepdim=True)
    if distill_weight == 0:
        return hard
    # A row whose every key is left out (one sample, empty queue) has no teacher's opinion: the hard target stands alone.
    soft = torch.where(
        teacher_logits.isfinite().any(-1, keepdim=True), torch.softmax(teacher_logits, -1).nan_to_num(), hard
    )
    return distill_weight * soft + (1 - distill_weight) * hard


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over rows of -sum(targets * log softmax(logits)). Both (batch, keys)."""
    return -(targets * torch.log_softmax(logits, -1)).sum(-1).mean()


class Contrastive:
    """Exact over the global batch: the keys are the teacher's, so each sample's loss depends on its own student features alone."""

    def __init__(self, config: ContrastiveConfig) -> None:
        self.intra_modal = config.intra_modal

    def __call__(self, state: StudentState) -> dict[str, Tensor]:
        """-> `contrastive`: the mean of image-to-text, text-to-image and, if on, image-to-image and text-to-text."""
        batch, keys, temperature = state.batch, state.batch.keys, state.model.temperature()
        positives = batch.image_ids[:, None] == keys.image_ids[None]
        itself = torch.arange(len(keys.image_ids), device=batch.rows.device)[None] == batch.rows[:, None]

        def term(student: Tensor, teacher: Tensor, against: Tensor, same_modality: bool) -> Tensor:
            with torch.no_grad():
                opinion = teacher @ against.T / temperature
                if same_modality:  # the teacher's similarity to itself would outweigh all else
                    opinion = opinion.masked_fill(itself, -torch.inf)
                targets = soft_targets(opinion, positives, batch.distill_weight)
            return soft_cross_entropy(student @ against.T / temperature, targets)

        teacher_image, teacher_text = keys.image[batch.rows], keys.text[batch.rows]
        terms = [term(state.image, teacher_image, keys.text, False), term(state.text, teacher_text, keys.image, False)]
        if self.intra_modal:
            terms += [
                term(state.image, teacher_image, keys.image, True),
                term(state.text, teacher_text, keys.text, True),
            ]
        return {"contrastive": torch.stack(terms).mean()}
