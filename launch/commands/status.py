"""`ligature status`: show how runs are doing."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from launch.recover.run_status import format_runs, is_run, list_runs, read_status, runs_below
from runtime.errors import RecipeError
from runtime.recipe import OptionParser


def run(arguments: list[str]) -> None:
    """Print the state of each named run as a block of lines or a JSON object, or the list of all runs in a folder.

    Raises:
        RecipeError: A folder is not a run's folder, and there is none in it.
    """
    parser = OptionParser(
        "ligature status",
        description="Show how runs are doing: job, step, rate, time left, last checkpoint, last error.",
    )
    parser.add_argument(
        "runs", type=Path, nargs="*", help="run folders, or one folder whose runs are listed (default: runs)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object a run, for programs")
    parser.add_argument(
        "--watch",
        type=float,
        nargs="?",
        const=10.0,
        metavar="SECONDS",
        help="show it again every so many seconds (10 if none are given), until ctrl-C",
    )
    options = parser.parse_args(arguments)
    if options.watch is not None and not options.watch > 0:
        raise RecipeError(f"--watch is {options.watch:g}; it is a number of seconds above 0")
    print(describe(options.runs, options.json), flush=True)
    while options.watch:
        try:
            time.sleep(options.watch)
        except KeyboardInterrupt:  # how a person ends it
            return
        text = describe(options.runs, options.json)
        # On a terminal the screen is cleared, so that the text stays in place.
        clear = "\033[H\033[2J" if sys.stdout.isatty() else "" if options.json else "\n"
        print(clear + text, flush=True)


def describe(folders: list[Path], as_json: bool) -> str:
    """Return the text for some run folders, or for the runs in a folder that is none itself.

    Raises:
        RecipeError: A folder is not a run's folder, and there is none in it.
    """
    listed = runs_below(folders[0] if folders else Path("runs")) if len(folders) < 2 else []
    if folders and (len(folders) > 1 or not listed or is_run(folders[0])):
        statuses = [read_status(folder) for folder in folders]
        if as_json:
            return "\n".join(map(json.dumps, statuses))
        return "\n\n".join("\n".join(f"{name:11} {text}" for name, text in status.items()) for status in statuses)
    if not listed:
        raise RecipeError("there are no runs in runs/ here; name the folder of a run, or one that holds runs")
    rows = list_runs(listed)
    return "\n".join(map(json.dumps, rows)) if as_json else format_runs(rows)
