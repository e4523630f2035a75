"""Read the images that a search index is made of: a shard folder, a folder of any nesting, or an uncompressed tar.

A gallery skips an image that cannot be read, and lists it with the reason. A `Collection` stops at one, because without it the
scores would change.
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
"""Extensions of the files that count as images until reading one shows that it is none."""


@dataclass
class GalleryBatch:
    """A batch of images, some of which may be unreadable."""

    numbers: list[int]
    """Numbers of the images that were read."""
    pixels: Tensor | None
    """(len(numbers), 3, size, size) uint8, None where no image of the batch was read."""
    broken: list[tuple[int, str]] = field(default_factory=list)
    """Number of each image that could not be read, and the reason."""


class Gallery(Dataset):
    """Images by number."""

    kind: str
    """What was opened: shards, folder or tar."""
    path: str
    """Path or address that was opened."""
    transform: Callable | None = None
    """Turns a decoded image into (3, size, size) uint8; `batches` sets it."""

    @abstractmethod
    def __len__(self) -> int: ...

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Hex sha256 that is equal for the same images in the same order. No image is read for it."""

    @abstractmethod
    def name(self, number: int) -> str:
        """Return an image's key in a shard folder, or its path under the folder or in the tar."""

    def captions(self, number: int) -> list[str]:
        """Return an image's captions, an empty list where it has none that can be read."""
        return []

    @abstractmethod
    def read(self, number: int) -> bytes:
        """Return the encoded image. Raises OSError, ValueError or DataError where it cannot be read."""

    def image(self, number: int) -> Any:
        """Return the decoded image, RGB and upright. Raises OSError, ValueError or DataError where it cannot be read."""
        return upright(open_image(self.read(number), SOURCE_FORMATS))

    def __getitem__(self, number: int) -> tuple[int, Tensor | str]:
        """Return the number, and the transformed image or the reason why there is none."""
        assert self.transform is not None, "batches() sets it"
        try:
            return number, self.transform(self.image(number))
        except (OSError, ValueError, DataError) as error:
            reason = error.reason if isinstance(error, BrokenSample) else getattr(error, "strerror", None) or str(error)
            return number, " ".join(reason.split())

    def batches(self, transform: Callable, numbers: range, batch_size: int, workers: int) -> Iterator[GalleryBatch]:
        """Yield batches of images in order. An image's number alone decides its batch.

        Args:
            transform: Turns a decoded image into (3, size, size) uint8.
            numbers: Numbers of the images.
            batch_size: Images per batch, unreadable ones included; the last batch may have fewer.
            workers: Loader processes; 0: this process reads.
        """
        self.transform = transform
        yield from open_loader(Subset(self, numbers), _collate, workers, batch_size=batch_size)


def _collate(results: list[tuple[int, Tensor | str]]) -> GalleryBatch:
    images = [(number, image) for number, image in results if not isinstance(image, str)]
    pixels = torch.stack([image for _, image in images]) if images else None
    broken = [(number, reason) for number, reason in results if isinstance(reason, str)]
    return GalleryBatch([number for number, _ in images], pixels, broken)


class ShardGallery(Gallery):
    """A shard folder, on a disk or remote."""

    kind = "shards"

    def __init__(self, path: str) -> None:
        self.path = path
        # Unchecked: the images of a missing shard are listed one by one, and the other shards are read.
        self.reader = ShardReader(path, check=False)

    def __len__(self) -> int:
        return len(self.reader)

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the folder's manifest."""
        return self.reader.manifests[0].fingerprint

    def name(self, number: int) -> str:
        """Return an image's key, or its shard and row where the index cannot be read."""
        try:
            return self.reader.key(number)
        except DataError:  # the shard's index is missing or broken, so the key is unknown
            shard, row = self.reader.locate(number)
            return f"{self.reader.shard(shard)[1].name}, sample {row}"

    def captions(self, number: int) -> list[str]:
        """Return an image's captions, an empty list where they cannot be read."""
        try:
            return self.reader.captions(number)
        except DataError:
            return []

    def read(self, number: int) -> bytes:
        """Return the encoded image. Raises OSError, ValueError or DataError where it cannot be read."""
        return self.reader[number].image


class FileGallery(Gallery):
    """Files under a folder."""

    kind = "folder"

    def __init__(self, path: str, names: list[str] | None = None) -> None:
        """List the folder.

        Args:
            path: The folder.
            names: Paths of the images relative to the folder, in order; None: search the folder for them.
        """
        self.path = path
        self.names = find_images(Path(path)) if names is None else names

    def __len__(self) -> int:
        return len(self.names)

    @property
    def fingerprint(self) -> str:
        """Hex sha256 of the files' names."""
        return _digest(self.names)

    def name(self, number: int) -> str:
        """Return an image's path under the folder."""
        return os.fsencode(self.names[number]).decode("utf-8", "backslashreplace")

    def read(self, number: int) -> bytes:
        """Return the encoded image. Raises OSError, ValueError or DataError where it cannot be read."""
        if self.name(number) != self.names[number]:
            raise ValueError("its name is not UTF-8; rename the file")
        file = Path(self.path, self.names[number])
        if (size := file.stat().st_size) > MAX_BYTES:
            raise ValueError(f"{size:,} bytes are more than {MAX_BYTES:,}")
        return file.read_bytes()


class TarGallery(Gallery):
    """The images of an uncompressed tar. `problems` lists what is damaged; the rest is read."""

    kind = "tar"

    def __init__(self, path: str) -> None:
        self.path = path
        contents = walk_tar(path)
        self.members = [member for member in contents.members if is_image(member.name)]
        self.problems = contents.problems

    def __len__(self) -> int:
        return len(self.members)

    @property
    def fingerprint(self) -> str:
        """Hex sha256 of the images' names, offsets and sizes."""
        return _digest([f"{member.name}\t{member.offset}\t{member.size}" for member in self.members])

    def name(self, number: int) -> str:
        """Return an image's path in the tar."""
        return self.members[number].name

    def read(self, number: int) -> bytes:
        """Return the encoded image. Raises OSError, ValueError or DataError where it cannot be read."""
        member = self.members[number]
        if member.size > MAX_BYTES:
            raise ValueError(f"{member.size:,} bytes are more than {MAX_BYTES:,}")
        return StoredBytes(self.path, member.offset, member.size)()


def open_gallery(path: str, names: list[str] | None = None) -> Gallery:
    """Open a shard folder (it has a manifest), another folder, or a tar.

    Args:
        path: Path of the folder or tar, or address of a remote shard folder.
        names: Paths of the images of a folder that was listed before; None: list it now.

    Raises:
        DataError: There is nothing at the path, or nothing that looks like an image.
    """
    gallery: Gallery
    if is_remote(path) or Path(path, MANIFEST_NAME).is_file():
        if not is_remote(path):
            read_manifest(path, check=False)  # a broken manifest is one clear message here
        gallery = ShardGallery(path)
    elif Path(path).is_dir():
        gallery = FileGallery(path, names)
        if not len(gallery) and any(Path(path).glob("*.tar")):
            raise DataError(f"{path} holds tars without an index; run `ligature inspect {path} --index` first")
    elif Path(path).is_file():
        gallery = TarGallery(path)
    else:
        raise DataError(f"no images at {path}; give a shard folder, a folder of images, or an uncompressed tar")
    if not len(gallery):
        raise DataError(f"{path} holds no images; files with these extensions count: .{', .'.join(SUFFIXES)}")
    return gallery


def is_image(name: str) -> bool:
    """Return whether a file counts as an image by its name. Hidden files do not."""
    path = PurePosixPath(name)
    return path.suffix[1:].lower() in SUFFIXES and not path.name.startswith(".")


def find_images(folder: Path) -> list[str]:
    """Return the paths of the images under a folder, relative to it and sorted. Links to folders are not followed."""
    names = []
    for root, folders, files in os.walk(folder):
        # Changed in place, because os.walk enters the folders that remain in this list.
        folders[:] = [name for name in folders if not name.startswith(".")]
        relative = os.path.relpath(root, folder)
        names += [name if relative == "." else f"{relative}/{name}" for name in files if is_image(name)]
    # File systems list names in any order, and the rows of an index follow this one.
    return sorted(names)


def _digest(lines: list[str]) -> str:
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode("utf-8", "surrogateescape") + b"\n")
    return digest.hexdigest()
