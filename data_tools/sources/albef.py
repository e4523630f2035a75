"""ALBEF's and BLIP's json: a list of objects with `image` and `caption`, a string or a list of strings.

Tested in tests/data_tools/sources/test_albef_source.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_tools.sources.items import Choice, Dropped, Entry, Row, Source, join_rows
from data_tools.sources.reading import FieldCheck, read_value
from runtime.errors import DataError


def _matches(path: Path, head: str) -> bool:
    return head.startswith("[") and '"caption"' in head


def _read(path: Path, choice: Choice, dropped: Dropped) -> Iterator[Entry]:
    rows = read_value(path)
    if not isinstance(rows, list):
        raise DataError(f"{path} is not a list of images, so it is of another kind; give the right --kind")
    yield from join_rows(_rows(path, rows))


def _rows(path: Path, rows: list[Any]) -> Iterator[Row]:
    for position, row in enumerate(rows):
        with FieldCheck(path, f"entry {position}"):
            if "image" not in row and "url" in row:
                raise DataError(
                    f"{path}: entry {position} has an address but no `image`; "
                    "fetch the images first (img2dataset) and shard its tars"
                )
            name, caption, image_id = row["image"], row["caption"], row.get("image_id")
        if not isinstance(name, str) or not isinstance(caption, (str, list)):
            raise DataError(f"{path}: entry {position} has no `image` (a name) and `caption` (a string or a list)")
        # list(caption) of a string would make one caption of each letter.
        yield name, None if image_id is None else str(image_id), [caption] if isinstance(caption, str) else caption


ALBEF = Source(_read, _matches)
