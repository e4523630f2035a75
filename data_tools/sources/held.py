"""Sources that hold their images themselves: folders of `name.jpg` + `name.txt`, and WebDataset tars."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator
from pathlib import Path

from data_tools.making.processes import run_parallel
from data_tools.shards.captions import parse_texts
from data_tools.shards.tars import IMAGE_FORMATS, group_members, walk_tar
from data_tools.sources.annotations import refuse_split
from data_tools.sources.items import Choice, Dropped, Entry, StoredBytes
from data_tools.sources.reading import read_text
from runtime.errors import DataError, LigatureError
from runtime.files import read_json
from runtime.progress import progress


def folder_pairs(annotation: Path, choice: Choice, dropped: Dropped) -> Iterator[Entry]:
    """`name.jpg` (png, webp) and `name.txt` beside it, one caption a line; folders inside are walked, names sorted."""
    refuse_split(annotation, choice)
    for folder, folders, files in os.walk(annotation):
        folders.sort()
        texts = {name for name in files if name.endswith(".txt")}
        for name in sorted(files):
            stem, _, extension = name.rpartition(".")
            if extension.lower() not in IMAGE_FORMATS:
                continue
            path = Path(folder, name)
            relative = path.relative_to(annotation).as_posix()
            text = f"{stem}.txt"
            captions = read_text(path.with_name(text)).split("\n") if text in texts else []
            stored = StoredBytes(str(path.resolve()), 0, path.stat().st_size)
            captions = [line for line in captions if line.strip()]
            yield Entry(relative, relative.rpartition(".")[0], captions, stored, stated=False)


def find_tars(place: Path) -> list[Path]:
    """The tars that a folder, a file, or a pattern names (`{00000..01242}.tar`, `*.tar`), sorted. `DataError` for none."""
    if place.is_dir():
        found = sorted(place.glob("*.tar"))
    else:
        found = [Path(path) for part in _braces(str(place)) for path in (sorted(glob.glob(part)) or [part])]
    if missing := [path for path in found if not path.is_file()]:
        raise DataError(f"{len(missing):,} of {len(found):,} tars of {place} are not there, the first: {missing[0]}")
    if not found:
        raise DataError(f"no tars in {place}")
    return found


def _braces(pattern: str) -> list[str]:
    """`a{08..11}.tar` -> a08.tar, a09.tar, a10.tar, a11.tar: digits as wide as the first number, as the shell has it."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if match is None:
        return [pattern]
    first, last = match[1], match[2]
    numbers = (str(number).zfill(len(first)) for number in range(int(first), int(last) + 1))
    return [rest for number in numbers for rest in _braces(pattern[: match.start()] + number + pattern[match.end() :])]


def is_pattern(place: Path) -> bool:
    return not place.exists() and re.search(r"[*?\[{]", str(place)) is not None


def webdataset_tars(annotation: Path, choice: Choice, dropped: Dropped) -> Iterator[Entry]:
    """Tars of `<key>.jpg` with `<key>.json` (`captions`, a list, or `caption`) or `<key>.txt`: img2dataset's, open_clip's, ours.

    Where img2dataset's `<tar>_stats.json` lie beside the tars, each must have one (it is written last) and agree with its tar.
    """
    refuse_split(annotation, choice)
    tars = find_tars(annotation)
    stats = [stats_file(tar).is_file() for tar in tars]
    wrong: list[str] = []
    with progress("listing", len(tars), "tars") as bar:
        results: dict[int, _Listed] = {}
        numbered = list(enumerate(tars))
        following = 0
        for (number, _), listed in run_parallel(_list_numbered, numbered, choice.workers):
            results[number] = listed
            bar.advance()
            while following in results:  # in the tars' order, whichever was listed first
                part, tar = results.pop(following), tars[following]
                if any(stats):
                    wrong += held_against_stats(tar, part.samples)
                wrong += [f"{tar.name}: {problem}" for problem in part.problems]
                for problem in part.problems:
                    dropped.image(tar.name, problem, "broken places in tars")
                for name in part.skipped:
                    dropped.image(f"{tar.name}/{name}", "not a plain file: never read", "links, devices and odd paths")
                for name in part.no_image:
                    dropped.image(f"{tar.name}/{name}", "no image", "captions without an image")
                yield from part.entries
                following += 1
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        dropped.fatal = f"{annotation} is not whole: {wrong[0]}{more}"


class _Listed:
    """What one tar gives; sent between processes."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.problems: list[str] = []
        self.skipped: list[str] = []
        self.no_image: list[str] = []
        self.samples = 0


def _list_numbered(task: tuple[int, Path]) -> _Listed:
    return _list_tar(task[1])


def _list_tar(tar: Path) -> _Listed:
    found, contents = _Listed(), walk_tar(tar)
    found.problems, found.skipped = contents.problems, contents.skipped
    path = str(tar.resolve())
    for group in group_members(contents.members):
        if group.image is None:
            found.no_image.append(group.name)
            continue
        found.samples += 1
        values = {kind: StoredBytes(path, text.offset, text.size)() for kind, text in group.texts.items()}
        captions, image_id = parse_texts(values)
        stored = StoredBytes(path, group.image.offset, group.image.size)
        name = f"{tar.stem}/{group.image.name}"
        found.entries.append(Entry(name, image_id or group.name, captions, stored, stated=bool(image_id)))
    return found


def stats_file(tar: Path) -> Path:
    return tar.with_name(f"{tar.stem}_stats.json")


def held_against_stats(tar: Path, samples: int) -> list[str]:
    path = stats_file(tar)
    if not path.is_file():
        return [f"{tar.name} has no {path.name}: img2dataset had not finished it"]
    try:
        promised = read_json(path)["successes"]
    except (LigatureError, KeyError, TypeError) as error:
        return [f"{path.name} is not img2dataset's ({error})"]
    return [] if promised == samples else [f"{tar.name} holds {samples:,} images, {path.name} says {promised:,}"]
