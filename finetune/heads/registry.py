"""The table of heads: where each head's code is, by the name that recipes and `model.json` give the head.

To add a head:

1. Copy `finetune/heads/dual.py`, the shortest one: a task, its loss, and the function that scores a checkpoint.
2. Give it a config dataclass in `finetune/heads/config.py`, and `FinetuneRecipe` a field of that type.
3. Add its line to `HEADS`, and its name to `TrainedHead` and `ScoredHead` below.
4. Add its recipe to `configs/finetune/` and its test to `tests/finetune/heads/`.

This module imports no torch: a head's own modules load when the head is first used.

Tested in tests/finetune/heads/test_head_registry.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

TrainedHead = Literal["dual", "hat", "vldeformer"]
"""What a fine-tuning recipe's `head` may be."""
ScoredHead = Literal["dual", "fusion", "hat", "vldeformer"]
"""What an evaluation recipe's `heads` may hold."""


@dataclass(frozen=True)
class Head:
    """Where the parts of one head are, each as `module:name`; empty where a head has no such part."""

    task: str = ""
    """The subclass of `HeadTask` that fine-tuning trains. Called with a `FinetuneRecipe`."""
    scorer: str = ""
    """Scores a checkpoint of this kind: (EvaluateRecipe, Collection, Workload) -> one `Scored` a head."""
    encoder: str = ""
    """Loads a checkpoint that gives each image and each caption one vector: (folder, device) -> `Encoder`."""
    first_stage: str = ""
    """Scores a collection for another head's shortlists: (folder, Collection, Workload) -> `FirstStage`."""


HEADS = {
    "dual": Head(
        task="finetune.heads.dual:DualTask",
        scorer="finetune.heads.dual:score_dual",
        encoder="pretrain.weights.load:load_model",
        first_stage="finetune.heads.dual:dual_first_stage",
    ),
    # It shares the dual head's task and checkpoint. The dual head's scorer calls `score_fusion`.
    "fusion": Head(),
    "hat": Head(task="finetune.heads.hat:HatTask", scorer="finetune.heads.hat:score_hat"),
    "vldeformer": Head(
        task="finetune.heads.vldeformer:VLDeformerTask",
        scorer="finetune.heads.vldeformer:score_vldeformer",
        encoder="finetune.heads.decomposed:LoadedVLDeformer",
        first_stage="finetune.heads.vldeformer:vldeformer_first_stage",
    ),
}
"""The heads by name."""

DEFAULT = "dual"
"""The head of a checkpoint if its `model.json` names none."""


def names_with(part: str) -> list[str]:
    """Return the names of the heads that have a part: `task`, `scorer`, `encoder` or `first_stage`."""
    return [name for name, head in HEADS.items() if getattr(head, part)]


def load_part(name: str, part: str) -> Any:
    """Import one part of a head.

    Args:
        name: a key of `HEADS`.
        part: `task`, `scorer`, `encoder` or `first_stage`; the head must have it.

    Returns:
        The class or function.
    """
    module, _, attribute = getattr(HEADS[name], part).partition(":")
    return getattr(import_module(module), attribute)
