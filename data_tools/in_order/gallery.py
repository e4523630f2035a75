"""Images to be indexed, by number: a shard folder, a folder of images of any nesting, or an uncompressed tar of images.

Unlike a `Collection`, whose scores would change, a gallery goes on at an image that cannot be read: it is listed with its reason.
"""

from __future__ import annotations

import hashlib
import os
from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from data_tools.pixels.decode import MAX_BYTES, SOURCE_FORMATS, open_image, upright
from data_tools.shards.manifest import MANIFEST_NAME, read_manifest
from data_tools.shards.reader import BrokenSample, ShardReader
from data_tools.shards.remote import is_remote
from data_tools.shards.tars import walk_tar
from data_tools.sources.items import StoredBytes
from data_tools.workers import open_loader
from runtime.errors import DataError

SUFFIXES = ("jpg", "jpeg", "jpe", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "jp2")
"""Of files that are taken for images; what is in them is found out by reading them."""


@dataclass
class GalleryBatch:
    numbers: list[int]
    """Of the images that could be read."""
    pixels: Tensor | None
    """(len(numbers), 3, size, size) uint8; None where no image of the batch could be read"""
    broken: list[tuple[int, str]] = field(default_factory=list)
    """Number and reason of the others."""


class Gallery(Dataset):
    """Images by number. `kind` and `place` say what was opened."""

    kind: str
    place: str
    transform: Callable | None = None

    @abstractmethod
    def __len__(self) -> int: ...

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """The same for the same images in the same order, as far as can be told without reading them."""

    @abstractmethod
    def name(self, number: int) -> str:
        """What a person finds the image by: its key in a shard folder, its path under the folder or in the tar."""

    def captions(self, number: int) -> list[str]:
        """Its captions, where it has any that can be read."""
        return []

    @abstractmethod
    def read(self, number: int) -> bytes:
        """The encoded image. Raises OSError, ValueError or DataError."""

    def image(self, number: int) -> Any:
        """The decoded image, RGB and upright. Raises OSError, ValueError or DataError."""
        return upright(open_image(self.read(number), SOURCE_FORMATS))

    def __getitem__(self, number: int) -> tuple[int, Tensor | str]:
        """The number, and the transformed image or why there is none."""
        assert self.transform is not None, "batches() sets it"
        try:
            return number, self.transform(self.image(number))
        except (OSError, ValueError, DataError) as error:
            reason = error.reason if isinstance(error, BrokenSample) else getattr(error, "strerror", None) or str(error)
            return number, " ".join(reason.split())

    def batches(self, transform: Callable, numbers: range, batch_size: int, workers: int) -> Iterator[GalleryBatch]:
        """These images in their order, `batch_size` numbers at a time: which batch an image is in depends on its number alone."""
        self.transform = transform
        yield from open_loader(Subset(self, numbers), _collate, workers, batch_size=batch_size)


def _collate(read: list[tuple[int, Tensor | str]]) -> GalleryBatch:
    good = [(number, found) for number, found in read if not isinstance(found, str)]
    pixels = torch.stack([found for _, found in good]) if good else None
    return GalleryBatch(
        [number for number, _ in good], pixels, [(number, told) for number, told in read if isinstance(told, str)]
    )


class ShardGallery(Gallery):
    """A shard folder, on a disk or remote."""

    kind = "shards"

    def __init__(self, place: str) -> None:
        self.place = place
        # Unchecked: what a missing shard holds is listed image by image, and the other shards are read.
        self.reader = ShardReader(place, check=False)

    def __len__(self) -> int:
        return len(self.reader)

    @property
    def fingerprint(self) -> str:
        return self.reader.manifests[0].fingerprint

    def name(self, number: int) -> str:
        try:
            return self.reader.key(number)
        except DataError:  # its index is gone or broken, and so is the sample
            shard, row = self.reader.locate(number)
            return f"{self.reader.shard(shard)[1].name}, sample {row}"

    def captions(self, number: int) -> list[str]:
        try:
            return self.reader.captions(number)
        except DataError:
            return []

    def read(self, number: int) -> bytes:
        return self.reader[number].image


class FileGallery(Gallery):
    """Files under a folder. `names`: their paths relative to it, in order; None looks for them."""

    kind = "folder"

    def __init__(self, place: str, names: list[str] | None = None) -> None:
        self.place = place
        self.names = find_images(Path(place)) if names is None else names

    def __len__(self) -> int:
        return len(self.names)

    @property
    def fingerprint(self) -> str:
        return _digest(self.names)

    def name(self, number: int) -> str:
        return os.fsencode(self.names[number]).decode("utf-8", "backslashreplace")

    def read(self, number: int) -> bytes:
        if self.name(number) != self.names[number]:
            raise ValueError("its name is not UTF-8; rename it")
        file = Path(self.place, self.names[number])
        if (size := file.stat().st_size) > MAX_BYTES:
            raise ValueError(f"{size:,} bytes are more than {MAX_BYTES:,}")
        return file.read_bytes()


class TarGallery(Gallery):
    """The images of an uncompressed tar. What of it is damaged is in `problems`; the rest is read."""

    kind = "tar"

    def __init__(self, place: str) -> None:
        self.place = place
        contents = walk_tar(place)
        self.members = [member for member in contents.members if is_image(member.name)]
        self.problems = contents.problems

    def __len__(self) -> int:
        return len(self.members)

    @property
    def fingerprint(self) -> str:
        return _digest([f"{member.name}\t{member.offset}\t{member.size}" for member in self.members])

    def name(self, number: int) -> str:
        return self.members[number].name

    def read(self, number: int) -> bytes:
        member = self.members[number]
        if member.size > MAX_BYTES:
            raise ValueError(f"{member.size:,} bytes are more than {MAX_BYTES:,}")
        return StoredBytes(self.place, member.offset, member.size)()


def open_gallery(place: str, names: list[str] | None = None) -> Gallery:
    """A shard folder (it has a manifest), another folder, or a tar. `names`: the files of a folder that was listed before.

    Raises DataError in one line where there is nothing there, or nothing that looks like an image.
    """
    path = Path(place)
    gallery: Gallery
    if is_remote(place) or (path / MANIFEST_NAME).is_file():
        if not is_remote(place):
            read_manifest(place, check=False)  # that it is one, in one line
        gallery = ShardGallery(place)
    elif path.is_dir():
        gallery = FileGallery(place, names)
        if not len(gallery) and any(path.glob("*.tar")):
            raise DataError(f"{place} holds tars without an index; run `ligature inspect {place} --index` first")
    elif path.is_file():
        gallery = TarGallery(place)
    else:
        raise DataError(f"no images at {place}; give a shard folder, a folder of images, or an uncompressed tar")
    if not len(gallery):
        raise DataError(f"{place} holds no images (looked for .{', .'.join(SUFFIXES)})")
    return gallery


def is_image(name: str) -> bool:
    """By its name; hidden files are none."""
    path = PurePosixPath(name)
    return path.suffix[1:].lower() in SUFFIXES and not path.name.startswith(".")


def find_images(folder: Path) -> list[str]:
    """Paths of the images under a folder, relative to it, in the order of their names; links to folders are not followed."""
    found = []
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        here = os.path.relpath(root, folder)
        found += [name if here == "." else f"{here}/{name}" for name in files if is_image(name)]
    return sorted(found)


def _digest(lines: list[str]) -> str:
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode("utf-8", "surrogateescape") + b"\n")
    return digest.hexdigest()
