"""Tiny models to decompose, and jobs that each rank of test_vldeformer.py runs."""

from __future__ import annotations

import torch
from torch import distributed
from torch.nn.functional import normalize

from finetune.heads.decomposed import Decomposed
from finetune.heads.vldeformer import Altered, contrastive_loss, cosine_loss
from pretrain.model.alignment_model import AlignmentModel
from pretrain.model.config import FusionEncoderConfig, ImageEncoderConfig, ModelConfig, TextEncoderConfig


def network(kind: str, image_width: int = 32, text_layers: int = 1) -> AlignmentModel:
    image = ImageEncoderConfig("vit_tiny_patch16_224", image_size=32, patch=8, width=image_width, depth=1, heads=2)
    text = TextEncoderConfig(width=32, layers=text_layers, heads=2, feed_forward=64, dropout=0.0, positions=16)
    torch.manual_seed(0)
    built = AlignmentModel(ModelConfig(image, text, FusionEncoderConfig(kind, 2), feature_dim=16, codewords=0), 85)
    with torch.no_grad():
        for parameter in built.parameters():  # BERT's start makes all states nearly alike
            parameter.mul_(4) if parameter.ndim > 1 else parameter.add_(0.1 * torch.randn(parameter.shape))
    return built.double().eval()


def decomposed(kind: str, pooling: str = "mean", **sizes) -> Decomposed:
    torch.manual_seed(1)
    return Decomposed(network(kind, **sizes), pooling).double().eval()


def loss_and_gradients(kind, sides, ids, usable, rank=0, world=1):
    """The loss of this rank's share of a batch, and the gradients of its rows: sides are image, text, altered image and text."""
    share = slice(rank * len(ids) // world, (rank + 1) * len(ids) // world)
    rows = [side[share].clone().requires_grad_() for side in sides]
    image, text, altered_image, altered_text = (normalize(side, dim=-1) for side in rows)
    if kind == "cosine":
        loss = cosine_loss(image, text, ids[share])
    else:
        ends = usable[share], ~usable[share], ids.roll(1)[share]
        loss = contrastive_loss(image, text, ids[share], 0.1, Altered(altered_image, altered_text, *ends))
    loss.backward()
    return loss.detach(), [row.grad for row in rows if row.grad is not None]


def on_this_rank(*batch):
    return loss_and_gradients(*batch, rank=distributed.get_rank(), world=distributed.get_world_size())
