"""The fusion head: the matching head re-ranks the dual head's shortlist (ALBEF, section 5.1; its `k_test`)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from finetune.config import EvaluateRecipe
from finetune.heads.base import Scored, Workload
from finetune.shortlist import FirstStage, Shortlists, make_shortlists
from pretrain.encode import Encodings, gather_shares, rank_share
from pretrain.model.alignment_model import AlignmentModel
from pretrain.weights.load import ImageTextModel
from retrieval.protocols import folds_of
from runtime.progress import progress
from runtime.ranks import Ranks

PAIRS = 512
"""Pairs that go through the fusion encoder at once."""


@torch.no_grad()
def match_pairs(
    model: AlignmentModel, encodings: Encodings, image: Tensor, text: Tensor, device: torch.device
) -> Tensor:
    """Return the matching logit (match minus no match) of each pair.

    It is the logit, not the probability: a saturated softmax would make ties.

    Args:
        model: an alignment model with a fusion encoder, on `device`.
        encodings: of the collection, tokens included.
        image: (pairs,) numbers of images.
        text: (pairs,) numbers of captions.
        device: where the fusion encoder runs.

    Returns:
        (pairs,), on the CPU.
    """
    assert encodings.image_tokens is not None and encodings.text_states is not None and encodings.text_mask is not None
    images, image_rows = image.unique(return_inverse=True)
    mask = encodings.text_mask[text]
    longest = int(mask.sum(-1).max())
    prepared_images = model.fusion_encoder.prepare_images(encodings.image_tokens[images].to(device))
    states = encodings.text_states[text, :longest].to(device)
    logits = model.match(states, mask[:, :longest].to(device), prepared_images, image_rows.to(device))
    return (logits[:, 1] - logits[:, 0]).cpu()


def fusion_scores(
    model: AlignmentModel, encodings: Encodings, lists: Shortlists, ranks: Ranks, device: torch.device
) -> tuple[np.ndarray, np.ndarray]:
    """Return the matching logits of the shortlists' pairs, each pair computed once.

    The ranks share the work in whole blocks of pairs, so the scores are the same bits for any number of ranks.

    Returns:
        Each image's captions, (images, k), and each caption's images, (captions, k).
    """
    assert encodings.text_mask is not None
    # Captions of like length go together, so that hardly any of a block is padding.
    by_length = encodings.text_mask.sum(1).argsort().numpy()
    image, position = np.nonzero(lists.pairs()[:, by_length])
    text = by_length[position]
    scores = np.empty((len(lists.captions), len(lists.images)), dtype=np.float32)
    logits, own_pairs = list[Tensor](), rank_share(len(image), PAIRS, ranks)
    with progress("re-ranking", len(image), "pairs", silent=not ranks.first) as bar:
        for start in range(own_pairs.start, own_pairs.stop, PAIRS):
            block = slice(start, min(start + PAIRS, own_pairs.stop))
            pairs = torch.from_numpy(image[block]), torch.from_numpy(text[block])
            logits.append(match_pairs(model, encodings, *pairs, device))
            bar.advance(len(logits[-1]) * ranks.world)
    scores[image, text] = gather_shares(logits, len(image), PAIRS, (), device).numpy()
    return lists.take(scores)


def score_fusion(
    recipe: EvaluateRecipe,
    model: ImageTextModel,
    encodings: Encodings,
    first_stage: FirstStage,
    size: int,
    caption_image: np.ndarray,
    work: Workload,
) -> Scored:
    """Re-rank the first stage's shortlists by matching.

    Args:
        recipe: names the protocol; the lists stay within its folds.
        model: an alignment model with a fusion encoder.
        encodings: of the collection by this model, tokens included.
        first_stage: the scores that choose the lists.
        size: candidates a query; as many as there are captions scores all pairs.
        caption_image: (captions,) the image of each caption.
        work: the ranks and the device.
    """
    folds = folds_of(recipe.protocol, len(encodings.image))
    lists = make_shortlists(first_stage.similarity, size, folds, caption_image)
    list_scores = fusion_scores(model.network, encodings, lists, work.ranks, work.device)
    image_to_text, text_to_image = lists.rerank(first_stage.similarity, list_scores)
    whole = size >= len(caption_image)
    name = "fusion of all pairs" if whole else f"fusion of the best {recipe.shortlist}"
    details = {"shortlist": lists.ceiling(caption_image) | first_stage.details}
    return Scored("fusion", name, image_to_text, text_to_image, model.hash, model.training, details)
