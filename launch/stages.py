"""The stages that read a recipe, and how a stage's command line becomes its recipe. Nothing here imports torch.

Tested in tests/runtime/test_recipe.py.
"""

from __future__ import annotations

import importlib
import re
from typing import TYPE_CHECKING, Any

from runtime.checks import check_writable
from runtime.recipe import read_recipe

if TYPE_CHECKING:
    from data_tools.making.writer import ShardOptions

RECIPES = {
    "pretrain": ("pretrain.config", "PretrainRecipe"),
    "finetune": ("finetune.config", "FinetuneRecipe"),
    "evaluate": ("finetune.config", "EvaluateRecipe"),
    "index": ("finetune.search.config", "IndexRecipe"),
    "ablate": ("launch.ablation.config", "AblateRecipe"),
}
"""Stage -> the module and the name of its recipe's dataclass."""


def read_stage(stage: str, arguments: list[str]) -> Any:
    """Return a stage's recipe, read from its command line.

    Without torch this takes a fraction of a second, so a mistake is answered at once.

    Raises:
        RecipeError: The recipe or an option cannot be run.
    """
    module, name = RECIPES[stage]
    recipe = read_recipe(getattr(importlib.import_module(module), name), arguments, f"ligature {stage}")
    for key, folder in (("runs", True), ("out", stage == "index")):
        if hasattr(recipe, key):
            check_writable(key, getattr(recipe, key), folder)
    return recipe


def read_shard_options(arguments: list[str]) -> ShardOptions:
    """Return the options of a `ligature shard` command line.

    The source may come first without its option's name, and `--exclude` may be repeated.

    Raises:
        RecipeError: An option cannot be run.
    """
    from data_tools.making.writer import ShardOptions

    if arguments and not arguments[0].startswith("-"):
        arguments = ["--annotation", *arguments]
    # `--exclude+` appends to the list; `--exclude` would replace it.
    arguments = [re.sub(r"^--exclude(?==|$)", "--exclude+", argument) for argument in arguments]
    options = read_recipe(ShardOptions, arguments, "ligature shard SOURCE")
    check_writable("out", options.out, folder=True)
    return options


def check_batch(recipe: Any, world: int) -> None:
    """Raise RecipeError if a recipe's global batch size does not divide over `world` ranks."""
    from pretrain.config import divide_batch

    # Fine-tuning may have no micro-batch; with 1 only the division over the ranks can fail.
    divide_batch(recipe.training.global_batch, recipe.training.micro_batch or 1, world)
