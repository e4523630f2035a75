"""A folder of pairs: `name.jpg` (png, webp) with `name.txt` beside it, one caption per line."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from data_tools.shards.tars import IMAGE_FORMATS
from data_tools.sources.items import Choice, Dropped, Entry, Source, StoredBytes
from data_tools.sources.reading import read_text


def _matches(path: Path, head: str) -> bool:
    return path.is_dir() and path.suffix != ".tar" and not any(path.glob("*.tar"))


def _read(path: Path, choice: Choice, dropped: Dropped) -> Iterator[Entry]:
    """Yield the pairs of a folder and of the folders inside it, sorted by name."""
    for folder, folders, files in os.walk(path):
        folders.sort()
        text_files = {name for name in files if name.endswith(".txt")}
        for name in sorted(files):
            stem, _, extension = name.rpartition(".")
            if extension.lower() not in IMAGE_FORMATS:
                continue
            image = Path(folder, name)
            relative = image.relative_to(path).as_posix()
            text_file = f"{stem}.txt"
            lines = read_text(image.with_name(text_file)).split("\n") if text_file in text_files else []
            stored = StoredBytes(str(image.resolve()), 0, image.stat().st_size)
            captions = [line for line in lines if line.strip()]
            yield Entry(relative, relative.rpartition(".")[0], captions, stored, states_id=False)


FOLDER = Source(_read, _matches, holds_images=True)
