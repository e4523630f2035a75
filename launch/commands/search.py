"""`ligature search`: list the images of an index that are most like some words or an image.

Tested in tests/finetune/search/test_query.py.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.checks import output_file
from runtime.errors import RecipeError
from runtime.recipe import OptionParser

if TYPE_CHECKING:
    from finetune.search.query import Answers


def run(arguments: list[str]) -> None:
    """Search the index, print the hits as tables or JSON lines, and write a page if `--html` names one."""
    parser = OptionParser(
        "ligature search", description="List the images of an index that are most like some words or an image."
    )
    parser.add_argument("query", nargs="*", help='words in quotes ("a dog on a beach"), or an image file')
    parser.add_argument(
        "--index", type=Path, default=Path("index"), help="folder made by `ligature index` (default index)"
    )
    parser.add_argument("--queries", type=Path, metavar="FILE", help="more queries, one a line; - is standard input")
    parser.add_argument("--top", type=int, default=10, help="images to list for a query (default 10)")
    parser.add_argument("--html", type=output_file, metavar="PAGE", help="also write a page with the pictures")
    parser.add_argument("--json", action="store_true", help="print one line of JSON a query instead of a table")
    parser.add_argument(
        "--approximate", action="store_true", help="search the index's inverted lists instead of all its rows"
    )
    parser.add_argument(
        "--checkpoint", help="folder of the index's checkpoint (default: the folder that the index names)"
    )
    parser.add_argument(
        "--device", choices=["auto", "cpu", "cuda"], default="cpu", help="device that encodes the query (default cpu)"
    )
    options = parser.parse_args(arguments)
    if options.top < 1:
        raise RecipeError(f"--top is {options.top}; it must be 1 or more")
    # Imported after the options are read, so that help and mistakes do not wait for torch.
    from finetune.search.query import read_queries, search
    from runtime.ranks import Ranks, choose_device

    queries = read_queries(options.query, options.queries)
    device = choose_device(options.device, Ranks())
    answers = search(options.index, queries, options.top, options.checkpoint, options.approximate, device)
    for note in answers.notes:
        print(f"ligature: note: {note}", file=sys.stderr)
    if options.html:
        from finetune.search.page import write_results_page

        write_results_page(answers, options.html)
    if options.json:
        print(format_json(answers))
    else:
        print_tables(answers)
        if options.html:
            print(f"page: {options.html}")


def print_tables(answers: Answers) -> None:
    """Print a table of hits for each query."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    captioned = any(hit.captions for hits in answers.hits for hit in hits)
    for query, hits in zip(answers.queries, answers.hits, strict=True):
        table = Table(
            title=Text(query.text, "bold"),
            title_justify="left",
            box=None,
            pad_edge=False,
            padding=(0, 2, 0, 0),
            expand=captioned,
        )
        table.add_column("", justify="right", style="dim")
        table.add_column("score", justify="right")
        table.add_column("image", overflow="fold")
        if captioned:
            table.add_column("caption", overflow="ellipsis", no_wrap=True, ratio=1, style="dim")
        for number, hit in enumerate(hits, start=1):
            caption = [Text(hit.captions[0] if hit.captions else "")] if captioned else []
            table.add_row(str(number), f"{hit.score:.3f}", Text(hit.name), *caption)
        console.print(table)
        console.print()
    count = f"{len(answers.queries):,} queries" if len(answers.queries) > 1 else "the query"
    seconds = (
        f"encoding {count} {1e3 * answers.encoding_seconds:.1f} ms, comparing {1e3 * answers.comparing_seconds:.1f} ms"
    )
    console.print(Text(f"{answers.description}; {seconds}", "dim"))


def format_json(answers: Answers) -> str:
    """Return one line of JSON for each query."""
    lines = []
    for query, hits in zip(answers.queries, answers.hits, strict=True):
        results = [
            {"rank": rank, "score": hit.score, "name": hit.name, "number": hit.number, "captions": hit.captions}
            for rank, hit in enumerate(hits, start=1)
        ]
        kind = "image" if query.image else "words"
        lines.append(json.dumps({"query": query.text, "kind": kind, "results": results}, ensure_ascii=False))
    return "\n".join(lines)
