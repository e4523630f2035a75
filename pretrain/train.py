"""A pretraining run, to be read from top to bottom; the loop it shares with fine-tuning is in `loop.py`."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_tools.in_order.collection import Collection, validation_collection
from data_tools.pixels.transforms import TrainTransform
from data_tools.stream.examples import Preparation
from data_tools.stream.order import derived_seed
from data_tools.stream.shard_stream import ShardStream, open_stream
from data_tools.stream.training_set import TrainingSet, open_training_set
from data_tools.tokenizer import CaptionTokenizer, load_tokenizer, train_tokenizer
from pretrain.config import PretrainRecipe, divide_batch
from pretrain.encode import encode_collection
from pretrain.engine import Engine
from pretrain.model.alignment_model import AlignmentModel
from pretrain.step_profile import StepProfile
from pretrain.task import PretrainTask
from pretrain.weights.begin_from import begin_from
from pretrain.weights.load import describe_model, find_checkpoint
from pretrain.weights.starting import load_starting_weights
from retrieval.protocols import recalls
from runtime.checkpoint import checkpoint_hash, read_tensors, verify_checkpoint, write_checkpoint
from runtime.checkpoint_writer import Write, host_copies
from runtime.errors import CheckpointError, SickRun
from runtime.files import read_json
from runtime.ranks import Ranks, barrier, run_on_first, sum_over_ranks
from runtime.recipe import write_recipe
from runtime.run_folder import RunFolder
from runtime.watchdog import Watchdog
from training.loop import Stage, hold_run, mean_figures, run_loop
from training.sick_steps import SickSteps

TOKENIZER_CAPTIONS = 2_000_000
"""Captions the tokenizer is trained on, at most."""


def pretrain(recipe: PretrainRecipe) -> Path:
    """Train by the recipe, or go on from its last checkpoint. -> the run's folder.

    Raises Interrupted when a signal asked it to stop (its state is saved), other LigatureErrors for mistakes.
    """
    return hold_run(recipe, train)


def train(recipe: PretrainRecipe, run: RunFolder, ranks: Ranks, device: torch.device, watchdog: Watchdog) -> None:
    """One rank's part of the run, from what is saved of it to its end."""
    micro_batch, accumulation = divide_batch(recipe.training.global_batch, recipe.training.micro_batch, ranks.world)
    data = open_training_set(recipe.data)
    told = recipe.data.validation
    validation = validation_collection(told, recipe.data.select_on_test) if told else None
    watchdog.enter_phase("taking the run", 0)
    run.open(recipe, ranks)
    watchdog.enter_phase("looking for checkpoints", 0)
    resumed = find_resume(run, ranks)
    # The first rank's word: another may see a run that has gone on meanwhile.
    source = (
        run_on_first(ranks, lambda: find_checkpoint(recipe.checkpoint)) if recipe.checkpoint and not resumed else None
    )
    watchdog.enter_phase("making the tokenizer", 0)
    tokenizer = prepare_tokenizer(recipe, run, data, ranks, source)

    torch.manual_seed(recipe.training.seed)
    model = AlignmentModel(recipe.model, tokenizer.vocabulary)
    watchdog.enter_phase("loading weights", 0)
    teacher = None
    if resumed is None:
        report = load_starting_weights(model)
        if source:
            report, teacher = begin_from(source, model)
        if ranks.first:
            if source:
                run.write("begun_from.json", {"checkpoint": str(source), "hash": checkpoint_hash(source)})
            print("\n".join([describe(model, recipe, ranks, device, micro_batch, accumulation), *report]), flush=True)
    model.to(device)
    task = PretrainTask(recipe, model, tokenizer, ranks, device)
    if teacher:
        task.teacher.load(task.teacher.averages | teacher)
    task.before_collective = watchdog.enter_collective
    training = recipe.training.for_world_size(ranks.world)
    engine = Engine(task.student, recipe.optimizer, training, micro_batch, accumulation, device)
    task.gathered = engine.gathered
    views = 2 if recipe.teacher.second_view else 1
    transform = TrainTransform(recipe.model.image.image_size, recipe.data.augment, views)
    batch_size = micro_batch * accumulation
    stream = open_stream(
        recipe.data,
        data,
        batch_size,
        ranks,
        recipe.training.seed,
        Preparation(transform, tokenizer),
        run.quarantine,
        device,
    )
    sick = SickSteps(recipe.training.sick_steps)
    profile = StepProfile(recipe.profile if ranks.first else 0, task.student.model, task.teacher.model, device)
    step, best = 0, -1.0
    if resumed is not None:
        step, best = resume(resumed, task, engine, sick)
        stream.load_state_dict(read_json(resumed / "state.json")["stream"])
        if ranks.first:
            print(f"going on from {resumed} at step {step}", flush=True)

    def take_step(batch: dict[str, Any], epoch: float, step: int) -> dict[str, Tensor]:
        engine.set_lr(
            lr := recipe.optimizer.lr_at(step, steps, epoch, steps * recipe.training.global_batch / len(data))
        )
        micro_batches, figures = task.prepare(batch, epoch, micro_batch)
        parts: list[dict[str, Tensor]] = []

        def admits(norm: float) -> bool:
            loss = torch.stack([part["loss"] for part in parts]).mean()
            return sick.admits(float(sum_over_ranks(loss)) / ranks.world, norm)

        for number, inputs in enumerate(micro_batches):
            # Dropout is a function of where we are, so nothing of it needs saving.
            torch.manual_seed(derived_seed(recipe.training.seed, step, ranks.rank, number))
            loss, named = engine.module(inputs)
            engine.backward(loss)
            parts.append(named)
            norm = engine.step(admits)
        if engine.applied:
            task.finish(engine.masters())
        if (step + 1) % recipe.training.log_every == 0:
            figures |= {"teacher_distance": task.teacher.distance(engine.masters())}
        figures |= {"lr": torch.tensor(lr), "gradient_norm": torch.tensor(norm)}
        profile.after_step()
        return figures | mean_figures(parts)

    def measure() -> dict[str, float]:
        assert validation is not None
        network = model
        if engine.stage == 3:  # ranks encode different numbers of batches, so each needs whole weights
            network = AlignmentModel(recipe.model, tokenizer.vocabulary).to(device)
            engine.copy_weights(network)
        return validate(network, tokenizer, validation, ranks, device, micro_batch, recipe.data.workers)

    def commit(step: int, best: float, improved: bool) -> Write | None:
        return save(run, recipe, task, engine, stream, sick, step, best, improved, ranks)

    def go_back(healthy: int) -> int:
        return resume(find_healthy(run, ranks, healthy), task, engine, sick)[0]

    steps = recipe.training.total_steps(len(data))
    stage = Stage(take_step, measure if validation else None, commit, go_back)
    run_loop(run, recipe.training, stream, stage, sick, watchdog, ranks, device, step, best)
    profile.finish()


def prepare_tokenizer(
    recipe: PretrainRecipe, run: RunFolder, data: TrainingSet, ranks: Ranks, source: Path | None
) -> CaptionTokenizer:
    """The run's tokenizer: trained or loaded once by the first rank, then read from the run's folder by all. Without a checkpoint
    it is made anew: the recipe may be another one than that of a start which came to none. source: what the run begins from."""
    if ranks.first and not (run.checkpoints.steps() and (run.path / "tokenizer.json").exists()):
        if recipe.data.tokenizer == "train":
            captions = data.some_captions(TOKENIZER_CAPTIONS)
            asked = recipe.data
            made = train_tokenizer(captions, asked.vocabulary, asked.caption_tokens, asked.punctuation)
        else:
            made = load_tokenizer(source or recipe.data.tokenizer, recipe.data.caption_tokens)
            if not recipe.data.punctuation:
                made.drop_punctuation()
        made.save(run.path)
    barrier()
    return load_tokenizer(run.path, recipe.data.caption_tokens)


def describe(
    model: AlignmentModel,
    recipe: PretrainRecipe,
    ranks: Ranks,
    device: torch.device,
    micro_batch: int,
    accumulation: int,
) -> str:
    """What this run is, in two lines."""
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    training = recipe.training.for_world_size(ranks.world)
    return (
        f"{recipe.name}: {millions:.1f} M parameters on {ranks.world} x {device.type}, {training.precision}, ZeRO {training.zero_stage}\n"
        f"global batch {training.global_batch} = {ranks.world} ranks x {accumulation} accumulated x {micro_batch}"
    )


def validate(
    model: AlignmentModel,
    tokenizer: CaptionTokenizer,
    validation: Collection,
    ranks: Ranks,
    device: torch.device,
    batch_size: int,
    workers: int,
) -> dict[str, float]:
    """R@1, R@5 and R@10 in percent both ways by the features' cosine, and their sum."""
    encodings = encode_collection(model, tokenizer, validation, ranks, batch_size, workers)
    return {
        f"validation/{name}": value
        for name, value in recalls((encodings.image @ encodings.text.T).numpy(), validation.caption_image).items()
    }


def save(
    run: RunFolder,
    recipe: PretrainRecipe,
    task: PretrainTask,
    engine: Engine,
    stream: ShardStream,
    sick: SickSteps,
    step: int,
    best: float,
    improved: bool,
    ranks: Ranks,
) -> Write | None:
    """Copy everything to the first rank's memory, a collective. -> what writes it there into a checkpoint; None elsewhere."""
    tensors = {
        "model": host_copies(engine.masters(), ranks.first),
        "optimizer": host_copies(engine.moments(), ranks.first),
        "teacher": host_copies(task.teacher.averages.items(), ranks.first),
        "queue": host_copies(task.queue.state_dict().items(), ranks.first),
    }
    if task.potentials is not None:
        tensors["transport"] = host_copies([("potentials", task.potentials)], ranks.first)
    if not ranks.first:
        return None
    state = {"step": step, "best_rsum": best, "stream": stream.state_dict(), "sick": sick.state_dict()}
    about = describe_model(recipe.model, recipe.data.caption_tokens, "pretrained")
    values = copy.deepcopy({"state": state, "model": about})

    def write_more(folder: Path) -> None:
        task.tokenizer.save(folder)
        write_recipe(folder / "config.yaml", recipe)

    def write(folder: Path, staging: Path) -> None:
        write_checkpoint(folder, tensors, values, write_more, staging)

    return lambda: run.checkpoints.try_commit(step, improved, write)


def find_resume(run: RunFolder, ranks: Ranks) -> Path | None:
    """The newest checkpoint that verifies, as the first rank sees it; None where there is none at all. Raises CheckpointError where
    there are some and none verifies: a run that began anew would throw them away."""

    def find() -> Path | None:
        found, steps = run.checkpoints.newest_valid(), run.checkpoints.steps()
        if found is None and steps:
            raise CheckpointError(
                f"none of the {len(steps)} checkpoints in {run.checkpoints.folder} verifies; bring a whole one back, or remove the folder to begin anew"
            )
        return found

    return run_on_first(ranks, find)


def find_healthy(run: RunFolder, ranks: Ranks, until: int) -> Path:
    """The same, not after step `until`; later ones are thrown away. Raises SickRun where there is none."""
    folder = run_on_first(ranks, lambda: run.checkpoints.newest_valid(until))
    if folder is None:
        raise SickRun(f"no checkpoint of step {until} or before to go back to; start again with a lower optimizer.lr")
    return folder


def resume(folder: Path, task: PretrainTask, engine: Engine, sick: SickSteps) -> tuple[int, float]:
    """Restore everything but the data's cursor from a checkpoint. -> step, best validation so far."""
    verify_checkpoint(folder)
    state = read_json(folder / "state.json")
    sick.load(state.get("sick"))
    applied = state["step"] - sick.skipped  # Adam counts the steps it took
    engine.load(read_tensors(folder, "model"), read_tensors(folder, "optimizer"), applied)
    task.teacher.load(read_tensors(folder, "teacher"))
    task.queue.load_state_dict(read_tensors(folder, "queue"))
    task.potentials = None
    if (folder / "transport.safetensors").exists():
        task.potentials = read_tensors(folder, "transport")["potentials"].to(task.device)
    return state["step"], state["best_rsum"]
