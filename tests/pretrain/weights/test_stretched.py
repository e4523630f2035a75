"""Stretched positions against Long-CLIP's loop, written down literally, and what a recipe makes of them."""

from __future__ import annotations

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from pretrain.model.alignment_model import AlignmentModel
from pretrain.model.config import FusionEncoderConfig, ImageEncoderConfig, ModelConfig, TextEncoderConfig
from pretrain.weights.starting import load_starting_weights
from pretrain.weights.stretched import stretch_positions
from runtime.errors import CheckpointError, RecipeError


def long_clip(embeddings, kept=20):
    """The loop of the paper's code: four new positions for each after the first 20, the last ones extrapolated."""
    length = len(embeddings)
    longer = torch.zeros(4 * length - 3 * kept, embeddings.shape[1], dtype=embeddings.dtype)
    longer[:kept] = embeddings[:kept]
    for number in range(length - kept):
        here = embeddings[kept + number]
        ahead = embeddings[kept + number + 1] - here if number < length - kept - 1 else here - embeddings[-2]
        for quarter in range(4):
            longer[4 * number + kept + quarter] = here + quarter / 4 * ahead
    return longer


def test_77_positions_become_long_clips_248():
    embeddings = torch.randn(77, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = long_clip(embeddings)
    assert len(expected) == 248
    torch.testing.assert_close(stretch_positions(embeddings, 248), expected, rtol=0, atol=1e-12)


def test_another_factor_keeps_the_first_and_stays_linear():
    line = torch.arange(40.0)[:, None] * torch.tensor([1.0, -2.0])
    stretched = stretch_positions(line, 50)
    assert torch.equal(stretched[:20], line[:20]) and stretched.shape == (50, 2)
    torch.testing.assert_close(stretched[20:, 0], 20 + torch.arange(30) * 20 / 30)


def model(**text):
    image = ImageEncoderConfig("vit_tiny_patch16_224", image_size=32, patch=16, width=32, depth=1, heads=2)
    sizes = {"width": 32, "layers": 1, "heads": 2, "feed_forward": 64}
    torch.manual_seed(0)
    config = ModelConfig(
        image, TextEncoderConfig(**sizes, **text), FusionEncoderConfig(layers=1), feature_dim=8, codewords=0
    )
    return AlignmentModel(config, 50)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BertForMaskedLM(BertConfig(vocab_size=50, max_position_embeddings=40, **sizes)).save_pretrained(folder)
    return folder


def test_a_recipe_stretches_a_berts_positions_or_is_refused(bert):
    trained = BertForMaskedLM.from_pretrained(bert).bert.embeddings.position_embeddings.weight
    longer = model(weights=str(bert), positions=64, stretch_positions=True)
    report = load_starting_weights(longer)
    assert torch.equal(longer.text_encoder.positions.weight, stretch_positions(trained, 64))
    assert any("positions stretched from 40 to 64" in line for line in report)
    with pytest.raises(CheckpointError, match="model.text.positions is 64, .* has 40; .*stretch_positions true"):
        load_starting_weights(model(weights=str(bert), positions=64))
    with pytest.raises(CheckpointError, match="positions is 24, .* has 40"):
        load_starting_weights(model(weights=str(bert), positions=24, stretch_positions=True))
    with pytest.raises(RecipeError, match="stretch_positions is for starting weights"):
        TextEncoderConfig(stretch_positions=True)
