"""Image-text contrast at several levels: pairs of inner text and image layers (the slides' future work).

Axes in tensor names: b, the micro-batch's samples; k, the keys (the global batch; inner levels have no queue).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pretrain.config import LevelsConfig
from pretrain.objectives.contrastive import soft_cross_entropy, soft_targets
from pretrain.objectives.state import Keys, StudentState
from runtime.ranks import gather_rows


class Levels:
    """Contrast at each of `model.levels` with the teacher's features of the global batch at that level.

    Like the contrastive objective, the loss is exact over the global batch.
    """

    def __init__(self, config: LevelsConfig) -> None:
        pass  # the weight is the task's, and the levels are the model's

    def __call__(self, state: StudentState) -> dict[str, Tensor]:
        """Return `levels`: the mean over levels of image-to-text and text-to-image."""
        batch, temperature = state.batch, state.model.temperature()
        terms = []
        for (image, text), keys in zip(state.levels, batch.level_keys, strict=True):
            positives_bk = batch.image_ids[:, None] == keys.image_ids[None]
            for student, teacher, key_features in ((image, keys.image, keys.text), (text, keys.text, keys.image)):
                with torch.no_grad():
                    teacher_logits_bk = teacher[batch.rows] @ key_features.T / temperature
                    targets_bk = soft_targets(teacher_logits_bk, positives_bk, batch.distill_weight)
                terms.append(soft_cross_entropy(student @ key_features.T / temperature, targets_bk))
        return {"levels": torch.stack(terms).mean()}


def gather_level_keys(levels: Sequence[Sequence[tuple[Tensor, Tensor]]], image_ids: Tensor) -> list[Keys]:
    """Gather the teacher's features of all ranks at every level. A collective.

    Args:
        levels: for each micro-batch of this rank, the image and text features (batch, feature_dim) of each level.
        image_ids: (samples,) int64, of the global batch.

    Returns:
        The keys of each level, in global sample order.
    """
    level_keys = []
    for level in zip(*levels, strict=True):
        images, texts = (torch.cat(features) for features in zip(*level, strict=True))
        level_keys.append(Keys(gather_rows(images), gather_rows(texts), image_ids))
    return level_keys
