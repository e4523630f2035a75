"""`ligature ablate`: run arms with the same seeds and compare them in pairs.

Tested in tests/launch/ablation/test_ablation.py.
"""

from __future__ import annotations

from launch.cli import main
from launch.stages import read_stage


def run(arguments: list[str]) -> None:
    """Read the recipe, run the arms that are missing, and print the table."""
    recipe = read_stage("ablate", arguments)
    from launch.ablation.run import run_arms
    from launch.ablation.workers import Workers

    # Each worker runs the stages through the front door, as a shell would, so an error is one line and an exit code.
    with Workers(recipe.jobs, main) as workers:
        print(run_arms(recipe, workers))
