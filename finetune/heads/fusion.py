"""The fusion head: the dual head's shortlist, re-ranked by the matching head (ALBEF section 5.1; its `k_test`)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from finetune.shortlist import Shortlists
from pretrain.encode import Encodings, gather_shares, rank_share
from pretrain.model.alignment_model import AlignmentModel
from runtime.progress import progress
from runtime.ranks import Ranks

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
    read = model.fusion_encoder.prepare_images(encodings.image_tokens[images].to(device))
    states = encodings.text_states[text, :words].to(device)
    logits = model.match(states, mask[:, :words].to(device), read, rows.to(device))
    return (logits[:, 1] - logits[:, 0]).cpu()


def fusion_scores(
    model: AlignmentModel, encodings: Encodings, lists: Shortlists, ranks: Ranks, device: torch.device
) -> tuple[np.ndarray, np.ndarray]:
    """Matching logits of the shortlists' pairs: each image's captions (images, k) and each caption's images (captions, k).

    The ranks share the work, in whole runs of pairs: the same bits whatever their number.
    """
    assert encodings.text_mask is not None
    shortest = encodings.text_mask.sum(1).argsort().numpy()  # captions of a length go together: little padding
    image, place = np.nonzero(lists.wanted()[:, shortest])
    text = shortest[place]
    scores = np.empty((len(lists.captions), len(lists.images)), dtype=np.float32)
    logits, own = list[Tensor](), rank_share(len(image), PAIRS, ranks)
    with progress("re-ranking", len(image), "pairs", silent=not ranks.first) as bar:
        for start in range(own.start, own.stop, PAIRS):
            run = slice(start, min(start + PAIRS, own.stop))
            pairs = torch.from_numpy(image[run]), torch.from_numpy(text[run])
            logits.append(match_pairs(model, encodings, *pairs, device))
            bar.advance(len(logits[-1]) * ranks.world)
    scores[image, text] = gather_shares(logits, len(image), PAIRS, (), device).numpy()
    return lists.of(scores)
