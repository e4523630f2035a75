"""Alignment at inner layers follows its formula and reaches only earlier layers."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch

from pretrain.config import LevelsConfig
from pretrain.objectives.levels import Levels
from runtime.errors import RecipeError

CHANGES = {"objectives__levels__weight": 1.0, "model__levels": [[1, 1], [1, 2]]}


def test_the_loss_is_the_contrastive_loss_of_the_level_features():
    task = tiny.task(tiny.recipe(**CHANGES))
    (inputs,), _ = task.prepare(tiny.batch(8), 1.0, 8)
    model = task.student.model
    tokens, states, levels = model.encode(inputs.images, inputs.text.ids, inputs.text.mask)
    torch.testing.assert_close(tokens, model.image_encoder(inputs.images))
    assert [part.shape for pair in levels for part in pair] == [(8, 16)] * 4
    state = tiny.state(model, inputs)
    state.levels = levels
    total, temperature = 0.0, float(model.temperature().detach())
    positives = (inputs.image_ids[:, None] == inputs.image_ids).numpy()
    for (image, text), keys in zip(levels, inputs.level_keys, strict=True):
        assert len(keys.image) == 8, "no queue at inner levels"
        for student, teacher, against in ((image, keys.image, keys.text), (text, keys.text, keys.image)):
            student, teacher, against = (part.detach().double().numpy() for part in (student, teacher, against))
            softmax = [np.exp(rows @ against.T / temperature) for rows in (student, teacher)]
            said, opinion = (rows / rows.sum(1, keepdims=True) for rows in softmax)
            targets = 0.4 * opinion + 0.6 * positives / positives.sum(1, keepdims=True)
            total -= (targets * np.log(said)).sum(1).mean() / 4
    assert float(Levels(LevelsConfig())(state)["levels"]) == pytest.approx(total, rel=1e-5)


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
def test_missing_levels_are_refused(levels):
    with pytest.raises(RecipeError, match="a level is a pair"):
        tiny.recipe(model__levels=levels)


def test_a_weight_without_levels_is_refused():
    with pytest.raises(RecipeError, match=r"model\.levels is empty"):
        tiny.recipe(objectives__levels__weight=1.0)
