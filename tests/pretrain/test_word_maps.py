"""Grad-CAM: the layer taken apart is the layer, and a map is attention times gradient."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch.nn import functional

from pretrain.word_maps import run_with_attention, word_maps


def test_the_decomposed_layer_equals_the_layer():
    model = tiny.model().eval()
    batch = tiny.batch(3)
    read = model.fusion_encoder.prepare_images(model.image_encoder(batch["images"][0]))
    states = model.text_encoder(batch["ids"], batch["mask"])
    layer = model.fusion_encoder.layers[0]
    output, weights = run_with_attention(layer, states, batch["mask"], read[0])
    torch.testing.assert_close(output, layer(states, batch["mask"], read[0]))
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 2, batch["ids"].shape[1]))


@pytest.mark.parametrize("layer", [0, 1])
def test_a_map_is_attention_times_the_matching_logits_gradient(monkeypatch, layer):
    """Held against the model's own forward, its attention written out so that autograd keeps the weights."""
    model = tiny.model(tiny.recipe(model__fusion={"layers": 2})).eval()
    batch = tiny.batch(2)
    images, ids, mask = batch["images"][0], batch["ids"], batch["mask"]
    maps, kept = word_maps(model, images, ids, mask, layer), []
    tokens, states = model.image_encoder(images).detach(), model.text_encoder(ids, mask).detach()

    def written_out(query, key, value, mask, dropout):
        logits = query @ key.mT / key.shape[-1] ** 0.5
        weights = torch.softmax(logits if mask is None else logits.masked_fill(~mask, -torch.inf), -1)
        if mask is None:  # words to image tokens
            weights.retain_grad()
            kept.append(weights)
        return weights @ value

    monkeypatch.setattr(functional, "scaled_dot_product_attention", written_out)
    fused = model.fusion_encoder(states, mask, model.fusion_encoder.prepare_images(tokens))
    model.matching_logits(fused)[:, 1].sum().backward()
    expected = (kept[layer] * kept[layer].grad.clamp(min=0)).mean(1)[..., 1:].unflatten(-1, (2, 2))
    torch.testing.assert_close(maps, expected.detach(), rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("layer", [None, 0, 1])
def test_a_map_is_the_same_alone_and_leaves_no_gradient_behind(layer):
    settings = tiny.recipe(model__fusion={"layers": 2})
    model, batch = tiny.model(settings).eval(), tiny.batch(2)
    maps = word_maps(model, batch["images"][0], batch["ids"], batch["mask"], layer)
    assert maps.shape == (2, tiny.CAPTION_WORDS, 2, 2) and (maps >= 0).all() and maps.any()
    alone = word_maps(model, batch["images"][0][:1], batch["ids"][:1], batch["mask"][:1], layer)
    torch.testing.assert_close(alone, maps[:1], atol=1e-7, rtol=1e-3)
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_a_missing_layer_is_refused():
    batch = tiny.batch(1)
    with pytest.raises(ValueError, match="fusion layer 1 of 1 does not exist"):
        word_maps(tiny.model(), batch["images"][0], batch["ids"], batch["mask"], 1)
