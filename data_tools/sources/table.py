"""Tables of image paths and captions: CSV, TSV (with a header) and parquet. The rows of one image are joined."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from data_tools.sources.items import Choice, Dropped, Entry, Row, Source, join_rows
from data_tools.sources.reading import is_pattern, read_text
from runtime.errors import DataError, RecipeError

IMAGE_COLUMNS = ("filepath", "path", "image", "image_path", "image_name", "filename", "file_name", "file", "img")
CAPTION_COLUMNS = ("caption", "captions", "text", "title", "comment", "sentence", "description")
ID_COLUMN = "image_id"
DELIMITERS = "\t,|;"


def _matches(path: Path, head: str) -> bool:
    if path.suffix == ".parquet":
        return not path.is_dir() and not is_pattern(path)
    if head.startswith(("{", "[")):
        return False
    names = split_header(head)[1]
    return bool(set(IMAGE_COLUMNS) & names.keys() and set(CAPTION_COLUMNS) & names.keys())


def split_header(text: str) -> tuple[str, dict[str, str]]:
    """Read the first line of a table.

    Returns:
        Its delimiter, and its columns as {lower-case name: name as written}.
    """
    line = text.lstrip("\n").partition("\n")[0].rstrip("\r")
    delimiter = max(DELIMITERS, key=line.count)
    names = next(csv.reader([line], delimiter=delimiter, skipinitialspace=True), [])
    return delimiter, {name.strip().lower(): name for name in names}


def _read(path: Path, choice: Choice, dropped: Dropped) -> Iterator[Entry]:
    rows = _parquet_rows if path.suffix == ".parquet" else _text_rows
    yield from join_rows(rows(path, choice))


def _find_column(path: Path, chosen: str | None, known: tuple[str, ...], names: Iterable[str], option: str) -> str:
    """Return the column that the user chose, or else the first well-known name among the table's columns."""
    by_lower = {name.strip().lower(): name for name in names}
    if chosen is not None:
        if chosen.lower() not in by_lower:
            raise RecipeError(f"{path.name} has no column {chosen!r}; it has: {', '.join(by_lower)}")
        return by_lower[chosen.lower()]
    for name in known:
        if name in by_lower:
            return by_lower[name]
    raise RecipeError(f"{path.name} has the columns {', '.join(by_lower)}; name the right one with --{option}")


def _find_columns(path: Path, choice: Choice, names: Iterable[str]) -> tuple[str, str, str | None]:
    names = list(names)
    image = _find_column(path, choice.image_column, IMAGE_COLUMNS, names, "image_column NAME")
    caption = _find_column(path, choice.caption_column, CAPTION_COLUMNS, names, "caption_column NAME")
    return image, caption, ID_COLUMN if ID_COLUMN in names and image != ID_COLUMN else None


def _text_rows(path: Path, choice: Choice) -> Iterator[Row]:
    text = read_text(path)
    delimiter = split_header(text)[0]
    if path.name.removesuffix(".gz").endswith(".tsv"):
        delimiter = "\t"
    csv.field_size_limit(1 << 24)
    # csv handles line ends inside quotes. splitlines would also cut at characters that only Unicode calls line ends.
    rows = csv.reader(re.split(r"(?<=\n)", text), delimiter=delimiter, skipinitialspace=True)
    try:
        names = [name.strip() for name in next(rows, [])]
        image, caption, image_id = (
            None if name is None else names.index(name) for name in _find_columns(path, choice, names)
        )
        assert image is not None and caption is not None
        for row in rows:
            if not any(cell.strip() for cell in row):
                continue
            if len(row) != len(names):
                raise DataError(
                    f"{path}, line {rows.line_num}: {len(row)} cells, the header has {len(names)}; "
                    "quote cells that hold the delimiter"
                )
            yield row[image].strip(), None if image_id is None else row[image_id].strip(), [row[caption]]
    except csv.Error as error:
        raise DataError(f"{path}, line {rows.line_num}: not a table ({error}); mend or remove the line") from None


def _parquet_rows(path: Path, choice: Choice) -> Iterator[Row]:
    import pyarrow as pa  # imported here for start-up time
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        image, caption, image_id = _find_columns(path, choice, file.schema_arrow.names)
        names = [name for name in (image, caption, image_id) if name]
        for batch in file.iter_batches(columns=names, use_threads=False):
            columns: dict[str, list[Any]] = batch.to_pydict()
            ids = columns[image_id] if image_id else [None] * batch.num_rows
            for name, value, row_id in zip(columns[image], columns[caption], ids, strict=True):
                if not isinstance(name, str):
                    raise DataError(f"{path}: an image in column {image!r} is {type(name).__name__}, not a path")
                captions = value if isinstance(value, list) else [] if value is None else [value]
                yield name, None if row_id is None else str(row_id), captions
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a readable parquet file ({str(error).splitlines()[0]})") from None


TABLE = Source(_read, _matches)
