"""What a source consists of: entries as the source states them, and samples ready to be written."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

Row = tuple[str, str | None, list[str]]
"""Image name, image id (None where the row has none) and captions."""


@dataclass(frozen=True, slots=True)
class StoredBytes:
    """A range of a file, read when called. It opens the file each time, so any process can call it."""

    path: str
    offset: int
    size: int

    def __call__(self) -> bytes:
        """Read the bytes. Raises OSError when the file is shorter than it was."""
        with open(self.path, "rb", buffering=0) as file:
            data = os.pread(file.fileno(), self.size, self.offset)
        if len(data) != self.size:
            raise OSError(f"{self.path} ends {self.size - len(data):,} bytes early")
        return data


@dataclass(frozen=True, slots=True)
class CaptionedImage:
    """One sample to be written. Its image is named here and read when the sample is written."""

    key: str
    """Unique in its shard folder; without dots, slashes and white space."""
    captions: list[str]
    image_id: str
    """The source's id of the image. Samples with the same id show the same picture."""
    read: Callable[[], bytes]
    """Returns the encoded image. It must be picklable where several processes write."""
    source: str
    """The image's name in the source, for people who read the list of dropped images."""
    size: int | None = None
    """Bytes of the encoded image; None where only reading it would tell."""


@dataclass(frozen=True, slots=True)
class Choice:
    """Which part of a source to read, and how to interpret its files."""

    split: str | None = None
    """Split of a Karpathy json or of Multi30K."""
    restval: bool = False
    """Add Karpathy's split `restval` to train."""
    image_column: str | None = None
    """A table's column of image paths; None: the first well-known name that the table has."""
    caption_column: str | None = None
    """A table's column of captions; None: the first well-known name that the table has."""
    workers: int = 1
    """Processes that list tars; 0: one per core."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One image as its source states it. Its captions are not cleaned yet, and the image is not looked up yet."""

    name: str
    image_id: str
    captions: list[str]
    stored: StoredBytes | None = None
    """Where the image lies, for sources that hold their images. Other images are looked up by name."""
    states_id: bool = True
    """Whether the source itself states `image_id`. If not, the id is the file's name, which another image may share."""


@dataclass(slots=True)
class Dropped:
    """What is left out while a source is read: counts, and each image that has a name."""

    counts: Counter[str] = field(default_factory=Counter)
    """How many captions or images were left out for each reason."""
    listed: list[dict[str, Any]] = field(default_factory=list)
    """One per image: `key` (None: it never had one), `source`, `reason`, and `counted_as`, its reason in `counts`."""
    fatal: str | None = None
    """An error that stops the reading unless the user allows missing images."""

    def add_image(self, name: str, reason: str, count_as: str) -> None:
        """Count and list one image that is left out."""
        self.counts[count_as] += 1
        self.listed.append({"key": None, "source": name, "reason": reason, "counted_as": count_as})


@dataclass(frozen=True, slots=True)
class Source:
    """One kind of source: how to recognise it and how to read it."""

    read: Callable[[Path, Choice, Dropped], Iterator[Entry]]
    """Yields every image in the source's own order. It opens no image."""
    matches: Callable[[Path, str], bool]
    """Whether a path, with the start of its text, is of this kind. Folders, tars and parquet files have no text."""
    has_splits: bool = False
    """Whether `Choice.split` selects a part; a split of any other source is refused."""
    holds_images: bool = False
    """Whether the source contains its images, so that `--images` means nothing to it."""
    published: bool = False
    """Whether its file names are Flickr's or COCO's numbers, which name the same photo in every file."""


@dataclass(slots=True)
class Collected:
    """The usable samples of a source, and a record of what was left out."""

    items: list[CaptionedImage]
    kind: str
    dropped: Counter[str]
    """How many captions or images were left out for each reason."""
    listed: list[dict[str, Any]]
    """One per image left out: `key` (None: it never had one), `source`, `reason`."""
    renamed: int
    """Keys that differ from the file's stem: a dot, slash or blank became `_`, or a repeated stem its whole path."""
    ids_are_names: bool
    """Whether some image ids are file names, which mean nothing outside this source."""


def join_rows(rows: Iterable[Row]) -> Iterator[Entry]:
    """Yield one entry per image, in the order of first appearance, with the captions of all its rows."""
    captions: dict[str, list[str]] = {}
    ids: dict[str, str | None] = {}
    for name, image_id, more in rows:
        captions.setdefault(name, []).extend(more)
        ids.setdefault(name, image_id)
    for name, lines in captions.items():
        yield Entry(name, ids[name] or PurePosixPath(name).stem, lines, states_id=bool(ids[name]))


def clean_caption(caption: str) -> str:
    """Return a caption with each run of white space replaced by one space, or '' if it has lone surrogates, which no codec writes."""
    try:
        caption.encode()
    except UnicodeEncodeError:
        return ""
    return " ".join(caption.split())


def safe_key(name: str) -> tuple[str, bool]:
    """Return a file's stem as a WebDataset key (which ends at the first dot), and whether that changed it."""
    stem = PurePosixPath(name).stem
    key = re.sub(r"[./\\\s\x00-\x1f\x7f]", "_", stem)
    return key, key != stem
