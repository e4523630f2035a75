"""Text positions of trained weights, stretched to longer captions as in Long-CLIP (Zhang et al. 2024, section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor

KEPT = 20
"""First positions that stay as they are: captions of the usual length trained them well."""


def stretch_positions(embeddings: Tensor, positions: int) -> Tensor:
    """Stretch position embeddings to more positions.

    The first `KEPT` stay. The others are spread evenly over the new ones and interpolated linearly; the last step is continued beyond
    the last of them. 77 positions become 248, four for one, by Long-CLIP's rule.

    Args:
        embeddings: (trained positions, width), more than `KEPT` of them.
        positions: more than there are.

    Returns:
        (positions, width)
    """
    trained = len(embeddings)
    assert positions > trained > KEPT + 1, "there is something to stretch"
    steps = torch.arange(positions - KEPT, dtype=torch.float64) * (trained - KEPT) / (positions - KEPT) + KEPT
    low = steps.floor().long().clamp(max=trained - 2)
    share = (steps - low)[:, None]
    exact = embeddings.double().cpu()
    stretched = exact[low] * (1 - share) + exact[low + 1] * share
    return torch.cat([exact[:KEPT], stretched]).to(embeddings)
