"""What the tests of the engine have their ranks do: train a tiny model for a few steps and tell everything of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import tiny
import torch
from torch import Tensor, distributed

from pretrain.config import PretrainRecipe, divide_batch
from pretrain.engine import Engine
from pretrain.task import PretrainTask
from runtime.errors import CheckpointError
from runtime.ranks import ranks_from_environment, sum_over_ranks

Tensors = dict[str, Tensor]


@dataclass
class State:
    """Everything of a run that a checkpoint holds."""

    step: int
    masters: Tensors
    moments: Tensors
    teacher: Tensors
    queue: Tensors


@dataclass
class Told:
    """What one rank has to tell of a run."""

    losses: list[dict[str, float]] = field(default_factory=list)
    """Every named figure of every step, the mean over micro-batches and ranks."""
    norms: list[float] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    loaded: State | None = None
    """Read back right after loading."""
    state: State | None = None
    parameters: Tensors = field(default_factory=dict)
    teacher_compute: Tensors = field(default_factory=dict)


def train(recipe_changes: dict[str, Any], steps: int, start: State | None = None, lr: float = 1e-3) -> Told:
    """`steps` steps of a run; from `start`, if given, as a resumed run does it."""
    recipe: PretrainRecipe = tiny.recipe(**recipe_changes)
    ranks, device = ranks_from_environment(), torch.device("cpu")
    assert ranks.world == distributed.get_world_size()
    micro_batch, accumulation = divide_batch(recipe.training.global_batch, recipe.training.micro_batch, ranks.world)
    local = micro_batch * accumulation
    task = tiny.task(recipe, ranks)
    engine = Engine(task.student, recipe.optimizer, recipe.training, micro_batch, accumulation, device)
    told, first = Told(), 0
    if start is not None:
        engine.load(start.masters, start.moments, start.step)
        task.teacher.load(start.teacher)
        task.queue.load_state_dict(start.queue)
        first = start.step
        told.loaded = read(first, engine, task)
    for step in range(first, first + steps):
        rows = slice(ranks.rank * local, (ranks.rank + 1) * local)
        batch = tiny.batch(recipe.training.global_batch, step, rows)
        engine.set_lr(lr)
        micro_batches, figures = task.prepare(batch, step / 2, micro_batch)
        losses = []
        for inputs in micro_batches:
            loss, named = engine.module(inputs)
            engine.backward(loss)
            losses.append(named)
            norm = engine.step()
        assert engine.module.was_step_applied()
        task.finish(engine.masters())
        told.losses.append(mean_of(figures, losses, ranks.world))
        told.norms.append(norm)
    told.state = read(first + steps, engine, task)
    told.parameters = copied(dict(task.student.model.named_parameters()))
    told.teacher_compute = copied(dict(task.teacher.model.named_parameters()))
    return told


def mean_of(figures: Tensors, losses: list[Tensors], world: int) -> dict[str, float]:
    """Every named figure, the mean over micro-batches and ranks."""
    means = figures | {name: torch.stack([part[name] for part in losses]).mean() for name in losses[0]}
    return {name: float(sum_over_ranks(value.float())) / world for name, value in means.items()}


def read(step: int, engine: Engine, task: PretrainTask) -> State:
    return State(
        step,
        copied(dict(engine.masters())),
        copied(dict(engine.moments())),
        copied(task.teacher.averages),
        copied(task.queue.state_dict()),
    )


def copied(tensors: Tensors) -> Tensors:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def buffer_types(precision: str, stage: int) -> dict[str, list[str]]:
    """The dtypes of pixel statistics in student and teacher once the engine has cast the student."""
    recipe = tiny.recipe(training__precision=precision, training__zero_stage=stage)
    task = tiny.task(recipe, ranks_from_environment())
    Engine(task.student, recipe.optimizer, recipe.training, 8, 1, torch.device("cpu"))
    models = {"student": task.student.model, "teacher": task.teacher.model}
    return {name: [str(buffer.dtype) for buffer in model.buffers()] for name, model in models.items()}


def load_a_misfit(state: State) -> tuple[str, str]:
    """What is said of a state that lacks the codebook, and of one whose codebook has another shape."""
    recipe = tiny.recipe()
    task = tiny.task(recipe, ranks_from_environment())
    engine = Engine(task.student, recipe.optimizer, recipe.training, 8, 2, torch.device("cpu"))
    said = []
    without = {name: tensor for name, tensor in state.masters.items() if name != "codebook"}
    for masters in (without, state.masters | {"codebook": state.masters["codebook"][1:]}):
        try:
            engine.load(masters, state.moments, state.step)
        except CheckpointError as error:
            said.append(str(error))
    return said[0], said[1]
