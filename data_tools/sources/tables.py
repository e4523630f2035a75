"""Tables of image path and caption: CSV, TSV (with a header) and parquet."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from data_tools.sources.annotations import joined, refuse_split
from data_tools.sources.items import Choice, Dropped, Entry
from data_tools.sources.reading import read_text
from runtime.errors import DataError, RecipeError

IMAGE_COLUMNS = ("filepath", "path", "image", "image_path", "image_name", "filename", "file_name", "file", "img")
CAPTION_COLUMNS = ("caption", "captions", "text", "title", "comment", "sentence", "description")
ID_COLUMN = "image_id"
DELIMITERS = "\t,|;"


def is_table(head: str) -> bool:
    """Whether a text begins with a header that names an image column and a caption column."""
    names = split_header(head)[1]
    return bool(set(IMAGE_COLUMNS) & names.keys() and set(CAPTION_COLUMNS) & names.keys())


def split_header(text: str) -> tuple[str, dict[str, str]]:
    """A table's first line -> its delimiter and its columns: {lower-case name: name as written}."""
    line = text.lstrip("\n").partition("\n")[0].rstrip("\r")
    delimiter = max(DELIMITERS, key=line.count)
    names = next(csv.reader([line], delimiter=delimiter, skipinitialspace=True), [])
    return delimiter, {name.strip().lower(): name for name in names}


def table(annotation: Path, choice: Choice, dropped: Dropped) -> Iterator[Entry]:
    """A row an image and caption; rows of one image are joined. Parquet may hold lists of captions."""
    refuse_split(annotation, choice)
    rows = _parquet_rows if annotation.suffix == ".parquet" else _text_rows
    yield from joined(rows(annotation, choice))


def _column(annotation: Path, asked: str | None, known: tuple[str, ...], names: Iterable[str], option: str) -> str:
    by_lower = {name.strip().lower(): name for name in names}
    if asked is not None:
        if asked.lower() not in by_lower:
            raise RecipeError(f"{annotation.name} has no column {asked!r}; it has: {', '.join(by_lower)}")
        return by_lower[asked.lower()]
    if found := [name for name in known if name in by_lower]:
        return by_lower[found[0]]
    raise RecipeError(f"{annotation.name} has the columns {', '.join(by_lower)}; say which is meant with --{option}")


def _columns(annotation: Path, choice: Choice, names: Iterable[str]) -> tuple[str, str, str | None]:
    names = list(names)
    image = _column(annotation, choice.image_column, IMAGE_COLUMNS, names, "image_column NAME")
    caption = _column(annotation, choice.caption_column, CAPTION_COLUMNS, names, "caption_column NAME")
    return image, caption, ID_COLUMN if ID_COLUMN in names and image != ID_COLUMN else None


def _text_rows(annotation: Path, choice: Choice) -> Iterator[tuple[str, str | None, list[str]]]:
    text = read_text(annotation)
    delimiter = split_header(text)[0]
    if annotation.name.removesuffix(".gz").endswith(".tsv"):
        delimiter = "\t"
    csv.field_size_limit(1 << 24)
    # Lines as the file has them: csv takes care of line ends inside quotes, splitlines would cut at others.
    rows = csv.reader(re.split(r"(?<=\n)", text), delimiter=delimiter, skipinitialspace=True)
    try:
        names = [name.strip() for name in next(rows, [])]
        image, caption, image_id = _columns(annotation, choice, names)
        places = names.index(image), names.index(caption), names.index(image_id) if image_id else None
        for row in rows:
            if not any(cell.strip() for cell in row):
                continue
            if len(row) != len(names):
                raise DataError(
                    f"{annotation}, line {rows.line_num}: {len(row)} cells, the header has {len(names)}; "
                    "quote cells that hold the delimiter"
                )
            named = None if places[2] is None else row[places[2]].strip()
            yield row[places[0]].strip(), named, [row[places[1]]]
    except csv.Error as error:
        raise DataError(f"{annotation}, line {rows.line_num}: not a table ({error}); mend or remove the line") from None


def _parquet_rows(annotation: Path, choice: Choice) -> Iterator[tuple[str, str | None, list[str]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(annotation)
        image, caption, image_id = _columns(annotation, choice, file.schema_arrow.names)
        wanted = [name for name in (image, caption, image_id) if name]
        for batch in file.iter_batches(columns=wanted, use_threads=False):
            columns: dict[str, list[Any]] = batch.to_pydict()
            ids = columns[image_id] if image_id else [None] * batch.num_rows
            for name, said, named in zip(columns[image], columns[caption], ids, strict=True):
                if not isinstance(name, str):
                    raise DataError(f"{annotation}: an image in column {image!r} is {type(name).__name__}, not a path")
                captions = said if isinstance(said, list) else [] if said is None else [said]
                yield name, None if named is None else str(named), captions
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{annotation} is not a readable parquet file ({str(error).splitlines()[0]})") from None
