"""`ligature report`: write one HTML page of a run: curves, codebook, word maps.

Tested in tests/finetune/report/test_run_page.py.
"""

from __future__ import annotations

from pathlib import Path

from runtime.checks import output_file
from runtime.errors import RecipeError
from runtime.recipe import OptionParser


def run(arguments: list[str]) -> None:
    """Write the page and print where it is."""
    parser = OptionParser("ligature report", description="Write one HTML page of a run: curves, codebook, word maps.")
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("--out", type=output_file, help="HTML file to write (default RUN/report.html)")
    parser.add_argument("--data", help="shard folder for codewords and word maps (default: the run's validation data)")
    parser.add_argument("--limit", type=int, default=1000, help="images of that folder to look at (default 1000)")
    options = parser.parse_args(arguments)
    if options.limit < 1:
        raise RecipeError(f"--limit is {options.limit}; it must be 1 or more")
    from finetune.report.run_page import write_report

    print(write_report(options.run, options.out, options.data, options.limit))
