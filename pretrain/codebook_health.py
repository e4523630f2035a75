"""Whether a codebook has formed: how near held-out features lie to its codewords, beside what k-means finds in the same features.

A codebook that has formed covers the features about as well as as many k-means centres do, spreads over them, and gives an image and its
caption the same codeword. One that has not lies elsewhere: then random codewords are as near, and its targets say nothing of content.

Tested in tests/pretrain/test_codebook_health.py.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from pretrain.objectives.codebook import usage_figures

FEATURES_PER_CENTRE = 4
"""Features for each codeword below which k-means is no measure: with few, its centres are the features themselves."""
ROUNDS = 10
FORMED = {"of k-means": 0.9, "perplexity": 0.5, "kept": 0.8}
"""What a formed codebook reaches: its nearest cosine as a share of k-means', perplexity as a share of the codewords, and the share of
samples that keep their codeword from one validation to the next."""


class CodebookHealth:
    """Measures a codebook at each validation of a run, and remembers the codewords of the last one."""

    def __init__(self) -> None:
        self._previous: Tensor | None = None

    def measure(self, image: Tensor, text: Tensor, caption_image: Tensor, codewords: Tensor) -> dict[str, float]:
        """Return figures by name.

        Args:
            image: unit-norm image features as they meet the codewords, (images, feature_dim), on the CPU.
            text: likewise of captions, (captions, feature_dim).
            caption_image: (captions,) int64, the image of each caption.
            codewords: unit-norm (codewords, feature_dim).
        """
        features, count = torch.cat([image, text]), len(codewords)
        nearest = (features @ codewords.T).max(-1)
        codes = nearest.indices
        image_codes, text_codes = codes[: len(image)], codes[len(image) :]
        usage = usage_figures(torch.bincount(codes, minlength=count))
        random = torch.randn(codewords.shape, generator=torch.Generator().manual_seed(0))
        centre, middle = features.mean(0), codewords.mean(0)
        figures = {
            "codebook_nearest": float(nearest.values.mean()),
            "codebook_nearest_random": float((features @ functional.normalize(random, dim=-1).T).amax(-1).mean()),
            "codebook_perplexity": float(usage["codebook/perplexity"]),
            "codebook_agreement": 100 * float((image_codes[caption_image] == text_codes).float().mean()),
            "codebook_feature_cone": float(centre.square().sum()),
            "codebook_codeword_cone": float(middle.square().sum()),
            "codebook_cones_cosine": float(functional.cosine_similarity(centre, middle, dim=0)),
        }
        if len(features) >= FEATURES_PER_CENTRE * count:
            figures["codebook_nearest_kmeans"] = float((features @ spherical_kmeans(features, count).T).amax(-1).mean())
        if self._previous is not None and len(self._previous) == len(codes):
            figures["codebook_kept"] = 100 * float((codes == self._previous).float().mean())
        self._previous = codes
        if {"codebook_nearest_kmeans", "codebook_kept"} <= figures.keys():
            figures["codebook_formed"] = float(has_formed(figures, count))
        return figures


def has_formed(figures: dict[str, float], codewords: int) -> bool:
    """Return whether a validation's figures are those of a formed codebook (`FORMED`)."""
    return (
        figures["codebook_nearest"] >= FORMED["of k-means"] * figures["codebook_nearest_kmeans"]
        and figures["codebook_perplexity"] >= FORMED["perplexity"] * codewords
        and figures["codebook_kept"] >= 100 * FORMED["kept"]
    )


def warning(figures: dict[str, float]) -> str | None:
    """Return a line to tell the user where a codebook is no better than random codewords, else None."""
    nearest, random = figures["codebook_nearest"], figures["codebook_nearest_random"]
    if nearest > random:
        return None
    return (
        f"the codebook has not formed: held-out features have cosine {nearest:.2f} to their nearest codeword, {random:.2f} to random "
        "ones; try model.codebook_update average and model.codebook_centered true (docs/codis.md)"
    )


def spherical_kmeans(features: Tensor, count: int, seed: int = 0) -> Tensor:
    """Return `count` unit-norm centres of unit-norm features (n, feature_dim): Lloyd's rounds from a start by k-means++."""
    random = torch.Generator().manual_seed(seed)
    chosen = [int(torch.randint(len(features), (1,), generator=random))]
    distance = torch.full((len(features),), 2.0)  # 1 - cosine, half of the squared distance that k-means++ draws by
    for _ in range(count - 1):
        distance = torch.minimum(distance, 1 - features @ features[chosen[-1]])
        weight = distance.clamp(min=0) + 1e-12
        chosen.append(int(torch.searchsorted(weight.cumsum(0), weight.sum() * torch.rand(1, generator=random))[0]))
    centres = features[torch.tensor(chosen).clamp(max=len(features) - 1)]
    for _ in range(ROUNDS):
        nearest = (features @ centres.T).max(-1)
        sums = torch.zeros_like(centres).index_add_(0, nearest.indices, features)
        empty = torch.bincount(nearest.indices, minlength=count) == 0
        sums[empty] = features[
            nearest.values.argsort()[: int(empty.sum())]
        ]  # an empty centre moves to a feature far from all
        centres = functional.normalize(sums, dim=-1)
    return centres
