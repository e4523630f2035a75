"""A tiny HAT, and jobs that each rank of test_hat.py runs."""

from __future__ import annotations

import numpy as np
import tiny_images
import torch
from torch import Tensor

from finetune.config import FinetuneRecipe
from finetune.heads.base import Workload
from finetune.heads.config import HatConfig
from finetune.heads.hat import HatTask
from finetune.heads.hat_model import HatModel
from finetune.heads.hat_scoring import hat_scores
from finetune.heads.levels import CheckpointEncoders
from pretrain.model.alignment_model import AlignmentModel, TextBatch
from pretrain.model.config import FusionEncoderConfig, ImageEncoderConfig, ModelConfig, TextEncoderConfig
from pretrain.objectives.state import Keys, MicroBatch
from runtime.ranks import ranks_from_environment

CPU = torch.device("cpu")


def network() -> AlignmentModel:
    image = ImageEncoderConfig("vit_tiny_patch16_224", image_size=32, patch=16, width=32, depth=2, heads=2)
    text = TextEncoderConfig(width=32, layers=2, heads=2, feed_forward=64, dropout=0.0, positions=40)
    torch.manual_seed(0)
    built = AlignmentModel(ModelConfig(image, text, FusionEncoderConfig(layers=0), feature_dim=16, codewords=0), 90)
    with torch.no_grad():
        for parameter in built.parameters():  # BERT's start makes all states nearly alike
            if parameter.ndim > 1:
                parameter.mul_(4)
    return built


def model(**settings) -> HatModel:
    config = HatConfig(**{"levels": [[1, 1], [2, 2]], "width": 24, "frozen_epochs": 0.0, **settings})
    encoders = CheckpointEncoders(network())
    torch.manual_seed(1)
    return HatModel(encoders, config)


def task() -> HatTask:
    """HAT's task without a checkpoint's folder."""
    built = HatTask.__new__(HatTask)
    torch.nn.Module.__init__(built)
    built.recipe = FinetuneRecipe(checkpoint="none", dataset="none", head="hat", hat=HatConfig(frozen_epochs=0.0))
    built.model, built.tokenizer = model(), tiny_images.tokenizer()
    return built


def scores(count: int, each: int, listed: np.ndarray | None = None) -> np.ndarray:
    pictures = tiny_images.Pictures(count, each)
    work = Workload(ranks_from_environment(), CPU, batch_size=2)
    return hat_scores(model(), tiny_images.tokenizer(), pictures, work, listed)


def loss_and_gradients(
    pixels: Tensor, ids: Tensor, mask: Tensor, image_ids: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Of this rank's share of a batch."""
    ranks = ranks_from_environment()
    rows = slice(ranks.rank * len(ids) // ranks.world, (ranks.rank + 1) * len(ids) // ranks.world)
    words = int(mask[rows].sum(1).max())
    built, nothing = task().eval(), torch.empty(0)
    batch = MicroBatch(
        pixels[rows],
        TextBatch(ids[rows, :words], mask[rows, :words]),
        image_ids[rows],
        torch.arange(len(ids[rows])),
        nothing,
        Keys(nothing, nothing, nothing),
        0.0,
    )
    loss, _ = built(batch)
    loss.backward()
    named = built.named_parameters()
    return loss.detach(), {name: parameter.grad for name, parameter in named if parameter.grad is not None}
