"""What a source gives: entries as it has them, and samples fit to be written."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any


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
    """The image's name as the source gives it, for the reader of a list of what was dropped."""
    size: int | None = None
    """Bytes of the encoded image, where known without reading it."""


@dataclass(frozen=True, slots=True)
class Choice:
    """Which part of a source is asked for, and how its files are to be understood."""

    split: str | None = None
    """Of a Karpathy json or of Multi30K."""
    restval: bool = False
    """Karpathy's `restval` joins train."""
    image_column: str | None = None
    """Of a table; none: the known name that it has."""
    caption_column: str | None = None
    workers: int = 1
    """Processes that list tars; 0: one a core."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One image as its source has it: nothing cleaned, nothing looked up."""

    name: str
    image_id: str
    captions: list[str]
    stored: StoredBytes | None = None
    """Where the image lies, of sources that hold their images; others are looked up by name."""
    stated: bool = True
    """Whether the source itself gives `image_id`; else it is the file's name, which another image may have too."""


@dataclass(slots=True)
class Dropped:
    """What a source leaves out on its way: how many, and each one where it has a name."""

    counts: Counter[str] = field(default_factory=Counter)
    """Reason -> how many captions or images."""
    listed: list[dict[str, Any]] = field(default_factory=list)
    """One an image: `key` (None: it never had one), `source`, `reason`, and the reason of `counts` it is `counted_as`."""
    fatal: str | None = None
    """What stops the whole, unless the user allows what is missing."""

    def image(self, name: str, reason: str, count_as: str) -> None:
        self.counts[count_as] += 1
        self.listed.append({"key": None, "source": name, "reason": reason, "counted_as": count_as})


@dataclass(slots=True)
class Collected:
    """The usable samples of a source, and what was left out of it."""

    items: list[CaptionedImage]
    kind: str
    dropped: Counter[str]
    """Reason -> how many captions or images."""
    listed: list[dict[str, Any]]
    """Each image left out: `key` (None: it never had one), `source`, `reason`."""
    renamed: int
    """Keys that were made safe: a dot, slash or blank became an underscore, or a name that comes twice its whole path."""
    ids_are_names: bool
    """Image ids that mean nothing outside this source."""


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
