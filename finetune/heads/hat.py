"""HAT (Bin et al. 2023): tokens of several levels of two encoders, compared by stacked cross attention, learned by triplets."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data_tools.in_order.collection import Collection
from data_tools.tokenizer import CaptionTokenizer, load_tokenizer
from finetune.config import FinetuneRecipe
from finetune.heads.base import RetrievalTask
from finetune.heads.config import HatConfig
from finetune.heads.dual import GatherRows
from finetune.heads.levels import BackboneEncoders, CheckpointEncoders, LevelEncoders
from finetune.heads.stacked_attention import context_gram, mean_scores, pair_scores
from pretrain.config import ModelConfig
from pretrain.model.alignment_model import AlignmentModel
from pretrain.objectives.state import MicroBatch
from pretrain.weights.load import find_checkpoint, load_model, load_weights
from runtime.checkpoint import checkpoint_hash, read_tensors, verify_checkpoint
from runtime.errors import CheckpointError
from runtime.files import read_json
from runtime.ranks import Ranks, gather_rows
from runtime.recipe import build_config


class HatModel(nn.Module):
    """Encoders and, for each pair of levels, a norm and two projections. Token states are projected, never normalised to
    unit length; the norm stands in for the one a backbone has between its stages or at its end."""

    def __init__(self, encoders: LevelEncoders, config: HatConfig) -> None:
        super().__init__()
        self.config, self.pairs = config, config.pairs()
        encoders.check(self.pairs)
        self.encoders, self.frozen = encoders, False
        widths = [encoders.image_widths[image - 1] for _, image in self.pairs]
        self.image_norms = nn.ModuleList(nn.LayerNorm(width) for width in widths)
        self.image_projections = nn.ModuleList(nn.Linear(width, config.width) for width in widths)
        self.text_projections = nn.ModuleList(nn.Linear(encoders.text_encoder.width, config.width) for _ in self.pairs)
        for projection in [*self.image_projections, *self.text_projections]:
            assert isinstance(projection, nn.Linear)
            nn.init.normal_(projection.weight, std=0.02)
            nn.init.zeros_(projection.bias)

    def image_levels(self, images: Tensor) -> list[Tensor]:
        """images: (batch, 3, size, size) uint8 -> a (batch, regions, width) each pair."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            found = self.encoders.image_levels(images, [image for _, image in self.pairs])
        layers = zip(self.image_norms, self.image_projections, found, strict=True)
        return [project(norm(tokens)) for norm, project, tokens in layers]

    def text_levels(self, ids: Tensor, mask: Tensor) -> list[Tensor]:
        """ids, mask: (batch, words) -> a (batch, words, width) each pair. [CLS] and [SEP] are words too, as in HAT's code."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            found = self.encoders.text_levels(ids, mask, [text for text, _ in self.pairs])
        return [project(states) for project, states in zip(self.text_projections, found, strict=True)]

    def grams(self, images: list[Tensor]) -> list[Tensor] | None:
        """What `score` can be given where it is called several times with the same images."""
        if self.config.attention == "mean" or self.config.direction == "image_to_text":
            return None
        return [context_gram(regions) for regions in images]

    def score(
        self, images: list[Tensor], texts: list[Tensor], mask: Tensor, grams: list[Tensor] | None = None
    ) -> Tensor:
        """What `image_levels` and `text_levels` gave, and the captions' mask -> (images, captions): the levels' scores, summed."""
        total: Tensor | float = 0.0
        for level, (regions, words) in enumerate(zip(images, texts, strict=True)):
            if self.config.attention == "mean":
                total = total + mean_scores(regions, words, mask)
            else:
                gram, sharpness = grams[level] if grams else None, self.config.sharpness
                total = total + pair_scores(regions, words, mask, self.config.direction, sharpness=sharpness, gram=gram)
        assert isinstance(total, Tensor)
        return total

    @property
    def name(self) -> str:
        """As score records call it."""
        levels = "one level" if len(self.pairs) == 1 else f"{len(self.pairs)} levels"
        if self.config.attention == "mean":
            return f"hat without attention, {levels}"
        return f"hat {'i-t' if self.config.direction == 'image_to_text' else 't-i'}, {levels}"


def triplet_loss(
    scores: Tensor, image_ids: Tensor, caption_image: Tensor, margin: float, hardest: bool = True
) -> Tensor:
    """Negatives both ways, the mean over the matched pairs: of each pair the hardest (Faghri et al. 2018), or the mean of all.

    scores: (pairs, pairs), matched pairs on the diagonal; image_ids, caption_image: (pairs,) the image of each row and column.
    Captions of a row's image are never its negatives. A pair without any negative counts as 0.
    """
    same = image_ids[:, None] == caption_image[None]
    negatives = scores.masked_fill(same, -torch.inf)
    matched = scores.diagonal()
    if hardest:
        losses = [(margin - matched + negatives.amax(axis)).clamp(min=0) for axis in (1, 0)]
        return (losses[0] + losses[1]).mean()
    short = [(margin - one + negatives).clamp(min=0) for one in (matched[:, None], matched[None])]
    losses = [part.sum(axis) / (~same).sum(axis).clamp(min=1) for part, axis in zip(short, (1, 0), strict=True)]
    return (losses[0] + losses[1]).mean()


class HatTask(RetrievalTask):
    """HAT's training: the projections alone at first, then the encoders too."""

    hardest = True
    """Whether the hardest negatives alone count at this step."""

    def __init__(self, recipe: FinetuneRecipe) -> None:
        super().__init__()
        self.recipe, config = recipe, recipe.hat
        self.source: ModelConfig | None = None
        torch.manual_seed(recipe.training.seed)  # the projections start the same on every rank
        if config.encoders == "checkpoint":
            start = load_model(recipe.checkpoint, image_size=recipe.image_size)
            self.tokenizer, self.source = start.tokenizer, dataclasses.replace(start.network.config, codewords=0)
            encoders: LevelEncoders = CheckpointEncoders(start.network.requires_grad_(True))
            torch.manual_seed(recipe.training.seed)  # whatever loading drew
            self.about = f"HAT on the encoders of {start.folder} ({start.training})"
        else:
            self.tokenizer = load_tokenizer(config.tokenizer or config.text.weights, config.caption_tokens)
            encoders = BackboneEncoders(config, self.tokenizer.vocabulary, start=True)
            self.about = f"HAT on {config.image.architecture} ({config.image.weights}) and BERT ({config.text.weights})"
        self.model = HatModel(encoders, config)
        self.image_size = encoders.image_size
        self.partial = True  # the encoders rest at first, and layers after the last level are never read

    def begin_step(self, epoch: float) -> None:
        self.model.frozen = epoch < self.recipe.hat.frozen_epochs
        self.hardest = epoch >= self.recipe.hat.hardest_from_epoch
        self.model.encoders.train(not self.model.frozen)  # frozen encoders drop nothing out

    def caveat(self, epochs: float) -> str:
        frozen = self.recipe.hat.frozen_epochs
        if epochs > frozen:
            return ""
        return f"the run ends after {epochs:.3g} epochs, so the encoders never learn (hat.frozen_epochs: {frozen:g})"

    def lr_share(self, name: str) -> float:
        return self.recipe.hat.encoder_lr_share if name.startswith("model.encoders.") else 1.0

    def forward(self, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        scores, image_ids = self.batch_scores(batch)
        loss = triplet_loss(scores, image_ids, image_ids, self.recipe.hat.margin, self.hardest)
        hardest = scores.detach().masked_fill(image_ids[:, None] == image_ids[None], -torch.inf)
        wins = (scores.detach().diagonal() > hardest.amax(1)).float().mean()
        return loss, {"loss": loss.detach(), "triplet": loss.detach(), "batch_R@1": wins}

    def batch_scores(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """The scores of the global batch (pairs, pairs), the same on every rank, with their gradient; and its image ids."""
        image_levels = self.model.image_levels(batch.images)
        text_levels = self.model.text_levels(batch.text.ids, batch.text.mask)
        mask = batch.text.mask
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            # Each rank scores its images with everybody's captions, then the rows are put together.
            room = self.tokenizer.caption_tokens - mask.shape[1]
            text_levels = [GatherRows.apply(nn.functional.pad(words, (0, 0, 0, room))) for words in text_levels]
            mask = gather_rows(nn.functional.pad(mask, (0, room)).to(torch.uint8)).bool()
            mask = mask[:, : int(mask.sum(1).max())]
            text_levels = [words[:, : mask.shape[1]] for words in text_levels]
        scores = self.model.score(image_levels, text_levels, mask)
        return GatherRows.apply(scores), gather_rows(batch.image_ids)

    def layers(self) -> list[nn.Module]:
        encoders = self.model.encoders
        assert isinstance(encoders, CheckpointEncoders), "the recipe refuses it for other encoders"
        return [*encoders.image_encoder.vit.blocks, *encoders.text_encoder.layers]

    def stored(self) -> dict[str, Tensor]:
        return self.model.state_dict()

    def describe(self, training: str) -> dict[str, Any]:
        return {
            "head": "hat",
            "hat": dataclasses.asdict(self.recipe.hat),
            "model": dataclasses.asdict(self.source) if self.source else None,
            "caption_tokens": self.tokenizer.caption_tokens,
            "training": training,
        }

    def similarity(
        self, collection: Collection, ranks: Ranks, device: torch.device, batch_size: int, workers: int
    ) -> np.ndarray:
        from finetune.heads.hat_scoring import hat_scores

        return hat_scores(self.model, self.tokenizer, collection, ranks, device, batch_size, workers, silent=True)


class LoadedHat:
    """A HAT checkpoint, ready to score."""

    def __init__(self, source: str | Path, device: str | torch.device = "cpu") -> None:
        self.folder = find_checkpoint(source)
        verify_checkpoint(self.folder)
        about = read_json(self.folder / "model.json")
        if about.get("head") != "hat":
            raise CheckpointError(f"{self.folder} is no HAT checkpoint; its head is {about.get('head', 'dual')}")
        self.tokenizer: CaptionTokenizer = load_tokenizer(self.folder, about["caption_tokens"])
        self.training: str = about["training"]
        config = build_config(HatConfig, about["hat"])
        if config.encoders == "checkpoint":
            source_config = build_config(ModelConfig, about["model"])
            encoders: LevelEncoders = CheckpointEncoders(AlignmentModel(source_config, self.tokenizer.vocabulary))
        else:
            encoders = BackboneEncoders(config, self.tokenizer.vocabulary, start=False)
        self.model = HatModel(encoders, config)
        load_weights(self.model, read_tensors(self.folder, "model"), self.folder)
        self.model.eval().requires_grad_(False).to(device)

    @property
    def hash(self) -> str:
        return checkpoint_hash(self.folder)
