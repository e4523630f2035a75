"""`ligature shapes`: draw captioned scenes of coloured shapes, as a source for `ligature shard`.

Tested in tests/launch/commands/test_shapes_command.py.
"""

from __future__ import annotations

from runtime.checks import output_folder
from runtime.errors import RecipeError
from runtime.recipe import OptionParser


def run(arguments: list[str]) -> None:
    """Draw the scenes into a new folder and print the number of each split."""
    # Imported before the options: the names of the splits become options.
    from data_tools.shapes.scenes import SPLITS
    from data_tools.shapes.source import write_source
    from data_tools.shapes.wrong_captions import swap_captions

    parser = OptionParser(
        "ligature shapes", description="Draw captioned scenes of coloured shapes, as a source for `ligature shard`."
    )
    parser.add_argument("out", type=output_folder, help="folder to make")
    for split, count in zip(SPLITS, (1000, 200, 500), strict=True):
        parser.add_argument(f"--{split}", type=int, default=count, help=f"images of the split (default {count})")
    parser.add_argument("--size", type=int, default=64, help="pixels a side (default 64)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the drawing (default 0)")
    parser.add_argument(
        "--wrong",
        type=int,
        nargs="*",
        default=[],
        metavar="PERCENT",
        help="also write captions_train_wrong<PERCENT>.json, where this percentage of images have another image's captions",
    )
    options = parser.parse_args(arguments)
    counts = {split: getattr(options, split) for split in SPLITS}
    for name, value, least in (*((split, count, 1) for split, count in counts.items()), ("size", options.size, 16)):
        if value < least:
            raise RecipeError(f"--{name} is {value}; it must be {least} or more")
    if bad := [percent for percent in options.wrong if not 0 < percent <= 100]:
        raise RecipeError(f"--wrong is {bad[0]}; it must be a percentage from 1 to 100")
    write_source(options.out, counts, options.size, options.seed)
    for percent in options.wrong:
        out = options.out / f"captions_train_wrong{percent}.json"
        swap_captions(options.out / "captions_train.json", out, percent / 100, options.seed)
    print(f"{options.out}: {', '.join(f'{count:,} {split}' for split, count in counts.items())}; captions_<split>.json")
