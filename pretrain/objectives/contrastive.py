"""Image-text contrastive loss with intra-modal terms, against teacher keys and queue (ALBEF Eq. 1-2 and 6; CODIS L_ica).

Axes in tensor names: b, the micro-batch's samples; k, the keys (global batch, then queue).
"""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.config import ContrastiveConfig
from pretrain.objectives.state import StudentState


def soft_targets(teacher_logits_bk: Tensor, positives_bk: Tensor, distill_weight: float) -> Tensor:
    """Return `distill_weight` of the teacher's softmax, the rest spread evenly over the positives.

    Args:
        teacher_logits_bk: (batch, keys), -inf where a key is left out.
        positives_bk: (batch, keys) bool; each row has at least one.
        distill_weight: ALBEF's alpha, 0 to 1.

    Returns:
        (batch, keys); rows sum to 1.
    """
    hard_bk = positives_bk.to(teacher_logits_bk.dtype) / positives_bk.sum(-1, keepdim=True)
    if distill_weight == 0:
        return hard_bk
    # Where every key of a row is left out (one sample, empty queue) the teacher has no opinion, and the hard target stands alone.
    soft_bk = torch.where(
        teacher_logits_bk.isfinite().any(-1, keepdim=True), torch.softmax(teacher_logits_bk, -1).nan_to_num(), hard_bk
    )
    return distill_weight * soft_bk + (1 - distill_weight) * hard_bk


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean over rows of -sum(targets * log softmax(logits)); both are (batch, keys)."""
    return -(targets * torch.log_softmax(logits, -1)).sum(-1).mean()


class Contrastive:
    """Contrast of the student's features with the teacher's keys.

    The loss is exact over the global batch: the keys are the teacher's, so a sample's loss depends on its own student features alone.
    """

    def __init__(self, config: ContrastiveConfig) -> None:
        self.intra_modal = config.intra_modal

    def __call__(self, state: StudentState) -> dict[str, Tensor]:
        """Return `contrastive`: the mean of image-to-text, text-to-image and, if on, image-to-image and text-to-text."""
        batch, keys, temperature = state.batch, state.batch.keys, state.model.temperature()
        positives_bk = batch.image_ids[:, None] == keys.image_ids[None]
        is_self_bk = torch.arange(len(keys.image_ids), device=batch.rows.device)[None] == batch.rows[:, None]

        def term(student: Tensor, teacher: Tensor, key_features: Tensor, same_modality: bool) -> Tensor:
            """Return one direction's loss. student, teacher: (batch, feature_dim); key_features: (keys, feature_dim)."""
            with torch.no_grad():
                teacher_logits_bk = teacher @ key_features.T / temperature
                if same_modality:  # the teacher's similarity to itself would outweigh all else
                    teacher_logits_bk = teacher_logits_bk.masked_fill(is_self_bk, -torch.inf)
                targets_bk = soft_targets(teacher_logits_bk, positives_bk, batch.distill_weight)
            return soft_cross_entropy(student @ key_features.T / temperature, targets_bk)

        teacher_image, teacher_text = keys.image[batch.rows], keys.text[batch.rows]
        terms = [term(state.image, teacher_image, keys.text, False), term(state.text, teacher_text, keys.image, False)]
        if self.intra_modal:
            terms += [
                term(state.image, teacher_image, keys.image, True),
                term(state.text, teacher_text, keys.text, True),
            ]
        return {"contrastive": torch.stack(terms).mean()}
