"""A run's figures in experiment trackers (wandb, trackio, mlflow), through accelerate's common interface to them.

Off by default. `metrics.jsonl` and tensorboard's events hold every figure anyway, so a tracker that fails ends with a warning and
never ends the run.

    with open_trackers(context, config) as trackers:
        trackers.write(step, {"train/loss": 3.4})
"""

from __future__ import annotations

import hashlib
import math
import sys
from pathlib import Path
from typing import Any

from runtime.files import read_json
from runtime.recipe import flatten_values
from training.config import LoopConfig
from training.context import RunContext

IDS = "trackers.json"
"""File in a run's folder: tracker -> its id of the run, by which a resumed run goes on in the same place."""


class Trackers:
    """The trackers of one run. Every failure of one is a warning, and that tracker gets nothing more."""

    def __init__(self) -> None:
        self._open: dict[str, Any] = {}
        """accelerate's trackers by name."""

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, *_: object) -> None:
        for name, tracker in list(self._open.items()):
            self._guard(name, tracker.finish)
        self._open.clear()

    def start(self, name: str, run: Path, project: str, recorded: str | None) -> str | None:
        """Open a tracker.

        Args:
            name: `wandb`, `trackio` or `mlflow`.
            run: the run's folder, which holds its recipe.
            project: the tracker's project, or mlflow's experiment.
            recorded: the run's id in that tracker; None: the run is new to it.

        Returns:
            The run's id in that tracker; None where it cannot be opened.
        """
        return self._guard(name, lambda: self._start(name, run, project, recorded))

    def _start(self, name: str, run: Path, project: str, recorded: str | None) -> str:
        from accelerate.tracking import MLflowTracker, TrackioTracker, WandBTracker

        # Runs of one name in different folders are different runs.
        own = recorded or f"{run.name}-{hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:8]}"
        tracker: Any
        if name == "wandb":
            tracker = WandBTracker(project, name=run.name, id=own, resume="allow", dir=str(run))
        elif name == "trackio":
            tracker = TrackioTracker(project, name=own, resume="allow")
        else:
            tracker = MLflowTracker(experiment_name=project, run_name=run.name, run_id=recorded)
        # The first rank alone has trackers, so none needs to be kept from writing.
        tracker.main_process_only = False
        tracker.start()
        self._open[name] = tracker
        if name == "mlflow":
            own = tracker.tracker.info.run_id
        # mlflow refuses to change what is stored; the recipe of a resumed run is the same but for keys that do not matter.
        if recorded is None:
            tracker.store_init_configuration(_read_recipe(run))
        return own

    def write(self, step: int, figures: dict[str, float]) -> None:
        """Send the figures of a step. Those that are not finite are left out: not every tracker takes them."""
        finite = {key: value for key, value in figures.items() if math.isfinite(value)}
        for name, tracker in list(self._open.items()):
            values = {key.replace("@", "_at_"): value for key, value in finite.items()} if name == "mlflow" else finite
            self._guard(name, lambda tracker=tracker, values=values: tracker.log(values, step=step))  # type: ignore[misc]

    def _guard(self, name: str, action: Any) -> Any:
        """Call a tracker; a failure drops it. It may be of any kind, since a tracker talks to a server of its own."""
        try:
            return action()
        except Exception as error:
            self._open.pop(name, None)
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            print(f"ligature: WARNING: {name} gets nothing from here on: {reason}", file=sys.stderr)
            return None


def open_trackers(context: RunContext, config: LoopConfig) -> Trackers:
    """Open the trackers of a recipe; on ranks other than the first there are none."""
    trackers, folder = Trackers(), context.folder
    if context.ranks.first and config.trackers:
        from accelerate import PartialState

        PartialState(
            cpu=context.device.type == "cpu"
        )  # accelerate's trackers log by it; it takes the ranks as they are
        path = folder.path / IDS
        ids = read_json(path) if path.is_file() else {}
        for name in config.trackers:
            if own := trackers.start(name, folder.path, config.tracker_project, ids.get(name)):
                ids[name] = own
        folder.write(IDS, ids)
    return trackers


def _read_recipe(run: Path) -> dict[str, Any]:
    """Return a run's recipe by dotted key, as kinds of values that every tracker takes."""
    import yaml

    values = flatten_values(yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")))
    return {key: value if isinstance(value, bool | int | float | str) else str(value) for key, value in values.items()}
