"""A right recipe survives writing and reading, and a wrong one gives one line with key, value and nearest key."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import yaml

import configs
from finetune.config import FinetuneRecipe
from launch.cli import main
from launch.commands.launch import read_slurm_options
from launch.stages import RECIPES
from pretrain.config import PretrainRecipe, divide_batch
from runtime.errors import RecipeError
from runtime.recipe import OptionParser, changed_keys, find_recipe, load_recipe, read_recipe, write_recipe
from runtime.recipe_advice import SYNONYMS
from runtime.recipe_keys import keys_of

SHIPPED = sorted(Path(configs.__path__[0]).rglob("*.yaml"))


def read(*arguments: str) -> PretrainRecipe:
    return read_recipe(PretrainRecipe, list(arguments), "ligature pretrain")


def mistake(*arguments: str) -> str:
    with pytest.raises(RecipeError) as error:
        read(*arguments)
    assert error.value.exit_code == 2
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.fixture
def recipe_file(tmp_path):
    def write(text: str | bytes) -> str:
        path = tmp_path / "recipe.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return write


def test_a_file_and_then_the_command_line_decide(recipe_file):
    path = recipe_file("name: mine\noptimizer:\n  lr: 1e-3\ntraining:\n  steps: 5\n")
    recipe = read("--config", path, "--optimizer.lr", "3e-4", "--training.zero_stage=2")
    assert (recipe.name, recipe.optimizer.lr, recipe.training.steps, recipe.training.zero_stage) == ("mine", 3e-4, 5, 2)
    assert recipe.optimizer.min_lr == PretrainRecipe().optimizer.min_lr


def test_of_two_files_the_later_wins(tmp_path):
    (tmp_path / "a.yaml").write_text("name: a\ntraining:\n  steps: 5\n")
    (tmp_path / "b.yaml").write_text("name: b\n")
    recipe = read("--config", str(tmp_path / "a.yaml"), f"--config={tmp_path / 'b.yaml'}")
    assert (recipe.name, recipe.training.steps) == ("b", 5)


UNKNOWN = [
    (("--optimiser.lr", "1"), ("optimiser.lr", "'1'", "did you mean optimizer.lr?")),
    (("--optimizer.lrr=1",), ("optimizer.lrr", "'1'", "did you mean optimizer.lr?")),
    (("--data.augment.filp", "true"), ("data.augment.filp", "'true'", "did you mean data.augment.flip?")),
    (("--global_batch", "64"), ("global_batch", "'64'", "did you mean training.global_batch?")),
    (("--optimizer.weight", "1"), ("optimizer.weight", "did you mean optimizer.weight_decay?")),
    (("--optimizer", '{"lrr": 3}'), ("optimizer.lrr", "did you mean optimizer.lr?")),
    (("--zzz", "1"), ("zzz", "'1'", "--help")),
    (("--optimizer.learning_rate", "1"), ("did you mean optimizer.lr?",)),
    (("--learning-rate", "1"), ("did you mean optimizer.lr?",)),
    (("--batch_size", "1"), ("did you mean training.global_batch?",)),
    (("--optimizer.batch_size", "1"), ("did you mean training.global_batch?",)),
    (("--epochs", "1"), ("did you mean training.epochs?",)),
    (("--wd", "1"), ("did you mean optimizer.weight_decay?",)),
    (("--num_workers", "1"), ("did you mean data.workers?",)),
    (("--image_size", "1"), ("did you mean model.image.image_size?",)),
    (("--max_grad_norm", "1"), ("did you mean optimizer.clip_norm?",)),
    (("--lr", "1"), ("did you mean optimizer.lr?",)),
]


@pytest.mark.parametrize(("arguments", "parts"), UNKNOWN, ids=[" ".join(arguments) for arguments, _ in UNKNOWN])
def test_an_unknown_option_is_named_with_its_value_and_the_nearest_key(arguments, parts):
    message = mistake(*arguments)
    assert "unknown key" in message and all(part in message for part in parts), message


UNKNOWN_IN_FILE = [
    ("optimiser:\n  lr: 1\n", ("optimiser", "did you mean optimizer?")),
    ("optimizer:\n  lrr: 1\n", ("optimizer.lrr", "(value 1)", "did you mean optimizer.lr?")),
    ("model:\n  image:\n    with: 3\n", ("model.image.with", "(value 3)", "did you mean model.image.width?")),
    ("global_batch: 64\n", ("global_batch", "(value 64)", "did you mean training.global_batch?")),
    ("optimizer:\n  global_batch: 64\n", ("optimizer.global_batch", "did you mean training.global_batch?")),
    ("optimizer:\n  learning_rate: 1\n", ("optimizer.learning_rate", "did you mean optimizer.lr?")),
    ("1: 2\n", ("1", "(value 2)")),
]


@pytest.mark.parametrize(("text", "parts"), UNKNOWN_IN_FILE, ids=[repr(text) for text, _ in UNKNOWN_IN_FILE])
def test_an_unknown_key_of_a_file_is_named_with_the_file(recipe_file, text, parts):
    path = recipe_file(text)
    message = mistake("--config", path)
    assert message.startswith(path) and "unknown key" in message and all(part in message for part in parts), message


WRONG = [
    (("--training.global_batch", "many"), ("training.global_batch", "'many'", "int")),
    (("--training.global_batch", "6.5"), ("training.global_batch", "'6.5'", "int")),
    (("--optimizer.lr", "fast"), ("optimizer.lr", "'fast'", "float")),
    (("--optimizer.lr", "nan"), ("optimizer.lr", "'nan'", "float")),
    (("--data.augment.flip", "perhaps"), ("data.augment.flip", "'perhaps'", "bool")),
    (("--model.temperature", "0.5"), ("model.temperature is 0.5", "between 0.001 and 0.5")),
    (("--teacher.queue", "-1"), ("teacher.queue is -1",)),
    (("--teacher.ema_momentum", "1.5"), ("teacher.ema_momentum is 1.5",)),
    (("--optimizer.betas", "[0.9]"), ("optimizer.betas is [0.9]", "two")),
    (("--objectives.masked_language.share", "1.5"), ("masked_language.share is 1.5",)),
    (("--training.steps", "x"), ("training.steps", "'x'", "int or null")),
    (("--optimizer.betas", "[0.9, x]"), ("optimizer.betas", "'x'", "float")),
    (("--training.precision", "bf61"), ("training.precision", "'bf61'", "did you mean bf16?")),
    (("--training.zero_stage", "5"), ("training.zero_stage", "'5'", "[0, 1, 2, 3]")),
    (("--optimizer.lr",), ("optimizer.lr", "no value")),
    (("--optimizer", "3"), ("optimizer", "'3'", "group of keys", "optimizer.lr")),
    (("recipe.yaml",), ("recipe.yaml", "--config")),
    (("--config",), ("config", "no value")),
]


@pytest.mark.parametrize(("arguments", "parts"), WRONG, ids=[" ".join(arguments) for arguments, _ in WRONG])
def test_a_wrong_value_is_named_with_its_key_and_what_it_must_be(arguments, parts):
    message = mistake(*arguments)
    assert all(part in message for part in parts), message


WRONG_FILES = [
    ("training: [1\n", "not valid YAML"),
    ("training:\n\tglobal_batch: 3\n", "not valid YAML"),
    (b"name: caf\xe9\n", "not valid YAML"),
    ("name: !!python/object/apply:os.getcwd []\n", "not valid YAML"),
    ("- 1\n", "holds a list"),
    ("hello\n", "holds a str"),
    ("", "is empty"),
    ("training: 3\n", "training is 3; it is a group of keys: global_batch"),
    ("training:\n", "training is null; it is a group of keys"),
    ("training:\n  global_batch:\n", "training.global_batch is null"),
    ("training:\n  global_batch: many\n", "training.global_batch is 'many'; it must be int"),
    ("training:\n  precision: bf17\n", "did you mean bf16?"),
]


@pytest.mark.parametrize(("text", "says"), WRONG_FILES, ids=[repr(text) for text, _ in WRONG_FILES])
def test_a_file_that_is_no_recipe_gives_a_one_line_error(recipe_file, text, says):
    assert says in mistake("--config", recipe_file(text))


def test_a_missing_file_is_named(tmp_path):
    assert str(tmp_path / "none.yaml") in mistake("--config", str(tmp_path / "none.yaml"))


@pytest.mark.skipif(not SHIPPED, reason="no recipe is shipped yet")
def test_a_missing_file_is_answered_with_the_nearest_shipped_recipe(tmp_path):
    nearly = SHIPPED[0].stem + "s.yaml"
    message = mistake("--config", str(tmp_path / nearly))
    offered = message.partition("did you mean ")[2].rstrip("?")
    assert find_recipe(offered) == SHIPPED[0], message


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("pretrain/demoo.yaml", "pretrain/demo.yaml"), ("demo_evaluate.yaml", "finetune/demo_evaluate.yaml")],
)
def test_a_misspelt_shipped_recipe_is_answered_with_its_short_name(typed, meant):
    assert mistake("--config", typed) == f"--config {typed}: no such file; did you mean {meant}?"


def test_a_misspelt_file_of_the_user_is_answered_with_the_file_beside_it(tmp_path):
    (tmp_path / "mine.yaml").write_text("name: a")
    assert mistake("--config", str(tmp_path / "mien.yaml")).endswith(f"did you mean {tmp_path / 'mine.yaml'}?")


def test_every_word_of_another_project_leads_to_a_key_that_some_recipe_has():
    keys = {key for home, name in RECIPES.values() for key in keys_of(getattr(importlib.import_module(home), name))}
    assert set(SYNONYMS) <= keys


OUT_OF_RANGE = [
    ("optimizer.lr", "-1"),
    ("optimizer.min_lr", "-0.5"),
    ("optimizer.warmup_steps", "-1"),
    ("optimizer.weight_decay", "-1"),
    ("optimizer.clip_norm", "-1"),
    ("optimizer.betas", "[0.9, 1.0]"),
    ("model.image.width", "0"),
    ("model.image.patch", "0"),
    ("model.image.image_size", "0"),
    ("model.image.drop_path", "2"),
    ("model.text.width", "0"),
    ("model.text.heads", "0"),
    ("model.text.layers", "-1"),
    ("model.text.dropout", "-0.1"),
    ("model.fusion.layers", "-1"),
    ("model.codewords", "-1"),
    ("objectives.contrastive.weight", "-1"),
    ("objectives.levels.weight", "-1"),
    ("data.max_bad_share", "2"),
    ("data.vocabulary", "0"),
    ("teacher.queue_from_epoch", "-1"),
    ("training.epochs", "-1"),
]


@pytest.mark.parametrize(("key", "value"), OUT_OF_RANGE, ids=[key for key, _ in OUT_OF_RANGE])
def test_a_number_out_of_its_range_is_named_with_its_key(key, value):
    assert f"{key} is {value}" in mistake(f"--{key}", value)


def test_a_key_that_stands_twice_in_a_file_is_refused(recipe_file):
    twice = recipe_file("name: a\noptimizer:\n  lr: 1e-3\n  min_lr: 0.0\n  lr: 1e-4\n")
    assert mistake("--config", twice) == f"{twice}: optimizer.lr stands twice, again in line 5; keep one of them"
    twice = recipe_file("name: a\ntraining:\n  steps: 1\n'name': b\n")
    assert "name stands twice, again in line 4" in mistake("--config", twice)


def test_a_key_may_stand_in_two_groups_and_be_merged(recipe_file):
    text = "model:\n  image: &side\n    frozen: false\n  text:\n    <<: *side\n    frozen: false\n    width: 12\n"
    assert read("--config", recipe_file(text)).model.text.width == 12


IMPOSSIBLE = [
    (("--model.codewords", "0"), ("objectives.codebook.weight", "model.codewords is 0")),
    (("--model.fusion.layers", "0"), ("model.fusion.layers is 0", "matching")),
    (("--model.text.positions", "16"), ("data.caption_tokens 32", "model.text.positions 16")),
    (("--model.text.heads", "7"), ("model.text.width 768", "model.text.heads 7")),
    (("--data.caption_tokens", "2"), ("data.caption_tokens is 2",)),
    (("--data.workers", "-1"), ("data.workers is -1",)),
    (("--data.augment.crop_scale", "[0.9, 0.1]"), ("augment.crop_scale is [0.9, 0.1]",)),
    (("--data.augment.magnitude", "11"), ("augment.magnitude is 11",)),
    (("--training.global_batch", "0"), ("training.global_batch is 0",)),
    (("--training.keep_last", "0"), ("training.keep_last is 0",)),
    (("--name", "../elsewhere"), ("name is '../elsewhere'",)),
    (("--name", ".hidden"), ("name is '.hidden'",)),
    (("--name", ""), ("name is ''",)),
]


@pytest.mark.parametrize(("arguments", "parts"), IMPOSSIBLE, ids=[" ".join(arguments) for arguments, _ in IMPOSSIBLE])
def test_an_impossible_combination_names_its_keys(arguments, parts):
    message = mistake(*arguments)
    assert all(part in message for part in parts), message


def test_objectives_that_are_off_need_nothing():
    off = [
        "--objectives.codebook.weight",
        "0",
        "--objectives.matching.weight",
        "0",
        "--objectives.masked_language.weight",
    ]
    recipe = read(*off, "0", "--model.codewords", "0", "--model.fusion.layers", "0")
    assert recipe.model.codewords == recipe.model.fusion.layers == 0


@pytest.mark.parametrize(
    "bad",
    [
        ["--optimiser.lr", "1"],
        ["--config", "none.yaml"],
        ["--model.codewords", "0"],
        ["--model.codewords", "-1"],
        ["--transport.beta", "0"],
        ["--transport.inner_steps", "0"],
        ["--transport.solver", "sinkhorn", "--transport.regularisation", "0"],
        ["--objectives.codebook.temperature", "0"],
        ["--objectives.matching.pool", "0"],
        ["--teacher.distill_weight", "2"],
    ],
    ids=" ".join,
)
def test_the_command_answers_a_mistake_before_anything_is_written(tmp_path, monkeypatch, capsys, bad):
    monkeypatch.chdir(tmp_path)
    assert main(["pretrain", *bad]) == 2
    message = capsys.readouterr().err
    assert message.startswith("ligature: ") and message.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_survives_writing_and_reading(tmp_path):
    recipe = read(
        "--optimizer.lr", "3e-7", "--training.steps", "7", "--name", "naïve", "--data.augment.crop_scale", "[0.5, 1]"
    )
    write_recipe(tmp_path / "config.yaml", recipe)
    assert load_recipe(PretrainRecipe, tmp_path / "config.yaml") == recipe
    assert read("--config", str(tmp_path / "config.yaml")) == recipe


def test_the_written_recipe_states_every_key(tmp_path):
    write_recipe(tmp_path / "config.yaml", PretrainRecipe())
    text = (tmp_path / "config.yaml").read_text()
    assert all(f"{key.rsplit('.', 1)[-1]}:" in text for key in keys_of(PretrainRecipe))


def test_a_stored_recipe_that_was_damaged_gives_a_one_line_error(tmp_path):
    path = tmp_path / "config.yaml"
    for text, says in [("training: [", "not valid YAML"), ("optimizer:\n  lrr: 3\n", "unknown key optimizer.lrr")]:
        path.write_text(text)
        with pytest.raises(RecipeError, match=says):
            load_recipe(PretrainRecipe, path)
    with pytest.raises(RecipeError, match="no recipe at"):
        load_recipe(PretrainRecipe, tmp_path / "none.yaml")


def test_changed_keys_names_every_leaf_that_differs_and_no_other():
    old, new = read(), read("--optimizer.lr", "1e-3", "--model.image.width", "192", "--name", "other")
    assert sorted(changed_keys(old, new)) == [
        "model.image.width: None -> 192",
        "name: codis -> other",
        "optimizer.lr: 0.0001 -> 0.001",
    ]
    assert changed_keys(old, read()) == []


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_shipped_recipe_fits_its_stage(path):
    """Keys that only the user can know are set here; everything else comes from the file."""
    folder = path.relative_to(configs.__path__[0]).parts[0]
    if folder == "launch":
        read_slurm_options(["--site", str(path)])
        return
    set_in_file = yaml.safe_load(path.read_text(encoding="utf-8"))
    required = {
        "finetune": {"--checkpoint": "x", "--dataset": "x"},
        "evaluate": {"--checkpoint": "x", "--dataset": "x", "--data": "x", "--split": "x"},
    }
    mistakes = {}
    stages = ["finetune", "evaluate"] if folder == "finetune" else [folder]
    for stage in stages:
        home, name = RECIPES[stage]
        options = required.get(stage, {})
        if set_in_file.get("hat", {}).get("encoders") == "backbones":
            options.pop("--checkpoint")
        arguments = [word for option in options.items() for word in option]
        try:
            read_recipe(getattr(importlib.import_module(home), name), [*arguments, "--config", str(path)], stage)
        except RecipeError as error:
            mistakes[stage] = str(error)
    assert len(mistakes) < len(stages), mistakes


@pytest.mark.parametrize("over", ["base", "flickr8k_cpu"])
def test_vldeformers_ablations_change_only_their_stated_keys(over):
    folder = Path(configs.__path__[0]) / "finetune" / "vldeformer"
    ablations = [
        path
        for path in sorted(folder.glob("*.yaml"))
        if path.stem not in ("base", "flickr8k_cpu", "not_tuned_evaluate")
    ]
    assert len(ablations) == 9
    arguments = ["--dataset", "x", "--config", str(folder / f"{over}.yaml")]
    plain = read_recipe(FinetuneRecipe, arguments, "finetune")
    for path in ablations:
        changed_recipe = read_recipe(FinetuneRecipe, [*arguments, "--config", str(path)], "finetune")
        changed = {line.split(":")[0] for line in changed_keys(plain, changed_recipe)} - {"name"}
        same = over == "flickr8k_cpu" and path.stem == "temperature_005"
        assert changed and all(key.startswith("vldeformer.") for key in changed) or same, (path.stem, changed)


@pytest.mark.parametrize(
    ("global_batch", "micro_batch", "world", "expected"),
    [(512, 64, 8, (64, 1)), (512, 64, 1, (64, 8)), (96, 64, 1, (48, 2)), (7, 4, 1, (1, 7)), (8, 64, 2, (4, 1))],
)
def test_the_global_batch_is_divided_exactly(global_batch, micro_batch, world, expected):
    micro, accumulation = divide_batch(global_batch, micro_batch, world)
    assert (micro, accumulation) == expected
    assert micro * accumulation * world == global_batch


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(RecipeError, match="global_batch 10 does not divide over 4 ranks"):
        divide_batch(10, 64, 4)


def test_commands_without_a_recipe_answer_in_one_line_too():
    parser = OptionParser("ligature inspect")
    parser.add_argument("--full", action="store_true")
    for arguments in (["--ful"], ["what"]):
        with pytest.raises(RecipeError, match="--help") as error:
            parser.parse_args(arguments)
        assert arguments[0] in str(error.value)
