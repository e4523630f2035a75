"""Alignment over several layers: the slides' future work. Image and text are contrasted at inner layers as well as at the last."""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.objectives.contrastive import soft_cross_entropy, soft_targets
from pretrain.objectives.state import StudentState


class Levels:
    """Image-text contrast at each of `model.levels`, against the teacher's features of the global batch at that level.

    There is no queue at inner levels. The exactness over the global batch is the contrastive objective's.
    """

    def __call__(self, state: StudentState) -> dict[str, Tensor]:
        """-> `levels`: the mean over levels of image-to-text and text-to-image."""
        batch, temperature = state.batch, state.model.temperature()
        terms = []
        for (image, text), keys in zip(state.levels, batch.level_keys, strict=True):
            positives = batch.image_ids[:, None] == keys.image_ids[None]
            for student, teacher, against in ((image, keys.image, keys.text), (text, keys.text, keys.image)):
                with torch.no_grad():
                    opinion = teacher[batch.rows] @ against.T / temperature
                    targets = soft_targets(opinion, positives, batch.distill_weight)
                terms.append(soft_cross_entropy(student @ against.T / temperature, targets))
        return {"levels": torch.stack(terms).mean()}
