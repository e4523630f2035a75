"""Readers of captioned images: each known annotation file becomes a list of images whose bytes are fetched later.

A kind of source is one function, `(annotation, split, restval, dropped) -> iterator of Entry`, named in `KINDS`.
"""

from __future__ import annotations

import difflib
import gzip
import json
import os
import re
import tarfile
import zlib
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from runtime.errors import DataError, RecipeError


@dataclass(frozen=True, slots=True)
class StoredBytes:
    """A range of a file, read when called. Opens the file each time, so it can be sent to any process."""

    path: str
    offset: int
    size: int

    def __call__(self) -> bytes:
        with open(self.path, "rb", buffering=0) as file:
            found = os.pread(file.fileno(), self.size, self.offset)
        if len(found) != self.size:
            raise OSError(f"{self.path} ends {self.size - len(found):,} bytes early")
        return found


@dataclass(frozen=True, slots=True)
class CaptionedImage:
    """One sample to be written: its image is named here and read at write time."""

    key: str
    """Unique in its folder; no dot, slash or white space."""
    captions: list[str]
    image_id: str
    """What the source calls the image: samples with the same id show the same picture."""
    read: Callable[[], bytes]
    """Fetches the encoded image. Must be picklable where several processes write."""
    source: str
    """The image's name as the source gives it, for the reader of a quarantine list."""
    size: int | None = None
    """Bytes of the encoded image, where known without reading it."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One image as an annotation file has it: nothing cleaned, nothing looked up."""

    name: str
    image_id: str
    captions: list[str]


@dataclass(slots=True)
class Collected:
    """The usable samples of a source, and what was left out of it."""

    items: list[CaptionedImage]
    kind: str
    dropped: Counter[str]
    """Reason -> how many captions or images."""
    absent: list[str]
    """Names of the images that are not there."""
    renamed: int
    """Keys in which a dot, slash or blank was replaced by an underscore."""


# -- Images: in a folder or in a tar ----------------------------------------------------------------------------------


class Images(ABC):
    """Finds images by path or, failing that, by base name."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self._by_name: dict[str, list[str]] | None = None

    def find(self, name: str) -> StoredBytes | None:
        """Where the image lies; None when it is absent. A base name that several files bear is a `DataError`."""
        name = str(PurePosixPath(name))
        if found := self._at(name):
            return found
        if self._by_name is None:
            self._by_name = defaultdict(list)
            for path in self._paths():
                self._by_name[PurePosixPath(path).name].append(path)
        paths = self._by_name.get(PurePosixPath(name).name, [])
        if len(paths) > 1:
            raise DataError(f"{name} may be {paths[0]} or {paths[1]} in {self.place}; give one folder as --images")
        return self._at(paths[0]) if paths else None

    @abstractmethod
    def _at(self, path: str) -> StoredBytes | None:
        """The image of this very path."""

    @abstractmethod
    def _paths(self) -> Iterable[str]:
        """The paths of all files."""


class FolderImages(Images):
    def _at(self, path: str) -> StoredBytes | None:
        if path.startswith("/") or ".." in path.split("/"):
            return None  # an annotation names images of this folder, not files elsewhere
        file = self.place / path
        return StoredBytes(str(file), 0, file.stat().st_size) if file.is_file() else None

    def _paths(self) -> Iterator[str]:
        for folder, folders, files in os.walk(self.place):
            folders.sort()
            yield from (Path(folder, file).relative_to(self.place).as_posix() for file in files)


class TarImages(Images):
    """An uncompressed tar, indexed once; links, devices and sparse members are not images."""

    def __init__(self, place: Path) -> None:
        super().__init__(place)
        self._members: dict[str, tuple[int, int]] = {}
        try:
            with tarfile.open(place, "r:") as tar:
                for member in tar:
                    if member.isreg() and not member.issparse():
                        self._members[str(PurePosixPath(member.name))] = (member.offset_data, member.size)
                end = tar.offset
        except tarfile.TarError as error:
            raise DataError(
                f"cannot read {place} as an uncompressed tar ({error}); unpack it and give the folder"
            ) from None
        with open(place, "rb") as file:
            file.seek(end)
            # tarfile takes a broken header for the end of the archive and says nothing.
            if file.read(512).strip(b"\0"):
                raise DataError(f"{place} has a broken header at byte {end:,}; copy it again")

    def _at(self, path: str) -> StoredBytes | None:
        member = self._members.get(path)
        return StoredBytes(str(self.place), *member) if member else None

    def _paths(self) -> Iterable[str]:
        return self._members


def open_images(place: Path) -> Images:
    """The images of a folder or an uncompressed tar."""
    if place.is_dir():
        return FolderImages(place.resolve())
    if place.is_file():
        return TarImages(place.resolve())
    raise DataError(f"no images at {place}; give --images a folder or an uncompressed tar")


# -- Annotation files -------------------------------------------------------------------------------------------------


def read_text(path: Path) -> str:
    """A UTF-8 file's text, gzipped or plain. A byte that is not UTF-8 is a `DataError` naming its line."""
    try:
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is a broken gzip file ({error}); fetch it again") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    raw = raw.removeprefix(b"\xef\xbb\xbf")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}, line {line}: byte 0x{raw[error.start]:02x} is not UTF-8; "
            "convert the file first (iconv -f latin1 -t utf-8)"
        ) from None


def _read_object(path: Path, *wanted: str) -> dict[str, Any]:
    try:
        value = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno}: not valid JSON ({error.msg}); fetch the file again") from None
    for key in wanted:
        if not isinstance(value, dict) or not isinstance(value.get(key), list):
            raise DataError(f"{path} has no list {key!r}: it is of another kind, give the right --kind")
    return value


@dataclass(slots=True)
class _Place:
    """Turns a missing field deep in a JSON file into one line."""

    path: Path
    what: str

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind, error, trace) -> None:
        if isinstance(error, (KeyError, TypeError, AttributeError)):
            raise DataError(f"{self.path}: {self.what} does not fit its kind ({error!r}); is --kind right?") from None


def _refuse_split(annotation: Path, split: str | None, restval: bool) -> None:
    if split is not None or restval:
        raise RecipeError(f"{annotation.name} holds no splits; choose images by a list of names (--names FILE) instead")


def flickr_tokens(annotation: Path, split: str | None, restval: bool, dropped: Counter[str]) -> Iterator[Entry]:
    """Flickr8k's and Flickr30k's own file: `<image>#<n> TAB <caption>` a line."""
    _refuse_split(annotation, split, restval)
    captions: dict[str, list[str]] = {}
    for number, line in enumerate(read_text(annotation).split("\n"), start=1):
        if not line.strip():
            continue
        label, tab, caption = line.partition("\t")
        name, mark, order = label.rpartition("#")
        if not (tab and mark and name and order.isdigit()):
            raise DataError(f"{annotation}, line {number}: not `<image>#<number><TAB><caption>`; mend or remove it")
        captions.setdefault(name, []).append(caption)
    for name, found in captions.items():
        yield Entry(name, PurePosixPath(name).stem, found)


def coco_captions(annotation: Path, split: str | None, restval: bool, dropped: Counter[str]) -> Iterator[Entry]:
    """COCO captions json (2014, 2017): `images` and `annotations`, joined by image id."""
    _refuse_split(annotation, split, restval)
    value = _read_object(annotation, "images", "annotations")
    captions: dict[Any, list[str]] = defaultdict(list)
    for position, note in enumerate(value["annotations"]):
        with _Place(annotation, f"annotation {position}"):
            captions[note["image_id"]].append(note["caption"])
    for position, image in enumerate(value["images"]):
        with _Place(annotation, f"image {position}"):
            name, image_id = image["file_name"], image["id"]
        yield Entry(name, str(image_id), captions.pop(image_id, []))
    if orphans := sum(map(len, captions.values())):
        dropped["captions of unlisted images"] += orphans


def karpathy(annotation: Path, split: str | None, restval: bool, dropped: Counter[str]) -> Iterator[Entry]:
    """Karpathy's json (COCO, Flickr8k, Flickr30k): one split of it; `restval` joins train only where asked."""
    images = _read_object(annotation, "images")["images"]
    with _Place(annotation, "an image"):
        sizes = Counter(image["split"] for image in images)
    if split is None and len(sizes) == 1:
        split = next(iter(sizes))
    if split not in sizes:
        listed = ", ".join(f"{name} ({size:,})" for name, size in sizes.items())
        given = f"has no split {split!r}" if split else "holds several splits"
        raise RecipeError(f"{annotation.name} {given}; choose with --split one of: {listed}")
    if restval and split != "train":
        raise RecipeError(f"--restval true adds the split `restval` to train; it does not go with --split {split}")
    for position, image in enumerate(images):
        if image["split"] != split and not (restval and image["split"] == "restval"):
            continue
        with _Place(annotation, f"image {position}"):
            name = str(PurePosixPath(image.get("filepath", ""), image["filename"]))
            captions = [sentence["raw"] for sentence in image["sentences"]]
            image_id = str(image["cocoid"]) if "cocoid" in image else PurePosixPath(name).stem
        yield Entry(name, image_id, captions)


KINDS: dict[str, Callable[[Path, str | None, bool, Counter[str]], Iterator[Entry]]] = {
    "flickr": flickr_tokens,
    "coco": coco_captions,
    "karpathy": karpathy,
}


def detect_kind(annotation: Path) -> str:
    """Tell a source's kind by the first MiB of its annotation file."""
    try:
        with open(annotation, "rb") as plain:
            packed = plain.read(2) == b"\x1f\x8b"
        with gzip.open(annotation) if packed else open(annotation, "rb") as file:
            head = file.read(1 << 20).decode("utf-8", "replace").lstrip("\ufeff").lstrip()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{annotation} is a broken gzip file ({error}); fetch it again") from None
    except OSError as error:
        raise DataError(f"cannot read the caption file {annotation}: {error.strerror}") from None
    if head.startswith("{"):
        if '"file_name"' in head or '"annotations"' in head:
            return "coco"
        if '"sentences"' in head:
            return "karpathy"
    elif re.match(r"[^\t\n]+#\d+\t", head):
        return "flickr"
    raise DataError(f"cannot tell what kind of source {annotation} is; say it with --kind ({', '.join(KINDS)})")


# -- From entries to samples ------------------------------------------------------------------------------------------


def clean_caption(caption: str) -> str:
    """White space stripped and runs of it made one blank; '' for what is no text (lone surrogates)."""
    try:
        caption.encode()
    except UnicodeEncodeError:
        return ""
    return " ".join(caption.split())


def safe_key(name: str) -> tuple[str, bool]:
    """A file's stem, fit to be a WebDataset key (which ends at the first dot), and whether it had to be changed."""
    stem = PurePosixPath(name).stem
    key = re.sub(r"[./\\\s\x00-\x1f\x7f]", "_", stem)
    return key, key != stem


def entries_of(annotation: Path, kind: str, split: str | None, restval: bool, dropped: Counter[str]) -> list[Entry]:
    """Every image of an annotation file in its own order. `kind` is a name of `KINDS`."""
    if kind not in KINDS:
        near = difflib.get_close_matches(kind, KINDS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(KINDS)}"
        raise RecipeError(f"unknown kind of source {kind!r}{hint}")
    return list(KINDS[kind](annotation, split, restval, dropped))


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
    images: Path,
    *,
    kind: str = "auto",
    split: str | None = None,
    names: Path | None = None,
    restval: bool = False,
    start: int = 0,
    count: int | None = None,
    allow_missing: bool = False,
) -> Collected:
    """Read a source: which images, with which captions, and where their bytes lie; no image is opened.

    `start` and `count` cut the source's own order (after split and names, before anything is dropped), so that two cuts
    never share an image, whatever is missing. Raises `DataError` where images are absent, unless `allow_missing`.
    """
    dropped: Counter[str] = Counter()
    kind = detect_kind(annotation) if kind == "auto" else kind
    entries = entries_of(annotation, kind, split, restval, dropped)
    if names is not None:
        entries = _named(entries, names, annotation)
    if start and start >= len(entries):
        raise RecipeError(f"--start {start:,} is past the end: {annotation.name} gives {len(entries):,} images")
    entries = entries[start : None if count is None else start + count]

    store = open_images(images)
    items: list[CaptionedImage] = []
    absent: list[str] = []
    owners: dict[str, str] = {}
    renamed = 0
    for entry in entries:
        captions = []
        for caption in entry.captions:
            if not isinstance(caption, str):
                raise DataError(f"{annotation}: a caption of {entry.name} is {type(caption).__name__}, not text")
            captions.append(clean_caption(caption))
        dropped["empty captions"] += captions.count("")
        captions = [caption for caption in captions if caption]
        if not captions:
            dropped["images without a caption"] += 1
            continue
        found = store.find(entry.name)
        if found is None:
            absent.append(entry.name)
            continue
        key, changed = safe_key(entry.name)
        renamed += changed
        if key in owners:
            raise DataError(f"{annotation}: {owners[key]} and {entry.name} share the key {key}; rename one of them")
        owners[key] = entry.name
        items.append(CaptionedImage(key, captions, entry.image_id, found, entry.name, found.size))
    if absent:
        if not allow_missing:
            raise DataError(
                f"{len(absent):,} of {len(entries):,} images that {annotation.name} names are not in {images}, "
                f"the first: {absent[0]}; add them, or leave them out with --allow_missing true"
            )
        dropped["absent images"] = len(absent)
    if not items:
        raise DataError(f"{annotation} has no image both present and captioned, of {len(entries):,}")
    return Collected(items, kind, +dropped, absent, renamed)
