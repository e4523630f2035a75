"""The dual head: the cosine of the projected features, fine-tuned by contrast within the global batch."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, autocast, nn

from data_tools.in_order.collection import Collection
from finetune.config import EvaluateRecipe, FinetuneRecipe
from finetune.gradient_cache import IMAGES, PAIRS, TEXTS, CachedOutput, MicroBatches
from finetune.hard_negatives.exchanged_words import ExchangedWords
from finetune.heads.base import GatherRows, RetrievalTask, Scored, Workload, count_truncated
from finetune.heads.fusion import score_fusion
from finetune.heads.vldeformer import score_vldeformer
from finetune.shortlist import FirstStage, score_first_stage
from pretrain.encode import Encodings, encode_collection
from pretrain.model.alignment_model import AlignmentModel
from pretrain.model.parts import Part
from pretrain.objectives.contrastive import soft_cross_entropy
from pretrain.objectives.matching import Matching
from pretrain.objectives.state import Keys, MicroBatch, StudentState
from pretrain.weights.load import ImageTextModel, describe_model, load_model
from runtime.errors import CheckpointError, RecipeError
from runtime.files import read_json
from runtime.ranks import gather_rows


def dual_scores(encodings: Encodings) -> Tensor:
    """Return the cosine of every image's and every caption's features, (images, captions)."""
    return encodings.image @ encodings.text.T


def dual_loss(image: Tensor, text: Tensor, image_ids: Tensor, temperature: Tensor) -> Tensor:
    """Return the symmetric contrastive loss of ALBEF's retrieval fine-tuning.

    All captions of a query's image are its positives. Candidates are gathered from all ranks with their gradient, so the
    mean over the ranks is the loss of the global batch.

    Args:
        image: unit-norm image features of this rank, (batch, feature_dim).
        text: unit-norm caption features of this rank, (batch, feature_dim).
        image_ids: the image that each row belongs to, (batch,).
        temperature: divides the cosines, (1,).
    """
    all_image, all_text, all_ids = GatherRows.apply(image), GatherRows.apply(text), gather_rows(image_ids)
    positives = (image_ids[:, None] == all_ids[None]).to(image.dtype)
    targets = positives / positives.sum(-1, keepdim=True)
    to_text = soft_cross_entropy(image @ all_text.T / temperature, targets)
    to_image = soft_cross_entropy(text @ all_image.T / temperature, targets)
    return (to_text + to_image) / 2


class DualTask(RetrievalTask):
    """The alignment model's own projections, trained by contrast, and its fusion encoder, trained by matching."""

    def __init__(self, recipe: FinetuneRecipe) -> None:
        super().__init__()
        start = load_model(recipe.checkpoint, image_size=recipe.image_size)
        if not start.network.config.text.layers:
            raise CheckpointError(
                f"{start.folder} has no text layers, so no features for a dual head; fine-tune it with --head vldeformer"
            )
        self.weights = {
            "contrastive": recipe.contrastive_weight,
            "matching": recipe.matching_weight,
            "exchanged": recipe.exchanged.weight,
        }
        self.model = start.network.requires_grad_(True)
        for side, kept in vars(recipe.frozen).items():
            if kept is not None:  # the checkpoint says it too, for the runs that begin from it
                getattr(self.model.config, side).frozen = kept
        self.model.freeze()
        self.model.drop_codebook()  # retrieval does not read it
        if not recipe.matching_weight:  # no loss reaches these, and DDP would wait for their gradients
            self.model.fusion_encoder.requires_grad_(False)
            self.model.matching_head.requires_grad_(False)
        elif not self.model.config.fusion.layers:
            raise CheckpointError(f"{start.folder} has no fusion layers to match by; set --matching_weight 0")
        self.model.masked_language_head.requires_grad_(False)
        if self.model.config.levels:
            self.model.level_projections.requires_grad_(False)
        self.matching = Matching(recipe.matching)
        self.tokenizer, self.image_size = start.tokenizer, self.model.config.image.image_size
        self.exchanged = ExchangedWords(recipe.exchanged.words, self.tokenizer)
        self.description = f"{start.folder} ({start.training})"

    def forward(self, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted sum of the losses, and each of them by name."""
        tokens = self.model.image_tokens(batch.images)
        state = StudentState(self.model, batch, tokens, self.model.text_encoder(batch.text.ids, batch.text.mask))
        with autocast(tokens.device.type, enabled=False):
            losses = {"contrastive": self._contrast(state.image, state.text, batch.image_ids)}
        if self.weights["matching"]:
            # There is no teacher, so the model's own similarities draw the negatives.
            batch.keys = Keys(state.image.detach(), state.text.detach(), batch.image_ids)
            losses |= self.matching(state)
        if self.weights["exchanged"]:
            losses |= self.exchanged(state)
        total = self._total(losses)
        return total, {"loss": total.detach(), **{name: value.detach() for name, value in losses.items()}}

    @property
    def cacheable(self) -> AlignmentModel:
        """The alignment model itself."""
        return self.model

    def add_gradients(self, batch: MicroBatch, micro_batches: MicroBatches) -> dict[str, Tensor]:
        """Add the gradients in micro-batches; see `HeadTask.add_gradients`.

        Features are what is kept of a sample. Where fusion reads its tokens and states, these are.
        """
        model, ids, mask = self.model, batch.text.ids, batch.text.mask
        fuses = bool(self.weights["matching"])

        def encode_images(rows: slice) -> Tensor:
            tokens = model.image_tokens(batch.images[rows])
            with autocast(tokens.device.type, enabled=False):
                return tokens if fuses else model.image_features(tokens)

        def encode_texts(rows: slice) -> Tensor:
            states = model.text_encoder(ids[rows], mask[rows])
            with autocast(states.device.type, enabled=False):
                return states if fuses else model.text_features(states, mask[rows])

        images = CachedOutput(micro_batches, encode_images, IMAGES)
        texts = CachedOutput(micro_batches, encode_texts, TEXTS)
        image, text = images.output, texts.output
        state = StudentState(model, batch, image, text)
        if fuses:
            image, text = state.image, state.text
        losses = {"contrastive": self._contrast(image, text, batch.image_ids)}
        self._total(losses).backward()
        if fuses:
            batch.keys = Keys(image.detach(), text.detach(), batch.image_ids)
            losses |= self._add_fusion_gradients(state, micro_batches)
        images.backward()
        texts.backward()
        return {"loss": self._total(losses).detach(), **{name: value.detach() for name, value in losses.items()}}

    def _add_fusion_gradients(self, state: StudentState, micro_batches: MicroBatches) -> dict[str, Tensor]:
        """Add the gradients of the losses that read pairs, micro-batch by micro-batch, and return the figures of the batch."""
        negatives = self.matching.draw_nearby(state)
        count = self.exchanged.count(state.batch.text.ids) if self.weights["exchanged"] else None

        def fuse(rows: slice) -> dict[str, Tensor]:
            losses = self.matching.part(state, rows, negatives)
            return losses if count is None else losses | self.exchanged(state.part(rows), count)

        sums: dict[str, Tensor] = {}
        for _, losses in micro_batches.run(fuse, PAIRS):
            self._total(losses).backward()
            sums = {name: value.detach() + sums.get(name, 0.0) for name, value in losses.items()}
        return sums

    def _contrast(self, image: Tensor, text: Tensor, image_ids: Tensor) -> Tensor:
        """Return the contrastive loss; call it without autocast: bf16 has steps of 0.2 in a logit at temperature 0.02."""
        return dual_loss(image, text, image_ids, self.model.temperature())

    def _total(self, losses: dict[str, Tensor]) -> Tensor:
        """Return the weighted sum of the losses among the figures."""
        first, *others = [weight * losses[name] for name, weight in self.weights.items() if name in losses]
        return sum(others, first)

    def parts(self) -> dict[str, Part]:
        """Return the model's encoders."""
        return self.model.parts()

    def layers(self) -> list[nn.Module]:
        """Return the model's transformer layers."""
        return self.model.layers()

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        """Return the model's parameters: a dual checkpoint is an alignment model."""
        return self.model.state_dict()

    def describe(self, training: str) -> dict[str, Any]:
        """Return an alignment model's `model.json`, and whether its fusion head was tuned."""
        config = dataclasses.replace(self.model.config, codewords=0)
        return describe_model(config, self.tokenizer.caption_tokens, training) | {
            "fusion_tuned": bool(self.weights["matching"])
        }

    def similarity(self, collection: Collection, work: Workload) -> np.ndarray:
        """Return the cosine of every image with every caption, (images, captions)."""
        return dual_scores(_encode(self.model, self.tokenizer, collection, work)).numpy()

    def extra_figures(self) -> dict[str, Tensor]:
        """Return the temperature."""
        return {"temperature": self.model.temperature().detach()}


def score_dual(recipe: EvaluateRecipe, collection: Collection, work: Workload) -> Iterator[Scored]:
    """Score an alignment model by the heads that the recipe names.

    These are the dual head, the fusion head on the dual head's shortlists, and the fusion encoder taken apart but not tuned
    (`vldeformer`).
    """
    heads = recipe.heads or ["dual"]
    if "hat" in heads or recipe.ensemble:
        raise RecipeError(f"{recipe.checkpoint} is no HAT checkpoint; its heads are dual and fusion")
    if recipe.shortlist_from and "fusion" not in heads:
        raise RecipeError("shortlist_from is for heads that re-rank; add fusion to heads, or leave it out")
    if "vldeformer" in heads:
        yield from score_vldeformer(recipe, collection, work)
    if others := [head for head in heads if head != "vldeformer"]:
        yield from _score_together(recipe, others, collection, work)


def _score_together(
    recipe: EvaluateRecipe, heads: list[Any], collection: Collection, work: Workload
) -> Iterator[Scored]:
    """Score by `dual` and `fusion`, which share one encoding of the collection."""
    model = load_model(recipe.checkpoint, work.device)
    untuned = _check(recipe, heads, model)
    if untuned and work.ranks.first:
        print(
            f"{recipe.checkpoint} was fine-tuned with matching_weight 0, so its fusion head is still the pretrained one; "
            "the encoders it reads have changed",
            file=sys.stderr,
        )
    details = count_truncated(model.tokenizer, collection, work.ranks)
    encodings = _encode(model.network, model.tokenizer, collection, work, keep_tokens="fusion" in heads)
    first_stage = score_first_stage(recipe.shortlist_from, collection, work) if recipe.shortlist_from else None
    similarity = dual_scores(encodings).numpy()
    # A model without text layers has no features to make shortlists by: matching then scores all pairs.
    all_pairs = not model.network.config.text.layers and first_stage is None
    for head in heads:
        if head == "dual":
            yield Scored(head, head, similarity, similarity.T, model.hash, model.training, details)
        else:
            scored = score_fusion(
                recipe,
                model,
                encodings,
                first_stage or FirstStage(similarity, {}),
                len(collection.captions) if all_pairs else recipe.shortlist,
                collection.caption_image,
                work,
            )
            scored.details = details | scored.details | ({"fusion_tuned": False} if untuned else {})
            yield scored


def _check(recipe: EvaluateRecipe, heads: list[Any], model: ImageTextModel) -> bool:
    """Refuse heads that the checkpoint does not have.

    Returns:
        Whether the recipe asks for a fusion head that fine-tuning left as it was, while the encoders learned.
    """
    if "fusion" in heads and not model.network.config.fusion.layers:
        raise RecipeError(f"heads asks for fusion, but {recipe.checkpoint} has no fusion encoder; use --heads '[dual]'")
    if not model.network.config.text.layers and heads != ["fusion"]:
        raise RecipeError(
            f"{recipe.checkpoint} has no text layers, so no dual head; use --heads '[fusion]', on all pairs or with --shortlist_from"
        )
    return "fusion" in heads and read_json(model.folder / "model.json").get("fusion_tuned") is False


def dual_first_stage(folder: Path, collection: Collection, work: Workload) -> FirstStage:
    """Score a collection by a checkpoint's dual head, for another head's shortlists."""
    model = load_model(folder, work.device)
    if not model.network.config.text.layers:
        raise RecipeError(f"shortlist_from: {folder} has no text layers, so no dual head to make shortlists by")
    encodings = _encode(model.network, model.tokenizer, collection, work)
    return FirstStage(dual_scores(encodings).numpy(), {"checkpoint": model.hash})


def _encode(
    network: Any, tokenizer: Any, collection: Collection, work: Workload, keep_tokens: bool = False
) -> Encodings:
    return encode_collection(
        network,
        tokenizer,
        collection,
        work.ranks,
        work.batch_size,
        work.workers,
        keep_tokens=keep_tokens,
        silent=work.silent,
    )
