"""`ligature finetune`: fine-tune a checkpoint, or resume its run.

Tested in tests/finetune/test_train.py.
"""

from __future__ import annotations

from launch.stages import read_stage
from runtime.checks import check_given


def run(arguments: list[str]) -> None:
    """Read the recipe, then fine-tune."""
    recipe = read_stage("finetune", arguments)
    check_given(recipe, "data.train")
    from finetune.train import finetune

    finetune(recipe)
