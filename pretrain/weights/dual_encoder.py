"""A published dual encoder as a checkpoint of ours: two towers, two projections and a temperature, without fusion encoder and codebook.

`hugging_face.py` and `open_clip.py` read the published formats; this file builds our model from what they found and writes it.

Tested in tests/pretrain/weights/test_hugging_face_import.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data_tools.tokenizer import CaptionTokenizer, load_tokenizer
from pretrain.model.alignment_model import AlignmentModel, Temperature
from pretrain.model.config import FusionEncoderConfig, ImageEncoderConfig, ModelConfig, TextEncoderConfig
from pretrain.weights.load import at_resolution, describe_model
from pretrain.weights.text_tower import describe_encoder, fit_tokenizer
from runtime.checkpoint import write_checkpoint
from runtime.errors import CheckpointError

UNTRAINED = ("masked_language_head", "matching_head")
"""Parts of our model that no dual encoder has. Nothing that works without a fusion encoder reads them."""


@dataclass
class Projection:
    """A linear map from a tower's global state to the features. Without a weight it is the identity."""

    weight: Tensor | None = None
    """(feature_dim, pooled width)"""
    bias: Tensor | None = None
    """(feature_dim,)"""


@dataclass
class DualEncoder:
    """The content of a published dual encoder, under the names of our towers."""

    family: str
    """What it is, for the report."""
    image_config: ImageEncoderConfig
    text_config: TextEncoderConfig
    """Kind `transformers`; its `arguments` are complete."""
    feature_dim: int
    image: dict[str, Tensor]
    """The image tower's tensors by the library's names."""
    text: dict[str, Tensor]
    """The text tower's tensors by the library's names."""
    image_projection: Projection
    text_projection: Projection
    logit_scale: float
    """Multiplies the cosines: 1 / temperature."""
    left_out: list[str] = field(default_factory=list)
    """What our model cannot hold, in words."""


def import_dual_encoder(
    published: DualEncoder,
    out: Path,
    tokenizer: str,
    image_size: int | None = None,
    caption_tokens: int | None = None,
    training: str = "pretrained",
) -> list[str]:
    """Write a published dual encoder as a checkpoint folder of ours.

    Args:
        published: What was read.
        out: The folder to write.
        tokenizer: Folder or name of its tokenizer.
        image_size: Pixels a side to interpolate position embeddings to. None: its own.
        caption_tokens: Tokens that a caption is cut to. None: as many as the text tower has positions.
        training: What score records say of the model, `pretrained` or `fine-tuned-on X`.

    Returns:
        Lines that report what was and was not used.

    Raises:
        CheckpointError: A tensor is missing, of another shape or without a place; the message names it.
    """
    text = describe_encoder(published.text_config)
    words = load_tokenizer(tokenizer, caption_tokens or text.positions)
    text = fit_tokenizer(text, words)
    left_out = list(published.left_out)
    config = ModelConfig(
        published.image_config,
        text,
        FusionEncoderConfig(layers=0),
        published.feature_dim,
        codewords=0,
        temperature=bounded_temperature(published.logit_scale, left_out),
    )
    model = build_model(config, published, words)
    if image_size is not None:
        model = at_resolution(model, image_size)
    description = describe_model(model.config, words.caption_tokens, training) | {"untrained": list(UNTRAINED)}
    write_checkpoint(out, {"model": model.state_dict()}, {"model": description}, words.save)
    image = model.config.image
    return [
        f"{out}: {published.family}; image {image.architecture} at {image.image_size} px, text {text.arguments['model_type']} of "
        f"{words.caption_tokens} tokens, features of {config.feature_dim}, temperature {float(model.temperature()):.4f}",
        f"random, because it has none: {', '.join(UNTRAINED)}",
        f"left out: {'; '.join(left_out) or 'nothing'}",
        "without a fusion encoder and a codebook: evaluate with --heads '[dual]', index, search, fine-tune with --head dual",
    ]


def bounded_temperature(logit_scale: float, left_out: list[str]) -> float:
    """Return 1 / `logit_scale`, within our temperature's bounds; a line in `left_out` says where that changes it."""
    stored = 1 / logit_scale
    temperature = min(max(stored, 1.001 * Temperature.low), Temperature.high / 1.001)
    if temperature != stored:
        left_out.append(f"the temperature {stored:.5f} lies beyond our bounds and became {temperature:.5f}")
    return temperature


def build_model(config: ModelConfig, published: DualEncoder, tokenizer: CaptionTokenizer) -> AlignmentModel:
    """Return our model with the published weights."""
    model = AlignmentModel(config, tokenizer.vocabulary).eval()
    fill(model.image_encoder.vit, published.image, "image tower")
    text: Any = model.text_encoder
    fill(text.model, published.text, "text tower")
    for name, ours, theirs in (
        ("image", model.image_projection, published.image_projection),
        ("text", model.text_projection, published.text_projection),
    ):
        weight = torch.eye(*ours.weight.shape) if theirs.weight is None else theirs.weight
        if theirs.weight is None and ours.in_features != ours.out_features:
            raise CheckpointError(
                f"the {name} tower gives {ours.in_features} numbers, features have {ours.out_features}, and there is no projection"
            )
        bias = torch.zeros_like(ours.bias) if theirs.bias is None else theirs.bias
        fill(ours, {"weight": weight, "bias": bias}, f"{name} projection")
    return model


def fill(module: nn.Module, tensors: Mapping[str, Tensor], what: str) -> None:
    """Copy tensors into a module by name, all of them or none.

    Raises:
        CheckpointError: A tensor is missing, of another shape or without a place.
    """
    own = module.state_dict()
    for name in sorted(own.keys() ^ tensors.keys()):
        raise CheckpointError(f"the {what} {'lacks' if name in own else 'has no place for'} {name}")
    for name, tensor in tensors.items():
        if own[name].shape != tensor.shape:
            raise CheckpointError(
                f"the {what}'s {name} is {tuple(tensor.shape)}, by its configuration it has {tuple(own[name].shape)}"
            )
        own[name].data.copy_(tensor)
