"""Text encoders of every family give transformers' own states, padded and not, and are pooled their own way."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import transformers
from tiny_text_models import CAPTIONS, FAMILIES, POSITIONS, write_family

from data_tools.tokenizer import CaptionTokenizer, load_tokenizer
from pretrain.model.activations import checkpoint_activations
from pretrain.model.alignment_model import AlignmentModel
from pretrain.model.config import FusionEncoderConfig, ImageEncoderConfig, ModelConfig, TextEncoderConfig
from pretrain.model.transformers_text import TransformersText, make_encoder
from pretrain.weights.text_tower import describe_encoder, fit_tokenizer, load_text_tower
from runtime.errors import RecipeError

CLASSES = {"clip": "CLIPTextModel", "siglip": "SiglipTextModel", "siglip2": "Siglip2TextModel"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One folder a family, written when it is first asked for."""
    made = {}

    def folder(name: str):
        if name not in made:
            made[name] = write_family(name, tmp_path_factory.mktemp("model"))
        return made[name]

    return folder


def tower(folder, **changes) -> tuple[TransformersText, CaptionTokenizer, TextEncoderConfig]:
    """The encoder that a recipe naming the folder trains, with its tokenizer."""
    config = describe_encoder(TextEncoderConfig(kind="transformers", weights=str(folder), **changes))
    tokenizer = load_tokenizer(folder, POSITIONS)
    config = fit_tokenizer(config, tokenizer)
    encoder = TransformersText(config, tokenizer.vocabulary)
    load_text_tower(encoder, config)
    return encoder.eval(), tokenizer, config


def original(name: str, folder):
    kind = FAMILIES[name].model_type
    model_class = getattr(transformers, CLASSES[kind]) if kind in CLASSES else transformers.AutoModel
    return model_class.from_pretrained(str(folder)).eval(), transformers.AutoTokenizer.from_pretrained(str(folder))


def own_features(name: str, output, mask: torch.Tensor) -> torch.Tensor:
    """What the family's own code or its model card makes of a text."""
    if FAMILIES[name].model_type in CLASSES:
        return output.pooler_output
    if FAMILIES[name].pooling == "pooling_mode_mean_tokens":
        return (output.last_hidden_state * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    return output.last_hidden_state[:, 0]


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_states_and_features_are_transformers_own(folders, name):
    folder = folders(name)
    (encoder, tokenizer, config), (theirs, their_tokenizer) = tower(folder), original(name, folder)
    fixed = FAMILIES[name].model_type in ("siglip", "siglip2")
    padding = (
        {"padding": "max_length", "max_length": POSITIONS, "padding_side": "right"} if fixed else {"padding": True}
    )
    batch = their_tokenizer(CAPTIONS, return_tensors="pt", **padding)
    ids, mask = tokenizer(CAPTIONS)
    expected_mask = batch["attention_mask"].bool()
    assert torch.equal(ids[mask], batch["input_ids"][expected_mask]) and ids.shape == batch["input_ids"].shape
    inputs = {"input_ids": batch["input_ids"]} | ({} if fixed else {"attention_mask": batch["attention_mask"]})
    expected = theirs(**inputs, output_hidden_states=True)
    states = encoder(ids, mask)
    torch.testing.assert_close(states[mask], expected.last_hidden_state[mask], atol=1e-5, rtol=0)
    features = encoder.global_state(states, mask)
    torch.testing.assert_close(features, own_features(name, expected, batch["attention_mask"]), atol=1e-5, rtol=0)
    assert features.shape == (len(CAPTIONS), encoder.pooled_width) and (features[0] - features[1]).abs().max() > 0.1

    levels = encoder.layer_states(ids, mask)
    assert len(levels) == len(encoder.layers) + 1 == config.layers + 1 == 4
    for ours, other in zip(levels[:-1], expected.hidden_states[:-1], strict=True):
        torch.testing.assert_close(ours[mask], other[mask], atol=1e-5, rtol=0)
    torch.testing.assert_close(levels[-1], states, atol=1e-6, rtol=0)
    for number, caption in enumerate(CAPTIONS):
        alone = encoder(*tokenizer([caption]))
        torch.testing.assert_close(alone[0, : mask[number].sum()], states[number][mask[number]], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["RoBERTa", "CLIP", "SigLIP"])
@torch.no_grad()
def test_other_poolings(folders, name):
    encoder, tokenizer, config = tower(folders(name))
    ids, mask = tokenizer(CAPTIONS)
    states = encoder(ids, mask)
    pooled = {
        pooling: TransformersText(dataclasses.replace(config, pooling=pooling), 1).global_state(states, mask)
        for pooling in ("class", "mean", "last")
    }
    torch.testing.assert_close(pooled["class"], states[:, 0])
    for number, words in enumerate(mask.sum(1).tolist()):
        torch.testing.assert_close(pooled["mean"][number], states[number, :words].mean(0), atol=1e-5, rtol=0)
        torch.testing.assert_close(pooled["last"][number], states[number, words - 1])


def test_a_siglip_refuses_other_lengths(folders):
    encoder, _, _ = tower(folders("SigLIP"))
    with pytest.raises(RecipeError, match="reads captions of 16 tokens, padding included, not of 5"):
        encoder(torch.ones(1, 5, dtype=torch.int64), torch.ones(1, 5, dtype=torch.bool))


@torch.no_grad()
def test_rotary_frequencies_keep_their_precision(folders):
    encoder, tokenizer, _ = tower(folders("ModernBERT"))
    batch = tokenizer(CAPTIONS)
    before = {name: buffer.clone() for name, buffer in encoder.named_buffers() if buffer.is_floating_point()}
    assert before
    encoder.bfloat16()
    assert encoder(*batch).dtype == torch.bfloat16
    for name, buffer in encoder.named_buffers():
        assert name not in before or torch.equal(buffer, before[name])


def model(config: TextEncoderConfig, vocabulary: int, **changes) -> AlignmentModel:
    image = ImageEncoderConfig(image_size=32, patch=16, width=32, depth=2, heads=2)
    torch.manual_seed(0)
    return AlignmentModel(ModelConfig(image, config, FusionEncoderConfig(layers=1), 16, 4, **changes), vocabulary)


@pytest.mark.parametrize("name", ["RoBERTa", "SigLIP", "ModernBERT"])
def test_every_weight_of_the_model_learns_and_a_frozen_encoder_does_not(folders, name):
    _, tokenizer, config = tower(folders(name))
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    ids, mask = tokenizer(CAPTIONS)
    for frozen in (False, True):
        network = model(
            dataclasses.replace(config, frozen=frozen), tokenizer.vocabulary, levels=[[1, 1], [3, 2]]
        ).train()
        tokens, states, levels = network.encode(images, ids, mask)
        fused = network.fusion_encoder(states, mask, network.fusion_encoder.prepare_images(tokens))
        loss = network.text_features(states, mask)[:, 0].sum() + network.image_features(tokens)[:, 0].sum()
        loss = (
            loss
            + network.masked_language_logits(fused[mask]).pow(2).mean()
            + network.matching_logits(fused)[:, 0].sum()
        )
        (loss + sum(image[:, 0].sum() + text[:, 0].sum() for image, text in levels)).backward()
        idle = {key for key, p in network.named_parameters() if p.grad is None} - {"temperature.logit", "codebook"}
        text_side = {key for key, _ in network.named_parameters() if key.startswith("text_encoder.")}
        assert idle == (text_side if frozen else set())
    assert network.text_encoder.training is False
    assert network.masked_language_head.bias.shape == (network.text_encoder.words.num_embeddings,)


def test_a_level_beyond_the_text_encoder_is_named(folders):
    _, tokenizer, config = tower(folders("RoBERTa"))
    with pytest.raises(RecipeError, match=r"\[4, 1\]"):
        model(config, tokenizer.vocabulary, levels=[[4, 1]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model_type": "gpt2"}, "a gpt2 is not a text encoder"),
        ({"model_type": "t5"}, "a t5 is not a text encoder"),
        ({"model_type": "bart"}, "a bart is a decoder, not a text encoder"),
        ({"model_type": "bert", "is_decoder": True}, "a bert is a decoder"),
        ({}, "a model without model_type is not a text encoder"),
        ({"model_type": "bert", "hidden_size": 33, "num_attention_heads": 2}, "a bert cannot be made: .*33"),
        ({"model_type": "albert", "embedding_size": 8, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 4}, "a albert has no word"),
    ],
)  # fmt: skip
def test_what_is_no_text_encoder_is_refused_in_one_line(arguments, message):
    with pytest.raises(RecipeError, match=message) as error:
        make_encoder(arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["MPNet", "ModernBERT", "CLIP"])
def test_compiled_and_computed_again_the_gradients_are_the_same(folders, name, monkeypatch):
    _, tokenizer, config = tower(folders(name))
    ids, mask = tokenizer(CAPTIONS)
    whole = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: whole(function, backend="eager"))
    gradients = []
    for changed in (False, True):
        network = model(config, tokenizer.vocabulary).eval()
        if changed:
            network.compile_layers()
            checkpoint_activations(network.layers())
        states = network.text_encoder.layer_states(ids, mask)
        (states[1][mask].pow(2).sum() + network.text_features(states[-1], mask)[:, 0].sum()).backward()
        gradients.append({key: p.grad for key, p in network.text_encoder.named_parameters()})
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient, atol=1e-5, rtol=1e-4)
