"""`ligature status`: show how runs are doing."""

from __future__ import annotations

import json
from pathlib import Path

from launch.recover.run_status import read_status
from runtime.recipe import OptionParser


def run(arguments: list[str]) -> None:
    """Print the state of each run: one block of lines, or one JSON object.

    Raises:
        RecipeError: A folder is not a run's folder.
    """
    parser = OptionParser(
        "ligature status", description="Show how runs are doing: job, step, rate, last checkpoint, last error."
    )
    parser.add_argument("runs", type=Path, nargs="+", help="run folders")
    parser.add_argument("--json", action="store_true", help="print one JSON object a run, for programs")
    options = parser.parse_args(arguments)
    for number, status in enumerate([read_status(folder) for folder in options.runs]):
        if options.json:
            print(json.dumps(status))
        else:
            print("\n" * bool(number) + "\n".join(f"{name:11} {text}" for name, text in status.items()))
