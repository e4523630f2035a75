"""Which checkpoint a run resumes from, and which one it goes back to after sick steps. The first rank decides for all."""

from __future__ import annotations

from pathlib import Path

from runtime.errors import CheckpointError, SickRun
from runtime.ranks import run_on_first
from training.context import RunContext


def find_resume(context: RunContext) -> Path | None:
    """Return the newest checkpoint that verifies, or None when the run has no checkpoint yet. A collective.

    Raises:
        CheckpointError: there are checkpoints and none verifies. A run that began anew would delete them.
    """
    checkpoints = context.folder.checkpoints

    def find() -> Path | None:
        newest, steps = checkpoints.newest_valid(), checkpoints.steps()
        if newest is None and steps:
            raise CheckpointError(
                f"none of the {len(steps)} checkpoints in {checkpoints.folder} verifies; bring a whole one back, or remove the folder to begin anew"
            )
        return newest

    return run_on_first(context.ranks, find)


def find_healthy(context: RunContext, until: int) -> Path:
    """Return the newest checkpoint that verifies, of step `until` or before. A collective.

    Later checkpoints are deleted: the run goes back behind them.

    Raises:
        SickRun: there is no checkpoint to go back to.
    """
    path = run_on_first(context.ranks, lambda: context.folder.checkpoints.newest_valid(until))
    if path is None:
        raise SickRun(f"no checkpoint of step {until} or before to go back to; start again with a lower optimizer.lr")
    return path
