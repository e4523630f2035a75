"""A Ligature model for `transformers`: `AutoModel.from_pretrained(FOLDER, trust_remote_code=True)`.

This file is copied into every folder that `ligature export` writes for Hugging Face, and stands there alone: it needs torch, timm and
transformers, and nothing of Ligature. Its tensors have the names of Ligature's own checkpoints.

Tested in tests/finetune/export/test_hugging_face.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.utils.model import freeze_batch_norm_2d
from torch import Tensor, nn
from torch.nn import functional
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

TEXT, IMAGE = 0, 1
"""Rows of the segment embedding of layers that read both modalities."""


class LigatureConfig(PretrainedConfig):
    """The architecture.

    Args:
        image: Ligature's `model.image`, and `width` and `pooled_width` of its tokens and of its global state.
        text: Ligature's `model.text`, and the tokenizer's `vocabulary`.
        fusion: Ligature's `model.fusion`.
        projection_dim: Width of the features.
        head: `dual`: features are projected, and a fusion encoder, if there is one, gives matching logits. `vldeformer`: the fusion
            encoder's layers run on each modality alone, and the features are their pooled states.
        pooling: Of `vldeformer`: `mean` or `cls`.
    """

    model_type = "ligature"

    def __init__(
        self,
        image: dict[str, Any] | None = None,
        text: dict[str, Any] | None = None,
        fusion: dict[str, Any] | None = None,
        projection_dim: int = 256,
        head: str = "dual",
        pooling: str = "mean",
        **more: Any,
    ) -> None:
        self.image, self.text, self.fusion = image or {}, text or {}, fusion or {}
        self.projection_dim, self.head, self.pooling = projection_dim, head, pooling
        super().__init__(**more)


@dataclass
class LigatureOutput(ModelOutput):
    """What `LigatureModel.forward` returns.

    Attributes:
        logits_per_image: Cosines over the temperature, (images, texts).
        logits_per_text: The transpose of it, (texts, images).
        image_embeds: Unit-norm features, (images, projection_dim).
        text_embeds: Unit-norm features, (texts, projection_dim).
    """

    logits_per_image: Tensor | None = None
    logits_per_text: Tensor | None = None
    image_embeds: Tensor | None = None
    text_embeds: Tensor | None = None


class AttentionPool(nn.Module):
    """One learned query that attends to all tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(1, 1, width))
        self.norm = nn.LayerNorm(width)
        self.key_value = nn.Linear(width, 2 * width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Pool (images, tokens, width) to (images, width)."""
        key, value = self.key_value(self.norm(tokens)).chunk(2, dim=-1)
        return functional.scaled_dot_product_attention(self.query.expand(len(key), -1, -1), key, value)[:, 0]


class ImageEncoder(nn.Module):
    """A timm model that gives tokens and a global state."""

    def __init__(self, image: dict[str, Any]) -> None:
        super().__init__()
        settings: dict[str, Any] = {"num_classes": 0, "img_size": image["image_size"], **image["arguments"]}
        if image["kind"] == "vit":
            sizes = {"patch_size": "patch", "embed_dim": "width", "depth": "depth", "num_heads": "heads"}
            settings |= {name: image[key] for name, key in sizes.items() if image[key] is not None}
            settings["global_pool"] = ""
        self.pooling = "class" if image["kind"] == "vit" else image["pooling"]
        try:
            vit = timm.create_model(image["architecture"], **settings)
        except TypeError as error:
            if "img_size" not in str(error):
                raise
            del settings["img_size"]  # a CNN takes any size
            vit = timm.create_model(image["architecture"], **settings)
        self.vit: Any = freeze_batch_norm_2d(vit)
        self.attention_pool = AttentionPool(image["token_width"]) if self.pooling == "query" else None

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Encode normalised pixels (images, 3, size, size).

        Returns:
            Tokens (images, tokens, token width), and global states (images, pooled width).
        """
        features = self.vit.forward_features(pixels.to(next(self.vit.parameters()).dtype))
        tokens = features
        if features.ndim == 4:  # a map, of a CNN or a Swin
            last = getattr(self.vit, "output_fmt", "NCHW") == "NHWC"
            tokens = features.flatten(1, 2) if last else features.flatten(2).transpose(1, 2)
        if self.pooling == "class":
            return tokens, tokens[:, 0]
        if self.pooling == "mean":
            return tokens, tokens[:, getattr(self.vit, "num_prefix_tokens", 0) :].mean(1)
        if self.attention_pool is not None:
            return tokens, self.attention_pool(tokens)
        return tokens, self.vit.forward_head(features, pre_logits=True)


def split_heads(states: Tensor, heads: int) -> Tensor:
    """Return (batch, heads, tokens, width / heads) from (batch, tokens, width)."""
    return states.unflatten(-1, (heads, -1)).transpose(1, 2)


class SelfAttention(nn.Module):
    """Self-attention, its residual and its layer norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query_key_value = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """Return the new states (batch, tokens, width); mask: (batch, tokens) bool, True where a token is."""
        query, key, value = (split_heads(part, self.heads) for part in self.query_key_value(states).chunk(3, dim=-1))
        attended = functional.scaled_dot_product_attention(query, key, value, mask[:, None, None])
        return self.norm(states + self.output(attended.transpose(1, 2).flatten(2)))


class CrossAttention(nn.Module):
    """Attention of words to image tokens, its residual and its layer norm."""

    def __init__(self, width: int, image_width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(image_width, 2 * width)
        self.output = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)

    def forward(self, states: Tensor, image_tokens: Tensor) -> Tensor:
        """Return the new states (texts, words, width); image_tokens: (texts, tokens, image width)."""
        key, value = (split_heads(part, self.heads) for part in self.key_value(image_tokens).chunk(2, dim=-1))
        attended = functional.scaled_dot_product_attention(split_heads(self.query(states), self.heads), key, value)
        return self.norm(states + self.output(attended.transpose(1, 2).flatten(2)))


class Layer(nn.Module):
    """BERT's layer, with cross-attention to image tokens if `image_width` is set."""

    def __init__(self, text: dict[str, Any], image_width: int | None = None) -> None:
        super().__init__()
        width, heads = text["width"], text["heads"]
        self.self_attention = SelfAttention(width, heads)
        self.cross_attention = CrossAttention(width, image_width, heads) if image_width else None
        self.intermediate = nn.Linear(width, text["feed_forward"])
        self.output = nn.Linear(text["feed_forward"], width)
        self.norm = nn.LayerNorm(width, eps=1e-12)

    def forward(self, states: Tensor, mask: Tensor, image_tokens: Tensor | None = None) -> Tensor:
        """Return the new states (batch, tokens, width)."""
        states = self.self_attention(states, mask)
        if self.cross_attention is not None:
            states = self.cross_attention(states, image_tokens)
        return self.norm(states + self.output(functional.gelu(self.intermediate(states))))


class TextEncoder(nn.Module):
    """BERT's embeddings and layers."""

    def __init__(self, text: dict[str, Any]) -> None:
        super().__init__()
        width = text["width"]
        self.pooling = text["pooling"]
        self.words = nn.Embedding(text["vocabulary"], width, padding_idx=0)
        self.positions = nn.Embedding(text["positions"], width)
        self.segments = nn.Embedding(2, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.layers = nn.ModuleList(Layer(text) for _ in range(text["layers"]))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return word states (texts, words, width); mask: (texts, words) bool."""
        places = torch.arange(ids.shape[1], device=ids.device)
        states = self.norm(self.words(ids) + self.positions(places) + self.segments.weight[TEXT])
        for layer in self.layers:
            states = layer(states, mask)
        return states

    def pooled(self, states: Tensor, mask: Tensor) -> Tensor:
        """Pool word states to (texts, width)."""
        return states[:, 0] if self.pooling == "class" else masked_mean(states, mask)


def masked_mean(states: Tensor, mask: Tensor) -> Tensor:
    """Return the mean (batch, width) of the states (batch, tokens, width) where `mask` (batch, tokens) is True."""
    weights = mask[..., None].to(states.dtype)
    return (states * weights).sum(1) / weights.sum(1)


class FusionEncoder(nn.Module):
    """Layers that read words and image tokens.

    Args:
        config: The architecture.
        kind: `cross_attention`: words attend to image tokens. `single_stream`: one sequence of both. `apart`: a `cross_attention`
            encoder without its cross-attention, which reads one modality.
    """

    def __init__(self, config: LigatureConfig, kind: str) -> None:
        super().__init__()
        text, image_width = config.text, config.image["token_width"]
        self.kind = kind
        if kind != "cross_attention":
            projected = kind == "single_stream" or image_width != text["width"]
            self.entry: nn.Module = nn.Linear(image_width, text["width"]) if projected else nn.Identity()
            self.segments = nn.Embedding(2, text["width"])
        self.norm = nn.LayerNorm(text["width"], eps=1e-12) if kind == "single_stream" else nn.Identity()
        across = image_width if kind == "cross_attention" else None
        self.layers = nn.ModuleList(Layer(text, across) for _ in range(config.fusion["layers"]))

    def forward(self, states: Tensor, mask: Tensor, image_tokens: Tensor) -> Tensor:
        """Fuse text i (words, width) with image i (tokens, image width); return states whose first is [CLS]."""
        if self.kind == "single_stream":
            image_tokens = self.enter_image(image_tokens)
            states = torch.cat([self.enter_text(states), image_tokens], 1)
            mask = functional.pad(mask, (0, image_tokens.shape[1]), value=True)
        return self.run_layers(states, mask, image_tokens)

    def run_layers(self, states: Tensor, mask: Tensor, image_tokens: Tensor | None = None) -> Tensor:
        """Run the layers on states (batch, tokens, width): of one modality alone, or of both."""
        for layer in self.layers:
            states = layer(states, mask, image_tokens)
        return states

    def enter_text(self, states: Tensor) -> Tensor:
        """Mark word states as text."""
        return self.norm(states + self.segments.weight[TEXT])

    def enter_image(self, image_tokens: Tensor) -> Tensor:
        """Bring image tokens to the layers' width and mark them as image."""
        return self.norm(self.entry(image_tokens) + self.segments.weight[IMAGE])


class LigatureModel(PreTrainedModel):
    """Image and text encoders, features that are compared by cosine, and the probability that an image and a text belong together."""

    config_class = LigatureConfig
    base_model_prefix = "ligature"
    main_input_name = "pixel_values"

    def __init__(self, config: LigatureConfig) -> None:
        super().__init__(config)
        image, text = config.image, config.text
        self.image_encoder, self.text_encoder = ImageEncoder(image), TextEncoder(text)
        if config.head == "vldeformer":
            single = config.fusion["kind"] == "single_stream"
            self.joint = FusionEncoder(config, "single_stream" if single else "apart")
        else:
            self.image_projection = nn.Linear(image["pooled_width"], config.projection_dim)
            self.text_projection = nn.Linear(text["width"], config.projection_dim)
            self.logit_scale = nn.Parameter(torch.zeros(()))
            if config.fusion["layers"]:
                self.fusion_encoder = FusionEncoder(config, config.fusion["kind"])
                self.matching_head = nn.Linear(text["width"], 2)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Make again what timm computes and no file holds: transformers builds models without values."""
        compute: Any = getattr(module, "init_non_persistent_buffers", None)
        if compute is not None:
            compute()

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Return unit-norm features (images, projection_dim) of normalised pixels (images, 3, size, size)."""
        tokens, pooled = self.image_encoder(pixel_values)
        if self.config.head == "vldeformer":
            mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
            return self._represent(self.joint.run_layers(self.joint.enter_image(tokens), mask), mask)
        return functional.normalize(self.image_projection(pooled).float(), dim=-1)

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return unit-norm features (texts, projection_dim) of token ids (texts, words)."""
        mask = _bool_mask(input_ids, attention_mask)
        states = self.text_encoder(input_ids, mask)
        if self.config.head == "vldeformer":
            return self._represent(self.joint.run_layers(self.joint.enter_text(states), mask), mask)
        if not self.config.text["layers"]:
            raise ValueError(
                "this model has no text layers, so a text has no features of its own; use get_matching_logits"
            )
        return functional.normalize(self.text_projection(self.text_encoder.pooled(states, mask)).float(), dim=-1)

    def get_matching_logits(
        self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        """Judge whether image i and text i belong together.

        Args:
            pixel_values: (pairs, 3, size, size), normalised.
            input_ids: (pairs, words).
            attention_mask: (pairs, words), 1 where a token is.

        Returns:
            Logits (pairs, 2): no match, match.

        Raises:
            ValueError: The model has no fusion encoder.
        """
        if not hasattr(self, "fusion_encoder"):
            raise ValueError("this model has no fusion encoder, so no matching logits; compare features instead")
        mask = _bool_mask(input_ids, attention_mask)
        tokens, _ = self.image_encoder(pixel_values)
        fused = self.fusion_encoder(self.text_encoder(input_ids, mask), mask, tokens)
        return self.matching_head(fused[:, 0]).float()

    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **_: Any,
    ) -> LigatureOutput:
        """Return the features of images and texts, and where both are given their cosines over the temperature."""
        image = None if pixel_values is None else self.get_image_features(pixel_values)
        text = None if input_ids is None else self.get_text_features(input_ids, attention_mask)
        logits = None
        if image is not None and text is not None:
            logits = image @ text.T * (self.logit_scale.exp() if hasattr(self, "logit_scale") else 1.0)
        return LigatureOutput(logits, None if logits is None else logits.T, image, text)

    def _represent(self, states: Tensor, mask: Tensor) -> Tensor:
        """Pool VLDeformer's states to unit-norm features (batch, width)."""
        pooled = states[:, 0].float() if self.config.pooling == "cls" else masked_mean(states.float(), mask)
        return functional.normalize(torch.tanh(pooled), dim=-1)


def _bool_mask(ids: Tensor, mask: Tensor | None) -> Tensor:
    return torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
