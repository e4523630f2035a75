"""Flickr8k's and Flickr30k's own caption file: one line `<image>#<number> TAB <caption>` per caption."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from data_tools.sources.items import Choice, Dropped, Entry, Source
from data_tools.sources.reading import read_text
from runtime.errors import DataError


def _matches(path: Path, head: str) -> bool:
    return re.match(r"[^\t\n]+#\d+\t", head) is not None and not head.startswith(("{", "["))


def _read(path: Path, choice: Choice, dropped: Dropped) -> Iterator[Entry]:
    captions: dict[str, list[str]] = {}
    # Not splitlines: a caption may contain what Unicode calls a line end.
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        label, tab, caption = line.partition("\t")
        name, mark, order = label.rpartition("#")
        if not (tab and mark and name and order.isdigit()):
            raise DataError(f"{path}, line {number}: not `<image>#<number><TAB><caption>`; mend or remove it")
        captions.setdefault(name, []).append(caption)
    for name, lines in captions.items():
        yield Entry(name, PurePosixPath(name).stem, lines, states_id=False)


FLICKR = Source(_read, _matches, published=True)
