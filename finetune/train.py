"""Fine-tuning for retrieval, with accelerate: the same for every head, which `task.py` makes."""

from __future__ import annotations

import copy
import math
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn

from data_tools.in_order.collection import validation_collection
from data_tools.pixels.packed import render_views
from data_tools.pixels.transforms import TrainTransform
from data_tools.stream.examples import Preparation
from data_tools.stream.order import derived_seed, uniforms
from data_tools.stream.shard_stream import ShardStream, open_stream
from data_tools.stream.training_set import open_training_set
from finetune.config import FinetuneRecipe
from finetune.heads.base import RetrievalTask, make_task
from pretrain.model.activations import checkpoint_activations
from pretrain.model.alignment_model import TextBatch
from pretrain.objectives.state import Keys, MicroBatch
from pretrain.task import NEGATIVES
from pretrain.train import find_healthy, find_resume
from pretrain.weights.load import copy_weights
from retrieval.protocols import recalls
from runtime.checkpoint import read_tensors, write_checkpoint
from runtime.checkpoint_writer import Write, host_copies
from runtime.errors import CheckpointError, LigatureError, RecipeError
from runtime.files import read_json
from runtime.ranks import Ranks, sum_over_ranks
from runtime.recipe import write_recipe
from runtime.run_folder import RunFolder
from runtime.watchdog import Watchdog
from training.loop import Stage, hold_run, run_loop
from training.sick_steps import SickSteps


def finetune(recipe: FinetuneRecipe) -> Path:
    """Fine-tune by the recipe, or go on from its last checkpoint. -> the run's folder."""
    return hold_run(recipe, train)


def train(recipe: FinetuneRecipe, run: RunFolder, ranks: Ranks, device: torch.device, watchdog: Watchdog) -> None:
    """One rank's part of the run, from what is saved of it to its end."""
    if recipe.training.global_batch % ranks.world:
        raise RecipeError(
            f"training.global_batch {recipe.training.global_batch} does not divide over {ranks.world} ranks"
        )
    task = make_task(recipe).train()
    if recipe.training.checkpoint_activations:
        checkpoint_activations(task.layers())
    told = recipe.data.validation
    validation = validation_collection(told, recipe.data.select_on_test) if told else None
    watchdog.enter_phase("taking the run", 0)
    run.open(recipe, ranks)
    watchdog.enter_phase("opening the data", 0)
    data, batch_size = open_training_set(recipe.data), recipe.training.global_batch // ranks.world
    transform = TrainTransform(task.image_size, recipe.data.augment, views=1)
    stream = open_stream(
        recipe.data,
        data,
        batch_size,
        ranks,
        recipe.training.seed,
        Preparation(transform, task.tokenizer),
        run.quarantine,
        device,
    )
    mixed = "bf16" if recipe.training.precision == "bf16" else "no"
    handlers = [DistributedDataParallelKwargs(find_unused_parameters=task.partial)]
    accelerator = Accelerator(mixed_precision=mixed, cpu=device.type == "cpu", kwargs_handlers=handlers)
    if accelerator.num_processes != ranks.world:  # it would train replicas that never meet
        raise LigatureError(
            f"accelerate sees {accelerator.num_processes} of {ranks.world} ranks; start it by `ligature launch`"
        )
    named = {name: parameter for name, parameter in task.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(
        parameter_groups(task, named, recipe.optimizer.weight_decay),
        betas=(recipe.optimizer.betas[0], recipe.optimizer.betas[1]),
    )
    losses, prepared = accelerator.prepare(task, optimizer)
    sick = SickSteps(recipe.training.sick_steps)
    step, best = 0, -1.0
    if (resumed := find_resume(run, ranks)) is not None:
        state = resume(resumed, task, optimizer, named, sick)
        if state.get("frozen", task.frozen) != task.frozen:
            raise CheckpointError(
                f"{recipe.checkpoint} now leads to another checkpoint than this run began with, and its model is used as it is; "
                f"make it lead to {state['frozen']} again"
            )
        stream.load_state_dict(state["stream"])
        step, best = state["step"], state["best_rsum"]
        if ranks.first:
            print(f"going on from {resumed} at step {step}", flush=True)
    elif ranks.first:
        print(
            f"fine-tuning {task.about} on {recipe.dataset}, {ranks.world} x {device.type}",
            flush=True,
        )

    def take_step(batch: dict[str, Any], epoch: float, step: int) -> dict[str, Tensor]:
        for group in optimizer.param_groups:
            group["lr"] = group["lr_share"] * recipe.optimizer.lr_at(step, steps)
        task.begin_step(epoch)
        torch.manual_seed(derived_seed(recipe.training.seed, step, ranks.rank))
        watchdog.enter_collective()
        loss, figures = losses(retrieval_batch(batch, recipe.training.seed, device))
        accelerator.backward(loss)
        norm = torch.nn.utils.clip_grad_norm_(named.values(), recipe.optimizer.clip_norm or math.inf)
        mean_loss = float(sum_over_ranks(figures["loss"])) / ranks.world
        if sick.admits(mean_loss, float(norm)):
            prepared.step()
        prepared.zero_grad()
        lr = torch.tensor(recipe.optimizer.lr_at(step, steps))
        return figures | {"lr": lr, "gradient_norm": norm} | task.extra_figures()

    def measure() -> dict[str, float]:
        assert validation is not None
        training = task.training
        similarity = task.eval().similarity(validation, ranks, device, 64, recipe.data.workers)
        task.train(training)
        return {f"validation/{name}": value for name, value in recalls(similarity, validation.caption_image).items()}

    def commit(step: int, best: float, improved: bool) -> Write | None:
        return save(run, recipe, task, optimizer, named, stream, sick, step, best, improved) if ranks.first else None

    def go_back(healthy: int) -> int:
        return resume(find_healthy(run, ranks, healthy), task, optimizer, named, sick)["step"]

    steps = recipe.training.total_steps(len(stream))
    if ranks.first and (caveat := task.caveat(steps * recipe.training.global_batch / len(stream))):
        print(f"ligature: {caveat}", file=sys.stderr)
    stage = Stage(take_step, measure if validation else None, commit, go_back)
    run_loop(run, recipe.training, stream, stage, sick, watchdog, ranks, device, step, best)


def retrieval_batch(batch: dict[str, Any], seed: int, device: torch.device) -> MicroBatch:
    """A batch of the stream as the heads read it; its keys are the model's own features, which come later."""
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


def resume(
    folder: Path,
    task: RetrievalTask,
    optimizer: torch.optim.Optimizer,
    named: dict[str, nn.Parameter],
    sick: SickSteps,
) -> dict[str, Any]:
    """Restore everything but the data's cursor from a checkpoint. -> its `state.json`."""
    state = read_json(folder / "state.json")
    sick.load(state.get("sick"))
    copy_weights(task.stored(), read_tensors(folder, "model"), folder)
    load_moments(optimizer, named, read_tensors(folder, "optimizer"))
    return state


def parameter_groups(task: RetrievalTask, named: dict[str, nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's groups, by share of the learning rate; vectors (norms, biases, the temperature) do not decay."""
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in named.items():
        groups.setdefault((task.lr_share(name), parameter.ndim > 1), []).append(parameter)
    return [
        {"params": parameters, "lr_share": share, "weight_decay": weight_decay if matrices else 0.0}
        for (share, matrices), parameters in groups.items()
    ]


MOMENTS = ("exp_avg", "exp_avg_sq", "step")
"""Adam's state of a parameter. `step` too: a parameter that was frozen at first has taken fewer than the run."""


def load_moments(optimizer: torch.optim.Optimizer, named: dict[str, nn.Parameter], moments: dict[str, Tensor]) -> None:
    """Restore Adam's state by parameter name; those that had not learned yet have none."""
    for name, parameter in named.items():
        optimizer.state.pop(parameter, None)
        if f"step.{name}" in moments:
            state = {moment: moments[f"{moment}.{name}"] for moment in MOMENTS}
            optimizer.state[parameter] = {
                moment: value if moment == "step" else value.to(parameter.device) for moment, value in state.items()
            }


def save(
    run: RunFolder,
    recipe: FinetuneRecipe,
    task: RetrievalTask,
    optimizer: torch.optim.Optimizer,
    named: dict[str, nn.Parameter],
    stream: ShardStream,
    sick: SickSteps,
    step: int,
    best: float,
    improved: bool,
) -> Write:
    """Copy the model, Adam's moments and the cursor. -> what writes them into a checkpoint."""
    moments = (
        (f"{moment}.{name}", optimizer.state[parameter][moment])
        for name, parameter in named.items()
        if parameter in optimizer.state
        for moment in MOMENTS
    )
    tensors = {
        "model": host_copies(task.stored().items(), keep=True),
        "optimizer": host_copies(moments, keep=True),
    }
    state = {"step": step, "best_rsum": best, "stream": stream.state_dict(), "sick": sick.state_dict()}
    state["frozen"] = task.frozen
    values = copy.deepcopy({"state": state, "model": task.describe(f"fine-tuned-on {recipe.dataset}")})

    def write_more(folder: Path) -> None:
        task.tokenizer.save(folder)
        write_recipe(folder / "config.yaml", recipe)

    def write(folder: Path, staging: Path) -> None:
        write_checkpoint(folder, tensors, values, write_more, staging)

    return lambda: run.checkpoints.try_commit(step, improved, write)
