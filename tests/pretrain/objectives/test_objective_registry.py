"""The registry names every objective of the recipe, and the worked example of docs/codis.md runs as it stands."""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path

import pytest
import tiny
import torch
import yaml

from pretrain.config import ObjectivesConfig, OtherObjective
from pretrain.objectives.registry import OBJECTIVES, make_objectives, objective_weights
from runtime.errors import RecipeError

PAGE = (Path(__file__).parents[3] / "docs" / "codis.md").read_text(encoding="utf-8")


def block(language: str, holding: str) -> str:
    return next(code for code in re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL) if holding in code)


@pytest.fixture
def example(tmp_path, monkeypatch):
    """The page's recipe, its file where Python finds it."""
    (tmp_path / "uniformity.py").write_text(block("python", "class Uniformity:"))
    monkeypatch.syspath_prepend(str(tmp_path))
    yield yaml.safe_load(block("yaml", "others:"))["objectives"]["others"]
    sys.modules.pop("uniformity", None)


def test_every_objective_of_the_recipe_is_registered():
    assert {*OBJECTIVES, "others"} == {field.name for field in dataclasses.fields(ObjectivesConfig)}


def test_objectives_are_built_where_they_have_a_weight(example):
    config = ObjectivesConfig(others={"uniformity": OtherObjective(**example["uniformity"])})
    config.matching.weight = 0.0
    assert list(make_objectives(config)) == ["contrastive", "masked_language", "codebook", "uniformity"]
    assert objective_weights(config) == {
        "contrastive": 1.0,
        "matching": 0.0,
        "masked_language": 1.0,
        "codebook": 1.0,
        "levels": 0.0,
        "uniformity": 0.1,
    }


def test_the_new_objective_of_the_docs_learns_and_splits(example):
    task = tiny.task(tiny.recipe(objectives__others=example))
    whole, _ = task.prepare(tiny.batch(16), 1.0, 16)
    parts, _ = task.prepare(tiny.batch(16), 1.0, 4)
    total, figures = task.student(whole[0])
    plain, _ = tiny.task(tiny.recipe()).student(whole[0])
    torch.testing.assert_close(total - plain, 0.1 * figures["uniformity"])
    assert figures["uniformity"].isfinite()
    total.backward()
    assert task.student.model.image_projection.weight.grad.any()
    split = torch.stack([task.student(part)[1]["uniformity"] for part in parts]).mean()
    torch.testing.assert_close(split, figures["uniformity"])


@pytest.mark.parametrize("use", ["uniformity.Uniform", "nowhere.Uniformity", "Uniformity", ""])
def test_a_missing_class_gives_a_one_line_error(example, use):
    with pytest.raises(RecipeError, match="objectives.others.mine: cannot make .*name a class as module.Class"):
        tiny.task(tiny.recipe(objectives__others={"mine": {"use": use}}))


def test_a_loss_under_another_name_gives_a_one_line_error(example):
    task = tiny.task(tiny.recipe(objectives__others={"spread": example["uniformity"]}))
    (inputs,), _ = task.prepare(tiny.batch(8), 1.0, 8)
    with pytest.raises(
        RecipeError, match="objectives.others.spread returned uniformity, but not its loss `spread`; name the loss so"
    ):
        task.student(inputs)


@pytest.mark.parametrize("name", ["codebook", "loss"])
def test_a_figure_name_already_in_use_is_refused(name):
    with pytest.raises(
        RecipeError, match=f"objectives.others.{name} has the name of an existing figure; choose another name"
    ):
        ObjectivesConfig(others={name: OtherObjective("uniformity.Uniformity")})
