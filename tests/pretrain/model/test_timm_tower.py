"""Towers of every family give timm's own features, pooled as timm pools them, and levels at their strides."""

from __future__ import annotations

import pytest
import torch

from pretrain.model.alignment_model import AlignmentModel
from pretrain.model.config import FusionEncoderConfig, ImageEncoderConfig, ModelConfig, TextEncoderConfig
from pretrain.model.timm_tower import TimmTower
from runtime.errors import RecipeError

NARROW = {"embed_dim": 32, "depth": 3, "num_heads": 2}
FAMILIES = {
    "a ViT with a class token": ("vit_tiny_patch16_224", 32, NARROW, 1, 3),
    "SigLIP, no class token, attention pooling": ("vit_base_patch16_siglip_224", 32, NARROW, 0, 3),
    "DINOv2, layer scale": ("vit_small_patch14_dinov2", 28, NARROW, 1, 3),
    "DINOv3, registers and rotary positions": ("vit_small_patch16_dinov3", 32, NARROW, 5, 3),
    "EVA": ("eva02_tiny_patch14_224", 28, NARROW, 1, 3),
    "BEiT": ("beit_base_patch16_224", 32, NARROW, 1, 3),
    "NaFlex at a fixed size": ("naflexvit_base_patch16_gap", 32, NARROW, 4, 3),
    "Swin": ("swin_tiny_patch4_window7_224", 64, {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 2)}, 0, 4),
    "ConvNeXt": ("convnext_atto", 64, {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}, 0, 4),
    "EfficientNet": ("tf_efficientnet_lite0", 64, {}, 0, 4),
    "ResNet": ("resnet18", 64, {"layers": (1, 1, 1, 1)}, 0, 4),
    "MobileNetV3, a wider head": ("mobilenetv3_small_050", 64, {}, 0, 4),
}  # fmt: skip


def tower(name: str, **changes) -> TimmTower:
    architecture, image_size, arguments, _, _ = FAMILIES[name]
    settings = {"architecture": architecture, "image_size": image_size, "arguments": dict(arguments)}
    torch.manual_seed(0)
    return TimmTower(ImageEncoderConfig(kind="timm", **settings | changes)).eval()


def images(size: int) -> torch.Tensor:
    return torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_own_pooling_is_timms_output(name):
    encoder, pixels = tower(name), images(FAMILIES[name][1])
    tokens = encoder(pixels)
    assert tokens.shape == (2, encoder.tokens, encoder.width)
    assert encoder.prefix_tokens == FAMILIES[name][3]
    assert encoder.tokens == encoder.prefix_tokens + encoder.grid[0] * encoder.grid[1]
    expected = encoder.vit((pixels.float() - encoder.mean) / encoder.std)  # without a classifier: the pooled features
    torch.testing.assert_close(encoder.global_state(tokens), expected, atol=1e-6, rtol=0)
    assert encoder.pooled_width == expected.shape[1]


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_levels_have_their_widths_and_the_tokens_stay(name):
    encoder, pixels = tower(name), images(FAMILIES[name][1])
    count = len(encoder.level_widths)
    assert count == FAMILIES[name][4]
    tokens, tops = encoder.with_levels(pixels, [count, 1])
    torch.testing.assert_close(tokens, encoder(pixels), atol=1e-6, rtol=0)
    patches = encoder.layer_tokens(pixels, [count, 1])
    for level, top, each in zip((count, 1), tops, patches, strict=True):
        assert top.shape == (2, encoder.level_widths[level - 1]) and each.shape[-1] == encoder.level_widths[level - 1]
    assert patches[1].shape[1] >= patches[0].shape[1], "the first level is at least as fine as the last"
    assert encoder.layers(), "there are blocks to compile and to compute again"


@torch.no_grad()
def test_other_poolings():
    pixels = images(32)
    name = "a ViT with a class token"
    mean, first = tower(name, pooling="mean"), tower(name, pooling="class")
    tokens = mean(pixels)
    torch.testing.assert_close(mean.global_state(tokens), tokens[:, 1:].mean(1))
    torch.testing.assert_close(first.global_state(tokens), tokens[:, 0])
    query = tower("EfficientNet", pooling="query")
    features = query.global_state(query(images(64)))
    assert features.shape == (2, query.width) and any("attention_pool" in key for key in query.state_dict())
    with pytest.raises(RecipeError, match="has no class token"):
        tower("EfficientNet", pooling="class")


@torch.no_grad()
def test_another_image_size():
    for name, size in (("a ViT with a class token", 48), ("EfficientNet", 96)):
        encoder = tower(name)
        encoder.set_image_size(size)
        assert encoder(images(size)).shape == (2, encoder.tokens, encoder.width)


def test_each_tower_has_its_own_statistics_and_crop():
    assert (tower("ResNet").mean.flatten() / 255).tolist() == pytest.approx([0.485, 0.456, 0.406])
    lite = tower("EfficientNet")
    assert (lite.mean.flatten() / 255).tolist() == pytest.approx([0.5] * 3) and lite.crop == 0.875


def test_an_architecture_that_timm_does_not_know_is_one_line():
    with pytest.raises(RecipeError, match="model.image: timm cannot make resnet_7 at 64 px"):
        tower("ResNet", architecture="resnet_7", arguments={})


def model(**image) -> AlignmentModel:
    text = TextEncoderConfig(width=32, layers=2, heads=2, feed_forward=64, positions=16, pooling="mean", frozen=True)
    config = ImageEncoderConfig(
        kind="timm", architecture="resnet18", image_size=64, arguments={"layers": [1, 1, 1, 1]}, **image
    )
    torch.manual_seed(0)
    return AlignmentModel(ModelConfig(config, text, FusionEncoderConfig(layers=1), 16, 4, levels=[[1, 2], [2, 4]]), 40)


def test_frozen_encoders_get_no_gradient_and_are_in_the_constants():
    network = model(frozen=True, pooling="query").train()
    ids, mask = torch.arange(1, 9).reshape(2, 4), torch.tensor([[True] * 4, [True, True, False, False]])
    tokens, states, levels = network.encode(images(64), ids, mask)
    loss = network.image_features(tokens).sum() + network.text_features(states, mask).sum()
    (
        loss + network.match(states, mask, network.fusion_encoder.prepare_images(tokens)).sum() + levels[0][0].sum()
    ).backward()
    assert all(
        p.grad is None
        for name, p in network.named_parameters()
        if name.startswith(("image_encoder.vit.", "text_encoder."))
    )
    assert (
        network.image_encoder.attention_pool.query.grad.abs().sum() > 0
        and network.image_projection.weight.grad is not None
    )
    assert (
        not network.text_encoder.training and not network.image_encoder.vit.training and network.fusion_encoder.training
    )
    trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert network.constants().keys() | trained == network.state_dict().keys()
    assert "image_encoder.vit.bn1.running_mean" in network.constants()


@torch.no_grad()
def test_mean_pooling_of_words_leaves_padding_out():
    network = model().eval()
    ids, mask = torch.arange(1, 9).reshape(2, 4), torch.tensor([[True] * 4, [True, True, False, False]])
    states = network.text_encoder(ids, mask)
    pooled = network.text_encoder.global_state(states, mask)
    torch.testing.assert_close(pooled[1], states[1, :2].mean(0))
    torch.testing.assert_close(pooled[0], states[0].mean(0))
