"""A run's folder: a function of the run's name, never of the clock. The same command finds it again and resumes the run."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from runtime.checkpoint import CheckpointFolder
from runtime.errors import RecipeError
from runtime.files import read_json, write_json
from runtime.lease import Lease, take_lease
from runtime.ranks import Ranks, ranks_from_environment, run_on_first
from runtime.recipe import changed_keys, free_keys, load_recipe, write_recipe
from runtime.version import VERSION

PACKAGES = (
    "torch",
    "torchvision",
    "deepspeed",
    "transformers",
    "timm",
    "accelerate",
    "webdataset",
    "numpy",
)
"""Packages that `environment.json` gives the versions of, beside our own."""


class RunFolder:
    """The folder of one run. Only the process that holds its lease writes into it.

    It holds `config.yaml`, `environment.json`, `metrics.jsonl`, `tensorboard/`, `quarantine.jsonl`, `checkpoints/`, `lease/` and,
    at the end, `finished.json`.
    """

    def __init__(self, recipe: Any) -> None:
        self.path = Path(recipe.runs) / recipe.name
        self.config, self.quarantine = self.path / "config.yaml", self.path / "quarantine.jsonl"
        self.lease: Lease | None = None
        self.checkpoints = CheckpointFolder(
            self.path / "checkpoints", recipe.training.keep_last, recipe.training.milestone_every
        )

    def changes(self, recipe: Any) -> list[str]:
        """Return `key: old -> new` for each recipe key in which the folder's recipe differs from this one, free keys left out.

        A folder without a checkpoint has no such keys. Its start may have failed by a mistake in the recipe that only
        building the model shows, and the corrected recipe must be accepted.
        """
        if not self.config.exists() or not self.checkpoints.steps():
            return []
        stored = load_recipe(type(recipe), self.config)
        free = free_keys(type(recipe))
        return [line for line in changed_keys(stored, recipe) if line.split(":")[0] not in free]

    def check(self, recipe: Any) -> None:
        """Refuse a folder that belongs to another recipe.

        Raises:
            RecipeError: the recipes differ; the message names the keys.
        """
        if changes := self.changes(recipe):
            raise RecipeError(
                f"{self.path} belongs to another recipe ({'; '.join(changes)}); choose another --name, or remove the folder"
            )

    def open(self, recipe: Any, ranks: Ranks) -> None:
        """Hold the folder until `close`, and write the recipe and the environment into it. A collective.

        The first start creates the folder.

        Raises:
            RunHeld: another process holds the folder.
        """

        def take_and_write() -> None:
            self.lease = self.checkpoints.lease = take_lease(self.path)
            write_recipe(self.config, recipe)
            write_json(self.path / "environment.json", environment())

        run_on_first(ranks, take_and_write)

    def close(self) -> None:
        """Give the folder up for the next process."""
        if self.lease:
            self.lease.release()

    def finished(self) -> bool:
        """Return whether the run reached its end. The first rank prints it where it did."""
        path = self.path / "finished.json"
        if path.exists() and ranks_from_environment().first:
            print(f"{self.path} is finished ({read_json(path)['steps']} steps); nothing to do")
        return path.exists()

    def finish(self, summary: dict[str, Any]) -> None:
        """Mark the run as finished. `summary` has its number of `steps`."""
        self.write("finished.json", summary)

    def write(self, name: str, value: Any) -> None:
        """Write a JSON file into the folder."""
        assert self.lease, "only the process that holds the run writes into it"
        with self.lease.guarded() as staging:
            write_json(self.path / name, value, staging)


def environment() -> dict[str, Any]:
    """Return the versions, host, command and commit of this process."""
    versions = {"ligature": VERSION}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    source = str(Path(__file__).resolve().parent.parent)
    git = ["git", "-C", source]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    changed = subprocess.run(
        [*git, "status", "--porcelain"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "versions": versions,
        "python": platform.python_version(),
        "host": platform.node(),
        "command": sys.argv,
        "commit": (commit + " with uncommitted changes" * bool(changed)) or "not a git checkout",
    }
