"""A pretraining run, told from top to bottom by `train`. The loop it shares with fine-tuning is `training/loop.py`.

Tested in tests/end_to_end/test_killed.py.
"""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_tools.in_order.collection import Collection, validation_collection
from data_tools.pixels.feature_blocks import CachedViews
from data_tools.pixels.transforms import TrainTransform
from data_tools.stream.examples import Preparation
from data_tools.stream.order import derived_seed
from data_tools.stream.shard_stream import open_stream
from data_tools.stream.training_set import TrainingSet, open_training_set
from data_tools.tokenizer import ABSENT, CaptionTokenizer, load_tokenizer, train_tokenizer
from pretrain.codebook_health import CodebookHealth, warning
from pretrain.config import PretrainRecipe, divide_batch
from pretrain.encode import Encodings, encode_collection
from pretrain.engine import Engine
from pretrain.feature_cache import training_features, validation_features
from pretrain.model.alignment_model import IMAGE, TEXT, AlignmentModel
from pretrain.model.config import TextEncoderConfig
from pretrain.model.parts import Freezing
from pretrain.step_profile import StepProfile
from pretrain.task import PretrainTask
from pretrain.weights.architecture import adopt_architecture
from pretrain.weights.begin_from import begin_from
from pretrain.weights.load import copy_weights, describe_model, find_checkpoint
from pretrain.weights.packages import model_folder
from pretrain.weights.starting import load_starting_weights
from pretrain.weights.text_tower import describe_encoder, described_by, fit_tokenizer
from retrieval.protocols import recalls
from runtime.checkpoint import checkpoint_hash, read_tensors, verify_checkpoint, write_checkpoint
from runtime.checkpoint_writer import Write, host_copies
from runtime.errors import RecipeError
from runtime.files import read_json
from runtime.ranks import barrier, run_on_first, sum_over_ranks
from runtime.recipe import write_recipe
from training.averages import WeightAverage
from training.context import RunContext, hold_run
from training.loop import TrainingLoop
from training.resume import find_resume
from training.sick_steps import SickSteps
from training.stage import LoopState, Stage, Validation

TOKENIZER_CAPTIONS = 2_000_000
"""The most captions that a tokenizer is trained on."""


def pretrain(recipe: PretrainRecipe) -> Path:
    """Train by the recipe, or resume from the run's last checkpoint.

    Returns:
        The run's folder.

    Raises:
        Interrupted: a signal asked the run to stop; its state is saved.
        LigatureError: any other mistake, with what to do about it.
    """
    return hold_run(recipe, train)


def train(recipe: PretrainRecipe, context: RunContext) -> None:
    """Run one rank's part of the run, from its last checkpoint to its end."""
    ranks, device, watchdog = context.ranks, context.device, context.watchdog
    micro_batch, accumulation = divide_batch(recipe.training.global_batch, recipe.training.micro_batch, ranks.world)

    # Open the data. Mistakes in its paths show before the run's folder is touched.
    data = open_training_set(recipe.data)
    folder = recipe.data.validation
    validation = validation_collection(folder, recipe.data.select_on_test) if folder else None

    # A text encoder of `transformers` is described by its weights, or by the model that the run goes on or begins from.
    known = recipe.checkpoint or context.folder.checkpoints.steps()
    text = recipe.model.text if known else describe_encoder(recipe.model.text)

    # Hold the run's folder and decide what to start from.
    watchdog.enter_phase("taking the run", 0)
    context.folder.open(recipe, ranks)
    watchdog.enter_phase("looking for checkpoints", 0)
    checkpoint = find_resume(context)
    source = find_source(recipe, context) if checkpoint is None else None
    if known_model := checkpoint or source:
        text = described_by(known_model, text)

    watchdog.enter_phase("making the tokenizer", 0)
    tokenizer = prepare_tokenizer(with_text(recipe, text), context, data, source)
    recipe = with_text(recipe, fit_tokenizer(text, tokenizer))
    check_mask(recipe, tokenizer)

    # The model, on the CPU until its first weights are loaded.
    adopt_architecture(recipe.model, checkpoint or source)
    torch.manual_seed(recipe.training.seed)
    model = AlignmentModel(recipe.model, tokenizer.vocabulary)
    watchdog.enter_phase("loading weights", 0)
    teacher_weights = None
    if checkpoint is None:
        report, teacher_weights = load_first_weights(model, source)
        if ranks.first:
            if source:
                context.folder.write("begun_from.json", {"checkpoint": str(source), "hash": checkpoint_hash(source)})
            print("\n".join([describe(model, recipe, context, (micro_batch, accumulation)), *report]), flush=True)
    else:
        load_constants(model, checkpoint)
    model.to(device)
    features = training_features(recipe.data, data.reader, model, context)
    if validation is not None:
        validation.features = validation_features(recipe.data, validation, model, context)

    # The task (student, teacher, queue, objectives) and the engine that trains its student.
    task = PretrainTask(recipe, model, tokenizer, ranks, device)
    if teacher_weights:
        task.teacher.load(task.teacher.averages | teacher_weights)
    task.before_collective = watchdog.enter_collective
    training = recipe.training.for_world_size(ranks.world)
    engine = Engine(task.student, recipe.optimizer, training, micro_batch, accumulation, device)
    task.gathered = engine.gathered

    views = 2 if recipe.teacher.second_view else 1
    transform = (
        CachedViews(features, views)
        if features
        else TrainTransform(recipe.model.image.image_size, recipe.data.augment, views)
    )
    batch_size = micro_batch * accumulation
    stream = open_stream(
        recipe.data,
        data,
        batch_size,
        ranks,
        recipe.training.seed,
        Preparation(transform, tokenizer),
        context.folder.quarantine,
        device,
    )

    state = LoopState(stream, SickSteps(recipe.training.sick_steps))
    profile = StepProfile(recipe.profile if ranks.first else 0, task.student.model, task.teacher.model, device)
    steps = recipe.training.total_steps(len(data))
    stage = Pretraining(recipe, context, task, engine, state, profile, validation, micro_batch, steps)
    if checkpoint is not None:
        state.resume(stage.restore(checkpoint))
        if ranks.first:
            print(f"going on from {checkpoint} at step {state.step}", flush=True)

    if ranks.first and (caveat := stage.freezing.caveat(stage.epochs)):
        print(f"ligature: {caveat}", file=sys.stderr)

    TrainingLoop(context, recipe.training, stage, state).run()
    profile.finish()


@dataclass
class Pretraining(Stage):
    """Pretraining as the loop drives it: a step, a validation, a checkpoint."""

    recipe: PretrainRecipe
    context: RunContext
    task: PretrainTask
    engine: Engine
    state: LoopState
    profile: StepProfile
    validation: Collection | None
    micro_batch: int
    """Samples that one forward pass takes on this rank."""
    steps: int
    """Training steps of the whole run."""

    def __post_init__(self) -> None:
        self.validates, self.health = self.validation is not None, CodebookHealth()
        model = self.task.student.model
        self.freezing = Freezing(self.task.student, model.parts(), vars(self.recipe.optimizer.freeze_until))
        momentum = self.recipe.training.ema_momentum
        self.average = None if momentum is None else WeightAverage(self.engine.masters(), momentum)
        self.epochs = self.steps * self.recipe.training.global_batch / len(self.state.stream)

    def take_step(self, batch: dict[str, Any], epoch: float, step: int) -> dict[str, Tensor]:
        """Train on one batch; see `Stage.take_step`."""
        task, engine, training = self.task, self.engine, self.recipe.training
        lr = self.recipe.optimizer.lr_at(step, self.steps, epoch, self.epochs)
        engine.set_lr(lr)
        engine.freeze(frozen := self.freezing.apply(epoch))
        self.state.sick.begin_step(frozen)
        micro_batches, figures = task.prepare(batch, epoch, self.micro_batch)
        losses: list[dict[str, Tensor]] = []
        for number, inputs in enumerate(micro_batches):
            # Dropout is a function of (seed, step, rank, micro-batch), so nothing of it needs saving.
            torch.manual_seed(derived_seed(training.seed, step, self.context.ranks.rank, number))
            loss, named = engine.module(inputs)
            engine.backward(loss)
            losses.append(named)
            # The engine applies the gradients at the last micro-batch only, and asks `admits` there.
            norm = engine.step(partial(self._admits, losses))
        if engine.applied:
            task.finish(engine.masters())
            if self.average:
                self.average.update(engine.masters())
        if (step + 1) % training.log_every == 0:
            figures |= {"teacher_distance": task.teacher.distance(engine.masters())}
        figures |= {"lr": torch.tensor(lr), "gradient_norm": torch.tensor(norm)}
        self.profile.after_step()
        return figures | mean_over_micro_batches(losses)

    def _admits(self, losses: list[dict[str, Tensor]], norm: float) -> bool:
        """Return whether the step may be applied, by its mean loss over all ranks and its gradient norm. A collective."""
        loss = torch.stack([figures["loss"] for figures in losses]).mean()
        return self.state.sick.admits(float(sum_over_ranks(loss)) / self.context.ranks.world, norm)

    def validate(self) -> Validation:
        """Return R@1, R@5 and R@10 in percent both ways by the features' cosine, and their sum."""
        recipe, context, tokenizer = self.recipe, self.context, self.task.tokenizer
        assert self.validation is not None
        model = self.task.student.model
        # At stage 3 ranks encode different numbers of batches, so each needs whole weights. An average needs a model to lie in.
        if self.engine.stage == 3 or self.average:
            model = AlignmentModel(recipe.model, tokenizer.vocabulary).to(context.device)
            self.engine.copy_weights(model)
        for name, average in self.average.weights.items() if self.average else ():
            model.get_parameter(name).data.copy_(average)
        encodings = encode_collection(
            model, tokenizer, self.validation, context.ranks, self.micro_batch, recipe.data.workers
        )
        cosines = (encodings.image @ encodings.text.T).numpy()
        validation = Validation.of_recalls(recalls(cosines, self.validation.caption_image))
        validation.figures |= self._codebook_figures(model, encodings)
        return validation

    def _codebook_figures(self, model: AlignmentModel, encodings: Encodings) -> dict[str, float]:
        """Measure the codebook on held-out features, where it has a loss and has started. On the first rank alone: it takes k-means."""
        codebook = self.recipe.objectives.codebook
        if not self.context.ranks.first or not codebook.weight or self.task.codebook.starts:
            return {}
        assert self.validation is not None
        with torch.no_grad():
            codewords = model.codewords()
            image = model.codebook_features(encodings.image.to(codewords.device), IMAGE).cpu()
            text = model.codebook_features(encodings.text.to(codewords.device), TEXT).cpu()
        caption_image = torch.from_numpy(self.validation.caption_image)
        figures = self.health.measure(image, text, caption_image, codewords.cpu())
        if not codebook.frozen and (line := warning(figures)):
            print(f"ligature: {line}", file=sys.stderr)
        return figures

    def save(self, improved: bool) -> Write | None:
        """Copy everything to the first rank's memory; see `Stage.save`."""
        recipe, task, engine, first = self.recipe, self.task, self.engine, self.context.ranks.first
        tensors = {
            "model": host_copies(chain(engine.masters(), task.saved_constants().items()), first),
            "optimizer": host_copies(engine.moments(), first),
            "teacher": host_copies(task.teacher.averages.items(), first),
            "queue": host_copies(task.queue.state_dict().items(), first),
        }
        if task.potentials is not None:
            tensors["transport"] = host_copies([("potentials", task.potentials)], first)
        if self.average:
            tensors["ema"] = host_copies(self.average.weights.items(), first)
        if not first:
            return None
        description = describe_model(recipe.model, recipe.data.caption_tokens, "pretrained")
        # A copy: training goes on and changes the state while a thread writes it.
        state = self.state.state_dict() | {"part_steps": engine.part_steps}
        values = copy.deepcopy({"state": state, "model": description})
        step, checkpoints = self.state.step, self.context.folder.checkpoints

        def write_texts(folder: Path) -> None:
            task.tokenizer.save(folder)
            write_recipe(folder / "config.yaml", recipe)

        def write(folder: Path, staging: Path) -> None:
            write_checkpoint(folder, tensors, values, write_texts, staging)

        return lambda: checkpoints.try_commit(step, improved, write)

    def restore(self, checkpoint: Path) -> dict[str, Any]:
        """Restore everything but the data cursor; see `Stage.restore`."""
        verify_checkpoint(checkpoint)
        task, sick = self.task, self.state.sick
        saved = read_json(checkpoint / "state.json")
        sick.load(saved.get("sick"))
        applied = saved["step"] - sick.skipped  # Adam counts the steps that were applied
        weights = read_tensors(checkpoint, "model")
        masters = {name: weight for name, weight in weights.items() if name not in task.constants}
        self.engine.load(masters, read_tensors(checkpoint, "optimizer"), applied, saved.get("part_steps", {}))
        task.teacher.load(read_tensors(checkpoint, "teacher"))
        task.queue.load_state_dict(read_tensors(checkpoint, "queue"))
        if self.average:
            self.average.load(read_tensors(checkpoint, "ema"))
        task.potentials = None
        if (checkpoint / "transport.safetensors").exists():
            task.potentials = read_tensors(checkpoint, "transport")["potentials"].to(task.device)
        return saved


def find_source(recipe: PretrainRecipe, context: RunContext) -> Path | None:
    """Return the folder of the model that a new run begins from, or None. A collective.

    The first rank decides: the source may be a run that is still training, and another rank might see a newer checkpoint.
    """
    name = recipe.checkpoint
    return run_on_first(context.ranks, lambda: find_checkpoint(name)) if name else None


def load_first_weights(model: AlignmentModel, source: Path | None) -> tuple[list[str], dict[str, Tensor] | None]:
    """Load a new run's weights into `model`: those of the recipe's `weights` keys, then those of `source`.

    Returns:
        Lines that report what was and was not used, and the teacher's weights by name when `source` has a teacher.
    """
    report = load_starting_weights(model)
    return begin_from(source, model) if source else (report, None)


def load_constants(model: AlignmentModel, checkpoint: Path) -> None:
    """Copy a checkpoint's frozen weights and batch norm statistics into the model; the engine restores the rest."""
    if constants := model.constants():
        weights = read_tensors(checkpoint, "model")
        copy_weights(constants, {name: weights[name] for name in constants if name in weights}, checkpoint)


def prepare_tokenizer(
    recipe: PretrainRecipe, context: RunContext, data: TrainingSet, source: Path | None
) -> CaptionTokenizer:
    """Return the run's tokenizer. The first rank makes it, then all ranks read it from the run's folder. A collective.

    As long as the run has no checkpoint it is made anew: an earlier start that failed may have had another recipe.

    Args:
        recipe: says whether to train a tokenizer on the captions or to load one.
        context: this rank's place in the run.
        data: the captions to train on.
        source: the model that the run begins from; its tokenizer is used unless one is to be trained.
    """
    config, folder = recipe.data, context.folder
    exists = (folder.path / "tokenizer.json").exists()
    if context.ranks.first and not (folder.checkpoints.steps() and exists):
        if config.tokenizer == "train":
            captions = data.some_captions(TOKENIZER_CAPTIONS)
            tokenizer = train_tokenizer(captions, config.vocabulary, config.caption_tokens, config.punctuation)
        else:
            tokenizer = load_tokenizer(
                source or model_folder(config.tokenizer, "data.tokenizer"), config.caption_tokens
            )
            if not config.punctuation:
                tokenizer.drop_punctuation()
        fit_tokenizer(recipe.model.text, tokenizer)
        tokenizer.save(folder.path)
    barrier()
    return load_tokenizer(folder.path, config.caption_tokens)


def with_text(recipe: PretrainRecipe, text: TextEncoderConfig) -> PretrainRecipe:
    """Return the recipe with another `model.text`. The run's config.yaml keeps what the user wrote; checkpoints hold all of it."""
    return replace(recipe, model=replace(recipe.model, text=text))


def check_mask(recipe: PretrainRecipe, tokenizer: CaptionTokenizer) -> None:
    """Raise RecipeError if words are to be masked with a tokenizer that has no token for it, as CLIP's."""
    if recipe.objectives.masked_language.weight and tokenizer.mask == ABSENT:
        raise RecipeError(
            f"the tokenizer of {recipe.data.tokenizer} has no mask token, as CLIP's, so words cannot be masked; set "
            "objectives.masked_language.weight to 0"
        )


def describe(model: AlignmentModel, recipe: PretrainRecipe, context: RunContext, batch: tuple[int, int]) -> str:
    """Return two lines about the run: its size and world, and how its global batch is divided.

    Args:
        model: the student.
        recipe: the run's recipe.
        context: this rank's place in the run.
        batch: the micro-batch size and the number of accumulated micro-batches, as `divide_batch` returns them.
    """
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    world, (micro_batch, accumulation) = context.ranks.world, batch
    training = recipe.training.for_world_size(world)
    return (
        f"{recipe.name}: {millions:.1f} M parameters on {world} x {context.device.type}, {training.precision}, ZeRO {training.zero_stage}\n"
        f"global batch {training.global_batch} = {world} ranks x {accumulation} accumulated x {micro_batch}"
    )


def mean_over_micro_batches(figures: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the mean of each named figure over a step's micro-batches."""
    return {name: torch.stack([one[name].float().reshape(()) for one in figures]).mean() for name in figures[0]}
