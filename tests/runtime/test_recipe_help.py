"""`--help` describes every key that the parser takes, with the default that a recipe really has, and answers for one group too."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

import pytest

from finetune.config import FinetuneRecipe
from pretrain.config import PretrainRecipe
from runtime.errors import RecipeError
from runtime.recipe import free, read_recipe
from runtime.recipe_help import recipe_help
from runtime.recipe_keys import form_of, format_default, groups_of, keys_of


@dataclass
class Wheel:
    """A wheel. More about it."""

    spokes: int = 32
    """Number of
    spokes."""
    colour: Literal["red", "blue"] = "red"
    """Colour."""


@dataclass
class Base:
    """What all have."""

    name: str = ""
    """Name."""


@dataclass
class Bicycle(Base):
    """A bicycle,
    with wheels.

    More about it.
    """

    name: str = "mine"
    """Its own name."""
    front: Wheel = free(default_factory=lambda: Wheel(spokes=24))
    """The front wheel."""
    spare: Wheel | None = None
    """Another wheel."""
    extra: dict[str, Wheel] = field(default_factory=dict)
    """Further wheels."""


def test_keys_carry_the_texts_forms_and_defaults_of_their_fields():
    own, front, spare, extra = groups_of(Bicycle)
    assert own.about == "A bicycle, with wheels."
    name, wheels = own.keys
    assert (name.name, name.about, name.form, name.default, name.free) == (
        "name",
        "Its own name.",
        "TEXT",
        "mine",
        False,
    )
    assert wheels.form == "{NAME: GROUP, …}"
    assert (front.name, front.about) == ("front", "The front wheel.")
    spokes, colour = front.keys
    assert (spokes.name, spokes.about, spokes.default, spokes.free) == ("front.spokes", "Number of spokes.", 24, True)
    assert (colour.form, colour.choices) == ("red|blue", ("red", "blue"))
    assert spare.keys[0].default == 32 and not spare.keys[0].free
    assert extra.name == "extra.NAME" and extra.keys[0].name == "extra.NAME.spokes"


def test_a_fields_own_docstring_wins_over_the_inherited_one_and_inherited_ones_count():
    texts = {key.name: key.about for group in groups_of(PretrainRecipe) for key in group.keys}
    assert texts["training.epochs"] == "Epochs of the whole run."  # of LoopConfig, below TrainingConfig
    assert groups_of(Bicycle)[0].keys[0].about == "Its own name."


@pytest.mark.parametrize(
    ("hint", "form"),
    [
        (int | None, "INT or null"),
        (list[list[int]], "[[INT, …], …]"),
        (str | list[str] | dict[str, float], "TEXT or [TEXT, …] or {NAME: NUMBER, …}"),
        (list[Literal["a", "b"]] | None, "[a|b, …] or null"),
        (bool, "true|false"),
    ],
    ids=str,
)
def test_a_type_is_written_as_its_values_look(hint, form):
    assert form_of(hint) == form


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "null"), (True, "true"), (1, "1"), ("", "empty"), ([0.5, 1], "[0.5, 1]"), ({"a": None}, "{a: null}")],
    ids=str,
)
def test_a_default_is_written_as_in_a_recipe(value, text):
    assert format_default(value) == text


def test_the_defaults_of_help_are_those_of_the_recipe():
    recipe = PretrainRecipe()
    settled = {"model.text.pooling": "class"}  # a recipe names what is a BERT's `own`
    for group in groups_of(PretrainRecipe):
        for key in group.keys:
            if "NAME" not in key.name:
                value = recipe
                for part in key.name.split("."):
                    value = getattr(value, part)
                assert value == settled.get(key.name, key.default), key.name


def test_help_lists_all_keys_of_the_parser_and_no_others():
    for kind in (PretrainRecipe, FinetuneRecipe):
        shown = [key.name for group in groups_of(kind) for key in group.keys if "NAME" not in key.name]
        assert sorted(shown) == sorted(keys_of(kind))
        text = recipe_help(kind, "ligature x")
        assert all(f"  --{key} " in text for key in shown)


def test_help_asks_for_nothing_and_leaves(capsys):
    with pytest.raises(SystemExit) as leaving:
        read_recipe(PretrainRecipe, ["--config", "none.yaml", "--help"], "ligature pretrain")
    assert leaving.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: ligature pretrain [--config RECIPE]")
    assert "  --optimizer.lr NUMBER  (default 0.0001)\n      Highest learning rate" in text


def test_help_of_a_group_shows_its_keys_alone():
    text = recipe_help(PretrainRecipe, "ligature pretrain", "training")
    assert "--training.epochs " in text and "--training.sick_steps.window " in text and "--optimizer.lr" not in text
    text = recipe_help(PretrainRecipe, "ligature pretrain", "training.sick_steps")
    assert "--training.sick_steps.window " in text and "--training.epochs" not in text


def test_help_of_a_key_shows_it_alone():
    text = recipe_help(PretrainRecipe, "ligature pretrain", "optimizer.lr")
    assert text.count("--") == 1 and "--optimizer.lr NUMBER" in text


def test_help_of_an_unknown_group_names_the_nearest():
    with pytest.raises(RecipeError, match="no key or group optimiser; did you mean optimizer?"):
        recipe_help(PretrainRecipe, "ligature pretrain", "optimiser")


def test_lines_fit_the_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    described = [line for line in recipe_help(PretrainRecipe, "ligature pretrain").splitlines() if "--" not in line]
    assert max(map(len, described)) <= 80


def test_free_keys_are_marked():
    lines = recipe_help(PretrainRecipe, "ligature pretrain").splitlines()
    assert "  --data.workers INT *  (default 2)" in lines
    assert "  --optimizer.lr NUMBER  (default 0.0001)" in lines


def test_a_field_without_a_default_is_required():
    @dataclass
    class Needs:
        """A thing."""

        it: int

    (group,) = groups_of(Needs)
    assert group.keys[0].default is dataclasses.MISSING
    assert "  --it INT  (required)" in recipe_help(Needs, "x")
