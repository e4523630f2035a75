"""Jobs that each rank of test_gradient_cache.py runs: gradients of a batch at once and in micro-batches."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from finetune.config import FinetuneRecipe
from finetune.gradient_cache import IMAGES, PAIRS, TEXTS, MicroBatches, average_gradients
from finetune.heads.config import ExchangedWordsConfig
from finetune.heads.dual import DualTask
from finetune.train import finetune
from launch.stages import read_stage
from pretrain.model.alignment_model import TextBatch
from pretrain.objectives.state import Keys, MicroBatch, StudentState
from runtime.ranks import Ranks, ranks_from_environment

SEED = 5, 7
WEIGHTS = {"contrast": (1.0, 0.0, 0.0), "all": (0.7, 1.3, 0.5)}
"""Of the contrastive loss, matching, and exchanged words."""
CAPTIONS = [
    "a red circle left of a blue square",
    "a star",
    "two green triangles",
    "the small square right of the star",
    "a blue circle",
    "a red star left of a star",
    "three squares",
    "a large circle",
]
IMAGE_IDS = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6])  # the second and the fourth are captions of one image


def task(folder: Path, losses: str, dtype: torch.dtype, dropout: bool) -> DualTask:
    """A dual head on a checkpoint. Its biases and features differ, so that no gradient is near 0."""
    contrast, matching, exchanged = WEIGHTS[losses]
    built = DualTask(
        FinetuneRecipe(
            checkpoint=str(folder),
            dataset="shapes",
            contrastive_weight=contrast,
            matching_weight=matching,
            exchanged=ExchangedWordsConfig(exchanged, ["left right"]),
        )
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.mul_(2) if parameter.ndim > 1 else parameter.add_(0.1 * torch.randn(parameter.shape))
    return built.to(dtype).train(dropout)


def batch(built: DualTask, ranks: Ranks) -> MicroBatch:
    """This rank's share of eight samples."""
    generator = torch.Generator().manual_seed(1)
    size = built.image_size
    images = torch.randint(0, 256, (8, 3, size, size), dtype=torch.uint8, generator=generator)
    draws = torch.rand(8, 2, generator=generator, dtype=torch.float64)
    ids, mask = built.tokenizer(CAPTIONS)
    own = slice(ranks.rank * 8 // ranks.world, (ranks.rank + 1) * 8 // ranks.world)
    rows, nothing = torch.arange(8 // ranks.world), torch.empty(0)
    return MicroBatch(
        images[own],
        TextBatch(ids[own], mask[own]),
        IMAGE_IDS[own],
        rows,
        draws[own],
        Keys(nothing, nothing, nothing),
        0.0,
        positions=rows,
    )


def in_one_graph(built: DualTask, inputs: MicroBatch, micro_batches: MicroBatches) -> dict[str, Tensor]:
    """The same passes with the same dropout, all in one graph that one call of `backward` goes through."""

    def states(forward, kind):
        return torch.cat([part for _, part in micro_batches.run(forward, kind)])

    model, text = built.model, inputs.text
    images = states(lambda rows: model.image_encoder(inputs.images[rows]), IMAGES)
    texts = states(lambda rows: model.text_encoder(text.ids[rows], text.mask[rows]), TEXTS)
    state = StudentState(model, inputs, images, texts)
    inputs.keys = Keys(state.image.detach(), state.text.detach(), inputs.image_ids)
    losses = {"contrastive": built._contrast(state.image, state.text, inputs.image_ids)}
    if built.weights["matching"]:
        drawn, count = built.matching.draw_nearby(state), built.exchanged.count(text.ids)

        def fuse(rows):
            return built.matching.part(state, rows, drawn), built.exchanged(state.part(rows), count)

        for _, (matched, exchanged) in micro_batches.run(fuse, PAIRS):
            for name, value in {**matched, **exchanged}.items():
                losses[name] = losses.get(name, 0.0) + value
    total = built._total(losses)
    total.backward()
    return {"loss": total.detach(), **{name: value.detach() for name, value in losses.items()}}


def gradients(
    folder: Path,
    losses: str,
    micro_batch: int | None,
    one_graph: bool = False,
    dtype=torch.float64,
    dropout=False,
    bf16=False,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The figures of this rank and the gradients, the mean over the ranks.

    Args:
        folder: a pretrained checkpoint.
        losses: a key of WEIGHTS.
        micro_batch: None: by `forward`, as without micro-batches.
        one_graph: keep the graph of all micro-batches instead of the gradient cache.
        dtype: of the model.
        dropout: whether it is on.
        bf16: whether forward passes compute in it.
    """
    ranks = ranks_from_environment()
    built = task(folder, losses, dtype, dropout)
    inputs = batch(built, ranks)
    autocast = partial(torch.autocast, "cpu", torch.bfloat16, enabled=bf16)
    if micro_batch is None:
        with autocast():
            loss, figures = built(inputs)
        loss.backward()
    else:
        micro_batches = MicroBatches(len(inputs.images), micro_batch, (*SEED, ranks.rank), autocast)
        figures = (
            in_one_graph(built, inputs, micro_batches) if one_graph else built.add_gradients(inputs, micro_batches)
        )
    named = {name: parameter for name, parameter in built.named_parameters() if parameter.requires_grad}
    average_gradients(named.values(), ranks)
    return figures, {name: parameter.grad for name, parameter in named.items() if parameter.grad is not None}


def tune(arguments: list[str]) -> None:
    """A whole fine-tuning as this rank runs it."""
    finetune(read_stage("finetune", arguments))
