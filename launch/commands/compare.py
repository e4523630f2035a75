"""`ligature compare`: compare two score records, query by query, by a paired test.

Tested in tests/retrieval/test_compare.py.
"""

from __future__ import annotations

from pathlib import Path

from runtime.checks import output_file
from runtime.errors import RecipeError
from runtime.files import write_json
from runtime.recipe import OptionParser


def run(arguments: list[str]) -> None:
    """Print the comparison, and write it to the JSON file and the page that the options name."""
    parser = OptionParser(
        "ligature compare", description="Compare two score records, query by query, by a paired test."
    )
    parser.add_argument("first", type=Path, help="score record (JSON, with its .ranks.npz beside it)")
    parser.add_argument("second", type=Path, help="score record to compare it with")
    parser.add_argument("--out", type=output_file, help="also write the comparison as JSON")
    parser.add_argument(
        "--page", type=output_file, help="HTML page of captions that only the first record gets right; needs --data"
    )
    parser.add_argument("--data", help="shard folder or caption file that both were scored on")
    parser.add_argument("--images", default="", help="folder or tar of a caption file's images")
    options = parser.parse_args(arguments)
    if bool(options.page) != bool(options.data):
        raise RecipeError("--page and --data go together: a page shows the pictures")
    from retrieval.compare import compare_records, describe

    comparison = compare_records(options.first, options.second)
    if options.out:
        write_json(options.out, comparison)
    print(describe(comparison))
    if options.page:
        from finetune.report.flips_page import write_flips_page

        print(write_flips_page(options.first, options.second, options.data, options.images, options.page))
