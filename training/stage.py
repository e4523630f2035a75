"""What a stage brings to the training loop, and what the loop itself remembers between steps.

Tested in tests/end_to_end/test_killed.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.checkpoint_writer import Write
from training.sick_steps import SickSteps

if TYPE_CHECKING:
    from torch import Tensor

    from data_tools.stream.shard_stream import ShardStream


@dataclass
class LoopState:
    """Where a loop is: everything a checkpoint keeps in `state.json`."""

    stream: ShardStream
    """The training data, with the cursor of the next batch."""
    sick: SickSteps
    """The history that later steps are judged by."""
    step: int = 0
    """Training steps taken, skipped ones included."""
    best_rsum: float = -1.0
    """The highest value so far of the figure that chooses the best checkpoint; -1 before the first validation. For retrieval
    it is rsum, the sum of six recalls in percent."""

    def state_dict(self) -> dict[str, Any]:
        """Return the content of `state.json`."""
        return {
            "step": self.step,
            "best_rsum": self.best_rsum,
            "stream": self.stream.state_dict(),
            "sick": self.sick.state_dict(),
        }

    def resume(self, saved: dict[str, Any]) -> None:
        """Continue where a `state.json` stopped. The stage has restored `sick` already, with the weights."""
        self.stream.load_state_dict(saved["stream"])
        self.step, self.best_rsum = saved["step"], saved["best_rsum"]


@dataclass
class Validation:
    """What a stage measures on held-out data."""

    figures: dict[str, float]
    """By name. The log puts `validation/` before each."""
    best_by: str
    """Name of the figure that chooses the best checkpoint; higher is better."""
    summary: str
    """A few words for the progress bar."""

    @classmethod
    def of_recalls(cls, recalls: dict[str, float]) -> Validation:
        """Return the validation of a retrieval model, for which rsum chooses the best checkpoint.

        Args:
            recalls: R@1, R@5 and R@10 in percent both ways, and rsum, their sum (`retrieval.protocols.recalls`).
        """
        image_to_text, text_to_image = recalls["image_to_text_R@10"], recalls["text_to_image_R@10"]
        return cls(recalls, "rsum", f"R@10 {image_to_text:.1f} / {text_to_image:.1f}")


class Stage(ABC):
    """A stage (pretraining, fine-tuning) as the loop drives it."""

    validates: bool
    """Whether the recipe names validation data; only then is `validate` called."""

    @abstractmethod
    def take_step(self, batch: dict[str, Any], epoch: float, step: int) -> dict[str, Tensor]:
        """Train on one batch. Ask `SickSteps.admits` before the weights change.

        Args:
            batch: this rank's batch, as ShardStream yields it.
            epoch: epochs consumed before this batch.
            step: training steps taken before this one.

        Returns:
            The step's figures to log, scalars; `loss` is among them.
        """

    @abstractmethod
    def validate(self) -> Validation:
        """Measure the model on held-out data. A collective."""

    @abstractmethod
    def save(self, improved: bool) -> Write | None:
        """Copy all state to the first rank's host memory. A collective.

        Args:
            improved: whether this step's validation is the best so far.

        Returns:
            On the first rank the function that writes the copies into a checkpoint; None on the others.
        """

    @abstractmethod
    def restore(self, checkpoint: Path) -> dict[str, Any]:
        """Restore the weights, the optimizer and the history of sick steps, but not the data cursor.

        Returns:
            The checkpoint's `state.json`.
        """
