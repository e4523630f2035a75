"""Recipe keys that pretraining and fine-tuning share: the optimizer, the loop and sick steps. Imports no torch.

Tested in tests/pretrain/test_albef_recipe.py.
"""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass, field
from typing import Literal

from runtime.checks import check_range
from runtime.errors import RecipeError
from runtime.recipe import free


@dataclass
class RatesConfig:
    """Learning rates by part of the model, as shares of `optimizer.lr`."""

    image: float = 1.0
    """Share of the image encoder."""
    text: float = 1.0
    """Share of the text encoder."""
    fusion: float = 1.0
    """Share of the fusion encoder."""
    new: float = 1.0
    """Share of all other weights: projections, heads, codebook, temperature, a learned query."""

    def __post_init__(self) -> None:
        for name, share in vars(self).items():
            if not 0 <= share < math.inf:
                raise RecipeError(f"optimizer.rates.{name} is {share:g}; it must be a share of optimizer.lr, 0 or more")


@dataclass
class FreezeConfig:
    """Epochs at the start in which an encoder keeps its weights, without dropout. 0 lets it learn from the first step."""

    image: float = 0.0
    """Epoch from which the image encoder learns; a share of an epoch is allowed."""
    text: float = 0.0
    """Epoch from which the text encoder learns."""
    fusion: float = 0.0
    """Epoch from which the fusion encoder learns."""

    def __post_init__(self) -> None:
        for name, epoch in vars(self).items():
            if not 0 <= epoch < math.inf:
                raise RecipeError(
                    f"optimizer.freeze_until.{name} is {epoch:g}; it must be a number of epochs, 0 or more"
                )

    def of(self, part: str) -> float:
        """Return the epoch from which a part learns; `new` always does."""
        return vars(self).get(part, 0.0)


@dataclass
class OptimizerConfig:
    """AdamW with a linear warm-up and half a cosine after it."""

    lr: float = 1e-4
    """Highest learning rate, reached at the end of the warm-up."""
    min_lr: float = 1e-5
    """Learning rate at the end of the cosine."""
    schedule: Literal["step", "epoch"] = "step"
    """`step` changes the learning rate with every step. `epoch` is ALBEF's schedule: 20 stairs of warm-up within the first
    epoch, then a cosine that changes once an epoch."""
    warmup_lr: float = 0.0
    """Learning rate at the start of the warm-up."""
    warmup_steps: int = 2000
    """Training steps of the warm-up."""
    weight_decay: float = 0.02
    """AdamW's weight decay of matrices. Biases, norms and the temperature have none."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    """AdamW's decay rates of the first and the second moment."""
    clip_norm: float = 0.0
    """Gradients with a larger norm are scaled down to this one. 0 leaves them as they are."""
    rates: RatesConfig = field(default_factory=RatesConfig)
    """Learning rates by part of the model."""
    layer_decay: float = 1.0
    """Factor of the learning rate for each layer below the top of the image and the text encoder; embeddings lie below the lowest
    layer. 1: all layers learn alike."""
    freeze_until: FreezeConfig = field(default_factory=FreezeConfig)
    """Epoch from which each encoder learns."""

    def __post_init__(self) -> None:
        names = ("lr", "min_lr", "warmup_lr", "warmup_steps", "weight_decay", "clip_norm")
        check_range(self, "optimizer.", 0, None, *names)
        if not 0 < self.layer_decay <= 1:
            raise RecipeError(f"optimizer.layer_decay is {self.layer_decay:g}; it must be above 0 and at most 1")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise RecipeError(f"optimizer.betas is {self.betas}; give two numbers, each at least 0 and below 1")

    def lr_at(self, step: int, steps: int, epoch: float = 0.0, epochs: float = 1.0) -> float:
        """Return the learning rate of a step.

        Args:
            step: training steps taken before this one.
            steps: training steps of the whole run.
            epoch: epochs consumed before this step; only `schedule: epoch` reads it.
            epochs: epochs of the whole run; only `schedule: epoch` reads it.
        """
        if self.schedule == "epoch":
            if epoch >= 1:
                return self._cosine(min(1.0, int(epoch) / epochs))
            # ALBEF advances its scheduler once in 100 of its 2,000 warm-up iterations, which makes 20 stairs.
            stair = min(20, step * 20 // max(1, self.warmup_steps))
            return self.warmup_lr + (self.lr - self.warmup_lr) * stair / 20
        if step < self.warmup_steps:  # step + 1, because a first step at a rate of 0 would change nothing
            return self.warmup_lr + (self.lr - self.warmup_lr) * (step + 1) / self.warmup_steps
        return self._cosine((step - self.warmup_steps) / max(1, steps - self.warmup_steps))

    def _cosine(self, share: float) -> float:
        """Return the rate after a share (0 to 1) of the cosine."""
        return self.min_lr + (self.lr - self.min_lr) * 0.5 * (1 + math.cos(math.pi * share))


@dataclass
class SickStepConfig:
    """When all ranks skip a step, and what happens after many skipped steps (`training/sick_steps.py`)."""

    norm_factor: float = 10.0
    """A step is sick when its gradient norm exceeds this many times the median of the last `window` applied steps. 0 skips
    only losses and gradients that are not finite."""
    window: int = 128
    """Applied steps that the median is taken over. Norms are judged once a quarter of them is filled."""
    in_a_row: int = 8
    """Sick steps in a row after which the run stops skipping. If all of them have large gradients at a loss no higher than
    before, large gradients count as usual from then on."""
    then: Literal["go_back", "stop"] = "go_back"
    """What follows `in_a_row` sick steps. `go_back` restores the last checkpoint before them and continues with the data after
    them; `stop` ends the run."""
    returns: int = 3
    """How often the run may go back without a new checkpoint in between. After that it stops."""

    def __post_init__(self) -> None:
        for name in ("window", "in_a_row", "returns"):
            if (value := getattr(self, name)) < 1:
                raise RecipeError(f"training.sick_steps.{name} is {value}; it must be 1 or more")
        if self.norm_factor and self.norm_factor <= 1:
            raise RecipeError(
                f"training.sick_steps.norm_factor is {self.norm_factor}; it must be above 1, or 0 to judge no norm"
            )


@dataclass
class LoopConfig:
    """How long a loop runs, on which device, and how often it logs, validates and saves."""

    global_batch: int = 512
    """Samples of one training step over all ranks."""
    epochs: float = 30.0
    """Epochs of the whole run."""
    steps: int | None = None
    """Training steps of the whole run. When it is set, `epochs` is not used."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Number format of the computation. The optimizer always updates float32 weights."""
    seed: int = 0
    """Seed of all random draws."""
    device: Literal["auto", "cpu", "cuda"] = free("auto")
    """`auto` takes a GPU if there is one, else the CPU."""
    log_every: int = free(10)
    """Training steps between two log lines."""
    validate_every: int = 1000
    """Training steps between two measurements of R@K on `data.validation`."""
    checkpoint_every: int = 1000
    """Training steps between two checkpoints."""
    keep_last: int = free(2)
    """How many of the newest checkpoints to keep. The best one by validation is kept beside them."""
    milestone_every: int | None = free(None)
    """Keep a checkpoint for good when its step is a multiple of this. It must be a multiple of `checkpoint_every`."""
    checkpoint_activations: bool = free(False)
    """Compute each layer's activations again in the backward pass instead of keeping them. This makes room for larger batches
    and images."""
    sick_steps: SickStepConfig = field(default_factory=SickStepConfig)
    """When a step is skipped, and what follows many skipped steps."""
    rank_timeout: float = free(600.0)
    """Seconds without progress after which a rank counts as hung and the run stops, naming it. It must exceed the longest
    validation, compilation or part of the start; taking over from a process that vanished takes a minute. A rank that died is
    noticed after three tenths of this time, or after about 30 seconds if that is sooner."""
    ema_momentum: float | None = None
    """Share of itself that a moving average of the trained weights keeps in each step, such as 0.999. Validation and whoever loads the
    checkpoint then use the average. null: no average."""
    trackers: list[Literal["wandb", "trackio", "mlflow"]] = free(default_factory=list)
    """Experiment trackers that get the figures of the run and its recipe, such as `[wandb]`. Each needs its package, and takes its
    server and its keys from its own environment variables. Tensorboard's events are always in the run's folder."""
    tracker_project: str = free("ligature")
    """The trackers' project, or mlflow's experiment, that the run belongs to."""

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
        if self.ema_momentum is not None and not 0 <= self.ema_momentum < 1:
            raise RecipeError(
                f"training.ema_momentum is {self.ema_momentum}; it must be at least 0 and below 1, or null for no average"
            )
        if unknown := set(self.trackers) - {"wandb", "trackio", "mlflow"}:
            raise RecipeError(
                f"training.trackers has {', '.join(sorted(unknown))}; it takes wandb, trackio and mlflow (tensorboard's events are always written)"
            )
        if self.rank_timeout <= 0:
            raise RecipeError(f"training.rank_timeout is {self.rank_timeout}; it must be a number of seconds above 0")
        if self.epochs <= 0 or self.seed < 0:
            raise RecipeError(
                f"training.epochs is {self.epochs}, training.seed {self.seed}; epochs must be above 0 and the seed 0 or more"
            )

    def check_trackers(self) -> None:
        """Refuse trackers whose packages are missing, before a run begins. A recipe may be read without them.

        Raises:
            RecipeError: a package is not installed; the message names it.
        """
        for name in self.trackers:
            if importlib.util.find_spec(name) is None:
                raise RecipeError(
                    f"training.trackers has {name}, which is not installed; `pip install {name}`, or leave it out"
                )

    def total_steps(self, samples: int) -> int:
        """Return the training steps of the whole run over a dataset of `samples` samples."""
        return self.steps or math.ceil(self.epochs * samples / self.global_batch)
