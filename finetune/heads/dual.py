"""The dual head: cosine of the projected features, fine-tuned by contrast within the global batch."""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.encode import Encodings
from pretrain.objectives.contrastive import soft_cross_entropy


def dual_scores(encodings: Encodings) -> Tensor:
    """(images, captions): the cosine of every image's and every caption's features."""
    return encodings.image @ encodings.text.T


def dual_loss(image: Tensor, text: Tensor, image_ids: Tensor, temperature: Tensor) -> Tensor:
    """Symmetric contrastive loss; all captions of a query's image are its positives (ALBEF's retrieval fine-tuning).

    image, text: unit-norm features (batch, feature_dim) of this rank; image_ids: (batch,). Candidates are gathered from all
    ranks with their gradient, so the mean over ranks is the loss of the global batch.
    """
    all_image, all_text, all_ids = (
        gather_with_gradient(image),
        gather_with_gradient(text),
        gather_with_gradient(image_ids),
    )
    positives = (image_ids[:, None] == all_ids[None]).float()
    targets = positives / positives.sum(-1, keepdim=True)
    to_text = soft_cross_entropy(image @ all_text.T / temperature, targets)
    to_image = soft_cross_entropy(text @ all_image.T / temperature, targets)
    return (to_text + to_image) / 2


def gather_with_gradient(rows: Tensor) -> Tensor:
    """(n, …) on each rank -> (world * n, …) in rank order; gradients flow back to the rank they belong to."""
    from torch import distributed

    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return rows
    if rows.requires_grad:
        from torch.distributed.nn.functional import all_gather

        return torch.cat(all_gather(rows))
    parts = [torch.empty_like(rows) for _ in range(distributed.get_world_size())]
    distributed.all_gather(parts, rows.contiguous())
    return torch.cat(parts)
