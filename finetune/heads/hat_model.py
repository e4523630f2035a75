"""HAT's model (Bin et al. 2023): tokens of several levels of two encoders, projected to one width and compared.

A level is a pair of a text layer and an image level.

Tested in tests/finetune/heads/test_hat.py.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from data_tools.tokenizer import CaptionTokenizer, load_tokenizer
from finetune.heads.config import HatConfig
from finetune.heads.levels import BackboneEncoders, CheckpointEncoders, LevelEncoders
from finetune.heads.stacked_attention import Comparison, context_gram, mean_scores, pair_scores
from pretrain.model.alignment_model import AlignmentModel
from pretrain.model.config import ModelConfig
from pretrain.weights.load import find_checkpoint, load_weights, read_weights
from runtime.checkpoint import checkpoint_hash, verify_checkpoint
from runtime.errors import CheckpointError
from runtime.files import read_json
from runtime.recipe import build_config


class HatModel(nn.Module):
    """Two encoders and, for each level, a norm and two projections.

    Token states are projected but never normalised to unit length. The norm replaces the one that a backbone applies between
    its stages or at its end.
    """

    def __init__(self, encoders: LevelEncoders, config: HatConfig) -> None:
        super().__init__()
        self.config, self.pairs = config, config.pairs()
        encoders.check(self.pairs)
        self.encoders = encoders
        widths = [encoders.image_widths[image - 1] for _, image in self.pairs]
        self.image_norms = nn.ModuleList(nn.LayerNorm(width) for width in widths)
        self.image_projections = nn.ModuleList(nn.Linear(width, config.width) for width in widths)
        self.text_projections = nn.ModuleList(nn.Linear(encoders.text_encoder.width, config.width) for _ in self.pairs)
        for projection in [*self.image_projections, *self.text_projections]:
            assert isinstance(projection, nn.Linear)
            nn.init.normal_(projection.weight, std=0.02)
            nn.init.zeros_(projection.bias)

    def image_levels(self, images: Tensor) -> list[Tensor]:
        """Encode images, (batch, 3, size, size) uint8, into one (batch, regions, width) a level."""
        encoded = self.encoders.image_levels(images, [image for _, image in self.pairs])
        layers = zip(self.image_norms, self.image_projections, encoded, strict=True)
        return [project(norm(tokens)) for norm, project, tokens in layers]

    def text_levels(self, ids: Tensor, mask: Tensor) -> list[Tensor]:
        """Encode captions, ids and mask of shape (batch, words), into one (batch, words, width) a level.

        [CLS] and [SEP] count as words, as in HAT's code.
        """
        encoded = self.encoders.text_levels(ids, mask, [text for text, _ in self.pairs])
        return [project(states) for project, states in zip(self.text_projections, encoded, strict=True)]

    def grams(self, images: list[Tensor]) -> list[Tensor] | None:
        """Return the Gram matrices that several calls of `score` with the same images can share; None if they need none."""
        if self.config.attention == "mean" or self.config.direction == "image_to_text":
            return None
        return [context_gram(regions) for regions in images]

    def score(
        self, images: list[Tensor], texts: list[Tensor], mask: Tensor, grams: list[Tensor] | None = None
    ) -> Tensor:
        """Score every image with every caption.

        Args:
            images: what `image_levels` returned.
            texts: what `text_levels` returned.
            mask: (captions, words) bool, True where a word is.
            grams: what `grams` returned for these images.

        Returns:
            (images, captions), the sum of the levels' scores.
        """
        total: Tensor | float = 0.0
        for level, (regions, words) in enumerate(zip(images, texts, strict=True)):
            if self.config.attention == "mean":
                total = total + mean_scores(regions, words, mask)
            else:
                comparison, gram = Comparison(sharpness=self.config.sharpness), grams[level] if grams else None
                total = total + pair_scores(regions, words, mask, self.config.direction, comparison, gram)
        assert isinstance(total, Tensor)
        return total

    @property
    def name(self) -> str:
        """The head's name in score records."""
        levels = "one level" if len(self.pairs) == 1 else f"{len(self.pairs)} levels"
        if self.config.attention == "mean":
            return f"hat without attention, {levels}"
        return f"hat {'i-t' if self.config.direction == 'image_to_text' else 't-i'}, {levels}"


class LoadedHat:
    """A HAT checkpoint, verified and ready to score."""

    def __init__(self, source: str | Path, device: str | torch.device = "cpu") -> None:
        self.folder = find_checkpoint(source)
        verify_checkpoint(self.folder)
        description = read_json(self.folder / "model.json")
        if description.get("head") != "hat":
            raise CheckpointError(f"{self.folder} is no HAT checkpoint; its head is {description.get('head', 'dual')}")
        self.tokenizer: CaptionTokenizer = load_tokenizer(self.folder, description["caption_tokens"])
        self.training: str = description["training"]
        """`fine-tuned-on X`, as score records name it."""
        config = build_config(HatConfig, description["hat"])
        if config.encoders == "checkpoint":
            source_config = build_config(ModelConfig, description["model"])
            encoders: LevelEncoders = CheckpointEncoders(AlignmentModel(source_config, self.tokenizer.vocabulary))
        else:
            encoders = BackboneEncoders(config, self.tokenizer.vocabulary, start=False)
        self.model = HatModel(encoders, config)
        load_weights(self.model, read_weights(self.folder), self.folder)
        self.model.eval().requires_grad_(False).to(device)

    @property
    def hash(self) -> str:
        """Hash of the checkpoint's content, for score records."""
        return checkpoint_hash(self.folder)
