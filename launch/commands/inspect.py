"""`ligature inspect`: verify and describe a shard folder, or index tars made elsewhere.

Tested in tests/data_tools/making/test_indexing.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from runtime.checks import output_file
from runtime.errors import RecipeError
from runtime.recipe import OptionParser


def run(arguments: list[str]) -> None:
    """Index the folder if `--index` is given, verify it, and print a description."""
    parser = OptionParser(
        "ligature inspect", description="Verify and describe a shard folder, or index tars made elsewhere."
    )
    parser.add_argument("folder", type=Path, help="shard folder")
    depth = parser.add_mutually_exclusive_group()
    depth.add_argument("--quick", action="store_true", help="check names and sizes (the default)")
    depth.add_argument("--full", action="store_true", help="check every file's hash, and every index")
    parser.add_argument(
        "--html", type=output_file, metavar="PAGE", help="write a page with histograms and a grid of samples"
    )
    parser.add_argument(
        "--index", action="store_true", help="index tars made elsewhere (img2dataset, open_clip) in place"
    )
    parser.add_argument(
        "--slice", metavar="I/N", help="with --index: index only this part of the tars, as one task of a job array"
    )
    parser.add_argument("--workers", type=int, default=0, help="processes (default 0: one a core)")
    options = parser.parse_args(arguments)
    if options.workers < 0:
        raise RecipeError(f"--workers is {options.workers}; it must be 0 or more")
    if options.slice is not None and not options.index:
        raise RecipeError("--slice goes with --index; a folder is verified and described whole")
    from data_tools.making.inspection import describe, verify

    if options.index:
        from data_tools.making.indexing import index_folder
        from data_tools.making.writer import read_slice

        if index_folder(options.folder, options.workers, read_slice(options.slice)) is None:
            print(
                f"slice {options.slice} of {options.folder} is indexed; the slice that finishes last writes the manifest"
            )
            return
    verify(options.folder, options.full, options.workers)
    if options.html is None:
        print(format_description(describe(options.folder)))
    else:
        from data_tools.making.inspection_page import write_page

        print(format_description(write_page(options.folder, options.html)), f"  page          {options.html}", sep="\n")


def format_description(description: dict[str, Any]) -> str:
    """Return what `data_tools.making.inspection.describe` measured, as text for a terminal."""
    lines = [description["folder"]]

    def add(name: str, value: str) -> None:
        lines.append(f"  {name:14}{value}")

    repeated = description["samples"] - description["images"]
    note = f", of which {repeated:,} show another's picture" if repeated else ""
    add("samples", f"{description['samples']:,}{note}")
    add("captions", f"{description['captions']:,}")
    add("shards", f"{description['shards']:,}, {description['bytes'] / 1e6:,.1f} MB")
    add("formats", ", ".join(f"{name} {count:,}" for name, count in description["image_formats"].items()))
    add("fingerprint", description["fingerprint"][:16])
    source = {name: value for name, value in description["source"].items() if value not in (None, False, 0, {})}
    add("source", ", ".join(f"{name} {value}" for name, value in source.items() if name != "items_sha256"))
    for number, (reason, count) in enumerate(description["dropped"].items()):
        add("dropped" if number == 0 else "", f"{count:,} {reason}")
    columns = ["least", "5 %", "25 %", "median", "75 %", "95 %", "most"]
    lines += ["", "  " + " " * 20 + "".join(f"{column:>9}" for column in columns)]
    for name, values in description["quantiles"].items():
        lines.append(f"  {name.replace('_', ' '):20}" + "".join(f"{value:>9,.5g}" for value in values.values()))
    if description["captions_read_of"] < description["samples"]:
        lines.append(f"  (caption words: of {description['captions_read_of']:,} samples spread evenly)")
    return "\n".join(lines)
