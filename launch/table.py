"""All commands of `ligature` at a glance. To add one: a file in `launch/commands/` with a `run(arguments)`, and a line here.

Tested in tests/launch/test_cli.py.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable
from dataclasses import dataclass

from runtime.errors import RecipeError


@dataclass(frozen=True)
class Command:
    """A command: the module with its `run(arguments)`, and its line of help."""

    module: str
    about: str

    def load(self) -> Callable[[list[str]], None]:
        """Import the command's module and return its `run`."""
        # Imported on use: help stays fast, and a command can run another through the table without an import circle.
        return importlib.import_module(self.module).run


# In the order of the help text: first what a newcomer needs, last what runs and watches long jobs.
COMMANDS = {
    "demo": Command("launch.commands.demo", "run the whole path on drawn shapes, on a CPU, in minutes"),
    "shapes": Command("launch.commands.shapes", "OUT: draw captioned scenes of coloured shapes to try things on"),
    "shard": Command("launch.commands.shard", "SOURCE --out DIR: write WebDataset shards from captioned images"),
    "inspect": Command("launch.commands.inspect", "DIR: verify and describe a shard folder, or index tars made elsewhere"),
    "pretrain": Command("launch.commands.pretrain", "--config RECIPE: pretrain a model, or resume its run"),
    "finetune": Command("launch.commands.finetune", "--config RECIPE: fine-tune a checkpoint for retrieval"),
    "evaluate": Command("launch.commands.evaluate", "--config RECIPE: score a checkpoint; a table and a JSON record"),
    "compare": Command("launch.commands.compare", "A B: compare two score records by a paired test"),
    "import": Command("launch.commands.import_weights", "hf|clip|siglip|open_clip|albef SOURCE OUT: convert a published model into a checkpoint of ours"),
    "index": Command("launch.commands.index", "--checkpoint RUN --data IMAGES: embed shards or a folder of images for search"),
    "search": Command("launch.commands.search", '"WORDS" or IMAGE: list the images of an index most like it'),
    "export": Command("launch.commands.export", "CHECKPOINT OUT --format F: write the model alone, for Ligature or other libraries"),
    "heatmap": Command("launch.commands.heatmap", "CHECKPOINT IMAGE CAPTION --out FILE: draw where HAT's words look"),
    "report": Command("launch.commands.report", "RUN…: write one HTML page of a run (curves, scores, recipe, word maps), or compare runs"),
    "ablate": Command("launch.commands.ablate", "--config RECIPE: run arms with the same seeds and compare them in pairs"),
    "plot": Command("launch.commands.plot", "RUN… --out FILE: draw the curves of runs as a picture"),
    "launch": Command("launch.commands.launch", "local|hosts|slurm … STAGE …: run a stage on several processes or machines"),
    "status": Command("launch.commands.status", "[RUN…]: list all runs, or show one: job, step, rate, time left, last error"),
    "doctor": Command("launch.commands.doctor", "check this node, or a job's nodes, before time is spent on them"),
    "completion": Command("launch.commands.completion", "bash|zsh|fish: print a completion script for the shell"),
    "plan": Command("launch.commands.plan", "--config RECIPE --nodes N --gpus-per-node G: estimate a run's memory, time and traffic"),
}  # fmt: skip


def find_command(name: str) -> Command:
    """Return the command of that name.

    Raises:
        RecipeError: No command has that name; the message suggests the nearest one.
    """
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {close[0]}?" if close else "`ligature --help` lists them"
        raise RecipeError(f"no command `{name}`; {hint}")
    return COMMANDS[name]


def usage() -> str:
    """Return the text of `ligature --help`."""
    lines = [f"  {name:10} {command.about}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: ligature COMMAND …",
            "",
            "Pretrain image-text models and turn them into image-text search.",
            "",
            *lines,
            "",
            "`ligature COMMAND --help` explains a command's options, `ligature pretrain --help optimizer` one group of them.",
            "`ligature --version` prints the version.",
        ]
    )
