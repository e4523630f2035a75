"""A run's folder: a function of its name, never of the clock. The same command again finds it and goes on."""

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

PACKAGES = (
    "ligature",
    "torch",
    "torchvision",
    "deepspeed",
    "transformers",
    "timm",
    "accelerate",
    "webdataset",
    "numpy",
)


class RunFolder:
    """`config.yaml`, `environment.json`, `metrics.jsonl`, `tensorboard/`, `quarantine.jsonl`, `checkpoints/`, `lease/`, `finished.json`."""

    def __init__(self, recipe: Any) -> None:
        self.path = Path(recipe.runs) / recipe.name
        self.config, self.quarantine = self.path / "config.yaml", self.path / "quarantine.jsonl"
        self.lease: Lease | None = None
        self.checkpoints = CheckpointFolder(
            self.path / "checkpoints", recipe.training.keep_last, recipe.training.milestone_every
        )

    def changes(self, recipe: Any) -> list[str]:
        """`key: old -> new` where the folder's recipe and this one differ in what makes a run another run. A start that came to no
        checkpoint (a mistake in the recipe that only building the model shows) binds nobody."""
        if not self.config.exists() or not self.checkpoints.steps():
            return []
        stored = load_recipe(type(recipe), self.config)
        free = free_keys(type(recipe))
        return [line for line in changed_keys(stored, recipe) if line.split(":")[0] not in free]

    def check(self, recipe: Any) -> None:
        """Refuse a folder that belongs to another recipe, naming the keys that differ."""
        if changes := self.changes(recipe):
            raise RecipeError(
                f"{self.path} belongs to another recipe ({'; '.join(changes)}); choose another --name, or remove the folder"
            )

    def open(self, recipe: Any, ranks: Ranks) -> None:
        """Hold the folder (made on the first start) until `close`, and write down the recipe and the environment.

        All ranks come here. Raises RunHeld while another process holds it.
        """

        def take_and_write() -> None:
            self.lease = self.checkpoints.lease = take_lease(self.path)
            write_recipe(self.config, recipe)
            write_json(self.path / "environment.json", environment())

        run_on_first(ranks, take_and_write)

    def close(self) -> None:
        """Leave the folder to whoever comes next."""
        if self.lease:
            self.lease.release()

    def finished(self) -> bool:
        """Whether the run reached its end; the first rank says so."""
        path = self.path / "finished.json"
        if path.exists() and ranks_from_environment().first:
            print(f"{self.path} is finished ({read_json(path)['steps']} steps); nothing to do")
        return path.exists()

    def finish(self, summary: dict[str, Any]) -> None:
        self.write("finished.json", summary)

    def write(self, name: str, value: Any) -> None:
        """Put a JSON file into the folder."""
        assert self.lease, "only the process that holds the run writes into it"
        with self.lease.guarded() as staging:
            write_json(self.path / name, value, staging)


def environment() -> dict[str, Any]:
    """Versions, host and commit that a run was made with."""
    versions = {}
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
