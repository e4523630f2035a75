"""Find the images that an annotation file names, in a folder or in a tar."""

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
    """The images of a folder or tar, found by path or, failing that, by base name."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._paths_by_name: dict[str, list[str]] | None = None

    def find(self, name: str) -> StoredBytes | None:
        """Return where an image lies, or None when it is absent.

        Raises:
            DataError: Only the base name fits, and several files have it.
        """
        name = str(PurePosixPath(name))
        if stored := self._locate(name):
            return stored
        if self._paths_by_name is None:
            self._paths_by_name = defaultdict(list)
            for path in self._paths():
                self._paths_by_name[PurePosixPath(path).name].append(path)
        paths = self._paths_by_name.get(PurePosixPath(name).name, [])
        if len(paths) > 1:
            raise DataError(f"{name} may be {paths[0]} or {paths[1]} in {self.root}; give one folder as --images")
        return self._locate(paths[0]) if paths else None

    @abstractmethod
    def _locate(self, path: str) -> StoredBytes | None:
        """Return where the image with exactly this path lies."""

    @abstractmethod
    def _paths(self) -> Iterable[str]:
        """Return the paths of all files."""


class FolderImages(Images):
    """The files under a folder."""

    def _locate(self, path: str) -> StoredBytes | None:
        if path.startswith("/") or ".." in path.split("/"):
            return None  # an annotation names images of this folder, not files elsewhere
        file = self.root / path
        return StoredBytes(str(file), 0, file.stat().st_size) if file.is_file() else None

    def _paths(self) -> Iterator[str]:
        for folder, folders, files in os.walk(self.root):
            folders.sort()
            yield from (Path(folder, file).relative_to(self.root).as_posix() for file in files)


class TarImages(Images):
    """The members of an undamaged, uncompressed tar, indexed once. Links, devices and sparse members are not images."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        contents = walk_tar(root)
        if contents.problems:
            raise DataError(f"{root} is damaged ({contents.problems[0]}); copy it again")
        self._members = {str(PurePosixPath(member.name)): (member.offset, member.size) for member in contents.members}

    def _locate(self, path: str) -> StoredBytes | None:
        member = self._members.get(path)
        return StoredBytes(str(self.root), *member) if member else None

    def _paths(self) -> Iterable[str]:
        return self._members


def open_images(path: Path) -> Images:
    """Open the images of a folder or of an uncompressed tar."""
    if path.is_dir():
        return FolderImages(path.resolve())
    if path.is_file():
        return TarImages(path.resolve())
    raise DataError(f"no images at {path}; give --images a folder or an uncompressed tar")
