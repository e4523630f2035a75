"""VLDeformer (Zhang et al. 2021): contrast, with hard negatives, teaches a fusion encoder taken apart to give embeddings."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from data_tools.in_order.collection import Collection
from data_tools.stream.order import derived_seed, uniforms
from finetune.config import FinetuneRecipe
from finetune.hard_negatives.altering import AlteredCaptions, choose_patches, exchange_patches
from finetune.hard_negatives.wordnet import open_lexicon
from finetune.heads.base import RetrievalTask
from finetune.heads.decomposed import Decomposed, encode_decomposed, need_fusion
from finetune.heads.dual import GatherRows
from pretrain.config import PretrainRecipe
from pretrain.model.alignment_model import AlignmentModel
from pretrain.objectives.matching import draw_negatives
from pretrain.objectives.state import MicroBatch
from pretrain.weights.load import load_model
from pretrain.weights.starting import load_starting_weights
from pretrain.word_maps import attention_maps
from runtime.errors import RecipeError
from runtime.ranks import Ranks, gather_rows, sum_over_ranks
from runtime.recipe import load_recipe

# What the draws of one sample are for; pretraining's purposes are 1 and 2.
WORDS, PATCHES = 3, 4


def contrastive_loss(
    image: Tensor,
    text: Tensor,
    image_ids: Tensor,
    temperature: float,
    altered_image: Tensor | None = None,
    altered_text: Tensor | None = None,
    usable_image: Tensor | None = None,
    usable_text: Tensor | None = None,
    donor_ids: Tensor | None = None,
) -> Tensor:
    """Eq. 1-3: both directions summed; every altered sample of the global batch joins the other side's denominators.

    image, text and their altered forms: unit-norm (batch, width) of this rank; image_ids: (batch,); usable: (batch,) bool, which
    altered forms differ from their originals; donor_ids: (batch,) the image that an altered image's new patches are of. Left out of
    an anchor's denominator: other captions of its image, and of a caption altered images that show patches of its own image.
    Candidates are gathered with their gradient, so the mean over ranks is the loss of the global batch.
    """
    own = torch.arange(len(image), device=image.device) + len(image) * _rank()
    same = image_ids[:, None] == gather_rows(image_ids)[None]
    same = same & (own[:, None] != torch.arange(same.shape[1], device=same.device))
    total = torch.zeros((), dtype=image.dtype, device=image.device)
    for anchor, matched, altered, usable, donors in (
        (text, image, altered_image, usable_image, donor_ids),
        (image, text, altered_text, usable_text, None),
    ):
        logits = (anchor @ GatherRows.apply(matched).T / temperature).masked_fill(same, -torch.inf)
        if altered is not None and usable is not None:
            harder = anchor @ GatherRows.apply(altered).T / temperature
            out = ~gather_rows(usable.to(torch.uint8)).bool()[None]
            if donors is not None:
                out = out | (image_ids[:, None] == gather_rows(donors)[None])
            logits = torch.cat([logits, harder.masked_fill(out, -torch.inf)], 1)
        total = total + functional.cross_entropy(logits, own)
    return total


def cosine_loss(image: Tensor, text: Tensor, image_ids: Tensor) -> Tensor:
    """The ablation "w/o contrastive", pairwise cosine: 1 - cosine of each pair, plus the mean positive cosine of all other pairs.

    The paper says no more than "pairwise cosine similarity"; pairs alone would make all embeddings one. Arguments as above.
    """
    cosine = text @ GatherRows.apply(image).T
    own = torch.arange(len(image), device=image.device) + len(image) * _rank()
    others = image_ids[:, None] != gather_rows(image_ids)[None]
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    apart = (cosine.clamp(min=0) * others).sum() / (sum_over_ranks(others.sum()) / world).clamp(min=1)
    return (1 - cosine.gather(1, own[:, None])).mean() + apart


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


class VLDeformerTask(RetrievalTask):
    """Decomposing: the whole model learns, by contrast alone."""

    def __init__(self, recipe: FinetuneRecipe) -> None:
        super().__init__()
        start = load_model(recipe.checkpoint, image_size=recipe.image_size)
        need_fusion(start.network.config, start.folder)
        self.recipe, config = recipe, recipe.vldeformer
        self.tokenizer, self.image_size = start.tokenizer, start.network.config.image.image_size
        network = start.network.requires_grad_(True)
        torch.manual_seed(recipe.training.seed)  # what is new starts the same on every rank
        if config.start == "unpretrained":
            network = AlignmentModel(network.config, self.tokenizer.vocabulary)
            told, sources = start.folder / "config.yaml", (network.config.image.weights, network.config.text.weights)
            if "none" in sources and not told.is_file():
                raise RecipeError(
                    f"vldeformer.start is unpretrained, but {start.folder} (an export or import) does not say what pretraining began from; "
                    "give the run's own checkpoint"
                )
            load_starting_weights(network)
            if told.is_file() and (begun := load_recipe(PretrainRecipe, told).checkpoint):
                raise RecipeError(
                    f"vldeformer.start is unpretrained, but {start.folder} began from {begun}, not from nothing; take that apart instead"
                )
        negatives, lexicon = config.negatives, ""
        guided = config.loss == "contrastive" and negatives.image and negatives.attended
        # It knows where nouns are in a picture; as it is before joint layers are made anew, which is not that ablation's question.
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
        before = {
            "unpretrained": "its sizes alone, not its weights",
            "fresh_joint": f"{start.training}, joint layers anew",
        }
        self.about = f"{self.model.name} of {start.folder} ({before.get(config.start, start.training)}){lexicon}"

    def forward(self, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        config, mask = self.recipe.vldeformer, batch.text.mask
        image, text = self.model.encode_image(batch.images), self.model.encode_text(batch.text.ids, mask)
        figures: dict[str, Tensor] = {}
        if config.loss == "cosine":
            with torch.autocast(image.device.type, enabled=False):
                loss = cosine_loss(image, text, batch.image_ids)
        else:
            altered: dict[str, Tensor] = {}
            if self.captions and config.negatives.text:
                ids, new_mask, usable = self.captions(
                    batch.text.ids, mask, self._numbers(batch, WORDS, self.captions.numbers_per_caption)
                )
                altered |= {"altered_text": self.model.encode_text(ids, new_mask), "usable_text": usable}
                figures["unaltered_captions"] = (~usable).float().mean()
            if self.captions and config.negatives.image:
                pixels, usable, donors = self._altered_images(batch)
                altered |= {
                    "altered_image": self.model.encode_image(pixels),
                    "usable_image": usable,
                    "donor_ids": donors,
                }
            with torch.autocast(image.device.type, enabled=False):  # bf16 cannot hold a cosine divided by 0.005
                loss = contrastive_loss(image, text, batch.image_ids, config.temperature, **altered)
            figures |= margins(image.detach(), text.detach(), altered)
        return loss, {"loss": loss.detach(), config.loss: loss.detach(), **figures}

    @torch.no_grad()
    def _altered_images(self, batch: MicroBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Images with patches of others of the micro-batch; (batch,) bool, where there is another image to take from; its id."""
        negatives = self.recipe.vldeformer.negatives
        side = self.image_size // self.model.image_encoder.vit.patch_embed.patch_size[0]
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
        """(batch, count) uniform numbers that belong to the samples."""
        assert batch.positions is not None
        return uniforms(derived_seed(self.recipe.training.seed, purpose), batch.positions.cpu().numpy(), count)

    def layers(self) -> list[nn.Module]:
        return [*self.model.image_encoder.vit.blocks, *self.model.text_encoder.layers, *self.model.joint.layers]

    def stored(self) -> dict[str, Tensor]:
        return self.model.state_dict()

    def describe(self, training: str) -> dict[str, Any]:
        return {
            "head": "vldeformer",
            "vldeformer": dataclasses.asdict(self.recipe.vldeformer),
            "model": dataclasses.asdict(self.source),
            "caption_tokens": self.tokenizer.caption_tokens,
            "training": training,
        }

    def similarity(
        self, collection: Collection, ranks: Ranks, device: torch.device, batch_size: int, workers: int
    ) -> np.ndarray:
        image, text = encode_decomposed(self.model, self.tokenizer, collection, ranks, device, batch_size, workers)
        return (image @ text.T).numpy()


def margins(image: Tensor, text: Tensor, altered: dict[str, Tensor]) -> dict[str, Tensor]:
    """How hard the altered samples are: the share of anchors that are nearer to their own altered partner than to the true one."""
    matched, figures = (image * text).sum(-1), {}
    for name, anchor in (("text", image), ("image", text)):
        if f"altered_{name}" in altered:
            nearer = (anchor * altered[f"altered_{name}"].detach()).sum(-1) >= matched
            usable = altered[f"usable_{name}"]
            figures[f"fooled_by_altered_{name}"] = (nearer & usable).sum() / usable.sum().clamp(min=1)
    return figures
