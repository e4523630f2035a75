"""`ligature report`: write one HTML page of a run, or one that compares runs.

Tested in tests/finetune/report/test_run_page.py.
"""

from __future__ import annotations

import time
from pathlib import Path

from runtime.checks import output_file
from runtime.errors import RecipeError
from runtime.recipe import OptionParser


def run(arguments: list[str]) -> None:
    """Write the page and print where it is; with --watch write it again while the run trains."""
    parser = OptionParser(
        "ligature report",
        description="Write one HTML page of a run: scores, curves, recipe, errors, codebook, word maps. Of several runs: one page that compares them.",
    )
    parser.add_argument("runs", type=Path, nargs="+", help="folder of a run, or of each run to compare")
    parser.add_argument(
        "--out", type=output_file, help="HTML file to write (default RUN/report.html, of several runs comparison.html)"
    )
    parser.add_argument("--data", help="shard folder for codewords and word maps (default: the run's validation data)")
    parser.add_argument(
        "--limit",
        type=int,
        default=1000,
        help="images of that folder to look at (default 1000; 0: no codewords, no maps)",
    )
    parser.add_argument(
        "--scores",
        type=Path,
        nargs="+",
        default=[],
        help="score records to show besides those in the run's folder and beside it",
    )
    parser.add_argument(
        "--watch",
        type=float,
        nargs="?",
        const=30.0,
        metavar="SECONDS",
        help="write it again every so many seconds (30 if none are given) until the runs are finished or ctrl-C; without codewords and "
        "word maps until then",
    )
    options = parser.parse_args(arguments)
    if options.limit < 0:
        raise RecipeError(f"--limit is {options.limit}; it must be 0 or more")
    if options.watch is not None and not options.watch > 0:
        raise RecipeError(f"--watch is {options.watch:g}; it is a number of seconds above 0")
    if len(options.runs) > 1 and (options.data or options.scores):
        raise RecipeError("--data and --scores are for the page of one run; compare runs without them")
    from finetune.report.comparison_page import write_comparison
    from finetune.report.run_page import write_report

    finished = False
    while not finished:
        finished = options.watch is None or all((run / "finished.json").is_file() for run in options.runs)
        if len(options.runs) > 1:
            page = write_comparison(options.runs, options.out or Path("comparison.html"))
        else:
            # While it trains, its processors are the run's: the model is looked at when it is done.
            limit = options.limit if finished else 0
            page = write_report(options.runs[0], options.out, options.data, limit, options.scores)
        print(page, flush=True)
        if not finished:
            try:
                time.sleep(options.watch)
            except KeyboardInterrupt:  # how a person ends it
                return
