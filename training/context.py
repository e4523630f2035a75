"""What one rank needs wherever it is in a run: the run's folder, its ranks, its device and its watchdog.

Tested in tests/end_to_end/test_interrupt.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.ranks import Ranks, join
from runtime.run_folder import RunFolder
from runtime.watchdog import Watchdog, watch_ranks

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class RunContext:
    """One rank's place in a run."""

    folder: RunFolder
    """The run's folder, which this process holds while it trains."""
    ranks: Ranks
    """This process among the processes of the run."""
    device: torch.device
    """The device that this rank computes on."""
    watchdog: Watchdog
    """Records which phase this rank is in, and stops all ranks when one hangs."""


def hold_run(recipe: Any, train: Callable[[Any, RunContext], None]) -> Path:
    """Meet the other ranks, train, and release the run's folder. Do nothing when the run is finished.

    Args:
        recipe: the run's recipe; it has `runs`, `name` and `training`.
        train: this rank's part of the run, called with the recipe and the context.

    Returns:
        The run's folder.
    """
    folder = RunFolder(recipe)
    # Checked before the ranks meet, so that a wrong recipe fails at once.
    folder.check(recipe)
    recipe.training.check_trackers()
    if not folder.finished():
        ranks, device = join(recipe.training.device, recipe.training.rank_timeout)
        try:
            with watch_ranks(ranks, recipe.training.rank_timeout) as watchdog:
                train(recipe, RunContext(folder, ranks, device, watchdog))
        finally:
            folder.close()
    return folder.path
