"""`ligature heatmap`: draw where in an image the words of a caption look, by a HAT checkpoint.

Tested in tests/finetune/heads/test_hat.py.
"""

from __future__ import annotations

from pathlib import Path

from runtime.checks import output_file
from runtime.recipe import OptionParser


def run(arguments: list[str]) -> None:
    """Draw the heat maps as a PNG file."""
    parser = OptionParser(
        "ligature heatmap", description="Draw where in an image the words of a caption look, by a HAT checkpoint."
    )
    parser.add_argument("checkpoint", help="folder of a HAT run or of a checkpoint")
    parser.add_argument("image", type=Path, help="image file")
    parser.add_argument("caption", help="the words, in quotes")
    parser.add_argument("--out", type=output_file, required=True, help="PNG file to write")
    options = parser.parse_args(arguments)
    from finetune.report.heat_maps import draw_heat_maps

    draw_heat_maps(options.checkpoint, options.image, options.caption, options.out)
