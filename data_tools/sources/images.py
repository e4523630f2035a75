"""Finds the images that an annotation file names: in a folder or in a tar."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from data_tools.shards.tars import walk_tar
from data_tools.sources.items import StoredBytes
from runtime.errors import DataError


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
    """An uncompressed tar, indexed once; links, devices and sparse members are not images. It must be whole."""

    def __init__(self, place: Path) -> None:
        super().__init__(place)
        contents = walk_tar(place)
        if contents.problems:
            raise DataError(f"{place} is damaged ({contents.problems[0]}); copy it again")
        self._members = {str(PurePosixPath(member.name)): (member.offset, member.size) for member in contents.members}

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
