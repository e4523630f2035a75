"""Recipe keys that pretraining and fine-tuning share: the optimizer, the loop, skipped steps. Imports nothing heavy."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from runtime.errors import RecipeError
from runtime.recipe import free


@dataclass
class OptimizerConfig:
    """AdamW, linear warm-up, then a cosine."""

    lr: float = 1e-4
    min_lr: float = 1e-5
    schedule: Literal["step", "epoch"] = "step"
    """`step`: the rate changes with every step. `epoch`: ALBEF's, whose warm-up climbs in 20 stairs within the first epoch, and
    whose cosine changes from one epoch to the next."""
    warmup_lr: float = 0.0
    """Where the warm-up begins."""
    warmup_steps: int = 2000
    weight_decay: float = 0.02
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    clip_norm: float = 0.0
    """Gradients are scaled down to this norm; 0 leaves them."""

    def __post_init__(self) -> None:
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise RecipeError(f"optimizer.betas is {self.betas}; AdamW has two, each at least 0 and below 1")

    def lr_at(self, step: int, steps: int, epoch: float = 0.0, epochs: float = 1.0) -> float:
        """The rate of a step of a run of `steps`; `schedule: epoch` goes by the epochs consumed, of all `epochs`.

        Warm-up begins at `warmup_lr` (by step: one step above it), and half a cosine ends at `min_lr`.
        """
        if self.schedule == "epoch":
            if epoch >= 1:
                return self._cosine(min(1.0, int(epoch) / epochs))
            stair = min(20, step * 20 // max(1, self.warmup_steps))
            return self.warmup_lr + (self.lr - self.warmup_lr) * stair / 20
        if step < self.warmup_steps:
            return self.warmup_lr + (self.lr - self.warmup_lr) * (step + 1) / self.warmup_steps
        return self._cosine((step - self.warmup_steps) / max(1, steps - self.warmup_steps))

    def _cosine(self, share: float) -> float:
        return self.min_lr + (self.lr - self.min_lr) * 0.5 * (1 + math.cos(math.pi * share))


@dataclass
class SickStepConfig:
    """When a step is skipped on all ranks, and what follows many such steps; `training/sick_steps.py`."""

    norm_factor: float = 10.0
    """A gradient norm so many times the median of the last `window` applied ones is sick; 0 leaves only what is not finite."""
    window: int = 128
    """Steps of history; it judges from a quarter of them on."""
    in_a_row: int = 8
    """Sick steps in a row after which skipping is given up. Where all of them are large gradients at a loss no higher than before,
    such gradients are the usual from then on."""
    then: Literal["go_back", "stop"] = "go_back"
    """`go_back` restores the last checkpoint before them and goes on with the data after them; `stop` ends the run."""
    returns: int = 3
    """Times to go back without a new checkpoint in between, before the run stops after all."""

    def __post_init__(self) -> None:
        for name in ("window", "in_a_row", "returns"):
            if (value := getattr(self, name)) < 1:
                raise RecipeError(f"training.sick_steps.{name} is {value}; it must be 1 or more")
        if self.norm_factor and self.norm_factor <= 1:
            raise RecipeError(f"training.sick_steps.norm_factor is {self.norm_factor}; it is above 1, or 0 for none")


@dataclass
class LoopConfig:
    """How long a loop runs, on what, and how often it looks up."""

    global_batch: int = 512
    """Samples a step over all ranks."""
    epochs: float = 30.0
    steps: int | None = None
    """Number of steps; stated, it overrides `epochs`."""
    precision: Literal["fp32", "bf16"] = "bf16"
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = free("auto")
    log_every: int = free(10)
    validate_every: int = 1000
    """Steps between two measurements of R@K on `data.validation`."""
    checkpoint_every: int = 1000
    keep_last: int = free(2)
    """Newest checkpoints to keep; the best by validation is kept beside them."""
    milestone_every: int | None = free(None)
    """Checkpoints of steps that are multiples of this are kept for good; a multiple of `checkpoint_every`."""
    checkpoint_activations: bool = free(False)
    """Compute each layer's activations again in the backward pass instead of keeping them: room for larger batches and images."""
    sick_steps: SickStepConfig = field(default_factory=SickStepConfig)
    rank_timeout: float = free(600.0)
    """Seconds without progress after which a rank counts as hung and the run stops, naming it; more than the longest validation,
    compilation or part of the start takes (taking over from a process that vanished without a word is a minute of it). A rank that died is noticed within a twentieth of it, and 30 seconds at most."""

    def __post_init__(self) -> None:
        for name in (
            "global_batch",
            "steps",
            "log_every",
            "validate_every",
            "checkpoint_every",
            "keep_last",
            "milestone_every",
        ):
            if (value := getattr(self, name)) is not None and value < 1:
                raise RecipeError(f"training.{name} is {value}; it must be 1 or more")
        if self.milestone_every and self.milestone_every % self.checkpoint_every:
            raise RecipeError(
                f"training.milestone_every is {self.milestone_every}; it must be a multiple of training.checkpoint_every {self.checkpoint_every}"
            )
        if self.rank_timeout <= 0:
            raise RecipeError(f"training.rank_timeout is {self.rank_timeout}; it is a number of seconds above 0")
        if self.epochs <= 0 or self.seed < 0:
            raise RecipeError(
                f"training.epochs is {self.epochs}, training.seed {self.seed}; epochs are above 0, a seed 0 or more"
            )

    def total_steps(self, samples: int) -> int:
        """Steps of the whole run over a data set of so many samples."""
        return self.steps or math.ceil(self.epochs * samples / self.global_batch)
