"""`ligature plot`: draw the curves of one run or several as one picture.

Tested in tests/end_to_end/test_path.py.
"""

from __future__ import annotations

from pathlib import Path

from runtime.checks import output_file
from runtime.recipe import OptionParser


def run(arguments: list[str]) -> None:
    """Draw the curves as a PNG file."""
    parser = OptionParser("ligature plot", description="Draw the curves of one run or several as one picture.")
    parser.add_argument("runs", type=Path, nargs="+", help="run folders")
    parser.add_argument("--out", type=output_file, required=True, help="PNG file to write")
    options = parser.parse_args(arguments)
    from finetune.report.curves import plot_curves

    plot_curves(options.runs, options.out)
