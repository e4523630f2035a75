"""The whole model: image, text and fusion encoder, two projections, matching and masked-language heads, codebook and temperature."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from data_tools.pixels.transforms import EvaluationTransform
from pretrain.model.bert_layers import PreparedImages, initialize_weights
from pretrain.model.config import ModelConfig
from pretrain.model.fusion_encoder import FusionEncoder
from pretrain.model.image_encoder import ImageEncoder
from pretrain.model.parts import TOWERS, Part, encoder_parts
from pretrain.model.single_stream import SingleStreamEncoder
from pretrain.model.text_encoder import TextEncoder
from pretrain.model.timm_tower import TimmTower
from pretrain.model.transformers_text import TransformersText
from pretrain.model.transformers_tower import TransformersTower
from runtime.errors import RecipeError

AnyImageEncoder = ImageEncoder | TimmTower | TransformersTower
IMAGE_ENCODERS: dict[str, type[AnyImageEncoder]] = {
    "vit": ImageEncoder,
    "timm": TimmTower,
    "transformers": TransformersTower,
}
"""The class of each `model.image.kind`."""
AnyTextEncoder = TextEncoder | TransformersText
TEXT_ENCODERS: dict[str, type[AnyTextEncoder]] = {"bert": TextEncoder, "transformers": TransformersText}
"""The class of each `model.text.kind`."""
FROZEN_CHUNK = 8
"""Images that a frozen encoder takes at once on a CPU."""


IMAGE, TEXT = 0, 1
"""The modalities, as rows of what holds both."""


class Temperature(nn.Module):
    """A learned temperature, bounded by a smooth function of its parameter: it needs no clamp, and its gradient never dies.

    The parameter has shape (1,), because DeepSpeed refuses 0-d ones. It takes no weight decay.
    """

    low, high = 0.001, 0.5

    def __init__(self, start: float) -> None:
        super().__init__()
        share = math.log(start / self.low) / math.log(self.high / self.low)
        self.logit = nn.Parameter(torch.tensor([math.log(share / (1 - share))]))

    def forward(self) -> Tensor:
        """Return the temperature, shape (1,), float32."""
        return self.low * (self.high / self.low) ** torch.sigmoid(_full(self.logit))


class MaskedLanguageHead(nn.Module):
    """BERT's prediction head. Its output weights are the word embeddings."""

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.bias = nn.Parameter(torch.zeros(vocabulary))
        self.apply(initialize_weights(width))

    def forward(self, states: Tensor, words: Tensor) -> Tensor:
        """Return logits (masked words, vocabulary) from states (masked words, width) and word embeddings (vocabulary, width)."""
        return functional.linear(self.norm(functional.gelu(self.dense(states))), words, self.bias)


@dataclass
class TextBatch:
    """Token ids (texts, words) int64 and their mask (texts, words) bool, True where a word is."""

    ids: Tensor
    mask: Tensor


class AlignmentModel(nn.Module):
    """CODIS's student, and, without matching head, codebook and temperature, its teacher.

    Args:
        config: the architecture.
        vocabulary: tokens of the tokenizer.

    Raises:
        RecipeError: the image encoder cannot be made, or a level names a layer that it does not have.
    """

    def __init__(self, config: ModelConfig, vocabulary: int) -> None:
        super().__init__()
        width = config.text.width
        self.config = config
        self.image_encoder: AnyImageEncoder = IMAGE_ENCODERS[config.image.kind](config.image)
        self.text_encoder: AnyTextEncoder = TEXT_ENCODERS[config.text.kind](config.text, vocabulary)
        fusion = SingleStreamEncoder if config.fusion.kind == "single_stream" else FusionEncoder
        self.fusion_encoder: FusionEncoder | SingleStreamEncoder = fusion(
            config.fusion, config.text, self.image_encoder.width
        )
        self.image_projection = nn.Linear(self.image_encoder.pooled_width, config.feature_dim)
        self.text_projection = nn.Linear(self.text_encoder.pooled_width, config.feature_dim)
        self.masked_language_head = MaskedLanguageHead(width, self.text_encoder.words.num_embeddings)
        level_widths = self.image_encoder.level_widths
        layers = len(level_widths)
        for pair in config.levels:
            if pair[1] > layers:
                raise RecipeError(
                    f"model.levels holds {pair}, but the image encoder has {layers} layers; name one of them"
                )
            if pair[0] > config.text.layers:  # known here at the latest, where the text encoder has its own sizes
                raise RecipeError(
                    f"model.levels holds {pair}, but the text encoder has {config.text.layers} layers; name one of them"
                )
        self.level_projections = nn.ModuleList(
            nn.ModuleDict(
                {
                    "image_norm": nn.LayerNorm(level_widths[layer - 1]),  # a ViT's inner layers are not normalised
                    "image": nn.Linear(level_widths[layer - 1], config.feature_dim),
                    "text": nn.Linear(self.text_encoder.pooled_width, config.feature_dim),
                }
            )
            for _, layer in config.levels
        )
        self.matching_head = nn.Linear(width, 2)
        self.temperature = Temperature(config.temperature)
        self._make_codebook()
        self.freeze()

    def _make_codebook(self) -> None:
        config, centres = self.config, torch.zeros(2, self.config.feature_dim)
        codewords = torch.randn(config.codewords, config.feature_dim) / config.feature_dim**0.5
        self.codebook: nn.Parameter | Tensor | None
        if config.codewords and config.codebook_update == "average":
            self.register_buffer("codebook", torch.zeros_like(codewords))
        else:
            self.codebook = nn.Parameter(codewords) if config.codewords else None
        self.feature_centres: Tensor | None
        self.register_buffer("feature_centres", centres if config.codewords and config.codebook_centered else None)

    def freeze(self) -> None:
        """Let no gradient reach the encoders that `model.image.frozen` and `model.text.frozen` name."""
        for part in self._frozen_parts():
            part.requires_grad_(False)

    def train(self, mode: bool = True) -> AlignmentModel:
        """Set the training mode. Frozen encoders stay in evaluation mode: without dropout they give the same tokens each time."""
        super().train(mode)
        for part in self._frozen_parts():
            part.eval()
        return self

    def _frozen_parts(self) -> list[nn.Module]:
        return [self.parts()[name].module for name in TOWERS if getattr(self.config, name).frozen]

    def parts(self) -> dict[str, Part]:
        """Return the encoders as parts, for learning rates and freezing."""
        fusion = Part(self.fusion_encoder, list(self.fusion_encoder.layers))
        return encoder_parts(self.image_encoder, self.text_encoder) | {"fusion": fusion}

    def constants(self) -> dict[str, Tensor]:
        """Return what a checkpoint must hold beside the trained parameters: frozen weights, and statistics of batch norms."""
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        return {name: tensor for name, tensor in self.state_dict().items() if name not in trained}

    def evaluation_transform(self) -> EvaluationTransform:
        """Return what makes an image ready for scoring: squashed to a square as in ALBEF, or the tower's own centre crop."""
        encoder = self.image_encoder
        return EvaluationTransform(self.config.image.image_size, encoder.crop, encoder.resample)

    def layers(self) -> list[nn.Module]:
        """Return the transformer layers of all three encoders."""
        return [*self.image_encoder.layers(), *self.text_encoder.layers, *self.fusion_encoder.layers]

    def compile_layers(self) -> None:
        """Compile each layer's forward: once for all layers of a class, and once more for each kind of call.

        Text and fusion layers are one class. They are called with and without gradients, images, or [CLS] alone, at fixed and at varying lengths.
        """
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        for layer in self.layers():
            layer.forward = torch.compile(layer.forward)  # type: ignore[method-assign]

    def encode(self, images: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
        """Encode a batch with image and text encoder.

        Args:
            images: (batch, 3, size, size) uint8, or cached features.
            ids: (batch, words) int64 token ids.
            mask: (batch, words) bool, True where a word is.

        Returns:
            Image tokens (batch, 1 + patches, image width), word states (batch, words, text width), and the unit-norm image and text
            features (batch, feature_dim) of each level.
        """
        if not self.config.levels:
            return self.image_tokens(images), self.text_encoder(ids, mask), []
        tokens, class_tokens = self.image_encoder.with_levels(images, [layer for _, layer in self.config.levels])
        states = self.text_encoder.layer_states(ids, mask)
        levels = []
        for projections, class_token, (layer, _) in zip(
            self.level_projections, class_tokens, self.config.levels, strict=True
        ):
            assert isinstance(projections, nn.ModuleDict)
            image = projections["image"](projections["image_norm"](class_token))
            text = projections["text"](self.text_encoder.global_state(states[layer], mask))
            levels.append((_unit(image), _unit(text)))
        return tokens, states[-1], levels

    def image_tokens(self, images: Tensor) -> Tensor:
        """Encode images (batch, 3, size, size) uint8 to tokens (batch, tokens, width). Cached features pass through.

        A frozen encoder needs no gradient. On a CPU it takes a few images at once: the memory of a large batch's maps would come
        from the system and go back to it in every layer, which costs more time than the arithmetic.
        """
        if images.is_floating_point():
            return images.to(self.image_projection.weight.dtype)
        if not self.config.image.frozen:
            return self.image_encoder(images)
        with torch.no_grad():
            parts = images.split(FROZEN_CHUNK) if images.device.type == "cpu" else [images]
            return torch.cat([self.image_encoder(part) for part in parts])

    def image_features(self, image_tokens: Tensor) -> Tensor:
        """Pool and project image tokens to unit-norm features.

        Args:
            image_tokens: (images, tokens, width), or (images, pooled_width) where the cache holds pooled states.

        Returns:
            (images, feature_dim) float32.
        """
        pooled = image_tokens if image_tokens.ndim == 2 else self.image_encoder.global_state(image_tokens)
        return _unit(self.image_projection(self._dropped(pooled)))

    def text_features(self, text_states: Tensor, mask: Tensor) -> Tensor:
        """Pool and project (texts, words, width) to unit-norm features (texts, feature_dim), float32.

        Args:
            text_states: (texts, words, width).
            mask: (texts, words) bool, True where a word is.
        """
        return _unit(self.text_projection(self._dropped(self.text_encoder.global_state(text_states, mask))))

    def _dropped(self, pooled: Tensor) -> Tensor:
        return functional.dropout(pooled, self.config.feature_dropout, self.training)

    def match(
        self, states: Tensor, mask: Tensor, images: PreparedImages, image_of_text: Tensor | None = None
    ) -> Tensor:
        """Fuse each text with one image and judge the pair; arguments as in the fusion encoder's `forward`.

        Returns:
            Logits (texts, 2): no match, match.
        """
        return self.matching_logits(self.fusion_encoder(states, mask, images, image_of_text, first_only=True))

    def matching_logits(self, fused_states: Tensor) -> Tensor:
        """Return logits (pairs, 2), no match and match, from fused states (pairs, words, width)."""
        return _full(self.matching_head(fused_states[:, 0]))

    def masked_language_logits(self, states: Tensor) -> Tensor:
        """Return logits (masked words, vocabulary) from the states of masked words alone, (masked words, width)."""
        return _full(self.masked_language_head(states, self.text_encoder.words.weight))

    def drop_codebook(self) -> None:
        """Leave out the codebook, and what belongs to it alone."""
        self.codebook = self.feature_centres = None

    def codewords(self) -> Tensor:
        """Return the codebook with unit-norm rows (codewords, feature_dim), float32. It is normalised here, never in place."""
        assert self.codebook is not None, "this model was made without a codebook"
        return _unit(self.codebook)

    def codebook_features(self, features: Tensor, modality: int) -> Tensor:
        """Return features as they meet the codewords: centred where the recipe says so.

        Args:
            features: unit-norm, (…, feature_dim).
            modality: `IMAGE` or `TEXT`.
        """
        if self.feature_centres is None:
            return features
        return _unit(features - self.feature_centres[modality].to(features))


def _full(values: Tensor) -> Tensor:
    """Return the values in float32, or in float64 where the model is (tests compare gradients in it)."""
    return values if values.dtype == torch.float64 else values.float()


def _unit(values: Tensor) -> Tensor:
    return functional.normalize(_full(values), dim=-1)
