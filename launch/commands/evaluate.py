"""`ligature evaluate`: score a checkpoint, with a table and a JSON record.

Tested in tests/finetune/test_evaluate.py.
"""

from __future__ import annotations

from launch.stages import read_stage


def run(arguments: list[str]) -> None:
    """Read the recipe, then score."""
    recipe = read_stage("evaluate", arguments)
    from finetune.evaluate import evaluate

    evaluate(recipe)
