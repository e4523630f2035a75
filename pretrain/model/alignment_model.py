"""The whole model: three encoders, two projections, the matching and MLM heads, the codebook and the temperature."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from pretrain.config import ModelConfig
from pretrain.model.bert_layers import PreparedImages, initialize_weights
from pretrain.model.fusion_encoder import FusionEncoder
from pretrain.model.image_encoder import ImageEncoder
from pretrain.model.single_stream import SingleStreamEncoder
from pretrain.model.text_encoder import TextEncoder
from runtime.errors import RecipeError


class Temperature(nn.Module):
    """A learned temperature within bounds, as a smooth function of its parameter: nothing to clamp, no dead gradient.

    The parameter has shape (1,) (DeepSpeed refuses 0-d ones) and takes no weight decay.
    """

    low, high = 0.001, 0.5

    def __init__(self, start: float) -> None:
        super().__init__()
        share = math.log(start / self.low) / math.log(self.high / self.low)
        self.logit = nn.Parameter(torch.tensor([math.log(share / (1 - share))]))

    def forward(self) -> Tensor:
        """The temperature, shape (1,), float32."""
        return self.low * (self.high / self.low) ** torch.sigmoid(_full(self.logit))


class MaskedLanguageHead(nn.Module):
    """BERT's prediction head; its output weights are the word embeddings."""

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.bias = nn.Parameter(torch.zeros(vocabulary))
        self.apply(initialize_weights(width))

    def forward(self, states: Tensor, words: Tensor) -> Tensor:
        """states: (masked words, width); words: (vocabulary, width) -> logits (masked words, vocabulary)."""
        return functional.linear(self.norm(functional.gelu(self.dense(states))), words, self.bias)


@dataclass
class TextBatch:
    """Token ids (texts, words) int64 and their mask (texts, words) bool, True where a word is."""

    ids: Tensor
    mask: Tensor


class AlignmentModel(nn.Module):
    """CODIS's student (and, without matching head, codebook and temperature, its teacher)."""

    def __init__(self, config: ModelConfig, vocabulary: int) -> None:
        super().__init__()
        width = config.text.width
        self.config = config
        self.image_encoder = ImageEncoder(config.image)
        self.text_encoder = TextEncoder(config.text, vocabulary)
        fusion = SingleStreamEncoder if config.fusion.kind == "single_stream" else FusionEncoder
        self.fusion_encoder: FusionEncoder | SingleStreamEncoder = fusion(
            config.fusion, config.text, self.image_encoder.width
        )
        self.image_projection = nn.Linear(self.image_encoder.width, config.feature_dim)
        self.text_projection = nn.Linear(width, config.feature_dim)
        self.masked_language_head = MaskedLanguageHead(width, vocabulary)
        layers = len(self.image_encoder.vit.blocks)
        for pair in config.levels:
            if pair[1] > layers:
                raise RecipeError(f"model.levels holds {pair}, but the image encoder has {layers} layers")
        self.level_projections = nn.ModuleList(
            nn.ModuleDict(
                {
                    "image_norm": nn.LayerNorm(self.image_encoder.width),  # a ViT's inner layers are not normalised
                    "image": nn.Linear(self.image_encoder.width, config.feature_dim),
                    "text": nn.Linear(width, config.feature_dim),
                }
            )
            for _ in config.levels
        )
        self.matching_head = nn.Linear(width, 2)
        self.temperature = Temperature(config.temperature)
        self.codebook = (
            nn.Parameter(torch.randn(config.codewords, config.feature_dim) / config.feature_dim**0.5)
            if config.codewords
            else None
        )

    def layers(self) -> list[nn.Module]:
        """The transformer layers of all three encoders."""
        return [*self.image_encoder.vit.blocks, *self.text_encoder.layers, *self.fusion_encoder.layers]

    def compile_layers(self) -> None:
        """torch.compile of each layer's forward: one compilation for all layers of a kind, and for each way they are called."""
        # Text and fusion layers are one class: with and without gradients, images, or [CLS] alone, of fixed and of varying lengths.
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        for layer in self.layers():
            layer.forward = torch.compile(layer.forward)  # type: ignore[method-assign]

    def encode(self, images: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
        """-> image tokens, text states, and the unit-norm image and text features of each level."""
        if not self.config.levels:
            return self.image_encoder(images), self.text_encoder(ids, mask), []
        tokens, tops = self.image_encoder.with_levels(images, [layer for _, layer in self.config.levels])
        states = self.text_encoder.layer_states(ids, mask)
        levels = []
        for projections, top, (layer, _) in zip(self.level_projections, tops, self.config.levels, strict=True):
            assert isinstance(projections, nn.ModuleDict)
            image = projections["image"](projections["image_norm"](top))
            text = projections["text"](states[layer][:, 0])
            levels.append((_unit(image), _unit(text)))
        return tokens, states[-1], levels

    def image_features(self, image_tokens: Tensor) -> Tensor:
        """(images, tokens, width) -> unit-norm features (images, feature_dim), float32, from the class token."""
        return _unit(self.image_projection(image_tokens[:, 0]))

    def text_features(self, text_states: Tensor) -> Tensor:
        """(texts, words, width) -> unit-norm features (texts, feature_dim), float32, from [CLS]."""
        return _unit(self.text_projection(text_states[:, 0]))

    def match(
        self, states: Tensor, mask: Tensor, images: PreparedImages, image_of_text: Tensor | None = None
    ) -> Tensor:
        """Each text fused with one image and judged, arguments as the fusion encoder's -> (texts, 2): no match, match."""
        return self.matching_logits(self.fusion_encoder(states, mask, images, image_of_text, first_only=True))

    def matching_logits(self, fused_states: Tensor) -> Tensor:
        """(pairs, words, width) -> (pairs, 2): no match, match."""
        return _full(self.matching_head(fused_states[:, 0]))

    def masked_language_logits(self, states: Tensor) -> Tensor:
        """States of masked words alone (masked words, width) -> (masked words, vocabulary)."""
        return _full(self.masked_language_head(states, self.text_encoder.words.weight))

    def codewords(self) -> Tensor:
        """The codebook with unit-norm rows (codewords, feature_dim), float32: normalised here, never in place."""
        assert self.codebook is not None, "this model was made without a codebook"
        return _unit(self.codebook)


def _full(values: Tensor) -> Tensor:
    """float32, or float64 where the model is (tests compare gradients in it)."""
    return values if values.dtype == torch.float64 else values.float()


def _unit(values: Tensor) -> Tensor:
    return functional.normalize(_full(values), dim=-1)
