"""Which checkpoints give one vector an image and one a text, and so can be searched by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from data_tools.tokenizer import CaptionTokenizer
from pretrain.load import find_checkpoint, load_model
from runtime.errors import CheckpointError
from runtime.files import read_json


class Encoder(Protocol):
    """What `load_encoder` gives: `pretrain.load.ImageTextModel`, and heads that decompose a pair into two encodings."""

    tokenizer: CaptionTokenizer
    folder: Path
    training: str
    transform: Callable
    """A PIL image -> (3, size, size) uint8."""

    @property
    def hash(self) -> str: ...
    def encode_image(self, images: Tensor) -> Tensor: ...
    def encode_text(self, texts: Sequence[str]) -> Tensor: ...


def load_encoder(source: str | Path, device: str | torch.device = "cpu") -> Encoder:
    """The encoder of a run or checkpoint. Raises CheckpointError for one whose head scores pairs only."""
    folder = find_checkpoint(source)
    head = head_of(folder)
    if head not in LOADERS:
        told = (
            "compares the tokens of every pair, so an image has no vector of its own" if head == "hat" else "is unknown"
        )
        raise CheckpointError(
            f"{folder} holds a {head} head, which {told}; index with a {' or '.join(LOADERS)} checkpoint (and re-rank its "
            "shortlists by HAT: `ligature evaluate --shortlist_from`)"
        )
    return LOADERS[head](folder, device)


def head_of(folder: Path) -> str:
    return read_json(folder / "model.json").get("head", "dual")


LOADERS: dict[str, Callable[[Path, Any], Encoder]] = {"dual": load_model}  # type: ignore[dict-item]
"""By the kind of head that a checkpoint's model.json names."""
