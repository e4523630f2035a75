"""Turn a source of any kind into samples that are ready to be written."""

from __future__ import annotations

import difflib
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from pathlib import Path, PurePosixPath

from data_tools.shards.manifest import read_manifest
from data_tools.sources.images import open_images
from data_tools.sources.items import CaptionedImage, Choice, Collected, Dropped, Entry, clean_caption, safe_key
from data_tools.sources.reading import read_text
from data_tools.sources.registry import KINDS, detect_kind
from runtime.errors import DataError, RecipeError

EVERYTHING = Choice()


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
    """Read a source: which images, with which captions, and where their bytes lie. No image is opened.

    `start` and `count` cut the source's own order, after split and names but before anything is dropped. Two cuts
    therefore never share an image, whatever is missing.

    Args:
        annotation: A caption file, table, folder, tar, or pattern for tars.
        images: Folder or tar of the images, for kinds that do not hold them; None: the annotation's own folder.
        kind: A name in `KINDS`; `auto` detects it.
        choice: Which part to read, and how to interpret the files.
        names: A file with one image name per line; other images are left out.
        start: Images to skip.
        count: Images to take at most; None takes all.
        allow_missing: Leave out absent images and broken places in tars instead of raising.

    Raises:
        DataError: The source is broken, an image is absent, or nothing usable is left.
        RecipeError: A kind, split or column does not exist, or `start` is past the end.
    """
    dropped = Dropped()
    kind = detect_kind(annotation) if kind == "auto" else kind
    entries = read_entries(annotation, kind, choice, dropped)
    if dropped.fatal and not allow_missing:
        raise DataError(f"{dropped.fatal}; mend it, or take what is there with --allow_missing true")
    ids_are_names = _ids_are_names(entries, annotation, kind)
    if names is not None:
        entries = _select_names(entries, names, annotation)
    if start and start >= len(entries):
        raise RecipeError(f"--start {start:,} is past the end: {annotation.name} gives {len(entries):,} images")
    cut = slice(start, None if count is None else start + count)
    # Keys come from all entries, so that a cut of the source changes no key.
    keys = _make_keys(entries, annotation)[cut]
    entries = entries[cut]

    store = None if KINDS[kind].holds_images else open_images(images or annotation.parent)
    items: list[CaptionedImage] = []
    absent: list[str] = []
    renamed = 0
    for entry, (key, changed) in zip(entries, keys, strict=True):
        captions = _clean_captions(entry, annotation, dropped)
        if not captions:
            dropped.add_image(entry.name, "no caption", "images without a caption")
            continue
        stored = entry.stored or (store.find(entry.name) if store else None)
        if stored is None:
            absent.append(entry.name)
            continue
        renamed += changed
        items.append(CaptionedImage(key, captions, entry.image_id, stored, entry.name, stored.size))
    if absent and not allow_missing:
        raise DataError(
            f"{len(absent):,} of {len(entries):,} images that {annotation.name} names are not in "
            f"{images or annotation.parent}, the first: {absent[0]}; "
            "add them, or leave them out with --allow_missing true"
        )
    for name in absent:
        dropped.add_image(name, "absent", "absent images")
    if not items:
        raise DataError(f"{annotation} has no image both present and captioned, of {len(entries):,}")
    return Collected(items, kind, +dropped.counts, dropped.listed, renamed, ids_are_names)


def read_entries(annotation: Path, kind: str, choice: Choice, dropped: Dropped) -> list[Entry]:
    """Return every image of a source, in the source's own order.

    Image ids that are file names must tell the images apart. Tars that each number from 0, or a/001.jpg and b/001.jpg,
    repeat a name. The ids of those images become their whole paths.

    Args:
        annotation: Path of the source.
        kind: A name in `KINDS`.
        choice: Which part to read, and how to interpret the files.
        dropped: Receives what is left out.

    Raises:
        RecipeError: There is no such kind, or it has no splits and `choice` names one.
    """
    if kind not in KINDS:
        near = difflib.get_close_matches(kind, KINDS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(KINDS)}"
        raise RecipeError(f"unknown kind of source {kind!r}; {hint}")
    source = KINDS[kind]
    if not source.has_splits and (choice.split is not None or choice.restval):
        raise RecipeError(f"{annotation.name} holds no splits; choose images by a list of names (--names FILE) instead")
    entries = list(source.read(annotation, choice, dropped))
    times = Counter(entry.image_id for entry in entries if not entry.states_id)
    return [
        entry if entry.states_id or times[entry.image_id] == 1 else replace(entry, image_id=entry.name)
        for entry in entries
    ]


def _ids_are_names(entries: list[Entry], annotation: Path, kind: str) -> bool:
    """Return whether image ids are file names, which may name other pictures in another source.

    Ligature's own shards state an id of either sort, and their manifest says which it is.
    """
    if kind == "webdataset":
        with suppress(DataError):  # tars made elsewhere have no manifest
            folder = annotation if annotation.is_dir() else annotation.parent
            if read_manifest(folder, check=False).ids_are_names:
                return True
    return not KINDS[kind].published and not all(entry.states_id for entry in entries)


def _select_names(entries: list[Entry], names_file: Path, annotation: Path) -> list[Entry]:
    """Return the entries that a list names, by base name with or without extension.

    Names without an entry follow as entries without captions, so that they are counted as dropped.
    """
    names = {PurePosixPath(line.strip()).name: None for line in read_text(names_file).split("\n") if line.strip()}
    selected: list[Entry] = []
    matched: set[str] = set()
    for entry in entries:
        path = PurePosixPath(entry.name)
        if hits := {path.name, path.stem} & names.keys():
            selected.append(entry)
            matched |= hits
    if not selected:
        raise DataError(f"{annotation} has none of the {len(names):,} images of {names_file}; is it the right list?")
    return selected + [Entry(name, name, []) for name in names if name not in matched]


def _clean_captions(entry: Entry, annotation: Path, dropped: Dropped) -> list[str]:
    captions = []
    for caption in entry.captions:
        if not isinstance(caption, str):
            raise DataError(f"{annotation}: a caption of {entry.name} is {type(caption).__name__}, not text")
        captions.append(clean_caption(caption))
    dropped.counts["empty captions"] += captions.count("")
    return [caption for caption in captions if caption]


def _make_keys(entries: list[Entry], annotation: Path) -> list[tuple[str, bool]]:
    """Return each entry's key, and whether it differs from the file's stem. A repeated stem becomes the whole path."""
    keys = [safe_key(entry.name) for entry in entries]
    times = Counter(key for key, _ in keys)
    names: dict[str, str] = {}
    for number, entry in enumerate(entries):
        if times[keys[number][0]] > 1:
            keys[number] = safe_key(str(PurePosixPath(entry.name)).replace("/", "_"))[0], True
        key = keys[number][0]
        if key in names:
            raise DataError(f"{annotation}: {names[key]} and {entry.name} share the key {key}; rename one of them")
        names[key] = entry.name
    return keys
