"""Jobs of the engine tests: train a tiny model for a few steps and return its whole state."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tiny
import torch
from deepspeed.utils import safe_get_full_grad
from torch import Tensor, distributed

import pretrain.engine
from pretrain.budget import BUCKET
from pretrain.config import PretrainRecipe, divide_batch
from pretrain.engine import Engine
from pretrain.model.parts import Freezing
from pretrain.task import PretrainTask
from runtime.checkpoint import read_tensors, verify_checkpoint, write_checkpoint
from runtime.errors import CheckpointError
from runtime.files import read_json
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
    transport: Tensors = field(default_factory=dict)
    part_steps: dict[str, int] = field(default_factory=dict)


PARTS = ("masters", "moments", "teacher", "queue", "transport")


@dataclass
class Results:
    """What one rank has to tell of a run."""

    losses: list[dict[str, float]] = field(default_factory=list)
    """Every named figure of every step, the mean over micro-batches and ranks."""
    norms: list[float] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    loaded: State | None = None
    """Read back right after loading."""
    state: State | None = None
    gradients: list[Tensors] = field(default_factory=list)
    """Raw gradients of every step, averaged over ranks and micro-batches, before clipping and before Adam."""
    parameters: Tensors = field(default_factory=dict)
    constants: Tensors = field(default_factory=dict)
    """Frozen weights and statistics, as a checkpoint holds them."""
    teacher_compute: Tensors = field(default_factory=dict)


def train(
    recipe_changes: dict[str, Any],
    steps: int,
    start: State | None = None,
    lr: float = 1e-3,
    raw_gradients: bool = False,
    kept_whole: int = 0,
    bucket: int | None = None,
) -> Results:
    """`steps` steps of a run; from `start`, if given, as a resumed run does it. kept_whole: the engine's, for ZeRO 3; bucket: elements
    of a reduction buffer, if not the engine's."""
    pretrain.engine.KEPT_WHOLE = kept_whole
    pretrain.engine.BUCKET = bucket or BUCKET
    recipe: PretrainRecipe = tiny.recipe(**recipe_changes)
    ranks, device = ranks_from_environment(), torch.device("cpu")
    assert ranks.world == distributed.get_world_size()
    micro_batch, accumulation = divide_batch(recipe.training.global_batch, recipe.training.micro_batch, ranks.world)
    local = micro_batch * accumulation
    task = tiny.task(recipe, ranks)
    engine = Engine(task.student, recipe.optimizer, recipe.training, micro_batch, accumulation, device)
    task.gathered = engine.gathered
    freezing = Freezing(task.student, task.student.model.parts(), vars(recipe.optimizer.freeze_until))
    results, first = Results(constants=copied(task.constants)), 0
    if start is not None:
        engine.load(start.masters, start.moments, start.step, start.part_steps)
        task.teacher.load(start.teacher)
        task.queue.load_state_dict(start.queue)
        task.potentials = start.transport.get("potentials")
        first = start.step
        results.loaded = read(first, engine, task)
    for step in range(first, first + steps):
        rows = slice(ranks.rank * local, (ranks.rank + 1) * local)
        batch = tiny.batch(recipe.training.global_batch, step, rows)
        engine.set_lr(lr)
        engine.freeze(freezing.apply(step / 2))
        micro_batches, figures = task.prepare(batch, step / 2, micro_batch)
        losses = []
        for number, inputs in enumerate(micro_batches):
            torch.manual_seed(1000 * step + 10 * ranks.rank + number)  # of dropout
            loss, named = engine.module(inputs)
            engine.backward(loss)
            losses.append(named)
            if raw_gradients and engine.module.is_gradient_accumulation_boundary():
                results.gradients.append(gradients(engine))
            norm = engine.step()
        assert engine.module.was_step_applied()
        task.finish(engine.masters())
        results.losses.append(mean_of(figures, losses, ranks.world))
        results.norms.append(norm)
    results.state = read(first + steps, engine, task)
    weights = tiny.model(recipe)
    engine.copy_weights(weights)
    results.parameters = copied(dict(weights.named_parameters()))
    results.teacher_compute = copied(dict(task.teacher.model.named_parameters()))
    return results


def save(recipe_changes: dict[str, Any], steps: int, folder: Path) -> dict[str, str]:
    """Train, and write a checkpoint as a run does. -> the digest of every tensor of it."""
    state = train(recipe_changes, steps).state
    assert state is not None
    if ranks_from_environment().first:
        tensors = {name: getattr(state, name) for name in PARTS}
        write_checkpoint(folder, tensors, {"state": {"step": state.step}}, lambda inside: None)
    distributed.barrier()
    return digests(state)


def resume(recipe_changes: dict[str, Any], folder: Path, steps: int) -> Results:
    """Go on from such a checkpoint."""
    verify_checkpoint(folder)
    parts = {name: read_tensors(folder, name) for name in PARTS}
    return train(recipe_changes, steps, State(read_json(folder / "state.json")["step"], **parts))


def digests(state: State) -> dict[str, str]:
    """sha256 of type, shape and bytes of every tensor."""
    return {
        f"{part}.{name}": hashlib.sha256(
            f"{tensor.dtype}{tuple(tensor.shape)}".encode() + tensor.contiguous().numpy().tobytes()
        ).hexdigest()
        for part in PARTS
        for name, tensor in getattr(state, part).items()
    }


def gradients(engine: Engine) -> Tensors:
    """What AdamW is about to get, whole, by DeepSpeed's own functions."""
    learning = {name: parameter for name, parameter in engine.parameters.items() if parameter.requires_grad}
    return {name: safe_get_full_grad(parameter).float().clone() for name, parameter in learning.items()}


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
        {} if task.potentials is None else copied({"potentials": task.potentials}),
        dict(engine.part_steps),
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
