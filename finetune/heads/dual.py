"""The dual head: cosine of the projected features, fine-tuned by contrast within the global batch."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed, nn

from data_tools.in_order.collection import Collection
from finetune.config import FinetuneRecipe
from finetune.hard_negatives.exchanged_words import ExchangedWords
from finetune.heads.base import RetrievalTask
from pretrain.encode import Encodings, encode_collection
from pretrain.objectives.contrastive import soft_cross_entropy
from pretrain.objectives.matching import Matching
from pretrain.objectives.state import Keys, MicroBatch, StudentState
from pretrain.weights.load import describe_model, load_model
from runtime.errors import CheckpointError
from runtime.ranks import Ranks, gather_rows, sum_over_ranks


def dual_scores(encodings: Encodings) -> Tensor:
    """(images, captions): the cosine of every image's and every caption's features."""
    return encodings.image @ encodings.text.T


def dual_loss(image: Tensor, text: Tensor, image_ids: Tensor, temperature: Tensor) -> Tensor:
    """Symmetric contrastive loss; all captions of a query's image are its positives (ALBEF's retrieval fine-tuning).

    image, text: unit-norm features (batch, feature_dim) of this rank; image_ids: (batch,). Candidates are gathered from all
    ranks with their gradient, so the mean over ranks is the loss of the global batch.
    """
    all_image, all_text, all_ids = GatherRows.apply(image), GatherRows.apply(text), gather_rows(image_ids)
    positives = (image_ids[:, None] == all_ids[None]).float()
    targets = positives / positives.sum(-1, keepdim=True)
    to_text = soft_cross_entropy(image @ all_text.T / temperature, targets)
    to_image = soft_cross_entropy(text @ all_image.T / temperature, targets)
    return (to_text + to_image) / 2


class GatherRows(torch.autograd.Function):
    """(n, …) on each rank -> (world * n, …) in rank order; the gradient goes back to the rank that a row came from."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.rows = len(rows)
        return gather_rows(rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        rank = distributed.get_rank() if distributed.is_initialized() else 0
        return sum_over_ranks(gradient)[rank * ctx.rows : (rank + 1) * ctx.rows]


class DualTask(RetrievalTask):
    """The pretraining's own projections by contrast, and the fusion encoder by matching."""

    def __init__(self, recipe: FinetuneRecipe) -> None:
        super().__init__()
        start = load_model(recipe.checkpoint, image_size=recipe.image_size)
        if not start.network.config.text.layers:
            raise CheckpointError(
                f"{start.folder} has no text layers, so no features for a dual head; fine-tune it with --head vldeformer"
            )
        self.contrastive_weight, self.matching_weight = recipe.contrastive_weight, recipe.matching_weight
        self.model = start.network.requires_grad_(True)
        self.model.codebook = None  # retrieval does not read it
        if not recipe.matching_weight:  # nothing trains these then, and DDP would wait for their gradients
            self.model.fusion_encoder.requires_grad_(False)
            self.model.matching_head.requires_grad_(False)
        elif not self.model.config.fusion.layers:
            raise CheckpointError(f"{start.folder} has no fusion layers to match by; set --matching_weight 0")
        self.model.masked_language_head.requires_grad_(False)
        if self.model.config.levels:
            self.model.level_projections.requires_grad_(False)
        self.matching = Matching(recipe.matching)
        self.tokenizer, self.image_size = start.tokenizer, self.model.config.image.image_size
        self.exchanged_weight = recipe.exchanged.weight
        self.exchanged = ExchangedWords(recipe.exchanged.words, self.tokenizer)
        self.about = f"{start.folder} ({start.training})"

    def forward(self, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        tokens = self.model.image_encoder(batch.images)
        state = StudentState(self.model, batch, tokens, self.model.text_encoder(batch.text.ids, batch.text.mask))
        with torch.autocast(tokens.device.type, enabled=False):  # bf16 has steps of 0.2 in a logit at temperature 0.02
            image, text, temperature = state.image.float(), state.text.float(), self.model.temperature().float()
            losses = {"contrastive": dual_loss(image, text, batch.image_ids, temperature)}
        total = self.contrastive_weight * losses["contrastive"]
        if self.matching_weight:
            # There is no teacher: negatives are drawn by the model's own similarities.
            batch.keys = Keys(state.image.detach(), state.text.detach(), batch.image_ids)
            losses |= self.matching(state)
            total = total + self.matching_weight * losses["matching"]
        if self.exchanged_weight:
            losses |= self.exchanged(state)
            total = total + self.exchanged_weight * losses["exchanged"]
        return total, {"loss": total.detach(), **{name: value.detach() for name, value in losses.items()}}

    def layers(self) -> list[nn.Module]:
        return self.model.layers()

    def stored(self) -> dict[str, Tensor]:
        return dict(self.model.named_parameters())

    def describe(self, training: str) -> dict[str, Any]:
        config = dataclasses.replace(self.model.config, codewords=0)
        return describe_model(config, self.tokenizer.caption_tokens, training) | {
            "fusion_tuned": bool(self.matching_weight)
        }

    def similarity(
        self, collection: Collection, ranks: Ranks, device: torch.device, batch_size: int, workers: int
    ) -> np.ndarray:
        found = encode_collection(self.model, self.tokenizer, collection, ranks, batch_size, workers)
        return dual_scores(found).numpy()

    def extra_figures(self) -> dict[str, Tensor]:
        return {"temperature": self.model.temperature().detach()}
