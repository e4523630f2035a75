"""A run's folder belongs to one recipe: the same one goes on in it, another is refused by the keys that differ."""

from __future__ import annotations

import pytest

from pretrain.config import PretrainRecipe
from runtime.errors import RecipeError
from runtime.files import read_json
from runtime.ranks import Ranks
from runtime.recipe import keys_of, load_recipe, read_recipe
from runtime.run_folder import FREE_KEYS, RunFolder


def recipe(tmp_path, *arguments: str) -> PretrainRecipe:
    return read_recipe(PretrainRecipe, ["--runs", str(tmp_path), "--name", "mine", *arguments], "ligature pretrain")


@pytest.fixture
def opened(tmp_path):
    run = RunFolder(recipe(tmp_path))
    run.open(recipe(tmp_path), Ranks())
    run.checkpoints.path_of(1).mkdir(parents=True)
    yield run
    run.close()


def test_the_folder_is_a_function_of_the_name(tmp_path):
    assert RunFolder(recipe(tmp_path)).path == RunFolder(recipe(tmp_path)).path == tmp_path / "mine"


def test_looking_at_a_run_writes_nothing(tmp_path):
    run = RunFolder(recipe(tmp_path))
    run.check(recipe(tmp_path))
    assert not run.finished()
    assert list(tmp_path.iterdir()) == []


def test_opening_writes_the_recipe_and_the_environment(opened, tmp_path):
    assert load_recipe(PretrainRecipe, opened.config) == recipe(tmp_path)
    environment = read_json(opened.path / "environment.json")
    assert {"versions", "python", "host", "command", "commit"} <= environment.keys()
    assert environment["versions"]["torch"] != "not installed"


def test_the_same_recipe_goes_on(opened, tmp_path):
    opened.check(recipe(tmp_path))


def test_another_recipe_is_refused_and_every_key_that_differs_named(opened, tmp_path):
    with pytest.raises(RecipeError) as error:
        opened.check(recipe(tmp_path, "--optimizer.lr", "0.5", "--training.seed", "3"))
    message = str(error.value)
    assert "optimizer.lr: 0.0001 -> 0.5" in message and "training.seed: 0 -> 3" in message and "--name" in message
    assert "\n" not in message


def test_a_start_that_came_to_no_checkpoint_binds_nobody(opened, tmp_path):
    opened.checkpoints.path_of(1).rmdir()
    opened.check(recipe(tmp_path, "--optimizer.lr", "0.5"))


def test_what_does_not_change_the_run_may_change(opened, tmp_path):
    free = [
        "--data.workers",
        "0",
        "--data.max_bad_share",
        "0.5",
        "--training.micro_batch",
        "4",
        "--training.zero_stage",
        "2",
        "--training.device",
        "cpu",
    ]
    opened.check(recipe(tmp_path, *free))


def test_free_keys_are_keys_of_the_recipe():
    assert set(FREE_KEYS) <= set(keys_of(PretrainRecipe))


def test_a_finished_run_says_how_it_ended(opened, capsys):
    opened.finish({"steps": 7})
    assert opened.finished()
    assert "finished (7 steps); nothing to do" in capsys.readouterr().out
