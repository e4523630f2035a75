"""What every head shares: the task that fine-tuning trains, and the form that scoring a collection takes.

`finetune/train.py` drives any `HeadTask`, `finetune/evaluate.py` reads any head's `Scored`. Neither knows which head it
holds; `finetune/heads/registry.py` says how to add one.

Tested in tests/finetune/heads/test_head_registry.py.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed, nn

from data_tools.in_order.collection import Collection
from data_tools.tokenizer import CaptionTokenizer
from finetune.gradient_cache import MicroBatches
from pretrain.model.alignment_model import AlignmentModel
from pretrain.model.parts import Part
from pretrain.objectives.state import MicroBatch
from retrieval.protocols import recalls
from runtime.ranks import Ranks, gather_rows, sum_over_ranks
from training.config import OptimizerConfig
from training.stage import Validation


@dataclass(frozen=True)
class Workload:
    """How a collection is encoded and scored: by which ranks, where, and in batches of which size."""

    ranks: Ranks
    device: torch.device
    batch_size: int = 64
    """Images, or captions, encoded at once."""
    workers: int = 0
    """Processes that decode images."""
    silent: bool = True
    """Whether to leave out the progress bar."""


@dataclass
class Scored:
    """One head's scores of a collection. On ranks other than the first the matrices may be empty."""

    key: str
    """The head's name in a recipe's `heads`, and so in the record's file name."""
    head: str
    """The head's name in the record, its settings included."""
    image_to_text: np.ndarray
    """(images, captions), a row ranks the captions for one image."""
    text_to_image: np.ndarray
    """(captions, images), a row ranks the images for one caption."""
    checkpoint: str
    """Hash of the checkpoint, or of the checkpoints, that gave the scores."""
    training: str
    """What the model learned from: `untrained`, `pretrained` or `fine-tuned-on X`."""
    details: dict[str, Any] = field(default_factory=dict)
    """Further keys of the record."""


class HeadTask(nn.Module):
    """A head with its encoders, as the training loop trains, saves and measures it."""

    tokenizer: CaptionTokenizer
    image_size: int
    """Pixels a side."""
    description: str
    """What is trained and where it started, for the first line of a run."""
    has_idle_parameters = False
    """Whether some training step leaves learning parameters without a gradient, apart from parts that are frozen at first."""

    frozen = ""
    """Hash of a second checkpoint that the task reads but does not train; empty: none. A resumed run must find the same one."""

    def forward(self, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of this rank's share of a global batch, and its figures.

        Returns:
            The loss, and detached scalars by name, `loss` among them. The mean of the losses over the ranks is the loss of the
            global batch.
        """
        raise NotImplementedError

    @property
    def cacheable(self) -> AlignmentModel | None:
        """The model whose frozen image tower's features `data.features` may cache; None where the head reads pixels."""
        return None

    def add_gradients(self, batch: MicroBatch, micro_batches: MicroBatches) -> dict[str, Tensor]:
        """Add the gradients of `forward`'s loss to the parameters', going through the batch in micro-batches.

        Only the heads for which `training.micro_batch` may be set have it. DDP has no part in it: its forward is not called.

        Returns:
            The figures, as `forward` returns them.
        """
        raise NotImplementedError

    def layers(self) -> list[nn.Module]:
        """Return the transformer layers that learn, for `training.checkpoint_activations`."""
        raise NotImplementedError

    def begin_step(self, epoch: float) -> None:
        """Prepare a training step.

        A task's schedule is a function of `epoch` alone, so that a resumed run follows it.

        Args:
            epoch: epochs consumed before the step.
        """

    def parts(self) -> dict[str, Part]:
        """Return the encoders as parts, for learning rates and freezing; all other parameters are `new`."""
        raise NotImplementedError

    def learning(self, optimizer: OptimizerConfig) -> OptimizerConfig:
        """Return the optimizer's settings as this head reads them; a head may have keys of its own for its encoders."""
        return optimizer

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        """Return the live tensors of `model.safetensors`; a resumed run copies into them."""
        raise NotImplementedError

    def describe(self, training: str) -> dict[str, Any]:
        """Return the checkpoint's `model.json`; `training` is `fine-tuned-on X`."""
        raise NotImplementedError

    def validate(self, collection: Collection, work: Workload) -> Validation:
        """Measure the task on held-out data; every rank calls it and gets the same figures."""
        raise NotImplementedError

    def extra_figures(self) -> dict[str, Tensor]:
        """Return figures of the model itself, logged with each training step."""
        return {}


class RetrievalTask(HeadTask):
    """A task that scores every image with every caption, and is validated by R@K."""

    def similarity(self, collection: Collection, work: Workload) -> np.ndarray:
        """Return the score of every image with every caption, (images, captions)."""
        raise NotImplementedError

    def validate(self, collection: Collection, work: Workload) -> Validation:
        """Measure R@1, R@5 and R@10 both ways; their sum, `rsum`, chooses the best checkpoint."""
        return Validation.of_recalls(recalls(self.similarity(collection, work), collection.caption_image))


class GatherRows(torch.autograd.Function):
    """Gather the rows (n, …) of every rank into (world * n, …), in the order of the ranks.

    The gradient of a row returns to the rank that the row came from, summed over the ranks that used it.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        """Gather `rows`, (n, …)."""
        ctx.rows = len(rows)
        return gather_rows(rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """Sum the gradient over the ranks and return this rank's rows of it."""
        first_row = own_rank() * ctx.rows
        return sum_over_ranks(gradient)[first_row : first_row + ctx.rows]


def own_rank() -> int:
    """Return this process's rank; 0 outside a distributed run."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def world_size() -> int:
    """Return the number of ranks; 1 outside a distributed run."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def count_truncated(tokenizer: CaptionTokenizer, collection: Collection, ranks: Ranks) -> dict[str, int]:
    """Count the captions that the model cannot read whole, and print a warning where there are any.

    Returns:
        `truncated_captions`, for the score record.
    """
    truncated = tokenizer.count_truncated(collection.captions)
    if truncated and ranks.first:
        print(
            f"{truncated:,} of {len(collection.captions):,} captions are longer than {tokenizer.caption_tokens} tokens; "
            "the model does not read their ends",
            file=sys.stderr,
        )
    return {"truncated_captions": truncated}
