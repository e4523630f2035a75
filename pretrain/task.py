"""The pretraining task: student, teacher, queue and objectives, joined into one step whose losses the loop need not know.

Order of a step: the teacher encodes the global batch, plans are solved, the student goes forward and
backward, the optimizer steps; then, and only then, the teacher moves and the queue takes the batch in.
"""

from __future__ import annotations

import importlib
import math
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from data_tools.pixels.packed import render_views
from data_tools.stream.order import derived_seed, uniforms
from data_tools.tokenizer import CaptionTokenizer
from pretrain.config import OtherObjective, PretrainRecipe
from pretrain.feature_queue import FeatureQueue
from pretrain.model.activations import checkpoint_activations
from pretrain.model.alignment_model import AlignmentModel, TextBatch
from pretrain.objectives.codebook import Codebook, solve_plans, usage
from pretrain.objectives.contrastive import Contrastive
from pretrain.objectives.levels import Levels
from pretrain.objectives.masked_language import MaskedLanguage, mask_words, word_logits
from pretrain.objectives.matching import Matching
from pretrain.objectives.state import GlobalInputs, Keys, MaskedText, MicroBatch, Plans, StudentState
from pretrain.teacher import Teacher
from runtime.errors import RecipeError
from runtime.ranks import Ranks, gather_rows, sum_over_ranks
from training.profile import profiled

# What the draws of one sample are for: each purpose has its own stream of numbers.
NEGATIVES, MASKS = 1, 2
SEEN = 10
"""Features for each codeword, over which its use is told: of fewer, many would be nobody's nearest in the best of codebooks."""

Objective = Callable[[StudentState], dict[str, Tensor]]


class Student(nn.Module):
    """The module that the engine wraps: one forward from inputs to losses."""

    def __init__(self, model: AlignmentModel, recipe: PretrainRecipe) -> None:
        super().__init__()
        self.model = model
        settings = recipe.objectives
        makers: dict[str, Callable[[], Objective]] = {
            "contrastive": lambda: Contrastive(settings.contrastive),
            "matching": lambda: Matching(settings.matching),
            "masked_language": MaskedLanguage,
            "codebook": lambda: Codebook(settings.codebook),
            "levels": Levels,
        }
        self.weights = {name: getattr(settings, name).weight for name in makers}
        self.objectives = {name: make() for name, make in makers.items() if self.weights[name]}
        for name, other in settings.others.items():
            self.weights[name] = other.weight
            if other.weight:
                self.objectives[name] = make_other(name, other)

    def forward(self, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """-> the weighted sum of the losses, and every named loss and figure, detached."""
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
                    f"objectives.others.{name} gave {', '.join(losses) or 'nothing'}, and no `{name}`, its loss"
                )
            total = total + self.weights[name] * losses[name]
            figures |= {key: value.detach() for key, value in losses.items()}
        figures["temperature"] = self.model.temperature().detach()
        return total, {**figures, "loss": total.detach()}


def make_other(name: str, other: OtherObjective) -> Objective:
    """An objective of the user's own. Raises RecipeError where there is no such class."""
    module, _, made = other.use.rpartition(".")
    try:
        return getattr(importlib.import_module(module), made)(**other.settings)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise RecipeError(
            f"objectives.others.{name}: cannot make {other.use} ({error}); name a class as module.Class, its module on PYTHONPATH"
        ) from error


class PretrainTask:
    """Everything of a step but the optimizer."""

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
            # Of the student: the teacher keeps none. After compiling: dynamo does not look behind it.
            checkpoint_activations(model.layers())
        self.queue = FeatureQueue(recipe.teacher.queue, recipe.model.feature_dim, device)
        self.potentials: Tensor | None = None
        """(2, codewords): what the last step's plans left for the next to start from, where the recipe says so."""
        self._arrived: tuple[Tensor, Tensor, Tensor] | None = None
        self._found: Tensor | None = None
        self._codewords: Tensor | None = None
        steps = math.ceil(SEEN * recipe.model.codewords / (2 * recipe.training.global_batch))
        self._nearest: deque[Tensor] = deque(maxlen=max(1, steps))
        self.before_collective: Callable[[], None] = lambda: None
        """Called in each step before this rank waits for the others, its own part (the teacher's forward) done."""
        self.gathered: Callable[[Iterable[nn.Parameter]], AbstractContextManager[Any]] = lambda parameters: (
            nullcontext()
        )
        """Makes parameters whole that are read outside the student's forward; the engine's, where it divides them."""

    @torch.no_grad()
    def prepare(
        self, batch: dict[str, Any], epoch: float, micro_batch: int
    ) -> tuple[list[MicroBatch], dict[str, Tensor]]:
        """This rank's batch -> the student's micro-batches with the teacher's word on them, and figures to log.

        batch: as ShardStream yields it; epoch: epochs consumed so far, for the ramp of the distillation.
        """
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
            image = torch.cat([model.image_features(image_tokens) for image_tokens in tokens])
            text_feature = torch.cat([model.text_features(states) for _, states, _ in encoded])
        self.before_collective()
        with profiled("communication"):
            arrived = gather_rows(image), gather_rows(text_feature), gather_rows(ids)
        self._arrived = arrived
        past = self.queue.keys() if epoch >= self.recipe.teacher.queue_from_epoch else ()
        with profiled("queue"):
            keys = Keys(*(torch.cat(parts) for parts in zip(arrived, past, strict=True))) if past else Keys(*arrived)
        rows = torch.arange(size, device=self.device) + self.ranks.rank * size
        level_keys = []
        for level in range(len(model.config.levels) if self.student.weights["levels"] else 0):
            images, texts = (torch.cat([levels[level][side] for _, _, levels in encoded]) for side in (0, 1))
            level_keys.append(Keys(gather_rows(images), gather_rows(texts), arrived[2]))
        global_inputs = None
        if self.student.weights["matching"] and self.recipe.objectives.matching.negatives == "all_ranks":
            global_inputs = GlobalInputs(gather_rows(views[0].contiguous()), self._gather_text(text))

        seed = self.recipe.training.seed
        draws = torch.from_numpy(uniforms(derived_seed(seed, NEGATIVES), batch["positions"].numpy(), 2)).to(self.device)
        # On the host, where the words still are: which of them are masked is known without asking the device.
        words = TextBatch(batch["ids"], batch["mask"])
        with profiled("teacher"):
            masked = self._mask(words, text.mask, batch["positions"], tokens, parts, distill_weight)
        with profiled("transport"):
            plans, figures = self._plan(views[0], text, parts, keys, len(arrived[2]))
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
        if self.recipe.teacher.keys == "local":
            for inputs in micro_batches:
                own = keys.image[inputs.rows], keys.text[inputs.rows], inputs.image_ids
                inputs.keys = Keys(*(torch.cat(pair) for pair in zip(own, past, strict=True))) if past else Keys(*own)
                inputs.rows = torch.arange(len(inputs.rows), device=self.device)
        return micro_batches, figures | {"distill_weight": torch.tensor(distill_weight)}

    def _gather_text(self, text: TextBatch) -> TextBatch:
        """The captions of all ranks, padded to the longest of them."""
        longest = torch.tensor(text.ids.shape[1], device=self.device)
        if self.ranks.world > 1:
            torch.distributed.all_reduce(longest, op=torch.distributed.ReduceOp.MAX)
        room = (0, int(longest) - text.ids.shape[1])
        ids, mask = nn.functional.pad(text.ids, room), nn.functional.pad(text.mask, room)
        return TextBatch(gather_rows(ids), gather_rows(mask.to(torch.uint8)).bool())

    def finish(self, masters: Iterable[tuple[str, Tensor]]) -> None:
        """After an optimizer step: the teacher moves, the batch joins the queue. Not called for a skipped step."""
        assert self._arrived is not None, "prepare comes before finish"
        with profiled("EMA"):
            self.teacher.update(masters)
        with profiled("queue"):
            self.queue.enqueue(*self._arrived)
        self.potentials = self._found
        self._arrived = self._found = None

    def _mask(
        self,
        words: TextBatch,
        mask: Tensor,
        positions: Tensor,
        tokens: list[Tensor],
        parts: list[slice],
        distill_weight: float,
    ) -> list[MaskedText | None]:
        """words and positions: on the host; mask: the words' again, on the device."""
        if not self.student.weights["masked_language"]:
            return [None] * len(parts)
        share = self.recipe.objectives.masked_language.share
        altered, chosen = mask_words(
            words,
            positions,
            self.tokenizer,
            share,
            derived_seed(self.recipe.training.seed, MASKS),
            self.recipe.objectives.masked_language.separators,
        )
        count = sum_over_ranks(chosen.sum().to(self.device, torch.float32)).clamp(min=1.0)
        masked: list[MaskedText | None] = []
        for part, image_tokens in zip(parts, tokens, strict=True):
            altered_text = TextBatch(altered[part].to(self.device, non_blocking=True), mask[part])
            places = chosen[part].flatten().nonzero()[:, 0]
            labels = words.ids[part].flatten()[places].to(self.device, non_blocking=True)
            places, logits = places.to(self.device, non_blocking=True), None
            if distill_weight:
                model = self.teacher.model
                logits = word_logits(model, altered_text, places, model.fusion_encoder.prepare_images(image_tokens))
            normaliser = count / (self.ranks.world * len(parts))
            masked.append(MaskedText(altered_text, places, labels, normaliser, logits))
        return masked

    def _plan(
        self, images: Tensor, text: TextBatch, parts: list[slice], keys: Keys, samples: int
    ) -> tuple[Plans | None, dict[str, Tensor]]:
        settings = self.recipe.objectives.codebook
        if not settings.weight:
            return None, {}
        image_rows, text_rows = keys.image, keys.text
        if settings.features == "student":
            model, training = self.student.model, self.student.model.training
            model.eval()  # dropout is not seeded here, and a plan must not depend on what was drawn before it
            own_image = torch.cat([model.image_features(model.image_encoder(images[part])) for part in parts])
            own_text = torch.cat(
                [model.text_features(model.text_encoder(text.ids[part], text.mask[part])) for part in parts]
            )
            model.train(training)
            image_rows, text_rows = (
                torch.cat([gather_rows(own), teacher[samples:]])
                for own, teacher in ((own_image, keys.image), (own_text, keys.text))
            )
        if self.recipe.transport.samples == "batch":
            image_rows, text_rows = image_rows[:samples], text_rows[:samples]
        model = self.student.model
        assert model.codebook is not None, "a recipe whose codebook has a weight has codewords"
        with self.gathered([model.codebook]):
            codewords = model.codewords()
        plans, figures, potentials = solve_plans(
            image_rows, text_rows, codewords, samples, self.recipe.transport, self.potentials
        )
        self._found = potentials if self.recipe.transport.warm_start else None
        both = torch.stack([image_rows, text_rows])
        nearest = (both @ codewords.T).argmax(-1)
        self._nearest.append(torch.bincount(nearest[:, :samples].flatten(), minlength=len(codewords)))
        if len(self._nearest) == self._nearest.maxlen:
            figures |= usage(torch.stack([*self._nearest]).sum(0))
        if self._codewords is not None:  # the same features, named by the codewords of now and of the step before
            figures["codebook/churn"] = (nearest != (both @ self._codewords.T).argmax(-1)).float().mean()
        self._codewords = codewords
        return plans, figures
