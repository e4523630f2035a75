"""Shards that lie elsewhere (s3://, gs://, https://, or a slow shared disk): fetched into a local folder of bounded size.

The processes of a node share the folder. A file is named by its whole address and its hash, is downloaded once, under a lock, and
appears under its name only when its bytes are those that the manifest promises.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any, TypeVar

from data_tools.shards.manifest import MANIFEST_NAME, Manifest, parse_manifest
from runtime.errors import DataError
from runtime.files import sha256_of

RETRIES = 5
FIRST_PAUSE = 0.5
"""Seconds before the second try; twice as long before each further one."""
Result = TypeVar("Result")


def is_remote(folder: Any) -> bool:
    return "://" in str(folder)


def read_remote_manifest(address: str) -> Manifest:
    """The manifest of a remote folder. Raises DataError in one line."""
    place = f"{address.rstrip('/')}/{MANIFEST_NAME}"

    def read() -> bytes:
        filesystem, path = _filesystem(place)
        return filesystem.cat_file(path)

    try:
        return parse_manifest(_retried(read, place), Path(address), place)
    except FileNotFoundError:
        raise DataError(f"no {place}: copy a whole shard folder there, its {MANIFEST_NAME} last") from None


def default_folder() -> str:
    return os.environ.get("LIGATURE_CACHE", "~/.cache/ligature/shards")


class ShardCache:
    """Local copies of remote files, at most `gigabytes` of them (10^9 bytes): those used longest ago leave first."""

    def __init__(self, folder: str | Path = "", gigabytes: float = 100.0, stage: bool = False) -> None:
        """folder: on a disk of this node, `~` and variables allowed; stage: take shards on local disks through it as well."""
        told = os.path.expanduser(os.path.expandvars(folder or default_folder()))
        if "$" in told:
            raise DataError(f"data.cache.folder is {folder}, and a variable in it is not set; set it, or name a folder")
        self.folder, self.limit, self.stage = Path(told), int(gigabytes * 1e9), stage

    def open(self, address: str, sha256: str, size: int | None) -> int:
        """A descriptor of the file at `address`, fetched where it is not here yet. Raises DataError, FileNotFoundError.

        Once open it can be read, whatever else leaves the cache.
        """
        key = hashlib.sha256(f"{address}\n{sha256}".encode()).hexdigest()[:40]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):
                return _open_used(self.folder / key)
            with self._locked(self.folder / f".{key}"), ExitStack() as granted:
                with suppress(FileNotFoundError):
                    return _open_used(self.folder / key)  # another process brought it
                # Its name promises its size to all: so it begins with its room, lest those who wait leave none to each other.
                part = self._locked(self.folder / f"{key}.{size or 0}.partial")
                partial = self._make_room(size or 0, address, lambda: granted.enter_context(part))
                _retried(lambda: _download(address, partial, sha256), address)
                descriptor = _open_used(partial)  # before others can see it, and remove it to make room
                os.replace(partial, self.folder / key)
                if size is None:
                    self._make_room(0, address, lambda: None)
                return descriptor
        except FileNotFoundError:
            raise
        except OSError as error:
            raise DataError(
                f"the cache {self.folder} cannot be used ({error.strerror}); free some space, or set data.cache.folder"
            ) from error

    @contextmanager
    def _locked(self, path: Path) -> Iterator[Path]:
        """Hold a file's lock, alone on this node. It may be renamed meanwhile; else it is removed."""
        while True:
            with open(path, "ab") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                # Who held it before may have renamed or removed it, and others lock another file of this name by now.
                if not _stands(file, path):
                    continue
                try:
                    yield path
                finally:
                    if _stands(file, path):
                        path.unlink()
                return

    def _make_room(self, size: int, address: str, take: Callable[[], Result]) -> Result:
        """Remove what was used longest ago until `size` bytes more fit, and take them before others can. Waits for downloads
        under way where they fill it."""
        if size > self.limit:
            raise DataError(
                f"{address} has {size / 1e9:.2f} GB, the cache holds {self.limit / 1e9:g}; raise data.cache.gigabytes"
            )
        while True:
            with open(self.folder / ".room", "ab") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                present, promised = self._contents()
                over = sum(bytes for _, bytes, _ in present) + promised + size - self.limit
                for _, bytes, path in sorted(present):
                    if over <= 0:
                        break
                    path.unlink(missing_ok=True)
                    over -= bytes
                if over <= 0:
                    return take()
            time.sleep(0.05)

    def _contents(self) -> tuple[list[tuple[float, int, Path]], int]:
        """-> (last use, bytes, path) of each file, and the bytes of downloads under way. Those of dead processes are removed."""
        present, promised = [], 0
        for entry in os.scandir(self.folder):
            with suppress(FileNotFoundError):
                if entry.name.endswith(".partial"):
                    if not _removed(entry.path):
                        promised += max(int(entry.name.split(".")[1]), entry.stat().st_size)
                elif not entry.name.startswith(".") and entry.is_file(follow_symlinks=False):  # `selections/` stays
                    present.append((entry.stat().st_mtime, entry.stat().st_size, Path(entry.path)))
        return present, promised


def _removed(path: str) -> bool:
    """Remove a download that no process holds the lock of any more."""
    with open(path, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        if _stands(file, path):
            os.unlink(path)
    return True


def _open_used(path: Path) -> int:
    descriptor = os.open(path, os.O_RDONLY)
    now = time.time_ns()
    os.utime(descriptor, ns=(now, now))  # the kernel's own clock for files stands still for milliseconds
    return descriptor


def _stands(file: IO[bytes], path: str | Path) -> bool:
    """An open file is still what its name stands for. Under the file's lock, nobody else changes that."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    return False


def _download(address: str, partial: Path, sha256: str) -> None:
    filesystem, path = _filesystem(address)
    filesystem.get_file(path, str(partial))
    if (found := sha256_of(partial)) != sha256:
        raise ValueError(f"its sha256 is {found[:12]}…, the manifest says {sha256[:12]}…")


def _filesystem(address: str) -> tuple[Any, str]:
    import fsspec

    try:
        return fsspec.core.url_to_fs(address)
    except (ImportError, ValueError) as error:
        raise DataError(
            f"cannot read {address} ({error}); `pip install '.[remote]'` in Ligature's checkout brings s3, gs and http"
        ) from error


def _retried(attempt: Callable[[], Result], address: str) -> Result:
    """Try again, with longer pauses, whatever a network may raise. What is not there stays so and is not asked for again."""
    for number in range(RETRIES):
        try:
            return attempt()
        except (FileNotFoundError, DataError):
            raise
        except PermissionError as error:
            raise DataError(f"no permission to read {address}; check the credentials of this node") from error
        except Exception as error:  # each kind of filesystem has its own, without a common base
            if number == RETRIES - 1:
                reason = " ".join(str(error).split()) or type(error).__name__
                raise DataError(f"cannot fetch {address} in {RETRIES} tries: {reason}") from error
            time.sleep(FIRST_PAUSE * 2**number)
    raise AssertionError("unreachable")
