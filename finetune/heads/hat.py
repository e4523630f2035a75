"""HAT (Bin et al. 2023): levels of two encoders, compared by stacked cross attention and fine-tuned by triplets.

The model is in `hat_model.py`, its encoders in `levels.py`, the comparison in `stacked_attention.py`, and the scoring of
a collection, block by block, in `hat_scoring.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data_tools.in_order.collection import Collection
from data_tools.tokenizer import load_tokenizer
from finetune.config import EvaluateRecipe, FinetuneRecipe
from finetune.heads.base import GatherRows, RetrievalTask, Scored, Workload, count_truncated, world_size
from finetune.heads.hat_model import HatModel, LoadedHat
from finetune.heads.hat_scoring import hat_scores
from finetune.heads.levels import BackboneEncoders, CheckpointEncoders, LevelEncoders
from finetune.shortlist import make_shortlists, score_first_stage
from pretrain.model.config import ModelConfig
from pretrain.model.parts import Part
from pretrain.objectives.state import MicroBatch
from pretrain.weights.load import load_model
from retrieval.protocols import folds_of
from runtime.errors import RecipeError
from runtime.ranks import gather_rows
from training.config import OptimizerConfig


def triplet_loss(
    scores: Tensor, image_ids: Tensor, caption_image: Tensor, margin: float, hardest: bool = True
) -> Tensor:
    """Return the triplet loss in both directions, the mean over the matched pairs.

    Captions of a row's image are never its negatives. A pair without any negative counts as 0.

    Args:
        scores: (pairs, pairs) image by caption, matched pairs on the diagonal.
        image_ids: (pairs,) the image of each row.
        caption_image: (pairs,) the image of each column.
        margin: by how much a matched pair should score above its negatives.
        hardest: whether each pair's hardest negative counts alone (Faghri et al. 2018), or the mean of all.
    """
    same = image_ids[:, None] == caption_image[None]
    negatives = scores.masked_fill(same, -torch.inf)
    matched = scores.diagonal()
    if hardest:
        losses = [(margin - matched + negatives.amax(axis)).clamp(min=0) for axis in (1, 0)]
        return (losses[0] + losses[1]).mean()
    violations = [(margin - positives + negatives).clamp(min=0) for positives in (matched[:, None], matched[None])]
    losses = [part.sum(axis) / (~same).sum(axis).clamp(min=1) for part, axis in zip(violations, (1, 0), strict=True)]
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
            torch.manual_seed(recipe.training.seed)  # loading drew from the generator
            self.description = f"HAT on the encoders of {start.folder} ({start.training})"
        else:
            self.tokenizer = load_tokenizer(config.tokenizer or config.text.weights, config.caption_tokens)
            encoders = BackboneEncoders(config, self.tokenizer.vocabulary, start=True)
            self.description = (
                f"HAT on {config.image.architecture} ({config.image.weights}) and BERT ({config.text.weights})"
            )
        self.model = HatModel(encoders, config)
        self.image_size = encoders.image_size
        # Nothing reads the layers after the last level.
        self.has_idle_parameters = True

    def begin_step(self, epoch: float) -> None:
        """Choose which negatives count."""
        self.hardest = epoch >= self.recipe.hat.hardest_from_epoch

    def parts(self) -> dict[str, Part]:
        """Return the encoders."""
        return self.model.encoders.parts()

    def learning(self, optimizer: OptimizerConfig) -> OptimizerConfig:
        """Let both encoders learn at `hat.encoder_lr_share`, and from `hat.frozen_epochs` on or later."""
        share, epochs = self.recipe.hat.encoder_lr_share, self.recipe.hat.frozen_epochs
        rates, until = optimizer.rates, optimizer.freeze_until
        return dataclasses.replace(
            optimizer,
            rates=dataclasses.replace(rates, image=share * rates.image, text=share * rates.text),
            freeze_until=dataclasses.replace(until, image=max(epochs, until.image), text=max(epochs, until.text)),
        )

    def forward(self, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the triplet loss of the global batch, and the share of its images that rank their own caption first."""
        scores, image_ids = self.batch_scores(batch)
        loss = triplet_loss(scores, image_ids, image_ids, self.recipe.hat.margin, self.hardest)
        negatives = scores.detach().masked_fill(image_ids[:, None] == image_ids[None], -torch.inf)
        wins = (scores.detach().diagonal() > negatives.amax(1)).float().mean()
        return loss, {"loss": loss.detach(), "triplet": loss.detach(), "batch_R@1": wins}

    def batch_scores(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """Score the global batch.

        Returns:
            The scores, (pairs, pairs), the same on every rank and with their gradient; and the image ids, (pairs,).
        """
        image_levels = self.model.image_levels(batch.images)
        text_levels = self.model.text_levels(batch.text.ids, batch.text.mask)
        mask = batch.text.mask
        if world_size() > 1:
            # Each rank scores its own images with all ranks' captions; the rows are gathered below.
            # Ranks pad to different lengths: captions take the longest length for the gather and are then cut again.
            room = self.tokenizer.caption_tokens - mask.shape[1]
            text_levels = [GatherRows.apply(nn.functional.pad(words, (0, 0, 0, room))) for words in text_levels]
            mask = gather_rows(nn.functional.pad(mask, (0, room)).to(torch.uint8)).bool()
            mask = mask[:, : int(mask.sum(1).max())]
            text_levels = [words[:, : mask.shape[1]] for words in text_levels]
        scores = self.model.score(image_levels, text_levels, mask)
        return GatherRows.apply(scores), gather_rows(batch.image_ids)

    def layers(self) -> list[nn.Module]:
        """Return the encoders' transformer layers."""
        encoders = self.model.encoders
        assert isinstance(encoders, CheckpointEncoders), "the recipe refuses other encoders"
        return [*encoders.image_encoder.layers(), *encoders.text_encoder.layers]

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        """Return the parameters and buffers of the encoders and the projections."""
        return self.model.state_dict()

    def describe(self, training: str) -> dict[str, Any]:
        """Return a HAT checkpoint's `model.json`."""
        return {
            "head": "hat",
            "hat": dataclasses.asdict(self.recipe.hat),
            "model": dataclasses.asdict(self.source) if self.source else None,
            "caption_tokens": self.tokenizer.caption_tokens,
            "training": training,
        }

    def similarity(self, collection: Collection, work: Workload) -> np.ndarray:
        """Return the score of every image with every caption, (images, captions)."""
        return hat_scores(self.model, self.tokenizer, collection, work)


def score_hat(recipe: EvaluateRecipe, collection: Collection, work: Workload) -> Iterator[Scored]:
    """Score by HAT, or by the mean of two HATs' scores: all pairs, or another checkpoint's shortlists."""
    if recipe.heads not in (None, ["hat"]):
        raise RecipeError(f"{recipe.checkpoint} is a HAT checkpoint; use --heads '[hat]', or leave heads out")
    models = [LoadedHat(source, work.device) for source in (recipe.checkpoint, recipe.ensemble) if source]
    if len({model.training for model in models}) > 1:
        raise RecipeError(f"{recipe.checkpoint} is {models[0].training}, but {recipe.ensemble} is {models[1].training}")
    details: dict[str, Any] = {**count_truncated(models[0].tokenizer, collection, work.ranks)}
    name = models[0].model.name
    if recipe.ensemble:
        name = f"hat ensemble of {name.removeprefix('hat ')} and {models[1].model.name.removeprefix('hat ')}"
    first_stage, lists = None, None
    if recipe.shortlist_from:
        first_stage = score_first_stage(recipe.shortlist_from, collection, work)
        folds = folds_of(recipe.protocol, len(collection))
        lists = make_shortlists(first_stage.similarity, recipe.shortlist, folds, collection.caption_image)
        details["shortlist"] = lists.ceiling(collection.caption_image) | first_stage.details
        name += f" of the best {recipe.shortlist}"
    mean = np.zeros(0)
    for model in models:
        scores = hat_scores(model.model, model.tokenizer, collection, work, lists.pairs() if lists else None)
        mean = scores / len(models) if model is models[0] else mean + scores / len(models)
    image_to_text, text_to_image = mean, mean.T
    if lists is not None and first_stage is not None:
        image_to_text, text_to_image = lists.rerank(first_stage.similarity, lists.take(mean))
    hashes = "+".join(model.hash for model in models)
    yield Scored("hat", name, image_to_text, text_to_image, hashes, models[0].training, details)
