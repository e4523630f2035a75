"""A run's folder belongs to one recipe: the same one goes on in it, another is refused by the keys that differ."""

from __future__ import annotations

import pytest

from finetune.config import FinetuneRecipe
from pretrain.config import PretrainRecipe
from runtime.errors import RecipeError
from runtime.files import read_json
from runtime.ranks import Ranks
from runtime.recipe import free_keys, load_recipe, read_recipe
from runtime.recipe_keys import keys_of
from runtime.run_folder import RunFolder


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


def test_inspecting_a_run_writes_nothing(tmp_path):
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


def test_a_start_without_a_checkpoint_may_change_its_recipe(opened, tmp_path):
    opened.checkpoints.path_of(1).rmdir()
    opened.check(recipe(tmp_path, "--optimizer.lr", "0.5"))


def test_free_keys_may_change(opened, tmp_path):
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


FREE_IN_BOTH = {
    "runs",
    "data.workers",
    "data.max_bad_share",
    "data.cache.folder",
    "data.cache.gigabytes",
    "data.cache.stage",
    "data.features.folder",
    "training.device",
    "training.log_every",
    "training.keep_last",
    "training.milestone_every",
    "training.checkpoint_activations",
    "training.micro_batch",
    "training.rank_timeout",
    "training.trackers",
    "training.tracker_project",
}
FREE_IN_PRETRAINING = {
    "profile",
    "training.zero_stage",
    "training.offload_optimizer",
    "training.compile",
}


@pytest.mark.parametrize(
    ("kind", "free"), [(PretrainRecipe, FREE_IN_BOTH | FREE_IN_PRETRAINING), (FinetuneRecipe, FREE_IN_BOTH)]
)
def test_free_keys_are_exactly_these_keys_of_the_recipe(kind, free):
    keys = free_keys(kind)
    assert set(keys) == free and len(keys) == len(free)
    assert free <= set(keys_of(kind))


def test_a_finished_run_says_how_it_ended(opened, capsys):
    opened.finish({"steps": 7})
    assert opened.finished()
    assert "finished (7 steps); nothing to do" in capsys.readouterr().out
