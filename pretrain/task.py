"""The pretraining task: student, teacher, queue and objectives in one step. The training loop never knows the objective.

A step runs in this order:

1. `PretrainTask.prepare`: the teacher encodes the global batch, and the transport plans are solved.
2. `Student.forward`, under the engine, and the backward pass.
3. The optimizer's step.
4. `PretrainTask.finish`: only now the teacher moves and the queue takes in the batch. A skipped step skips this too.

To add an objective, read `pretrain/objectives/registry.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from data_tools.pixels.packed import render_views
from data_tools.stream.order import derived_seed, uniforms
from data_tools.tokenizer import CaptionTokenizer
from pretrain.config import PretrainRecipe
from pretrain.feature_queue import FeatureQueue
from pretrain.model.activations import checkpoint_activations
from pretrain.model.alignment_model import IMAGE, TEXT, AlignmentModel, TextBatch
from pretrain.moving_codebook import MovingCodebook
from pretrain.objectives.codebook import CodebookUsage, solve_plans
from pretrain.objectives.levels import gather_level_keys
from pretrain.objectives.masked_language import mask_captions, word_logits
from pretrain.objectives.matching import gather_inputs
from pretrain.objectives.registry import make_objectives, objective_weights
from pretrain.objectives.state import Keys, MaskedText, MicroBatch, Plans, StudentState
from pretrain.teacher import Teacher
from runtime.errors import RecipeError
from runtime.ranks import Ranks, gather_rows
from training.profile import profiled

# What the random numbers of one sample are for. Each purpose has its own stream of numbers.
NEGATIVES, MASKS, CODEWORDS = 1, 2, 3


class Student(nn.Module):
    """The module that the engine wraps: one forward from inputs to losses."""

    def __init__(self, model: AlignmentModel, recipe: PretrainRecipe) -> None:
        super().__init__()
        self.model = model
        self.weights = objective_weights(recipe.objectives)
        self.objectives = make_objectives(recipe.objectives)

    def forward(self, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted sum of the losses, and every named loss and figure, detached.

        Raises:
            RecipeError: an objective returned no loss under its own name.
        """
        with profiled("student"):
            tokens, states, levels = self.model.encode(batch.images, batch.text.ids, batch.text.mask)
        state = StudentState(self.model, batch, tokens, states, levels)
        precise = torch.float64 if tokens.dtype == torch.float64 else torch.float32
        total, figures = torch.zeros((), device=tokens.device, dtype=precise), dict[str, Tensor]()
        for name, objective in self.objectives.items():
            with profiled(name):
                losses = objective(state)
            if name not in losses:
                raise RecipeError(
                    f"objectives.others.{name} returned {', '.join(losses) or 'nothing'}, but not its loss `{name}`; name the loss so"
                )
            total = total + self.weights[name] * losses[name]
            figures |= {key: value.detach() for key, value in losses.items()}
        figures["temperature"] = self.model.temperature().detach()
        return total, {**figures, "loss": total.detach()}


class PretrainTask:
    """Everything in a step except the optimizer."""

    def __init__(
        self,
        recipe: PretrainRecipe,
        model: AlignmentModel,
        tokenizer: CaptionTokenizer,
        ranks: Ranks,
        device: torch.device,
    ) -> None:
        self.recipe, self.tokenizer, self.ranks, self.device = recipe, tokenizer, ranks, device
        self.student = Student(model, recipe)
        precision = torch.bfloat16 if recipe.training.precision == "bf16" else torch.float32
        self.teacher = Teacher(model, recipe.teacher.ema_momentum, precision)
        if recipe.training.compile:
            model.compile_layers()
            self.teacher.model.compile_layers()
        if recipe.training.checkpoint_activations:
            # The student alone: the teacher keeps no activations. After compiling, because dynamo does not look behind it.
            checkpoint_activations(model.layers())
        self.constants = {name: tensor.cpu().clone() for name, tensor in model.constants().items()}
        """Frozen weights and batch norm statistics in float32, for checkpoints: the engine casts its own copy."""
        self.codebook = MovingCodebook(model, recipe.objectives.codebook, device)
        self.queue = FeatureQueue(recipe.teacher.queue, recipe.model.feature_dim, device)
        self.potentials: Tensor | None = None
        """(2, codewords): the potentials of the last step's plans, from which the next step starts with `transport.warm_start`."""
        self.before_collective: Callable[[], None] = lambda: None
        """Called in each step before this rank waits for the others, when its own part (the teacher's forward) is done."""
        self.gathered: Callable[[Iterable[nn.Parameter]], AbstractContextManager[Any]] = lambda parameters: (
            nullcontext()
        )
        """Makes parameters whole that are read outside the student's forward. The engine sets its own, for ZeRO stage 3."""
        self._usage = CodebookUsage(recipe.model.codewords, recipe.training.global_batch)
        # From `prepare`, for `finish`: the global batch's teacher features and image ids, its plans' potentials, its codewords' averages.
        self._gathered_batch: tuple[Tensor, Tensor, Tensor] | None = None
        self._new_potentials: Tensor | None = None
        self._averages: Tensor | None = None

    def saved_constants(self) -> dict[str, Tensor]:
        """Return what a checkpoint holds of the model beside its trained parameters."""
        return self.constants | self.codebook.tensors()

    @torch.no_grad()
    def prepare(
        self, batch: dict[str, Any], epoch: float, micro_batch: int
    ) -> tuple[list[MicroBatch], dict[str, Tensor]]:
        """Make the student's micro-batches from this rank's batch, with the teacher's targets. A collective.

        Args:
            batch: as ShardStream yields it.
            epoch: epochs consumed so far; distillation ramps up over the first.
            micro_batch: samples in each micro-batch.

        Returns:
            The micro-batches, and figures to log.
        """
        objectives, weights = self.recipe.objectives, self.student.weights
        views = render_views(batch["images"], self.device)
        text = TextBatch(
            batch["ids"].to(self.device, non_blocking=True), batch["mask"].to(self.device, non_blocking=True)
        )
        ids = batch["image_ids"].to(self.device)
        size = len(ids)
        parts = [slice(start, start + micro_batch) for start in range(0, size, micro_batch)]
        distill_weight = self.recipe.teacher.distill_weight * min(1.0, epoch)

        model = self.teacher.model
        with profiled("teacher"):
            encoded = [model.encode(views[-1, part], text.ids[part], text.mask[part]) for part in parts]
            tokens = [image_tokens for image_tokens, _, _ in encoded]
            image_features = torch.cat([model.image_features(image_tokens) for image_tokens in tokens])
            text_features = torch.cat(
                [
                    model.text_features(states, text.mask[part])
                    for (_, states, _), part in zip(encoded, parts, strict=True)
                ]
            )
        self.before_collective()
        with profiled("communication"):
            gathered = gather_rows(image_features), gather_rows(text_features), gather_rows(ids)
        self._gathered_batch = gathered
        past = self.queue.keys() if epoch >= self.recipe.teacher.queue_from_epoch else None
        with profiled("queue"):
            keys = join_keys(gathered, past)
        rows = torch.arange(size, device=self.device) + self.ranks.rank * size
        level_keys = gather_level_keys([levels for _, _, levels in encoded], gathered[2]) if weights["levels"] else []
        needs_inputs = weights["matching"] and objectives.matching.negatives == "all_ranks"
        global_inputs = gather_inputs(views[0], text, self.ranks) if needs_inputs else None
        draws = torch.from_numpy(uniforms(self._seed(NEGATIVES), batch["positions"].numpy(), 2)).to(self.device)
        with profiled("teacher"):
            # On the host, where the words still are: which of them are masked is known without waiting for the device.
            words = TextBatch(batch["ids"], batch["mask"])
            masked = self._mask(words, text.mask, batch["positions"], tokens, parts, distill_weight)
        with profiled("transport"):
            plans, figures = self._plan(views[0], text, parts, gathered, epoch)
        micro_batches = [
            MicroBatch(
                images=views[0, part],
                text=TextBatch(text.ids[part], text.mask[part]),
                image_ids=ids[part],
                rows=rows[part],
                draws=draws[part],
                keys=keys,
                distill_weight=distill_weight,
                masked=masked[number],
                plans=Plans(plans.image[rows[part]], plans.text[rows[part]]) if plans else None,
                level_keys=level_keys,
                global_inputs=global_inputs,
            )
            for number, part in enumerate(parts)
        ]
        if self.recipe.teacher.keys == "local":  # ALBEF's way: a sample's own micro-batch instead of the global batch
            for inputs in micro_batches:
                own = keys.image[inputs.rows], keys.text[inputs.rows], inputs.image_ids
                inputs.keys = join_keys(own, past)
                inputs.rows = torch.arange(len(inputs.rows), device=self.device)
        return micro_batches, figures | {"distill_weight": torch.tensor(distill_weight)}

    def finish(self, masters: Iterable[tuple[str, Tensor]]) -> None:
        """Move the teacher and let the batch join the queue, after an optimizer step. Not called for a skipped step.

        Args:
            masters: name and float32 weight of every parameter of the student, after the step.
        """
        assert self._gathered_batch is not None, "prepare comes before finish"
        with profiled("EMA"):
            self.teacher.update(masters)
        with profiled("transport"):
            self.codebook.move(*self._gathered_batch[:2], self._averages)
        with profiled("queue"):
            self.queue.enqueue(*self._gathered_batch)
        self.potentials = self._new_potentials
        self._gathered_batch = self._new_potentials = self._averages = None

    def _seed(self, purpose: int) -> int:
        return derived_seed(self.recipe.training.seed, purpose)

    def _mask(
        self,
        words: TextBatch,
        mask: Tensor,
        positions: Tensor,
        tokens: list[Tensor],
        parts: list[slice],
        distill_weight: float,
    ) -> Sequence[MaskedText | None]:
        """Mask the captions, and let the teacher predict the masked words where its prediction is a target.

        Args:
            words: (samples, words), on the host.
            mask: (samples, words) bool, on the device.
            positions: (samples,) int64.
            tokens: the teacher's image tokens (micro-batch, tokens, width) of each part.
            parts: the rows of each micro-batch.
            distill_weight: of this step.
        """
        if not self.student.weights["masked_language"]:
            return [None] * len(parts)
        config = self.recipe.objectives.masked_language
        masked_parts = mask_captions(
            words, mask, positions, self.tokenizer, config, self._seed(MASKS), parts, self.ranks.world
        )
        if distill_weight:
            model = self.teacher.model
            for masked, image_tokens in zip(masked_parts, tokens, strict=True):
                images = model.fusion_encoder.prepare_images(image_tokens)
                masked.teacher_logits = word_logits(model, masked.text, masked.word_indices, images)
        return masked_parts

    def _plan(
        self,
        images: Tensor,
        text: TextBatch,
        parts: list[slice],
        gathered: tuple[Tensor, Tensor, Tensor],
        epoch: float,
    ) -> tuple[Plans | None, dict[str, Tensor]]:
        """Solve the plans of the global batch, and measure the codebook's usage.

        Args:
            images: (samples, …), this rank's, as the student sees them.
            text: this rank's captions.
            parts: the rows of each micro-batch.
            gathered: the teacher's features of the global batch, and image ids.
            epoch: epochs consumed so far.
        """
        config, transport, model = self.recipe.objectives.codebook, self.recipe.transport, self.student.model
        self.codebook.begin_centres(*gathered[:2])
        self.codebook.publish(model)
        if not config.weight or epoch < config.from_epoch:
            return None, {}
        features = self._student_features(images, text, parts) if config.features == "student" else None
        own = tuple(gather_rows(side) for side in features) if features else gathered[:2]
        samples, sides = len(gathered[2]), list(own)
        from_epoch = transport.queue_from_epoch
        if from_epoch is None:
            from_epoch = self.recipe.teacher.queue_from_epoch
        if transport.samples == "batch+queue" and epoch >= from_epoch:
            count = transport.queue_samples
            past = self.queue.keys()[:2] if count is None else self.queue.newest(count)
            sides = [torch.cat(pair) for pair in zip(own, past, strict=True)]
        image_nd, text_nd = (model.codebook_features(side, way) for side, way in zip(sides, (IMAGE, TEXT), strict=True))
        if self.codebook.starts:
            self.codebook.start_codewords(image_nd, text_nd, transport, self._seed(CODEWORDS))
        assert model.codebook is not None, "a recipe whose codebook has a weight has codewords"
        learned = [model.codebook] if isinstance(model.codebook, nn.Parameter) else []
        with self.gathered(learned):
            codewords = model.codewords()
        averages = self.codebook.codewords is not None and not config.frozen
        solved = solve_plans(image_nd, text_nd, codewords, samples, transport, self.potentials, averages)
        self._new_potentials = solved.potentials if transport.warm_start else None
        self._averages = solved.averages
        usage = self._usage.update(torch.stack([image_nd, text_nd]), codewords, samples)
        return solved.plans, solved.figures | usage

    def _student_features(self, images: Tensor, text: TextBatch, parts: list[slice]) -> tuple[Tensor, Tensor]:
        """Return the student's features of this rank's images and captions, (samples, feature_dim) each."""
        model, training = self.student.model, self.student.model.training
        model.eval()  # dropout is not seeded here, and a plan must not depend on what was drawn before it
        image_features = torch.cat([model.image_features(model.image_tokens(images[part])) for part in parts])
        text_features = torch.cat(
            [
                model.text_features(model.text_encoder(text.ids[part], text.mask[part]), text.mask[part])
                for part in parts
            ]
        )
        model.train(training)
        return image_features, text_features


def join_keys(batch: tuple[Tensor, Tensor, Tensor], past: tuple[Tensor, Tensor, Tensor] | None) -> Keys:
    """Join the teacher's image features, text features and image ids of a batch with those of the queue, if any."""
    if past is None:
        return Keys(*batch)
    return Keys(*(torch.cat(pair) for pair in zip(batch, past, strict=True)))
