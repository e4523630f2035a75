"""Starting weights of a published image encoder, whole or not at all.

- A timm tower: timm's own, or a file of the same architecture under timm's or under other names.
- A transformers tower: a folder of that library, of the encoder alone or of a dual encoder.
"""

from __future__ import annotations

import sys
from typing import Any

import timm
import torch
from timm.models import load_state_dict
from torch import Tensor, nn

from pretrain.model.config import ImageEncoderConfig
from pretrain.model.timm_tower import TimmTower
from pretrain.model.transformers_tower import TransformersTower
from pretrain.weights.architecture import published_folder, quiet
from pretrain.weights.packages import weights_file
from runtime.errors import CheckpointError

CLASSIFIERS = ("head.", "head_dist.", "fc.", "fc_norm.", "classifier.", "pre_logits.", "attn_pool.", "head_drop.")
"""How names begin that belong to a classifier or a pooling which the tower does not have."""
COUNTER = "num_batches_tracked"
"""A batch norm's counter, which a frozen one does not have."""


def load_tower_weights(tower: TimmTower, config: ImageEncoderConfig) -> list[str]:
    """Start a tower from `model.image.weights`.

    Returns:
        Names in the source that were not used: its classifier.

    Raises:
        CheckpointError: A tensor of the tower is missing there or has another shape, or nothing can be read.
    """
    source = weights_file(config.weights, "model.image.weights")
    try:
        if source == "timm":
            stored = timm.create_model(config.architecture, pretrained=True, **config.arguments).state_dict()
        else:
            stored = dict(load_state_dict(source))
        own = tower.vit.state_dict()
        stored = {name: tensor for name, tensor in stored.items() if not name.endswith(COUNTER)}
        if stored.keys().isdisjoint(own) and (renamed := rename_by_order(stored, own)):
            stored = renamed
        elif (adapt := getattr(_module_of(tower.vit), "checkpoint_filter_fn", None)) is not None:
            stored = adapt(stored, tower.vit)
        unused = sorted(name for name in stored if name not in own)
        missing = sorted(own.keys() - stored.keys())
        if missing:
            raise CheckpointError(f"it lacks {missing[0]} and {len(missing) - 1} more tensors of {config.architecture}")
        if strange := [name for name in unused if not name.startswith(CLASSIFIERS)]:
            raise CheckpointError(
                f"it holds {strange[0]} and {len(strange) - 1} more tensors that {config.architecture} has no place for"
            )
        tower.vit.load_state_dict({name: stored[name] for name in own})
    except Exception as error:  # a download or a foreign file fails in many ways: all of them stop the run
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"model.image.weights: cannot load `{source}` into {config.architecture} ({reason}); without network, give a file"
        ) from error
    return unused


def load_transformers_weights(tower: TransformersTower, config: ImageEncoderConfig) -> list[str]:
    """Start a tower from the folder, the hub's name or the package in `model.image.weights`.

    Returns:
        Names in the source that were not used: a classifier, a text encoder, projections.

    Raises:
        CheckpointError: A tensor of the tower is missing there or has another shape, or nothing can be read.
    """
    source = published_folder(config.weights, "model.image.weights")
    try:
        with quiet():
            loaded, report = type(tower.vit).from_pretrained(
                source,
                config=tower.vit.config,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                dtype=torch.float32,
            )
    except Exception as error:  # a download or a foreign file fails in many ways: all of them stop the run
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"model.image.weights: cannot load `{source}` into {tower.architecture} ({reason}); without network, give a folder"
        ) from error
    own, stored = tower.vit.state_dict(), loaded.state_dict()
    where = f"model.image.weights: {config.weights}"
    if missing := sorted(own.keys() & report["missing_keys"]):
        raise CheckpointError(f"{where} lacks {missing[0]} and {len(missing) - 1} more tensors of {tower.architecture}")
    if mismatched := sorted(entry for entry in report["mismatched_keys"] if entry[0] in own):
        name, theirs, ours = mismatched[0]
        raise CheckpointError(
            f"{where}: {name} is {tuple(theirs)}, {tower.architecture} of the recipe has {tuple(ours)}"
        )
    unused = sorted(report["unexpected_keys"] | (stored.keys() - own.keys() - report["missing_keys"]))
    parts = {name for name, _ in tower.vit.named_children()}
    if strange := [name for name in unused if name.split(".")[0] in parts and not name.endswith("mask_token")]:
        raise CheckpointError(
            f"{where} holds {strange[0]} and {len(strange) - 1} more tensors that {tower.architecture} of the recipe has no place for"
        )
    tower.vit.load_state_dict({name: stored[name] for name in own})
    return unused


def rename_by_order(stored: dict[str, Tensor], own: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """Rename the tensors of a file that has timm's order but other names.

    Args:
        stored: The file's tensors, the classifier's last.
        own: The tower's tensors.

    Returns:
        The same tensors under `own`'s names, and the rest under `classifier.`; None where shapes do not agree one by one.
    """
    pairs = list(zip(own.items(), stored.items(), strict=False))
    if len(pairs) < len(own) or any(mine.shape != theirs.shape for (_, mine), (_, theirs) in pairs):
        return None
    renamed = {name: theirs for (name, _), (_, theirs) in pairs}
    rest = list(stored.items())[len(own) :]
    return renamed | {f"classifier.{name}": tensor for name, tensor in rest}


def _module_of(model: nn.Module) -> Any:
    return sys.modules[type(model).__module__]
