"""A fine-tuning run, which `train` describes from top to bottom. It uses accelerate and is the same for every head.

The head is a `HeadTask` (`finetune/heads/base.py`). The loop it shares with pretraining is `training/loop.py`.
"""

from __future__ import annotations

import copy
import math
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn

from data_tools.in_order.collection import Collection, validation_collection
from data_tools.pixels.feature_blocks import CachedViews
from data_tools.pixels.packed import render_views
from data_tools.pixels.transforms import TrainTransform
from data_tools.stream.examples import Preparation
from data_tools.stream.order import derived_seed, uniforms
from data_tools.stream.shard_stream import ShardStream, open_stream
from data_tools.stream.training_set import open_training_set
from finetune.config import FinetuneRecipe
from finetune.gradient_cache import MicroBatches, average_gradients
from finetune.heads.base import HeadTask, Workload
from finetune.heads.registry import load_part
from pretrain.feature_cache import training_features, validation_features
from pretrain.model.activations import checkpoint_activations
from pretrain.model.alignment_model import TextBatch
from pretrain.model.parts import Freezing, parameter_groups
from pretrain.objectives.state import Keys, MicroBatch
from pretrain.task import NEGATIVES
from pretrain.weights.load import copy_weights
from runtime.checkpoint import read_tensors, write_checkpoint
from runtime.checkpoint_writer import Write, host_copies
from runtime.errors import CheckpointError, LigatureError, RecipeError
from runtime.files import read_json
from runtime.ranks import sum_over_ranks
from runtime.recipe import write_recipe
from training.averages import WeightAverage
from training.context import RunContext, hold_run
from training.loop import TrainingLoop
from training.resume import find_resume
from training.sick_steps import SickSteps
from training.stage import LoopState, Stage, Validation


def finetune(recipe: FinetuneRecipe) -> Path:
    """Fine-tune by the recipe, or resume from the run's last checkpoint.

    Returns:
        The run's folder.
    """
    return hold_run(recipe, train)


def train(recipe: FinetuneRecipe, context: RunContext) -> None:
    """Run one rank's part of the run, from its last checkpoint to its end."""
    ranks, watchdog = context.ranks, context.watchdog
    if recipe.training.global_batch % ranks.world:
        raise RecipeError(
            f"training.global_batch {recipe.training.global_batch} does not divide over {ranks.world} ranks"
        )

    # The head and the validation data come first: their mistakes show before the run's folder is touched.
    task: HeadTask = load_part(recipe.head, "task")(recipe).train()
    if recipe.training.checkpoint_activations:
        checkpoint_activations(task.layers())
    folder = recipe.data.validation
    validation = validation_collection(folder, recipe.data.select_on_test) if folder else None

    # Hold the run's folder, and open the training data.
    watchdog.enter_phase("taking the run", 0)
    context.folder.open(recipe, ranks)
    watchdog.enter_phase("opening the data", 0)
    stream = open_data(recipe, context, task)
    if validation is not None and task.cacheable is not None:
        validation.features = validation_features(recipe.data, validation, task.cacheable, context)

    # Make the optimizer, and resume if there is a checkpoint.
    state = LoopState(stream, SickSteps(recipe.training.sick_steps))
    steps = recipe.training.total_steps(len(stream))
    learner = make_learner(recipe, context, task)
    stage = Finetuning(recipe, context, learner, state, validation, steps)
    if (checkpoint := find_resume(context)) is not None:
        state.resume(stage.restore(checkpoint))
        if ranks.first:
            print(f"going on from {checkpoint} at step {state.step}", flush=True)
    elif ranks.first:
        print(
            f"fine-tuning {task.description} on {recipe.dataset}, {ranks.world} x {context.device.type}",
            flush=True,
        )
    if ranks.first and (caveat := learner.freezing.caveat(steps * recipe.training.global_batch / len(stream))):
        print(f"ligature: {caveat}", file=sys.stderr)

    TrainingLoop(context, recipe.training, stage, state).run()


def open_data(recipe: FinetuneRecipe, context: RunContext, task: HeadTask) -> ShardStream:
    """Open this rank's stream of training batches, of images at the task's size and tokens of its tokenizer."""
    data = open_training_set(recipe.data)
    transform: TrainTransform | CachedViews = TrainTransform(task.image_size, recipe.data.augment, views=1)
    if task.cacheable is not None:
        features = training_features(recipe.data, data.reader, task.cacheable, context)
        transform = CachedViews(features, views=1) if features else transform
    return open_stream(
        recipe.data,
        data,
        recipe.training.global_batch // context.ranks.world,
        context.ranks,
        recipe.training.seed,
        Preparation(transform, task.tokenizer),
        context.folder.quarantine,
        context.device,
    )


@dataclass
class Learner:
    """A task and its optimizer, plain and as accelerate wraps them."""

    task: HeadTask
    wrapped: nn.Module
    """The task under accelerate (DDP, mixed precision); its forward gives the losses."""
    named: dict[str, nn.Parameter]
    """The parameters that learn, by their name in the task."""
    freezing: Freezing
    """Which parts of them do not learn yet."""
    optimizer: torch.optim.Optimizer
    prepared: Any
    """The optimizer under accelerate."""
    accelerator: Accelerator


def make_learner(recipe: FinetuneRecipe, context: RunContext, task: HeadTask) -> Learner:
    """Make AdamW for the task's parameters, and wrap both with accelerate.

    Raises:
        LigatureError: accelerate sees other ranks than the run has.
    """
    learning = task.learning(recipe.optimizer)
    never = {side: math.inf for side, kept in vars(recipe.frozen).items() if kept}
    freezing = Freezing(task, task.parts(), vars(learning.freeze_until) | never)
    mixed_precision = "bf16" if recipe.training.precision == "bf16" else "no"
    handlers = [
        DistributedDataParallelKwargs(find_unused_parameters=task.has_idle_parameters or bool(freezing.waiting))
    ]
    accelerator = Accelerator(
        mixed_precision=mixed_precision, cpu=context.device.type == "cpu", kwargs_handlers=handlers
    )
    if accelerator.num_processes != context.ranks.world:  # it would train replicas that never exchange gradients
        raise LigatureError(
            f"accelerate sees {accelerator.num_processes} of {context.ranks.world} ranks; start it by `ligature launch`"
        )
    named = {name: parameter for name, parameter in task.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(
        parameter_groups(named, task.parts(), learning),
        betas=(recipe.optimizer.betas[0], recipe.optimizer.betas[1]),
    )
    wrapped, prepared = accelerator.prepare(task, optimizer)
    return Learner(task, wrapped, named, freezing, optimizer, prepared, accelerator)


@dataclass
class Finetuning(Stage):
    """Fine-tuning as the loop drives it: a step, a validation, a checkpoint."""

    recipe: FinetuneRecipe
    context: RunContext
    learner: Learner
    state: LoopState
    validation: Collection | None
    """Held-out data; None where the recipe names none."""
    steps: int
    """Training steps of the whole run."""

    def __post_init__(self) -> None:
        self.validates = self.validation is not None
        momentum = self.recipe.training.ema_momentum
        self.average = None if momentum is None else WeightAverage(self._trained().items(), momentum)

    def _trained(self) -> dict[str, Tensor]:
        """Return the live weights that learn, by their name in a checkpoint."""
        learning = {parameter.data_ptr() for parameter in self.learner.named.values()}
        tensors = self.learner.task.checkpoint_tensors()
        return {name: tensor for name, tensor in tensors.items() if tensor.data_ptr() in learning}

    def take_step(self, batch: dict[str, Any], epoch: float, step: int) -> dict[str, Tensor]:
        """Train on one batch; see `Stage.take_step`."""
        recipe, context, learner = self.recipe, self.context, self.learner
        for group in learner.optimizer.param_groups:
            group["lr"] = group["lr_share"] * recipe.optimizer.lr_at(step, self.steps)
        self.state.sick.begin_step(learner.freezing.apply(epoch))
        learner.task.begin_step(epoch)
        context.watchdog.enter_collective()
        figures = self._add_gradients(retrieval_batch(batch, recipe.training.seed, context.device), step)
        norm = torch.nn.utils.clip_grad_norm_(learner.named.values(), recipe.optimizer.clip_norm or math.inf)
        mean_loss = float(sum_over_ranks(figures["loss"])) / context.ranks.world
        if self.state.sick.admits(mean_loss, float(norm)):
            learner.prepared.step()
            if self.average:
                self.average.update(self._trained().items())
        learner.prepared.zero_grad()
        lr = torch.tensor(recipe.optimizer.lr_at(step, self.steps))
        return figures | {"lr": lr, "gradient_norm": norm} | learner.task.extra_figures()

    def _add_gradients(self, batch: MicroBatch, step: int) -> dict[str, Tensor]:
        """Compute the gradients of a batch, the mean over the ranks. A collective.

        Returns:
            The task's figures of this rank.
        """
        learner, rows, micro_batch = self.learner, len(batch.image_ids), self.recipe.training.micro_batch
        # Dropout is a function of (seed, step, rank) and the micro-batch, so nothing of it needs saving.
        seed = self.recipe.training.seed, step, self.context.ranks.rank
        if micro_batch is None or micro_batch >= rows:
            torch.manual_seed(derived_seed(*seed))
            loss, figures = learner.wrapped(batch)
            learner.accelerator.backward(loss)
            return figures
        micro_batches = MicroBatches(rows, micro_batch, seed, learner.accelerator.autocast)
        figures = learner.task.add_gradients(batch, micro_batches)
        average_gradients(learner.named.values(), self.context.ranks)
        return figures

    def validate(self) -> Validation:
        """Return what the task measures on held-out data."""
        assert self.validation is not None
        task, context = self.learner.task, self.context
        training = task.training
        work = Workload(context.ranks, context.device, workers=self.recipe.data.workers)
        with self.average.in_place_of(self._trained()) if self.average else nullcontext():
            result = task.eval().validate(self.validation, work)
        task.train(training)
        return result

    def save(self, improved: bool) -> Write | None:
        """Copy the model, Adam's moments and the cursor to memory; see `Stage.save`."""
        recipe, task, optimizer = self.recipe, self.learner.task, self.learner.optimizer
        if not self.context.ranks.first:  # every rank holds the same weights: nothing is gathered
            return None
        moments = (
            (f"{moment}.{name}", optimizer.state[parameter][moment])
            for name, parameter in self.learner.named.items()
            if parameter in optimizer.state
            for moment in MOMENTS
        )
        tensors = {
            "model": host_copies(task.checkpoint_tensors().items(), keep=True),
            "optimizer": host_copies(moments, keep=True),
        }
        if self.average:
            tensors["ema"] = host_copies(self.average.weights.items(), keep=True)
        state = self.state.state_dict() | {"frozen": task.frozen}
        # A copy: training goes on and changes the state while a thread writes it.
        values = copy.deepcopy({"state": state, "model": task.describe(f"fine-tuned-on {recipe.dataset}")})
        step, checkpoints = self.state.step, self.context.folder.checkpoints

        def write_texts(folder: Path) -> None:
            task.tokenizer.save(folder)
            write_recipe(folder / "config.yaml", recipe)

        def write(folder: Path, staging: Path) -> None:
            write_checkpoint(folder, tensors, values, write_texts, staging)

        return lambda: checkpoints.try_commit(step, improved, write)

    def restore(self, checkpoint: Path) -> dict[str, Any]:
        """Restore everything but the data cursor; see `Stage.restore`."""
        task = self.learner.task
        saved = read_json(checkpoint / "state.json")
        self.state.sick.load(saved.get("sick"))
        copy_weights(task.checkpoint_tensors(), read_tensors(checkpoint, "model"), checkpoint)
        if self.average:
            self.average.load(read_tensors(checkpoint, "ema"))
        load_moments(self.learner.optimizer, self.learner.named, read_tensors(checkpoint, "optimizer"))
        if saved.get("frozen", task.frozen) != task.frozen:
            raise CheckpointError(
                f"{self.recipe.checkpoint} is not the checkpoint that this run started from, and the run still reads that one's model; "
                f"put checkpoint {saved['frozen']} back there"
            )
        return saved


def retrieval_batch(batch: dict[str, Any], seed: int, device: torch.device) -> MicroBatch:
    """Bring a batch of the stream into the form that the heads read.

    Args:
        batch: this rank's batch, as ShardStream yields it.
        seed: the run's seed, for the draws of negatives.
        device: where the tensors go.

    Returns:
        The batch. Its keys are empty: a head that compares with keys puts its own features there.
    """
    ids = batch["image_ids"].to(device)
    draws = torch.from_numpy(uniforms(derived_seed(seed, NEGATIVES), batch["positions"].numpy(), 2)).to(device)
    nothing = torch.empty(0, device=device)
    return MicroBatch(
        images=render_views(batch["images"], device)[0],
        text=TextBatch(batch["ids"].to(device), batch["mask"].to(device)),
        image_ids=ids,
        rows=torch.arange(len(ids), device=device),
        draws=draws,
        keys=Keys(nothing, nothing, nothing),
        distill_weight=0.0,
        positions=batch["positions"],
    )


MOMENTS = ("exp_avg", "exp_avg_sq", "step")
"""Adam's state of a parameter. It includes `step`: a parameter that was frozen at first has taken fewer steps than the run."""


def load_moments(optimizer: torch.optim.Optimizer, named: dict[str, nn.Parameter], moments: dict[str, Tensor]) -> None:
    """Restore Adam's state.

    Args:
        optimizer: its state is replaced.
        named: the parameters that learn, by name.
        moments: a checkpoint's tensors, named `<moment>.<parameter>`; a parameter that had not learned yet has none.
    """
    for name, parameter in named.items():
        optimizer.state.pop(parameter, None)
        if f"step.{name}" in moments:
            state = {moment: moments[f"{moment}.{name}"] for moment in MOMENTS}
            optimizer.state[parameter] = {
                moment: value if moment == "step" else value.to(parameter.device) for moment, value in state.items()
            }
