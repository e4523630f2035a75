"""The model: shapes, padding, and images shared among texts."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch.nn import functional

from pretrain.model.alignment_model import Temperature
from pretrain.model.config import ImageEncoderConfig
from pretrain.model.image_encoder import CLIP_MEAN, CLIP_STD, ImageEncoder
from runtime.errors import RecipeError


@pytest.fixture(scope="module")
def model():
    return tiny.model().eval()


@pytest.mark.parametrize(
    ("size", "patch", "width", "depth", "heads"),
    [(32, 16, 32, 2, 2), (32, 8, 48, 1, 3), (48, 16, 64, 3, 4), (64, 8, 32, 1, 1), (64, 16, None, 1, None)],
)
def test_image_encoders_of_several_sizes(size, patch, width, depth, heads):
    encoder = ImageEncoder(ImageEncoderConfig("vit_tiny_patch16_224", size, patch, width, depth, heads)).eval()
    tokens = encoder(torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8))
    assert tokens.shape == (2, 1 + (size // patch) ** 2, width or 192)
    assert encoder.tokens == tokens.shape[1] and encoder.width == tokens.shape[2]
    assert len(encoder.vit.blocks) == depth
    assert encoder.vit.blocks[0].attn.num_heads == (heads or 3)


def test_inner_layers_are_returned_as_requested():
    encoder = ImageEncoder(ImageEncoderConfig("vit_tiny_patch16_224", 32, 16, 32, 3, 2)).eval()
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    layers, outputs = [3, 1, 3, 2], list[torch.Tensor]()
    for block in encoder.vit.blocks:
        block.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    tops = encoder.with_levels(images, layers)[1]
    tokens = encoder.layer_tokens(images, layers)
    for layer, top, patches in zip(layers, tops, tokens, strict=True):
        assert torch.equal(top, outputs[layer - 1][:, 0]) and torch.equal(patches, outputs[layer - 1][:, 1:])


def test_pixels_are_normalised_by_clips_statistics_once():
    encoder = ImageEncoder(ImageEncoderConfig("vit_tiny_patch16_224", 32, 16, 32, 1, 2)).eval()
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    torch.testing.assert_close(encoder(images), encoder.vit((images / 255 - mean) / std), atol=1e-5, rtol=1e-5)
    assert not list(encoder.state_dict().keys() & {"mean", "std"}), "constants are not saved"


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (ImageEncoderConfig("vit_tiny_patch16_225", 32), "vit_tiny_patch16_225"),
        (ImageEncoderConfig("resnet18", 32), "resnet18"),
        (ImageEncoderConfig("vit_tiny_patch16_224", 32, 16, 30, 1, 4), "vit_tiny_patch16_224"),
    ],
)
def test_an_impossible_encoder_is_refused_in_one_line(config, says):
    with pytest.raises(RecipeError, match=says) as caught:
        ImageEncoder(config)
    assert str(caught.value).startswith("model.image")


def test_outputs_have_their_stated_shapes(model):
    batch = tiny.batch(5)
    ids, mask = batch["ids"], batch["mask"]
    tokens = model.image_encoder(batch["images"][0])
    states = model.text_encoder(ids, mask)
    fused = model.fusion_encoder(states, mask, model.fusion_encoder.prepare_images(tokens))
    assert tokens.shape == (5, 5, 32) and states.shape == fused.shape == (5, tiny.CAPTION_WORDS, 32)
    for features in (model.image_features(tokens), model.text_features(states, mask)):
        assert features.shape == (5, 16)
        torch.testing.assert_close(features.norm(dim=-1), torch.ones(5))
    assert model.matching_logits(fused).shape == (5, 2)
    assert model.masked_language_logits(fused[mask]).shape == (int(mask.sum()), 24)
    assert model.codewords().shape == (16, 16)
    torch.testing.assert_close(model.codewords().norm(dim=-1), torch.ones(16))


def test_padding_never_changes_a_caption_nor_what_is_fused_from_it(model):
    batch = tiny.batch(6)
    ids, mask = batch["ids"], batch["mask"]
    images = model.fusion_encoder.prepare_images(model.image_encoder(batch["images"][0]))
    states = model.text_encoder(ids, mask)
    fused = model.fusion_encoder(states, mask, images)
    assert mask.sum(1).unique().numel() > 2
    rubbish = torch.where(mask, ids, 7)
    torch.testing.assert_close(model.text_encoder(rubbish, mask)[mask], states[mask], atol=1e-6, rtol=1e-6)
    for row, length in enumerate(mask.sum(1).tolist()):
        alone = model.text_encoder(ids[row, None, :length], mask[row, None, :length])
        torch.testing.assert_close(alone[0], states[row, :length], atol=1e-5, rtol=1e-5)
        own = [(key[row, None], value[row, None]) for key, value in images]
        fused_alone = model.fusion_encoder(alone, mask[row, None, :length], own)
        torch.testing.assert_close(fused_alone[0], fused[row, :length], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            model.text_features(alone, mask[row, None, :length])[0],
            model.text_features(states, mask)[row],
            atol=1e-5,
            rtol=1e-5,
        )


def test_fusing_with_chosen_images_is_fusing_with_their_tokens_repeated(model):
    batch = tiny.batch(6)
    tokens, mask = model.image_encoder(batch["images"][0]), batch["mask"]
    states = model.text_encoder(batch["ids"], mask)
    chosen = torch.tensor([3, 3, 0, 5, 1, 3])
    shared = model.fusion_encoder(states, mask, model.fusion_encoder.prepare_images(tokens), chosen)
    repeated = model.fusion_encoder(states, mask, model.fusion_encoder.prepare_images(tokens[chosen]))
    torch.testing.assert_close(shared, repeated, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", ["cross_attention", "single_stream"])
def test_a_match_is_judged_by_cls_as_if_all_words_had_been_computed(kind):
    """Logits, and gradients of all weights, of the last layer among them."""
    model = tiny.model(tiny.recipe(model__fusion={"kind": kind, "layers": 2}))
    batch = tiny.batch(6)
    mask, chosen = batch["mask"], torch.tensor([3, 3, 0, 5, 1, 3])
    results = []
    for first_only in (True, False):
        states = model.text_encoder(batch["ids"], mask)
        read = model.fusion_encoder.prepare_images(model.image_encoder(batch["images"][0]))
        fused = model.fusion_encoder(states, mask, read, chosen, first_only)
        assert fused.shape[1] == (1 if first_only else tiny.CAPTION_WORDS)
        logits = model.match(states, mask, read, chosen) if first_only else model.matching_logits(fused)
        used = [
            weight for name, weight in model.named_parameters() if name.startswith(("fusion", "text_enc", "image_enc"))
        ]
        results.append([logits, *torch.autograd.grad(logits[:, 1].sum(), used)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_gradients_through_shared_images_are_those_of_repeated_ones(model):
    batch = tiny.batch(4)
    mask, chosen = batch["mask"], torch.tensor([1, 1, 0, 1])
    states = model.text_encoder(batch["ids"], mask).detach()
    results = []
    for share in (True, False):
        tokens = model.image_encoder(batch["images"][0]).detach().requires_grad_()
        read = model.fusion_encoder.prepare_images(tokens if share else tokens[chosen])
        fused = model.fusion_encoder(states, mask, read, chosen if share else None)
        weights = torch.linspace(-1, 1, fused.numel()).view_as(fused)
        results.append(torch.autograd.grad((fused * weights)[mask].sum(), tokens)[0])
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-4)
    assert not results[0][2:].any() and results[0][:2].any(), "an image that no text is fused with gets none"


@pytest.mark.parametrize("start", [0.002, 0.07, 0.4])
def test_the_temperature_starts_where_it_should_and_stays_within_its_bounds(start):
    temperature = Temperature(start)
    assert temperature.logit.shape == (1,), "DeepSpeed refuses 0-d parameters"
    assert temperature().item() == pytest.approx(start, rel=1e-5)
    for pushed, bound in ((-100.0, 0.001), (100.0, 0.5)):
        temperature.logit.data.fill_(pushed)
        assert temperature().item() == pytest.approx(bound, rel=1e-5)
    temperature = Temperature(start)
    temperature().backward()
    assert temperature.logit.grad.item() > 0


def test_layers_without_cross_attention_are_plain_bert_layers(model):
    assert all(layer.cross_attention is None for layer in model.text_encoder.layers)
    assert all(layer.cross_attention is not None for layer in model.fusion_encoder.layers)


def test_dropout_works_in_training_and_not_in_evaluation():
    network = tiny.model(tiny.recipe(model__text__dropout=0.5))
    ids, mask = tiny.captions(3, torch.Generator().manual_seed(0))
    network.eval()
    assert torch.equal(network.text_encoder(ids, mask), network.text_encoder(ids, mask))
    network.train()
    assert not functional.cosine_similarity(
        network.text_encoder(ids, mask).flatten(), network.text_encoder(ids, mask).flatten(), 0
    ).isclose(torch.tensor(1.0))


def test_pooled_states_are_dropped_out_in_training_alone():
    network = tiny.model(tiny.recipe(model__feature_dropout=0.5))
    tokens, states = torch.randn(64, 5, 32), torch.randn(64, 7, 32)
    mask = torch.ones(64, 7, dtype=torch.bool)
    plain = network.eval().image_features(tokens), network.text_features(states, mask)
    with torch.no_grad():
        pooled = functional.dropout(network.image_encoder.global_state(tokens), 0.5, True)
    assert 0.4 < (pooled == 0).float().mean() < 0.6
    network.train()
    torch.manual_seed(3)
    found = network.image_features(tokens)
    torch.manual_seed(3)
    expected = network.image_projection(functional.dropout(network.image_encoder.global_state(tokens), 0.5, True))
    torch.testing.assert_close(found, functional.normalize(expected, dim=-1))
    assert not torch.allclose(network.text_features(states, mask), plain[1]) and not torch.allclose(found, plain[0])
