"""Multi30K task 2's folder.

Line n of `raw/<split>.<1-5>.en.gz` is a caption of the image on line n of `image_splits/<split>_images.txt`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from data_tools.sources.items import Choice, Dropped, Entry, Source
from data_tools.sources.reading import read_text
from runtime.errors import DataError, RecipeError

NAMES_SUFFIX = "_images.txt"


def _matches(path: Path, head: str) -> bool:
    return path.suffix != ".tar" and (path / "image_splits").is_dir()


def _read(path: Path, choice: Choice, dropped: Dropped) -> Iterator[Entry]:
    folder = path / "image_splits"
    splits = sorted(file.name.removesuffix(NAMES_SUFFIX) for file in folder.glob(f"*{NAMES_SUFFIX}"))
    if choice.split not in splits:
        problem = f"has no split {choice.split!r}" if choice.split else "holds several splits"
        raise RecipeError(f"{path.name} {problem}; choose with --split one of: {', '.join(splits)}")
    names_file = folder / f"{choice.split}{NAMES_SUFFIX}"
    names = read_text(names_file).splitlines()
    caption_files = sorted((path / "raw").glob(f"{choice.split}.[0-9].en*"))
    if not caption_files:
        raise DataError(f"{path / 'raw'} has no captions {choice.split}.1.en.gz …; copy the folder again")
    columns = []
    for file in caption_files:
        # Not splitlines: a caption may contain what Unicode calls a line end.
        lines = read_text(file).removesuffix("\n").split("\n")
        if len(lines) != len(names):
            raise DataError(
                f"{file} has {len(lines):,} lines and {names_file.name} {len(names):,}, so they do not belong together; "
                "copy the folder again"
            )
        columns.append(lines)
    for name, *captions in zip(names, *columns, strict=True):
        yield Entry(name.strip(), PurePosixPath(name.strip()).stem, captions, states_id=False)


MULTI30K = Source(_read, _matches, has_splits=True, published=True)
