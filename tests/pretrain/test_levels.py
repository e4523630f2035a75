"""Alignment at inner layers: the formula, and whom it reaches."""

from __future__ import annotations

import pytest
import tiny
import torch

from pretrain.objectives.contrastive import soft_cross_entropy, soft_targets
from pretrain.objectives.levels import Levels
from runtime.errors import RecipeError

CHANGES = {"objectives__levels__weight": 1.0, "model__levels": [[1, 1], [1, 2]]}


def test_it_is_the_contrastive_loss_of_the_level_features():
    task = tiny.task(tiny.recipe(**CHANGES))
    (inputs,), _ = task.prepare(tiny.batch(8), 1.0, 8)
    model = task.student.model
    tokens, states, levels = model.encode(inputs.images, inputs.text.ids, inputs.text.mask)
    torch.testing.assert_close(tokens, model.image_encoder(inputs.images))
    assert [part.shape for pair in levels for part in pair] == [(8, 16)] * 4
    state = tiny.state(model, inputs)
    state.levels = levels
    total = 0.0
    positives = inputs.image_ids[:, None] == inputs.image_ids
    for (image, text), keys in zip(levels, inputs.level_keys, strict=True):
        assert len(keys.image) == 8, "no queue at inner levels"
        for student, teacher, against in ((image, keys.image, keys.text), (text, keys.text, keys.image)):
            targets = soft_targets(teacher @ against.T / model.temperature(), positives, 0.4)
            total = total + soft_cross_entropy(student @ against.T / model.temperature(), targets) / 4
    torch.testing.assert_close(Levels()(state)["levels"], total)


def test_inner_layers_learn_and_later_ones_do_not():
    weights = {
        f"objectives__{name}__weight": 0.0 for name in ("contrastive", "matching", "masked_language", "codebook")
    }
    task = tiny.task(tiny.recipe(**weights, objectives__levels__weight=1.0, model__levels=[[1, 1]]))
    (inputs,), _ = task.prepare(tiny.batch(8), 1.0, 8)
    task.student(inputs)[0].backward()
    reached = {name for name, p in task.student.model.named_parameters() if p.grad is not None and p.grad.any()}
    assert "image_encoder.vit.blocks.0.attn.qkv.weight" in reached and "level_projections.0.text.weight" in reached
    assert not any(
        name.startswith(("image_encoder.vit.blocks.1", "image_projection", "fusion_encoder")) for name in reached
    )
    assert "level_projections.0.image.weight" in task.teacher.averages


@pytest.mark.parametrize("levels", [[[1]], [[0, 1]], [[2, 1]]])
def test_levels_that_are_not_there_are_refused(levels):
    with pytest.raises(RecipeError, match="a level is a pair"):
        tiny.recipe(model__levels=levels)


def test_a_weight_without_levels_is_refused():
    with pytest.raises(RecipeError, match=r"model\.levels is empty"):
        tiny.recipe(objectives__levels__weight=1.0)
