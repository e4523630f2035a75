"""The fusion head: the dual head's shortlist, re-ranked by the matching head (ALBEF section 5.1; its `k_test`)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pretrain.encode import Encodings
from pretrain.model.alignment_model import AlignmentModel
from retrieval.metrics import rerank
from runtime.progress import progress

PAIRS = 512
"""Pairs that go through the fusion encoder at once."""


@torch.no_grad()
def match_pairs(
    model: AlignmentModel, encodings: Encodings, image: Tensor, text: Tensor, device: torch.device
) -> Tensor:
    """Matching logits (match minus no match) of pairs: image and text are (pairs,) numbers of images and captions -> (pairs,).

    The logit, not the probability: a saturated softmax would make ties.
    """
    assert encodings.image_tokens is not None and encodings.text_states is not None and encodings.text_mask is not None
    images, rows = image.unique(return_inverse=True)
    mask = encodings.text_mask[text]
    words = int(mask.sum(-1).max())
    read = model.fusion_encoder.read_images(encodings.image_tokens[images].to(device))
    states = encodings.text_states[text, :words].to(device)
    fused = model.fusion_encoder(states, mask[:, :words].to(device), read, rows.to(device))
    logits = model.matching_logits(fused)
    return (logits[:, 1] - logits[:, 0]).cpu()


def fusion_scores(
    model: AlignmentModel, encodings: Encodings, similarity: np.ndarray, shortlist: int, device: torch.device
) -> tuple[np.ndarray, np.ndarray]:
    """Re-rank each query's `shortlist` best candidates by the dual head; a gallery smaller than the shortlist is taken whole.

    similarity: (images, captions), the dual head's. -> image-to-text (images, captions) and text-to-image (captions, images).
    """
    directions = []
    sizes = [min(shortlist, similarity.shape[1]), min(shortlist, similarity.shape[0])]
    total = similarity.shape[0] * sizes[0] + similarity.shape[1] * sizes[1]
    with progress("re-ranking", total, "pairs") as bar:
        for scores, size, by_image in ((similarity, sizes[0], True), (similarity.T, sizes[1], False)):
            best = np.argpartition(-scores, size - 1, axis=1)[:, :size]
            found = np.empty(best.shape, dtype=np.float32)
            step = max(1, PAIRS // size)
            for start in range(0, len(scores), step):
                candidates = torch.from_numpy(best[start : start + step].copy())
                queries = torch.arange(start, start + len(candidates))[:, None].expand_as(candidates)
                image, text = (queries, candidates) if by_image else (candidates, queries)
                logits = match_pairs(model, encodings, image.flatten(), text.flatten(), device)
                found[start : start + step] = logits.view(candidates.shape).numpy()
                bar.advance(candidates.numel())
            directions.append(rerank(scores, best, found))
    return directions[0], directions[1]
