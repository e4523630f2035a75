"""What is exported: a loaded checkpoint of a head, in the one form that every format reads.

Tested in tests/finetune/export/test_export.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_tools.tokenizer import CaptionTokenizer
from finetune.export.formats import FORMATS
from finetune.heads.decomposed import Decomposed, LoadedVLDeformer
from finetune.heads.registry import DEFAULT
from pretrain.model.alignment_model import AlignmentModel
from pretrain.model.config import ModelConfig
from pretrain.model.image_encoder import ImageEncoder
from pretrain.model.text_encoder import TextEncoder
from pretrain.model.timm_tower import TimmTower
from pretrain.weights.load import find_checkpoint, load_model
from runtime.errors import CheckpointError
from runtime.files import read_json
from runtime.recipe import build_config


@dataclass
class Source:
    """A checkpoint, loaded to be exported."""

    origin: Path
    """The folder that the user named: a run's or a checkpoint's."""
    out: Path
    """The export's folder. Until it is complete, it is filled under another name."""
    folder: Path
    """The checkpoint's folder."""
    network: AlignmentModel | Decomposed
    """The model, in evaluation mode on the CPU."""
    config: ModelConfig
    tokenizer: CaptionTokenizer
    description: dict[str, Any]
    """The checkpoint's model.json."""
    hash: str
    """The checkpoint's hash, as in score records."""

    @property
    def head(self) -> str:
        """`dual` or `vldeformer`."""
        return self.description.get("head", DEFAULT)

    @property
    def training(self) -> str:
        """`pretrained` or `fine-tuned-on X`."""
        return self.description["training"]

    @property
    def has_features(self) -> bool:
        """Whether an image and a text have vectors of their own."""
        return self.head == "vldeformer" or self.config.text.layers > 0

    @property
    def has_matching(self) -> bool:
        """Whether a fusion encoder judges pairs."""
        return self.head == "dual" and self.config.fusion.layers > 0

    @torch.no_grad()
    def image_features(self, images: Tensor) -> Tensor:
        """Return unit-norm features (images, width); images: (images, 3, size, size) uint8."""
        if isinstance(self.network, Decomposed):
            return self.network.encode_image(images)
        return self.network.image_features(self.network.image_encoder(images))

    @torch.no_grad()
    def text_features(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return unit-norm features (texts, width); ids, mask: (texts, words)."""
        if isinstance(self.network, Decomposed):
            return self.network.encode_text(ids, mask)
        return self.network.text_features(self.network.text_encoder(ids, mask), mask)

    @torch.no_grad()
    def matching_logits(self, images: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Return logits (pairs, 2), no match and match; arguments as above."""
        assert isinstance(self.network, AlignmentModel)
        prepared = self.network.fusion_encoder.prepare_images(self.network.image_encoder(images))
        return self.network.match(self.network.text_encoder(ids, mask), mask, prepared)


def require_copied_towers(source: Source, kind: str) -> None:
    """Raise CheckpointError unless both towers are of the kinds that the format's code or names are for."""
    for side, tower, kinds in (
        ("image", source.network.image_encoder, (ImageEncoder, TimmTower)),
        ("text", source.network.text_encoder, (TextEncoder,)),
    ):
        if not isinstance(tower, kinds):
            raise CheckpointError(
                f"--format {kind} cannot hold {source.folder}: its {side} tower is a {type(tower).__name__}, and the format's code has "
                f"{' and '.join(each.__name__ for each in kinds)} only; use --format onnx"
            )


def load_source(origin: Path, out: Path, kind: str) -> Source:
    """Load a checkpoint for a format.

    Args:
        origin: A run's folder or a checkpoint's.
        out: The export's folder.
        kind: A name in `FORMATS`.

    Raises:
        CheckpointError: There is no whole checkpoint, or the format cannot hold its head or a tower.
    """
    folder = find_checkpoint(origin)
    description = read_json(folder / "model.json")
    head, able = description.get("head", DEFAULT), FORMATS[kind].heads
    if head not in able:
        others = [name for name, form in FORMATS.items() if head in form.heads]
        raise CheckpointError(
            f"{folder} holds a {head} head, which --format {kind} cannot hold (it holds {' and '.join(able)}); "
            + (
                f"use --format {' or '.join(others)}"
                if others
                else "no format holds it: it scores pairs of token lists"
            )
        )
    for part in ("image", "text"):
        if kind != "ligature" and description["model"][part].get("kind") == "transformers":
            raise CheckpointError(
                f"{folder} has an {part} tower of kind transformers, which --format {kind} cannot hold; use --format ligature"
            )
    loaded = LoadedVLDeformer(folder) if head == "vldeformer" else load_model(folder)
    network = loaded.model if isinstance(loaded, LoadedVLDeformer) else loaded.network
    config = build_config(ModelConfig, description["model"])
    return Source(origin, out, folder, network, config, loaded.tokenizer, description, loaded.hash)
