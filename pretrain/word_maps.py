"""Where the fusion encoder looks for each word: Grad-CAM on the attention of a fusion layer (Selvaraju et al. 2017; ALBEF section 5).

Axes in tensor names: p, the pairs; h, the heads; q and k, the queries and keys of the attention (in cross-attention words and image
tokens; in a single stream both are words, then image tokens).
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional

from pretrain.model.alignment_model import AlignmentModel
from pretrain.model.bert_layers import BertLayer, KeysValues, split_heads
from pretrain.model.image_encoder import ImageEncoder
from pretrain.model.single_stream import SingleStreamEncoder
from pretrain.model.timm_tower import TimmTower
from pretrain.model.transformers_tower import TransformersTower


def word_maps(model: AlignmentModel, images: Tensor, ids: Tensor, mask: Tensor, layer: int | None = None) -> Tensor:
    """Return a heat map over the image's patches for each word: attention x positive gradient of the matching logit, mean over heads.

    Args:
        model: in evaluation mode, with a fusion encoder.
        images: (pairs, 3, size, size) uint8.
        ids: (pairs, words) int64 token ids.
        mask: (pairs, words) bool, True where a word is.
        layer: a fusion layer, counted from 0. None: the middle one (ALBEF takes the third of its six).

    Returns:
        (pairs, words, rows, columns), non-negative.

    Raises:
        ValueError: there is no such layer.
    """
    with torch.no_grad():
        image_tokens = model.image_encoder(images)
    before = run_until_layer(model, image_tokens, ids, mask, layer)
    with torch.enable_grad():
        states, weights_phqk = run_with_attention(before.layers[0], before.states, before.mask, before.images[0])
        for later_layer, image in zip(before.layers[1:], before.images[1:], strict=True):
            states = later_layer(states, before.mask, image)
        (gradient_phqk,) = torch.autograd.grad(model.matching_logits(states)[:, 1].sum(), weights_phqk)
    return to_patch_grid(weights_phqk.detach() * gradient_phqk.clamp(min=0), ids.shape[1], model.image_encoder)


@torch.no_grad()
def attention_maps(
    model: AlignmentModel, image_tokens: Tensor, ids: Tensor, mask: Tensor, layer: int | None = None
) -> Tensor:
    """Return the attention alone, mean over heads, which needs no gradient.

    Arguments, result and errors are those of `word_maps`, except image_tokens: (pairs, 1 + patches, image width).
    """
    before = run_until_layer(model, image_tokens, ids, mask, layer)
    _, weights_phqk = run_with_attention(before.layers[0], before.states, before.mask, before.images[0])
    return to_patch_grid(weights_phqk.detach(), ids.shape[1], model.image_encoder)


class BeforeLayer(NamedTuple):
    """Pairs on their way through the fusion encoder, before some layer."""

    states: Tensor
    """(pairs, tokens, width): words, and in a single stream the image tokens behind them."""
    mask: Tensor
    """(pairs, tokens) bool"""
    layers: list[BertLayer]
    """That layer and those after it."""
    images: list[KeysValues | None]
    """The images as each of these layers reads them; None in a single stream."""


@torch.no_grad()
def run_until_layer(
    model: AlignmentModel, image_tokens: Tensor, ids: Tensor, mask: Tensor, layer: int | None
) -> BeforeLayer:
    """Run the text encoder, and the fusion encoder up to `layer`; arguments and errors as in `attention_maps`."""
    fusion = model.fusion_encoder
    layers = cast(list[BertLayer], list(fusion.layers))
    number = (len(layers) - 1) // 2 if layer is None else layer
    if not 0 <= number < len(layers):
        raise ValueError(f"fusion layer {number} of {len(layers)} does not exist; layers count from 0")
    states = model.text_encoder(ids, mask)
    images: list[KeysValues | None] = [None] * len(layers)
    if isinstance(fusion, SingleStreamEncoder):
        states, mask = fusion.join(states, mask, fusion.prepare_images(image_tokens))
    else:
        images = list(fusion.prepare_images(image_tokens))
    for earlier_layer, image in zip(layers[:number], images, strict=False):
        states = earlier_layer(states, mask, image)
    return BeforeLayer(states, mask, layers[number:], images[number:])


def to_patch_grid(maps_phqk: Tensor, words: int, encoder: ImageEncoder | TimmTower | TransformersTower) -> Tensor:
    """Average a layer's attention over heads and keep words x patches: (pairs, heads, queries, keys) -> (pairs, words, rows, columns)."""
    rows, columns = encoder.grid
    # The class token and registers come before the patches.
    return maps_phqk.mean(1)[:, :words, -rows * columns :].unflatten(-1, (rows, columns))


def run_with_attention(
    layer: BertLayer, states: Tensor, mask: Tensor, image: KeysValues | None
) -> tuple[Tensor, Tensor]:
    """Run a fusion layer in evaluation mode with its attention weights at hand, to differentiate by them.

    Args:
        layer: of the fusion encoder.
        states: (pairs, tokens, width)
        mask: (pairs, tokens) bool
        image: keys and values of the images; None in a single stream.

    Returns:
        The layer's states, and the attention weights (pairs, heads, queries, keys): words to image tokens, or in a single stream all
        tokens to all.
    """
    if image is None:
        attention = layer.self_attention
        query, key, value = (
            split_heads(part, attention.heads) for part in attention.query_key_value(states).chunk(3, dim=-1)
        )
        logits_phqk = (query @ key.mT / key.shape[-1] ** 0.5).masked_fill(~mask[:, None, None, :], -torch.inf)
        output, norm = attention.output, attention.norm
    else:
        cross = layer.cross_attention
        assert cross is not None, "a fusion layer has cross-attention"
        states = layer.self_attention(states, mask)
        key, value = image
        query = split_heads(cross.query(states), cross.heads)
        logits_phqk, output, norm = query @ key.mT / key.shape[-1] ** 0.5, cross.output, cross.norm
    weights_phqk = torch.softmax(logits_phqk, -1).detach().requires_grad_()
    attended = (weights_phqk @ value).transpose(1, 2).flatten(2)
    states = norm(states + output(attended))
    return layer.norm(states + layer.output(functional.gelu(layer.intermediate(states)))), weights_phqk
