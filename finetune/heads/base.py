"""What fine-tuning trains: a model and its loss in one object. `train.py` drives any of them; a head is one subclass."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data_tools.in_order.collection import Collection
from data_tools.tokenizer import CaptionTokenizer
from finetune.config import FinetuneRecipe
from pretrain.objectives.state import MicroBatch
from runtime.ranks import Ranks


class RetrievalTask(nn.Module):
    """A head with its encoders, as the loop trains it, saves it and measures it."""

    tokenizer: CaptionTokenizer
    image_size: int
    about: str
    """What is trained and where it started, for the first line of a run."""
    partial = False
    """Whether some step may leave parameters that learn without a gradient (a frozen phase, say)."""

    frozen = ""
    """Hash of a checkpoint whose model is used as it is beside what learns, so that a resumed run must find the same."""

    def forward(self, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """-> the loss of the global batch (the same on every rank after averaging), and its figures, `loss` among them."""
        raise NotImplementedError

    def layers(self) -> list[nn.Module]:
        """The transformer layers that learn, for `training.checkpoint_activations`."""
        raise NotImplementedError

    def begin_step(self, epoch: float) -> None:
        """Called before each step with the epochs consumed so far: a schedule is a function of this alone, so that a resumed
        run follows it."""

    def lr_share(self, name: str) -> float:
        """A parameter's share of the learning rate; `name` as in `named_parameters()` of the task."""
        return 1.0

    def stored(self) -> dict[str, Tensor]:
        """The checkpoint's `model.safetensors`: live tensors, which a resumed run copies into."""
        raise NotImplementedError

    def caveat(self, epochs: float) -> str:
        """What a run of so many epochs will not do, though one might expect it."""
        return ""

    def describe(self, training: str) -> dict[str, Any]:
        """The checkpoint's `model.json`; `training` is `fine-tuned-on X`."""
        raise NotImplementedError

    def similarity(
        self, collection: Collection, ranks: Ranks, device: torch.device, batch_size: int, workers: int
    ) -> np.ndarray:
        """The score of every image with every caption, (images, captions): what validation ranks by."""
        raise NotImplementedError

    def extra_figures(self) -> dict[str, Tensor]:
        """Figures of the model itself, logged with each step."""
        return {}


def make_task(recipe: FinetuneRecipe) -> RetrievalTask:
    """The task that a recipe asks for, on the CPU, its starting weights loaded."""
    if recipe.head == "hat":
        from finetune.heads.hat import HatTask

        return HatTask(recipe)
    if recipe.head == "vldeformer":
        from finetune.heads.vldeformer import VLDeformerTask

        return VLDeformerTask(recipe)
    from finetune.heads.dual import DualTask

    return DualTask(recipe)
