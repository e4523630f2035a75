"""`albef_base.yaml` and the switches that make it ALBEF: its schedule, its keys, its separators."""

from __future__ import annotations

import math

import pytest
import tiny
import torch

from pretrain.config import PretrainRecipe
from pretrain.model.alignment_model import TextBatch
from pretrain.objectives.masked_language import mask_words
from runtime.errors import RecipeError
from runtime.recipe import find_recipe, load_recipe
from training.config import OptimizerConfig


def albefs_rate(step: int, per_epoch: int, epochs: int = 30) -> float:
    """What ALBEF's loop sets (Pretrain.py: the scheduler is told every 100th of the first 2,000 iterations, then every epoch)."""
    rate = warmup = 1e-5
    for now in range(min(step, per_epoch - 1) + 1):
        if now % 100 == 0 and now <= 2000:
            rate = warmup + (now // 100) * (1e-4 - warmup) / 20
    if step >= per_epoch:
        rate = 1e-5 + 0.5 * (1e-4 - 1e-5) * (1 + math.cos(math.pi * (step // per_epoch) / epochs))
    return rate


@pytest.mark.parametrize("per_epoch", [500, 3000])
def test_its_schedule_is_albefs_even_where_an_epoch_is_shorter_than_the_warm_up(per_epoch):
    recipe = load_recipe(PretrainRecipe, find_recipe("pretrain/albef_base.yaml"))
    steps = 30 * per_epoch
    for step in (0, 99, 100, 101, 499, 500, 1999, 2000, 2999, 3000, 7000, steps - 1):
        rate = recipe.optimizer.lr_at(step, steps, step / per_epoch, 30.0)
        assert rate == pytest.approx(albefs_rate(step, per_epoch), rel=1e-12), step


def test_the_default_schedule_still_climbs_by_step_and_ends_at_its_least():
    plain = OptimizerConfig(lr=1.0, min_lr=0.1, warmup_steps=10)
    assert plain.lr_at(0, 100) == pytest.approx(0.1) and plain.lr_at(9, 100) == 1.0
    assert plain.lr_at(100, 100) == pytest.approx(0.1)
    assert OptimizerConfig(lr=1.0, warmup_lr=0.5, warmup_steps=10).lr_at(4, 100) == pytest.approx(0.75)


def test_local_keys_are_the_micro_batchs_own_and_the_queue():
    task = tiny.task(tiny.recipe(teacher__keys="local"))
    everywhere = tiny.task(tiny.recipe())
    for step in range(2):
        parts, _ = task.prepare(tiny.batch(16, step), 1.0, 8)
        wanted, _ = everywhere.prepare(tiny.batch(16, step), 1.0, 8)
        for number, (part, other) in enumerate(zip(parts, wanted, strict=True)):
            own = slice(8 * number, 8 * number + 8)
            for name in ("image", "text", "image_ids"):
                rows = getattr(other.keys, name)
                assert torch.equal(getattr(part.keys, name), torch.cat([rows[own], rows[16:]]))
            assert torch.equal(part.keys.image_ids[part.rows], part.image_ids)
            assert torch.isfinite(task.student(part)[0])
        for either in (task, everywhere):
            either.finish((name, p.data) for name, p in either.student.model.named_parameters())


def test_local_keys_are_refused_beside_objectives_that_need_global_keys():
    with pytest.raises(RecipeError, match=r"teacher\.keys is local"):
        tiny.recipe(teacher__keys="local", objectives__matching={"negatives": "all_ranks"})


def test_separators_are_masked_only_where_configured():
    tokenizer = tiny.tokenizer()
    ids, mask = tiny.captions(500, torch.Generator().manual_seed(0))
    text, positions = TextBatch(ids, mask), torch.arange(500)
    _, plain = mask_words(text, positions, tokenizer, 0.3, 1)
    _, albef = mask_words(text, positions, tokenizer, 0.3, 1, separators=True)
    ends = ids == tokenizer.sep
    assert not plain[ends].any() and 0.2 < albef[ends].float().mean() < 0.4
    assert torch.equal(plain[~ends], albef[~ends])
