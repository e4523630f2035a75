"""Which checkpoints give one vector an image and one a text, and so can be searched by."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from finetune.heads.decomposed import LoadedVLDeformer
from pretrain.weights.load import ImageTextModel, find_checkpoint, load_model
from runtime.errors import CheckpointError
from runtime.files import read_json

Encoder = ImageTextModel | LoadedVLDeformer
LOADERS: dict[str, Callable[[Path, Any], Encoder]] = {"dual": load_model, "vldeformer": LoadedVLDeformer}
"""By the kind of head that a checkpoint's model.json names."""


def load_encoder(source: str | Path, device: str | torch.device = "cpu") -> Encoder:
    """The encoder of a run or checkpoint. Raises CheckpointError for one whose head scores pairs only."""
    folder = find_checkpoint(source)
    head = read_json(folder / "model.json").get("head", "dual")
    if head not in LOADERS:
        told = "compares the tokens of every pair: an image has no vector of its own" if head == "hat" else "is unknown"
        raise CheckpointError(
            f"{folder} holds a {head} head, which {told}; index with a {' or '.join(LOADERS)} checkpoint (HAT re-ranks the "
            "shortlists of one: `ligature evaluate --shortlist_from`)"
        )
    return LOADERS[head](folder, device)
