"""The dual head: cosine of the projected features, fine-tuned by contrast within the global batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed

from pretrain.encode import Encodings
from pretrain.objectives.contrastive import soft_cross_entropy
from runtime.ranks import gather_rows, sum_over_ranks


def dual_scores(encodings: Encodings) -> Tensor:
    """(images, captions): the cosine of every image's and every caption's features."""
    return encodings.image @ encodings.text.T


def dual_loss(image: Tensor, text: Tensor, image_ids: Tensor, temperature: Tensor) -> Tensor:
    """Symmetric contrastive loss; all captions of a query's image are its positives (ALBEF's retrieval fine-tuning).

    image, text: unit-norm features (batch, feature_dim) of this rank; image_ids: (batch,). Candidates are gathered from all
    ranks with their gradient, so the mean over ranks is the loss of the global batch.
    """
    all_image, all_text, all_ids = GatherRows.apply(image), GatherRows.apply(text), gather_rows(image_ids)
    positives = (image_ids[:, None] == all_ids[None]).float()
    targets = positives / positives.sum(-1, keepdim=True)
    to_text = soft_cross_entropy(image @ all_text.T / temperature, targets)
    to_image = soft_cross_entropy(text @ all_image.T / temperature, targets)
    return (to_text + to_image) / 2


class GatherRows(torch.autograd.Function):
    """(n, …) on each rank -> (world * n, …) in rank order; the gradient goes back to the rank that a row came from."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.rows = len(rows)
        return gather_rows(rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        rank = distributed.get_rank() if distributed.is_initialized() else 0
        return sum_over_ranks(gradient)[rank * ctx.rows : (rank + 1) * ctx.rows]
