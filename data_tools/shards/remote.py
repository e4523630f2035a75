"""Fetch shards that lie elsewhere (s3://, gs://, https://, or a slow shared disk) into a local folder of bounded size.

The processes of a node share the folder. A file's name is a hash of its whole address and its promised sha256. It is downloaded
once, under a lock, and gets its name only when its bytes are those that the manifest promises.
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
"""Attempts to fetch a file."""
FIRST_PAUSE = 0.5
"""Seconds before the second attempt. The pause doubles before each further one."""
Result = TypeVar("Result")


def is_remote(folder: Any) -> bool:
    """Return whether a folder is an address rather than a path on a disk."""
    return "://" in str(folder)


def read_remote_manifest(address: str) -> Manifest:
    """Return the manifest of a remote folder.

    Raises:
        DataError: It is not there, cannot be fetched, or is not a manifest.
    """
    manifest_address = f"{address.rstrip('/')}/{MANIFEST_NAME}"

    def fetch() -> bytes:
        filesystem, path = _filesystem(manifest_address)
        return filesystem.cat_file(path)

    try:
        return parse_manifest(_retry(fetch, manifest_address), Path(address), manifest_address)
    except FileNotFoundError:
        raise DataError(f"no {manifest_address}; copy a whole shard folder there, its {MANIFEST_NAME} last") from None


def default_folder() -> str:
    """Return the cache folder where a recipe names none: $LIGATURE_CACHE, or one under the home folder."""
    return os.environ.get("LIGATURE_CACHE", "~/.cache/ligature/shards")


class ShardCache:
    """Local copies of remote files, at most `gigabytes` of them (10^9 bytes). The least recently used leave first."""

    def __init__(self, folder: str | Path = "", gigabytes: float = 100.0, stage: bool = False) -> None:
        """Name the cache folder; it is created when the first file is fetched.

        Args:
            folder: A folder on a disk of this node. `~` and variables are expanded; empty: `default_folder()`.
            gigabytes: Size that the cache stays within, in 10^9 bytes.
            stage: Whether shards on local disks go through the cache as well.
        """
        path = os.path.expanduser(os.path.expandvars(folder or default_folder()))
        if "$" in path:
            raise DataError(f"data.cache.folder is {folder}, but a variable in it is not set; set it, or name a folder")
        self.folder, self.limit, self.stage = Path(path), int(gigabytes * 1e9), stage

    def open(self, address: str, sha256: str, size: int | None) -> int:
        """Return a descriptor of the file at `address`, fetching it where the cache lacks it.

        An open file stays readable, whatever leaves the cache.

        Args:
            address: Where the file lies.
            sha256: Hex digest that its bytes must have.
            size: Its size in bytes, None where unknown.

        Raises:
            FileNotFoundError: There is no such file.
            DataError: It cannot be fetched, has other bytes, or the cache cannot hold it.
        """
        # The content is part of the name, so a shard that was written anew at its old address is fetched again.
        name = hashlib.sha256(f"{address}\n{sha256}".encode()).hexdigest()[:40]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):
                return _open_and_touch(self.folder / name)
            with self._locked(self.folder / f".{name}"), ExitStack() as partial_lock:
                with suppress(FileNotFoundError):
                    return _open_and_touch(self.folder / name)  # another process has fetched it meanwhile
                # The name announces the size to other processes. The lock, which creates the file, is therefore taken inside
                # `_make_room`: processes that still wait for room must not reserve any.
                lock = self._locked(self.folder / f"{name}.{size or 0}.partial")
                partial = self._make_room(size or 0, address, lambda: partial_lock.enter_context(lock))
                _retry(lambda: _download(address, partial, sha256), address)
                descriptor = _open_and_touch(partial)  # before the rename, after which others may remove the file
                os.replace(partial, self.folder / name)
                # Nothing was reserved for a file of unknown size, so the cache returns to its limit afterwards.
                if size is None:
                    self._make_room(0, address, lambda: None)
                return descriptor
        # A missing file is no fault of the cache, and its callers have a message of their own for it.
        except FileNotFoundError:
            raise
        except OSError as error:
            raise DataError(
                f"the cache {self.folder} cannot be used ({error.strerror}); free some space, or set data.cache.folder"
            ) from error

    @contextmanager
    def _locked(self, path: Path) -> Iterator[Path]:
        """Hold a file's lock, alone on this node. At the end the file is removed, unless it was renamed."""
        while True:
            with open(path, "ab") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                # The holder before us may have renamed or removed the file. Others then lock a new file of this name.
                if not _is_still_at(file, path):
                    continue
                try:
                    yield path
                finally:
                    if _is_still_at(file, path):
                        path.unlink()
                return

    def _make_room(self, size: int, address: str, reserve: Callable[[], Result]) -> Result:
        """Remove the least recently used files until `size` more bytes fit, then call `reserve` before others can.

        Where downloads under way fill the cache, this waits for them.
        """
        if size > self.limit:
            raise DataError(
                f"{address} has {size / 1e9:.2f} GB, the cache holds {self.limit / 1e9:g}; raise data.cache.gigabytes"
            )
        while True:
            with open(self.folder / ".room", "ab") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                files, reserved = self._contents()
                excess = sum(file_size for _, file_size, _ in files) + reserved + size - self.limit
                for _, file_size, path in sorted(files):
                    if excess <= 0:
                        break
                    # A process that still reads the file keeps it: its bytes stay until the last one closes it.
                    path.unlink(missing_ok=True)
                    excess -= file_size
                if excess <= 0:
                    return reserve()
            time.sleep(0.05)

    def _contents(self) -> tuple[list[tuple[float, int, Path]], int]:
        """List the cached files, and remove the downloads of dead processes.

        Returns:
            Last use (seconds), size (bytes) and path of each file; and the bytes that downloads under way have reserved.
        """
        files, reserved = [], 0
        for entry in os.scandir(self.folder):
            with suppress(FileNotFoundError):
                if entry.name.endswith(".partial"):
                    if not _remove_if_abandoned(entry.path):
                        # A download of unknown size announces 0, so what it has written so far counts.
                        reserved += max(int(entry.name.split(".")[1]), entry.stat().st_size)
                # The subfolder `selections/` is not part of what the limit counts.
                elif not entry.name.startswith(".") and entry.is_file(follow_symlinks=False):
                    files.append((entry.stat().st_mtime, entry.stat().st_size, Path(entry.path)))
        return files, reserved


def _remove_if_abandoned(path: str) -> bool:
    """Remove a download whose lock no process holds, and return whether that was so."""
    # The kernel drops the locks of a dead process, so a lock that can be had means that nobody downloads.
    with open(path, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        if _is_still_at(file, path):
            os.unlink(path)
    return True


def _open_and_touch(path: Path) -> int:
    descriptor = os.open(path, os.O_RDONLY)
    now = time.time_ns()
    # Set the time here: the kernel's clock for files advances only every few milliseconds, which would lose the order of use.
    os.utime(descriptor, ns=(now, now))
    return descriptor


def _is_still_at(file: IO[bytes], path: str | Path) -> bool:
    """Return whether an open file is still the one at `path`. Under the file's lock, no other process changes that."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    return False


def _download(address: str, partial: Path, sha256: str) -> None:
    filesystem, path = _filesystem(address)
    filesystem.get_file(path, str(partial))
    # A ValueError lets `_retry` fetch the file again, where a DataError would end the attempts.
    if (digest := sha256_of(partial)) != sha256:
        raise ValueError(f"its sha256 is {digest[:12]}…, the manifest says {sha256[:12]}…")


def _filesystem(address: str) -> tuple[Any, str]:
    import fsspec

    try:
        return fsspec.core.url_to_fs(address)
    except (ImportError, ValueError) as error:
        raise DataError(
            f"cannot read {address} ({error}); `pip install '.[remote]'` in Ligature's checkout brings s3, gs and http"
        ) from error


def _retry(attempt: Callable[[], Result], address: str) -> Result:
    """Call `attempt` up to RETRIES times, with longer and longer pauses. A file that does not exist is not tried again."""
    for number in range(RETRIES):
        try:
            return attempt()
        except (FileNotFoundError, DataError):
            raise
        except PermissionError as error:
            raise DataError(f"no permission to read {address}; check the credentials of this node") from error
        except Exception as error:  # each kind of filesystem has its own errors, without a common base
            if number == RETRIES - 1:
                reason = " ".join(str(error).split()) or type(error).__name__
                raise DataError(f"cannot fetch {address} in {RETRIES} attempts: {reason}") from error
            time.sleep(FIRST_PAUSE * 2**number)
    raise AssertionError("unreachable")
