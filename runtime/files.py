"""Files that are complete or absent: written under a temporary name, synced, then renamed into place."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from runtime.errors import LigatureError

PARTIAL = ".partial"


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file in hex. The file is read in blocks of 1 MiB."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sync_file(path: Path) -> None:
    """Wait until the disk holds a file or, for a folder, its list of names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replaced_file(path: Path, staging: Path | None = None) -> Iterator[Path]:
    """Yield a temporary path to write to. Rename it over `path` on success, and remove it on failure.

    The file is synced before it is renamed, so a reader finds the old file or the whole new one.

    Args:
        path: the file to replace. Its folder is created where it is missing.
        staging: folder of the temporary path, on the same file system; the default is the folder of `path`.

    Raises:
        LigatureError: the disk refuses the file.
    """
    path = Path(path)
    # A random name, not the process id: several machines or containers may write into one folder.
    temporary = (staging or path.parent) / f".{path.name}.{secrets.token_hex(6)}{PARTIAL}"
    try:
        # Create nothing inside an uncommitted folder. If that folder is gone, another process has ended its commit.
        if not any(part.endswith(PARTIAL) for part in path.parent.parts):
            path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        sync_file(temporary)
        os.replace(temporary, path)
        # The new name lies in the folder's list of names, which the disk keeps apart from the file.
        sync_file(path.parent)
    except OSError as error:
        raise LigatureError(
            f"cannot write {path}: {error.strerror or error}; free some space or choose another folder"
        ) from error
    finally:
        # After the rename there is nothing to remove, and a failure here must not hide the error before it.
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def committed_folder(path: Path, staging: Path | None = None) -> Iterator[Path]:
    """Yield a temporary folder to write into. Rename it to `path` on success, and remove it on failure.

    Every file in it is synced before the rename, so a reader finds the whole folder or none.

    Args:
        path: the folder to create. It must not exist, because a committed folder is never written into again.
        staging: parent of the temporary folder, on the same file system. It must exist; the default is the parent of `path`.

    Raises:
        LigatureError: the disk refuses the folder or a file in it.
    """
    path = Path(path)
    temporary = (staging or path.parent) / f".{path.name}{PARTIAL}"
    try:
        # The name is the same at every attempt, so this removes what a killed one left.
        shutil.rmtree(temporary, ignore_errors=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        yield temporary
        for entry in temporary.rglob("*"):
            sync_file(entry)
        sync_file(temporary)
        os.rename(temporary, path)
        sync_file(path.parent)
    except OSError as error:
        raise LigatureError(
            f"cannot write {path}: {error.strerror or error}; free some space or choose another folder"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: Path, text: str, staging: Path | None = None) -> None:
    """Replace a file by this text (UTF-8), whole or not at all; see `replaced_file`."""
    with replaced_file(path, staging) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any, staging: Path | None = None) -> None:
    """Replace a JSON file, whole or not at all. NaN and infinity raise ValueError, because JSON has neither."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n", staging)


def read_json(path: Path) -> Any:
    """Return the content of a JSON file.

    Raises:
        LigatureError: the file is missing, cannot be read or is not JSON; the message names it.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LigatureError(f"no file {path}") from None
    except OSError as error:
        raise LigatureError(f"cannot read {path}: {error.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise LigatureError(f"{path} is not valid JSON ({error}); it was cut short or altered, make it again") from None
