"""WebDataset tars: img2dataset's, open_clip's and Ligature's own shards."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from data_tools.processes import run_parallel
from data_tools.shards.captions import parse_texts
from data_tools.shards.tars import group_members, walk_tar
from data_tools.sources.items import Choice, Dropped, Entry, Source, StoredBytes
from data_tools.sources.reading import is_pattern
from runtime.errors import DataError, LigatureError
from runtime.files import read_json
from runtime.progress import progress


def find_tars(path: Path) -> list[Path]:
    """Return the tars of a folder, a file, or a pattern such as `{00000..01242}.tar` or `*.tar`.

    Raises:
        DataError: There are none, or some of those a pattern names are missing.
    """
    if path.is_dir():
        tars = sorted(path.glob("*.tar"))
    else:
        tars = [Path(tar) for pattern in _expand_braces(str(path)) for tar in (sorted(glob.glob(pattern)) or [pattern])]
    if missing := [tar for tar in tars if not tar.is_file()]:
        raise DataError(f"{len(missing):,} of {len(tars):,} tars of {path} are missing, the first: {missing[0]}")
    if not tars:
        raise DataError(f"no tars in {path}")
    return tars


def _expand_braces(pattern: str) -> list[str]:
    """Expand `a{08..11}.tar` into a08.tar … a11.tar: numbers are padded to the width of the first, as in a shell."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if match is None:
        return [pattern]
    first, last = match[1], match[2]
    numbers = (str(number).zfill(len(first)) for number in range(int(first), int(last) + 1))
    before, after = pattern[: match.start()], pattern[match.end() :]
    return [expanded for number in numbers for expanded in _expand_braces(before + number + after)]


def _matches(path: Path, head: str) -> bool:
    return path.suffix == ".tar" or is_pattern(path) or (path.is_dir() and any(path.glob("*.tar")))


def _read(path: Path, choice: Choice, dropped: Dropped) -> Iterator[Entry]:
    """Yield the images of tars of `<key>.jpg` with `<key>.json` (`captions`, a list, or `caption`) or `<key>.txt`.

    Where any `<tar>_stats.json` of img2dataset lies beside the tars, every tar must have one and agree with it.
    img2dataset writes it last, so a tar without one is unfinished.
    """
    tars = find_tars(path)
    check = any(stats_path(tar).is_file() for tar in tars)
    errors: list[str] = []
    with progress("listing", len(tars), "tars") as bar:
        listings: dict[int, _Listing] = {}
        next_number = 0
        for (number, _), listing in run_parallel(_list_numbered, list(enumerate(tars)), choice.workers):
            listings[number] = listing
            bar.advance()
            # Workers finish in any order; entries keep the order of the tars.
            while next_number in listings:
                listing, tar = listings.pop(next_number), tars[next_number]
                if check:
                    errors += check_stats(tar, listing.samples)
                errors += [f"{tar.name}: {problem}" for problem in listing.problems]
                _note_dropped(tar, listing, dropped)
                yield from listing.entries
                next_number += 1
    if errors:
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        dropped.fatal = f"{path} is not whole: {errors[0]}{more}"


@dataclass(slots=True)
class _Listing:
    """What one tar contains. It is sent between processes."""

    problems: list[str]
    skipped: list[str]
    """Members that are not plain files."""
    entries: list[Entry] = field(default_factory=list)
    without_image: list[str] = field(default_factory=list)
    """Keys that have captions only."""
    samples: int = 0


def _note_dropped(tar: Path, listing: _Listing, dropped: Dropped) -> None:
    for problem in listing.problems:
        dropped.add_image(tar.name, problem, "broken places in tars")
    for name in listing.skipped:
        dropped.add_image(f"{tar.name}/{name}", "not a plain file: never read", "links, devices and odd paths")
    for name in listing.without_image:
        dropped.add_image(f"{tar.name}/{name}", "no image", "captions without an image")


def _list_numbered(task: tuple[int, Path]) -> _Listing:
    return _list_tar(task[1])


def _list_tar(tar: Path) -> _Listing:
    contents = walk_tar(tar)
    listing = _Listing(contents.problems, contents.skipped)
    path = str(tar.resolve())
    for group in group_members(contents.members):
        if group.image is None:
            listing.without_image.append(group.name)
            continue
        listing.samples += 1
        texts = {kind: StoredBytes(path, text.offset, text.size)() for kind, text in group.texts.items()}
        captions, image_id = parse_texts(texts)
        stored = StoredBytes(path, group.image.offset, group.image.size)
        name = f"{tar.stem}/{group.image.name}"
        listing.entries.append(Entry(name, image_id or group.name, captions, stored, states_id=bool(image_id)))
    return listing


def stats_path(tar: Path) -> Path:
    """Return where img2dataset writes the counts of a tar."""
    return tar.with_name(f"{tar.stem}_stats.json")


def check_stats(tar: Path, samples: int) -> list[str]:
    """Compare a tar's number of images with img2dataset's count. Return what is wrong, one line per problem."""
    path = stats_path(tar)
    if not path.is_file():
        return [f"{tar.name} has no {path.name}: img2dataset had not finished it"]
    try:
        expected = read_json(path)["successes"]
    except (LigatureError, KeyError, TypeError) as error:
        return [f"{path.name} is not img2dataset's ({error})"]
    return [] if expected == samples else [f"{tar.name} holds {samples:,} images, {path.name} says {expected:,}"]


WEBDATASET = Source(_read, _matches, holds_images=True)
