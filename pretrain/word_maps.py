"""Where the fusion encoder looks for each word: Grad-CAM on the attention of a fusion layer (Selvaraju et al. 2017; ALBEF section 5)."""

from __future__ import annotations

import math
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional

from pretrain.model.alignment_model import AlignmentModel
from pretrain.model.bert_layers import BertLayer, KeysValues, split_heads
from pretrain.model.image_encoder import ImageEncoder
from pretrain.model.single_stream import SingleStreamEncoder


def word_maps(model: AlignmentModel, images: Tensor, ids: Tensor, mask: Tensor, layer: int | None = None) -> Tensor:
    """Heat maps of each word over the image's patches: attention x gradient of the matching logit, negatives cut, mean over heads.

    images: (pairs, 3, size, size) uint8; ids, mask: (pairs, words); layer: a fusion layer, from 0; None: the middle one (ALBEF
    takes the third of its six). -> (pairs, words, rows, columns), non-negative. Raises ValueError where there is no such layer.
    """
    with torch.no_grad():
        image_tokens = model.image_encoder(images)
    before = run_until_layer(model, image_tokens, ids, mask, layer)
    with torch.enable_grad():
        states, weights = run_with_attention(before.layers[0], before.states, before.mask, before.read[0])
        for after, image in zip(before.layers[1:], before.read[1:], strict=True):
            states = after(states, before.mask, image)
        (gradient,) = torch.autograd.grad(model.matching_logits(states)[:, 1].sum(), weights)
    return to_patch_grid(weights.detach() * gradient.clamp(min=0), ids.shape[1], model.image_encoder)


@torch.no_grad()
def attention_maps(
    model: AlignmentModel, image_tokens: Tensor, ids: Tensor, mask: Tensor, layer: int | None = None
) -> Tensor:
    """The attention alone, mean over heads; no gradient needed. image_tokens: (pairs, 1 + patches, image width) -> as `word_maps`."""
    before = run_until_layer(model, image_tokens, ids, mask, layer)
    _, weights = run_with_attention(before.layers[0], before.states, before.mask, before.read[0])
    return to_patch_grid(weights.detach(), ids.shape[1], model.image_encoder)


class Until(NamedTuple):
    """A pair on its way through the fusion encoder, before some layer."""

    states: Tensor
    """Words, and in a single stream the image tokens behind them: (pairs, tokens, width)."""
    mask: Tensor
    layers: list[BertLayer]
    """That layer and those after it."""
    read: list[KeysValues | None]
    """What each of them reads of the images; nothing in a single stream."""


@torch.no_grad()
def run_until_layer(model: AlignmentModel, image_tokens: Tensor, ids: Tensor, mask: Tensor, layer: int | None) -> Until:
    """Raises ValueError where there is no such layer."""
    fusion = model.fusion_encoder
    layers = cast(list[BertLayer], list(fusion.layers))
    chosen = (len(layers) - 1) // 2 if layer is None else layer
    if not 0 <= chosen < len(layers):
        raise ValueError(f"fusion layer {chosen} of {len(layers)}: there is no such layer")
    states = model.text_encoder(ids, mask)
    read: list[KeysValues | None] = [None] * len(layers)
    if isinstance(fusion, SingleStreamEncoder):
        states, mask = fusion.join(states, mask, fusion.prepare_images(image_tokens))
    else:
        read = list(fusion.prepare_images(image_tokens))
    for before, image in zip(layers[:chosen], read, strict=False):
        states = before(states, mask, image)
    return Until(states, mask, layers[chosen:], read[chosen:])


def to_patch_grid(maps: Tensor, words: int, encoder: ImageEncoder) -> Tensor:
    """(pairs, heads, queries, keys) of a layer's attention -> (pairs, words, rows, columns), without class token, mean over heads."""
    patches = encoder.vit.patch_embed.num_patches
    side = math.isqrt(patches)
    return maps.mean(1)[:, :words, -patches:].unflatten(-1, (side, side))


def run_with_attention(
    layer: BertLayer, states: Tensor, mask: Tensor, image: KeysValues | None
) -> tuple[Tensor, Tensor]:
    """A fusion layer in evaluation mode whose attention weights are at hand, to differentiate by: words to image tokens (pairs,
    heads, words, tokens), or in a single stream all to all (pairs, heads, words + tokens, words + tokens)."""
    if image is None:
        own = layer.self_attention
        query, key, value = (split_heads(part, own.heads) for part in own.query_key_value(states).chunk(3, dim=-1))
        logits = (query @ key.mT / key.shape[-1] ** 0.5).masked_fill(~mask[:, None, None, :], -torch.inf)
        output, norm = own.output, own.norm
    else:
        cross = layer.cross_attention
        assert cross is not None, "a fusion layer has cross-attention"
        states = layer.self_attention(states, mask)
        key, value = image
        query = split_heads(cross.query(states), cross.heads)
        logits, output, norm = query @ key.mT / key.shape[-1] ** 0.5, cross.output, cross.norm
    weights = torch.softmax(logits, -1).detach().requires_grad_()
    attended = (weights @ value).transpose(1, 2).flatten(2)
    states = norm(states + output(attended))
    return layer.norm(states + layer.output(functional.gelu(layer.intermediate(states)))), weights
