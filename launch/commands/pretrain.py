"""`ligature pretrain`: pretrain a model, or resume its run.

Tested in tests/end_to_end/test_path.py.
"""

from __future__ import annotations

from launch.stages import read_stage
from runtime.checks import check_given


def run(arguments: list[str]) -> None:
    """Read the recipe, then pretrain."""
    recipe = read_stage("pretrain", arguments)
    check_given(recipe, "data.train")
    # Imported after the recipe is read: torch takes seconds, and a mistake is answered before.
    from pretrain.train import pretrain

    pretrain(recipe)
