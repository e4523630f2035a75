"""Pretraining: the model, its objectives, teacher and engine. `from pretrain import load_model` loads a model."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pretrain.weights.load import ImageTextModel as ImageTextModel
    from pretrain.weights.load import load_model as load_model

_HOMES = {"load_model": "pretrain.weights.load", "ImageTextModel": "pretrain.weights.load"}


def __getattr__(name: str) -> Any:
    """Load a name on first use (PEP 562), so that importing the package does not import torch."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
