"""From a source, of whatever kind, to samples fit to be written."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path, PurePosixPath

from data_tools.shards.manifest import read_manifest
from data_tools.sources.annotations import albef, coco_captions, flickr_tokens, karpathy, multi30k
from data_tools.sources.held import folder_pairs, is_pattern, webdataset_tars
from data_tools.sources.images import open_images
from data_tools.sources.items import CaptionedImage, Choice, Collected, Dropped, Entry, clean_caption, safe_key
from data_tools.sources.reading import read_head, read_text
from data_tools.sources.tables import is_table, table
from runtime.errors import DataError, RecipeError

KINDS: dict[str, Callable[[Path, Choice, Dropped], Iterator[Entry]]] = {
    "flickr": flickr_tokens,
    "coco": coco_captions,
    "karpathy": karpathy,
    "albef": albef,
    "multi30k": multi30k,
    "table": table,
    "folder": folder_pairs,
    "webdataset": webdataset_tars,
}
HOLDING = ("folder", "webdataset")
"""Kinds that bring their images: --images means nothing to them."""
PUBLISHED = ("flickr", "karpathy", "multi30k")
"""Kinds of known datasets: their file names are Flickr's or COCO's numbers, the same photo in whatever file lists it."""
EVERYTHING = Choice()


def detect_kind(annotation: Path) -> str:
    """Tell a source's kind: a folder's by what lies in it, a file's by its name or its first MiB."""
    if annotation.suffix == ".tar" or is_pattern(annotation):
        return "webdataset"
    if annotation.is_dir():
        if (annotation / "image_splits").is_dir():
            return "multi30k"
        return "webdataset" if any(annotation.glob("*.tar")) else "folder"
    if annotation.suffix == ".parquet":
        return "table"
    head = read_head(annotation).lstrip()
    if head.startswith("{"):
        if '"file_name"' in head or '"annotations"' in head:
            return "coco"
        if '"sentences"' in head:
            return "karpathy"
    elif head.startswith("["):
        if '"caption"' in head:
            return "albef"
    elif re.match(r"[^\t\n]+#\d+\t", head):
        return "flickr"
    elif is_table(head):
        return "table"
    raise DataError(f"cannot tell what kind of source {annotation} is; say it with --kind ({', '.join(KINDS)})")


def entries_of(annotation: Path, kind: str, choice: Choice, dropped: Dropped) -> list[Entry]:
    """Every image of a source in its own order. `kind` is a name of `KINDS`.

    Image ids that are file names tell the images apart: a name that comes again (tars that each number from 0, a/001.jpg and
    b/001.jpg) is no id, its images go by their whole path.
    """
    if kind not in KINDS:
        near = difflib.get_close_matches(kind, KINDS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(KINDS)}"
        raise RecipeError(f"unknown kind of source {kind!r}{hint}")
    entries = list(KINDS[kind](annotation, choice, dropped))
    times = Counter(entry.image_id for entry in entries if not entry.stated)
    return [
        entry if entry.stated or times[entry.image_id] == 1 else replace(entry, image_id=entry.name)
        for entry in entries
    ]


def _ids_are_names(entries: list[Entry], annotation: Path, kind: str) -> bool:
    """Whether image ids are file names, which in another source may be other pictures. Shards of ours state such an id as any
    other, and their manifest tells which it is."""
    if kind == "webdataset":
        with suppress(DataError):  # tars made elsewhere
            folder = annotation if annotation.is_dir() else annotation.parent
            if read_manifest(folder, check=False).ids_are_names:
                return True
    return kind not in PUBLISHED and not all(entry.stated for entry in entries)


def _named(entries: list[Entry], names_file: Path, annotation: Path) -> list[Entry]:
    """The entries that a list names, by base name with or without extension; names without an entry come last, bare."""
    wanted = {PurePosixPath(line.strip()).name: None for line in read_text(names_file).split("\n") if line.strip()}
    kept = []
    for entry in entries:
        path = PurePosixPath(entry.name)
        if hit := {path.name, path.stem} & (wanted.keys()):
            kept.append((entry, hit))
    if not kept:
        raise DataError(f"{annotation} has none of the {len(wanted):,} images of {names_file}; is it the right list?")
    seen = set().union(*(hit for _, hit in kept))
    return [entry for entry, _ in kept] + [Entry(name, name, []) for name in wanted if name not in seen]


def collect(
    annotation: Path,
    images: Path | None = None,
    *,
    kind: str = "auto",
    choice: Choice = EVERYTHING,
    names: Path | None = None,
    start: int = 0,
    count: int | None = None,
    allow_missing: bool = False,
) -> Collected:
    """Read a source: which images, with which captions, and where their bytes lie; no image is opened.

    `images` (none: the annotation's own folder) is where images are looked up, of kinds that do not hold them. `start` and
    `count` cut the source's own order (after split and names, before anything is dropped), so that two cuts never share an
    image, whatever is missing. Raises `DataError` where images are absent or tars broken, unless `allow_missing`.
    """
    dropped = Dropped()
    kind = detect_kind(annotation) if kind == "auto" else kind
    entries = entries_of(annotation, kind, choice, dropped)
    if dropped.fatal and not allow_missing:
        raise DataError(f"{dropped.fatal}; mend it, or take what is there with --allow_missing true")
    ids_are_names = _ids_are_names(entries, annotation, kind)
    if names is not None:
        entries = _named(entries, names, annotation)
    if start and start >= len(entries):
        raise RecipeError(f"--start {start:,} is past the end: {annotation.name} gives {len(entries):,} images")
    cut = slice(start, None if count is None else start + count)
    keys = _keys(entries, annotation)[cut]  # of all: a cut of the source must not change a key
    entries = entries[cut]

    store = None if kind in HOLDING else open_images(images or annotation.parent)
    items: list[CaptionedImage] = []
    absent: list[str] = []
    renamed = 0
    for entry, (key, changed) in zip(entries, keys, strict=True):
        captions = []
        for caption in entry.captions:
            if not isinstance(caption, str):
                raise DataError(f"{annotation}: a caption of {entry.name} is {type(caption).__name__}, not text")
            captions.append(clean_caption(caption))
        dropped.counts["empty captions"] += captions.count("")
        captions = [caption for caption in captions if caption]
        if not captions:
            dropped.image(entry.name, "no caption", "images without a caption")
            continue
        found = entry.stored or (store.find(entry.name) if store else None)
        if found is None:
            absent.append(entry.name)
            continue
        renamed += changed
        items.append(CaptionedImage(key, captions, entry.image_id, found, entry.name, found.size))
    if absent and not allow_missing:
        raise DataError(
            f"{len(absent):,} of {len(entries):,} images that {annotation.name} names are not in "
            f"{images or annotation.parent}, the first: {absent[0]}; "
            "add them, or leave them out with --allow_missing true"
        )
    for name in absent:
        dropped.image(name, "absent", "absent images")
    if not items:
        raise DataError(f"{annotation} has no image both present and captioned, of {len(entries):,}")
    return Collected(items, kind, +dropped.counts, dropped.listed, renamed, ids_are_names)


def _keys(entries: list[Entry], annotation: Path) -> list[tuple[str, bool]]:
    """Each entry's key, and whether it is not simply its name. A name that several folders have becomes the whole path."""
    keys = [safe_key(entry.name) for entry in entries]
    times = Counter(key for key, _ in keys)
    taken: dict[str, str] = {}
    for number, entry in enumerate(entries):
        if times[keys[number][0]] > 1:
            keys[number] = safe_key(str(PurePosixPath(entry.name)).replace("/", "_"))[0], True
        key = keys[number][0]
        if key in taken:
            raise DataError(f"{annotation}: {taken[key]} and {entry.name} share the key {key}; rename one of them")
        taken[key] = entry.name
    return keys
