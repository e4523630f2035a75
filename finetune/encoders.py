"""The checkpoints that give each image and each text one vector, and so can be searched.

Tested in tests/finetune/search/test_query.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from data_tools.tokenizer import CaptionTokenizer
from finetune.heads.registry import DEFAULT, HEADS, load_part, names_with
from pretrain.weights.load import Images, Texts, find_checkpoint
from runtime.errors import CheckpointError
from runtime.files import read_json


class Encoder(Protocol):
    """A model that encodes images and texts apart; `ImageTextModel` and `LoadedVLDeformer` are ones."""

    tokenizer: CaptionTokenizer
    folder: Path
    device: torch.device
    training: str
    """`pretrained` or `fine-tuned-on X`."""
    transform: Callable[[Any], Tensor]
    """Turns a PIL image into (3, size, size) uint8."""

    @property
    def hash(self) -> str:
        """Hash of the checkpoint's content."""

    def encode_image(self, images: Images) -> Tensor:
        """Return unit-norm vectors, (batch, width); images: (batch, 3, size, size) uint8, or PIL images."""

    def encode_text(self, texts: Texts) -> Tensor:
        """Return unit-norm vectors of strings, (batch, width)."""


def load_encoder(source: str | Path, device: str | torch.device = "cpu") -> Encoder:
    """Load the encoder of a run or checkpoint.

    Args:
        source: a run's folder (its best checkpoint, else its latest) or a checkpoint's.
        device: where the model goes.

    Raises:
        CheckpointError: the checkpoint's head only scores pairs, or is unknown.
    """
    folder = find_checkpoint(source)
    head = read_json(folder / "model.json").get("head", DEFAULT)
    able = names_with("encoder")
    if head not in able:
        reason = "scores pairs only: an image has no vector of its own" if head in HEADS else "is unknown"
        raise CheckpointError(
            f"{folder} holds a {head} head, which {reason}; index with a {' or '.join(able)} checkpoint (the other heads "
            "re-rank the shortlists of one: `ligature evaluate --shortlist_from`)"
        )
    return load_part(head, "encoder")(folder, device)
