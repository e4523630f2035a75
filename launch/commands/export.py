"""`ligature export`: write a model alone, as a plain safetensors folder.

Tested in tests/end_to_end/test_path.py.
"""

from __future__ import annotations

from pathlib import Path

from runtime.recipe import OptionParser


def run(arguments: list[str]) -> None:
    """Write the model and print where."""
    parser = OptionParser("ligature export", description="Write a model alone, as a plain safetensors folder.")
    parser.add_argument("checkpoint", type=Path, help="folder of a run or of a checkpoint")
    parser.add_argument("out", type=Path, help="folder to make")
    options = parser.parse_args(arguments)
    from pretrain.weights.export import export

    print(export(options.checkpoint, options.out))
