"""`ligature export`: write a model for Ligature or for another library.

Tested in tests/end_to_end/test_path.py.
"""

from __future__ import annotations

from argparse import RawDescriptionHelpFormatter
from pathlib import Path

from finetune.export.formats import FORMATS
from runtime.checks import output_folder
from runtime.recipe import OptionParser


def run(arguments: list[str]) -> None:
    """Write the model and print where."""
    width = max(map(len, FORMATS))
    lines = "\n".join(f"  {name:{width}}  {form.about}" for name, form in FORMATS.items())
    parser = OptionParser(
        "ligature export",
        description="Write a model alone, for Ligature or for another library, with a model card.",
        epilog=f"formats:\n{lines}",
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", type=Path, help="folder of a run or of a checkpoint")
    parser.add_argument("out", type=output_folder, help="folder to make")
    parser.add_argument("--format", choices=list(FORMATS), default="ligature", help="see below (default ligature)")
    options = parser.parse_args(arguments)
    from finetune.export.export import export

    print("\n".join(export(options.checkpoint, options.out, options.format)))
