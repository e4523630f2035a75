"""The fusion head: the dual head's shortlist, re-ranked by the matching head (ALBEF section 5.1; its `k_test`)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from finetune.shortlist import Shortlists
from pretrain.encode import Encodings
from pretrain.model.alignment_model import AlignmentModel
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
    model: AlignmentModel, encodings: Encodings, lists: Shortlists, device: torch.device
) -> tuple[np.ndarray, np.ndarray]:
    """Matching logits of the shortlists' pairs: each image's captions (images, k) and each caption's images (captions, k)."""
    found: list[np.ndarray] = []
    with progress("re-ranking", lists.captions.size + lists.images.size, "pairs") as bar:
        for best, by_image in ((lists.captions, True), (lists.images, False)):
            logits = np.empty(best.shape, dtype=np.float32)
            step = max(1, PAIRS // best.shape[1])
            for start in range(0, len(best), step):
                candidates = torch.from_numpy(best[start : start + step].copy())
                queries = torch.arange(start, start + len(candidates))[:, None].expand_as(candidates)
                image, text = (queries, candidates) if by_image else (candidates, queries)
                scored = match_pairs(model, encodings, image.flatten(), text.flatten(), device)
                logits[start : start + step] = scored.view(candidates.shape).numpy()
                bar.advance(candidates.numel())
            found.append(logits)
    return found[0], found[1]
