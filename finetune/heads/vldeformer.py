"""VLDeformer (Zhang et al. 2021): a fusion encoder taken apart learns, by contrast with hard negatives, to give embeddings.

The model is in `decomposed.py`, the altered captions and images in `finetune/hard_negatives/`. A hard negative is called
altered here, and usable where it differs from its original.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from data_tools.in_order.collection import Collection
from data_tools.stream.order import derived_seed, uniforms
from data_tools.tokenizer import CaptionTokenizer
from finetune.config import EvaluateRecipe, FinetuneRecipe
from finetune.hard_negatives.altering import AlteredCaptions, choose_patches, exchange_patches
from finetune.hard_negatives.wordnet import open_lexicon
from finetune.heads.base import (
    GatherRows,
    RetrievalTask,
    Scored,
    Workload,
    count_truncated,
    own_rank,
    world_size,
)
from finetune.heads.decomposed import Decomposed, LoadedVLDeformer, encode_decomposed, require_fusion_encoder
from finetune.shortlist import FirstStage
from pretrain.config import PretrainRecipe
from pretrain.model.alignment_model import AlignmentModel
from pretrain.model.parts import Part, encoder_parts
from pretrain.objectives.matching import draw_negatives
from pretrain.objectives.state import MicroBatch
from pretrain.weights.load import ImageTextModel, load_model
from pretrain.weights.starting import load_starting_weights
from pretrain.word_maps import attention_maps
from runtime.errors import RecipeError
from runtime.ranks import gather_rows, sum_over_ranks
from runtime.recipe import load_recipe

# Purposes of a sample's random numbers. Pretraining's purposes are 1 and 2.
WORDS, PATCHES = 3, 4


@dataclass
class Altered:
    """The embeddings of a batch's altered samples; None where a side is not altered."""

    image: Tensor | None = None
    """(batch, width) unit-norm"""
    text: Tensor | None = None
    """(batch, width) unit-norm"""
    usable_image: Tensor | None = None
    """(batch,) bool, which altered images differ from their originals"""
    usable_text: Tensor | None = None
    """(batch,) bool, which altered captions differ from their originals"""
    donor_ids: Tensor | None = None
    """(batch,) the image that an altered image's new patches come from"""


def contrastive_loss(
    image: Tensor, text: Tensor, image_ids: Tensor, temperature: float, altered: Altered | None = None
) -> Tensor:
    """Return the loss of Eq. 1-3: both directions summed, altered samples in the other side's denominators.

    The candidates are the global batch, gathered with their gradient, so the mean over the ranks is the loss of the global
    batch. An anchor's denominator leaves out other captions of its image. A caption's denominator also leaves out altered
    images that show patches of the caption's own image.

    Args:
        image: unit-norm image embeddings of this rank, (batch, width).
        text: unit-norm caption embeddings of this rank, (batch, width).
        image_ids: the image of each row, (batch,).
        temperature: divides the cosines.
        altered: this rank's altered samples.
    """
    altered = altered or Altered()
    own = torch.arange(len(image), device=image.device) + len(image) * own_rank()
    same = image_ids[:, None] == gather_rows(image_ids)[None]
    same = same & (own[:, None] != torch.arange(same.shape[1], device=same.device))
    total = torch.zeros((), dtype=image.dtype, device=image.device)
    for anchor, matched, harder, usable, donors in (
        (text, image, altered.image, altered.usable_image, altered.donor_ids),
        (image, text, altered.text, altered.usable_text, None),
    ):
        logits = (anchor @ GatherRows.apply(matched).T / temperature).masked_fill(same, -torch.inf)
        if harder is not None and usable is not None:
            harder_logits = anchor @ GatherRows.apply(harder).T / temperature
            left_out = ~gather_rows(usable.to(torch.uint8)).bool()[None]
            if donors is not None:
                left_out = left_out | (image_ids[:, None] == gather_rows(donors)[None])
            logits = torch.cat([logits, harder_logits.masked_fill(left_out, -torch.inf)], 1)
        total = total + functional.cross_entropy(logits, own)
    return total


def cosine_loss(image: Tensor, text: Tensor, image_ids: Tensor) -> Tensor:
    """Return the loss of the ablation "w/o contrastive", pairwise cosine.

    It is 1 - cosine of each pair, plus the mean positive cosine of all other pairs. The paper says only "pairwise cosine
    similarity"; pairs alone would make all embeddings one. The arguments are those of `contrastive_loss`.
    """
    cosine = text @ GatherRows.apply(image).T
    own = torch.arange(len(image), device=image.device) + len(image) * own_rank()
    others = image_ids[:, None] != gather_rows(image_ids)[None]
    apart = (cosine.clamp(min=0) * others).sum() / (sum_over_ranks(others.sum()) / world_size()).clamp(min=1)
    return (1 - cosine.gather(1, own[:, None])).mean() + apart


class VLDeformerTask(RetrievalTask):
    """Decomposing: the whole model learns, by contrast alone."""

    def __init__(self, recipe: FinetuneRecipe) -> None:
        super().__init__()
        start = load_model(recipe.checkpoint, image_size=recipe.image_size)
        require_fusion_encoder(start.network.config, start.folder)
        self.recipe, config = recipe, recipe.vldeformer
        self.tokenizer, self.image_size = start.tokenizer, start.network.config.image.image_size
        network = start.network.requires_grad_(True)
        torch.manual_seed(recipe.training.seed)  # new weights start the same on every rank
        if config.start == "unpretrained":
            network = _unpretrained(start)
        negatives, lexicon = config.negatives, ""
        guided = config.loss == "contrastive" and negatives.image and negatives.attended
        # The guide knows where nouns are in a picture. It is copied before `fresh_joint` makes joint layers anew:
        # which patches are altered is not that ablation's question.
        self.guide = copy.deepcopy(network).requires_grad_(False) if guided else None
        if config.start == "fresh_joint":
            network.fusion_encoder = AlignmentModel(network.config, self.tokenizer.vocabulary).fusion_encoder
        self.source = dataclasses.replace(network.config, codewords=0, levels=[])
        self.captions: AlteredCaptions | None = None
        if config.loss == "contrastive" and (negatives.text or negatives.image):
            opened = open_lexicon(negatives.lexicon)
            self.captions = AlteredCaptions(negatives, opened, self.tokenizer)
            lexicon = f", words of {opened.name}"
        if self.guide is not None:
            self.frozen = start.hash
        self.model = Decomposed(network, config.pooling)
        origin = {
            "unpretrained": "its sizes alone, not its weights",
            "fresh_joint": f"{start.training}, joint layers anew",
        }.get(config.start, start.training)
        self.description = f"{self.model.name} of {start.folder} ({origin}){lexicon}"

    def forward(self, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the recipe's loss, and how hard the altered samples are."""
        config, mask = self.recipe.vldeformer, batch.text.mask
        image, text = self.model.encode_image(batch.images), self.model.encode_text(batch.text.ids, mask)
        figures: dict[str, Tensor] = {}
        if config.loss == "cosine":
            with torch.autocast(image.device.type, enabled=False):
                loss = cosine_loss(image, text, batch.image_ids)
        else:
            altered = Altered()
            if self.captions and config.negatives.text:
                numbers = self._numbers(batch, WORDS, self.captions.numbers_per_caption)
                ids, altered_mask, altered.usable_text = self.captions(batch.text.ids, mask, numbers)
                altered.text = self.model.encode_text(ids, altered_mask)
                figures["unaltered_captions"] = (~altered.usable_text).float().mean()
            if self.captions and config.negatives.image:
                pixels, altered.usable_image, altered.donor_ids = self._altered_images(batch)
                altered.image = self.model.encode_image(pixels)
            with torch.autocast(image.device.type, enabled=False):  # bf16 cannot hold a cosine divided by 0.005
                loss = contrastive_loss(image, text, batch.image_ids, config.temperature, altered)
            figures |= fooled(image.detach(), text.detach(), altered)
        return loss, {"loss": loss.detach(), config.loss: loss.detach(), **figures}

    @torch.no_grad()
    def _altered_images(self, batch: MicroBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Exchange patches between the images of the batch.

        Returns:
            The altered images; (batch,) bool, where the batch has another image to take patches from; (batch,) the id of the
            image that the patches come from.
        """
        negatives = self.recipe.vldeformer.negatives
        side = self.model.image_encoder.grid[0]
        numbers = torch.from_numpy(self._numbers(batch, PATCHES, 1 + side * side)).to(batch.images.device)
        attention = None
        if self.guide is not None:
            assert self.captions is not None
            self.guide.eval()
            tokens = self.guide.image_encoder(batch.images)
            maps = attention_maps(self.guide, tokens, batch.text.ids, batch.text.mask).flatten(2)
            nouns = self.captions.nouns(batch.text.ids, batch.text.mask)
            attention = (maps * nouns[..., None]).sum(1)
        chosen = choose_patches(attention, numbers[:, 1:], negatives.attended, negatives.rest)
        same = batch.image_ids[:, None] == batch.image_ids[None]
        donors, exists = draw_negatives(torch.zeros_like(same, dtype=torch.float64), same, numbers[:, 0])
        altered = exchange_patches(batch.images, chosen.unflatten(1, (side, side)), donors)
        return altered, exists, batch.image_ids[donors]

    def _numbers(self, batch: MicroBatch, purpose: int, count: int) -> np.ndarray:
        """Draw (batch, count) uniform numbers that are a function of the samples."""
        assert batch.positions is not None
        return uniforms(derived_seed(self.recipe.training.seed, purpose), batch.positions.cpu().numpy(), count)

    def parts(self) -> dict[str, Part]:
        """Return the encoders; the joint layers are the fusion encoder."""
        joint = Part(self.model.joint, list(self.model.joint.layers))
        return encoder_parts(self.model.image_encoder, self.model.text_encoder) | {"fusion": joint}

    def layers(self) -> list[nn.Module]:
        """Return the transformer layers of both encoders and the joint layers."""
        return [*self.model.image_encoder.layers(), *self.model.text_encoder.layers, *self.model.joint.layers]

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        """Return the parameters and buffers of the model taken apart."""
        return self.model.state_dict()

    def describe(self, training: str) -> dict[str, Any]:
        """Return a VLDeformer checkpoint's `model.json`."""
        return {
            "head": "vldeformer",
            "vldeformer": dataclasses.asdict(self.recipe.vldeformer),
            "model": dataclasses.asdict(self.source),
            "caption_tokens": self.tokenizer.caption_tokens,
            "training": training,
        }

    def similarity(self, collection: Collection, work: Workload) -> np.ndarray:
        """Return the cosine of every image with every caption, (images, captions)."""
        return _cosines(self.model, self.tokenizer, collection, work)


def _unpretrained(start: ImageTextModel) -> AlignmentModel:
    """Return a model of the same sizes with the weights that its pretraining began from.

    Raises:
        RecipeError: those weights are not known, or came from another run of ours.
    """
    network = AlignmentModel(start.network.config, start.tokenizer.vocabulary)
    path, sources = start.folder / "config.yaml", (network.config.image.weights, network.config.text.weights)
    if "none" in sources and not path.is_file():
        raise RecipeError(
            f"vldeformer.start is unpretrained, but {start.folder} (an export or import) does not say what pretraining began from; "
            "give the run's own checkpoint"
        )
    load_starting_weights(network)
    if path.is_file() and (earlier := load_recipe(PretrainRecipe, path).checkpoint):
        raise RecipeError(
            f"vldeformer.start is unpretrained, but {start.folder} began from {earlier}, not from nothing; take that apart instead"
        )
    return network


def fooled(image: Tensor, text: Tensor, altered: Altered) -> dict[str, Tensor]:
    """Return how hard the altered samples are.

    Args:
        image: unit-norm image embeddings, (batch, width).
        text: unit-norm caption embeddings, (batch, width).
        altered: the batch's altered samples.

    Returns:
        For each altered side, the share of anchors that are as near to their own altered partner as to the true one, or
        nearer.
    """
    matched, figures = (image * text).sum(-1), {}
    for name, anchor, harder, usable in (
        ("text", image, altered.text, altered.usable_text),
        ("image", text, altered.image, altered.usable_image),
    ):
        if harder is not None and usable is not None:
            nearer = (anchor * harder.detach()).sum(-1) >= matched
            figures[f"fooled_by_altered_{name}"] = (nearer & usable).sum() / usable.sum().clamp(min=1)
    return figures


def score_vldeformer(recipe: EvaluateRecipe, collection: Collection, work: Workload) -> Iterator[Scored]:
    """Score by the cosine of a VLDeformer's embeddings, or of an alignment model's, taken apart and not tuned."""
    if recipe.ensemble:
        raise RecipeError(f"{recipe.checkpoint} is no HAT checkpoint; ensemble is HAT's")
    loaded = LoadedVLDeformer(recipe.checkpoint, work.device)
    if loaded.tuned and (recipe.heads not in (None, ["vldeformer"]) or recipe.shortlist_from):
        raise RecipeError(
            f"{recipe.checkpoint} is a VLDeformer checkpoint; use --heads '[vldeformer]' or leave heads out, and shortlist_from too"
        )
    details = count_truncated(loaded.tokenizer, collection, work.ranks)
    similarity = _cosines(loaded.model, loaded.tokenizer, collection, work)
    yield Scored("vldeformer", loaded.name, similarity, similarity.T, loaded.hash, loaded.training, details)


def vldeformer_first_stage(folder: Path, collection: Collection, work: Workload) -> FirstStage:
    """Score a collection by a VLDeformer checkpoint, for another head's shortlists."""
    loaded = LoadedVLDeformer(folder, work.device)
    similarity = _cosines(loaded.model, loaded.tokenizer, collection, work)
    return FirstStage(similarity, {"checkpoint": loaded.hash, "head": loaded.name})


def _cosines(model: Decomposed, tokenizer: CaptionTokenizer, collection: Collection, work: Workload) -> np.ndarray:
    image, text = encode_decomposed(model, tokenizer, collection, work)
    return (image @ text.T).numpy()
