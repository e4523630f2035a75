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
    """Hex sha256 of a file, read in blocks of 1 MiB."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sync_file(path: Path) -> None:
    """Ask the disk to hold a file (or, for a folder, its list of names) before returning."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replaced_file(path: Path, staging: Path | None = None) -> Iterator[Path]:
    """Yield a temporary path beside `path`, or in `staging` (of the same file system); on success it is synced and renamed
    over `path`, on failure removed."""
    path = Path(path)
    # Not the process id: processes of several machines, or containers, may write into one folder.
    temporary = (staging or path.parent) / f".{path.name}.{secrets.token_hex(6)}{PARTIAL}"
    try:
        # Inside a folder that is not committed yet nothing is made: where it is gone, somebody has ended that commit.
        if not any(part.endswith(PARTIAL) for part in path.parent.parts):
            path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        sync_file(temporary)
        os.replace(temporary, path)
        sync_file(path.parent)
    except OSError as error:
        raise LigatureError(
            f"cannot write {path}: {error.strerror or error}; free some space or choose another folder"
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def committed_folder(path: Path, staging: Path | None = None) -> Iterator[Path]:
    """Yield a temporary folder beside `path`, or in `staging` (of the same file system, never made here); on success every
    file in it is synced and it is renamed to `path`.

    `path` must not exist: a committed folder is never written into again.
    """
    path = Path(path)
    temporary = (staging or path.parent) / f".{path.name}{PARTIAL}"
    try:
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
    """Replace a file's text atomically (UTF-8)."""
    with replaced_file(path, staging) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any, staging: Path | None = None) -> None:
    """Replace a JSON file atomically. NaN and infinity are refused: they are not JSON."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n", staging)


def read_json(path: Path) -> Any:
    """Read a JSON file; a missing or malformed one is a `LigatureError` that names it."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LigatureError(f"no file {path}") from None
    except OSError as error:
        raise LigatureError(f"cannot read {path}: {error.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise LigatureError(f"{path} is not valid JSON ({error}); it was cut short or altered, make it again") from None
