"""Where the fusion encoder looks for each word: Grad-CAM on the cross-attention of a fusion layer (Selvaraju et al. 2017; ALBEF section 5)."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from pretrain.model.alignment_model import AlignmentModel
from pretrain.model.bert_layers import BertLayer, KeysValues, split_heads


def word_maps(model: AlignmentModel, images: Tensor, ids: Tensor, mask: Tensor, layer: int | None = None) -> Tensor:
    """Heat maps of each word over the image's patches: attention x gradient of the matching logit, negatives cut, mean over heads.

    images: (pairs, 3, size, size) uint8; ids, mask: (pairs, words); layer: a fusion layer, from 0; None: the middle one (ALBEF
    takes the third of its six). -> (pairs, words, rows, columns), non-negative. Raises ValueError where there is no such layer.
    """
    layers = list(model.fusion_encoder.layers)
    chosen = (len(layers) - 1) // 2 if layer is None else layer
    if not 0 <= chosen < len(layers):
        raise ValueError(f"fusion layer {chosen} of {len(layers)}: there is no such layer")
    with torch.no_grad():
        states = model.text_encoder(ids, mask)
        read = model.fusion_encoder.read_images(model.image_encoder(images))
        for before, image in zip(layers[:chosen], read, strict=False):
            states = before(states, mask, image)
    with torch.enable_grad():
        one = layers[chosen]
        assert isinstance(one, BertLayer)
        states, weights = with_attention(one, states, mask, read[chosen])
        for after, image in zip(layers[chosen + 1 :], read[chosen + 1 :], strict=True):
            states = after(states, mask, image)
        (gradient,) = torch.autograd.grad(model.matching_logits(states)[:, 1].sum(), weights)
    maps = (weights.detach() * gradient.clamp(min=0)).mean(1)[..., 1:]  # without the class token
    side = math.isqrt(maps.shape[-1])
    return maps.unflatten(-1, (side, side))


def with_attention(layer: BertLayer, states: Tensor, mask: Tensor, image: KeysValues) -> tuple[Tensor, Tensor]:
    """A fusion layer in evaluation mode whose cross-attention weights are at hand: (pairs, heads, words, tokens), to differentiate by."""
    cross = layer.cross_attention
    assert cross is not None, "a fusion layer has cross-attention"
    states = layer.self_attention(states, mask)
    key, value = image
    query = split_heads(cross.query(states), cross.heads)
    weights = torch.softmax(query @ key.mT / key.shape[-1] ** 0.5, -1).detach().requires_grad_()
    attended = (weights @ value).transpose(1, 2).flatten(2)
    states = cross.norm(states + cross.output(attended))
    return layer.norm(states + layer.output(functional.gelu(layer.intermediate(states)))), weights
