"""A few inputs on which an export is compared with the model that it came from.

Tested in tests/finetune/export/test_export.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from finetune.export.source import Source
from runtime.errors import CheckpointError


def probe(source: Source) -> tuple[Tensor, Tensor, Tensor]:
    """Return two random images (2, 3, size, size) uint8, and ids and mask (2, words) of two captions of different lengths."""
    generator = torch.Generator().manual_seed(0)
    side, tokens = source.config.image.image_size, source.tokenizer
    pixels = torch.randint(0, 256, (2, 3, side, side), generator=generator, dtype=torch.uint8)
    words = max(3, min(8, tokens.caption_tokens))
    ids = torch.randint(5, tokens.vocabulary, (2, words), generator=generator)
    mask = torch.arange(words) < torch.tensor([[words], [3]])
    ids[:, 0] = tokens.cls
    return pixels, torch.where(mask, ids, tokens.pad), mask


def compare(expected: Tensor, actual: Tensor, library: str, what: str, tolerance: float = 1e-4) -> None:
    """Raise CheckpointError unless two outputs agree; it names the other library and the output."""
    error = float((expected - actual).abs().max())
    if not error <= tolerance:  # NaN too
        raise CheckpointError(
            f"{library} makes other {what} of this export (they differ by {error:.2g}), so nothing was written; this architecture "
            "cannot be exported to that format"
        )
