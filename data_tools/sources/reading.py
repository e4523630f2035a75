"""Read the text files of a source, and report what is broken in them in one line."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.errors import DataError


def is_pattern(path: Path) -> bool:
    """Return whether a path is a pattern for several files, such as `{000..123}.tar` or `*.tar`."""
    return not path.exists() and re.search(r"[*?\[{]", str(path)) is not None


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file, gzipped or plain.

    Raises:
        DataError: The file cannot be read, or a byte is not UTF-8; the message names its line.
    """
    try:
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is a broken gzip file ({error}); fetch it again") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    # Some programs begin UTF-8 files with a byte order mark, which would become part of the first word.
    raw = raw.removeprefix(b"\xef\xbb\xbf")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}, line {line}: byte 0x{raw[error.start]:02x} is not UTF-8; "
            "convert the file first (iconv -f latin1 -t utf-8)"
        ) from None


def read_head(path: Path, size: int = 1 << 20) -> str:
    """Return the first `size` bytes of a text file, gzipped or plain, to tell its kind. Bad bytes are replaced."""
    try:
        with open(path, "rb") as plain:
            packed = plain.read(2) == b"\x1f\x8b"
        with gzip.open(path) if packed else open(path, "rb") as file:
            return file.read(size).decode("utf-8", "replace").lstrip("\ufeff")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is a broken gzip file ({error}); fetch it again") from None
    except OSError as error:
        raise DataError(f"cannot read the caption file {path}: {error.strerror}") from None


def read_value(path: Path) -> Any:
    """Return the value of a JSON file, gzipped or plain."""
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno}: not valid JSON ({error.msg}); fetch the file again") from None


def read_object(path: Path, *keys: str) -> dict[str, Any]:
    """Return a JSON object that has a list under each of these keys."""
    value = read_value(path)
    for key in keys:
        if not isinstance(value, dict) or not isinstance(value.get(key), list):
            raise DataError(f"{path} has no list {key!r}, so it is of another kind; give the right --kind")
    return value


@dataclass(slots=True)
class FieldCheck:
    """A context in which a missing or mistyped field of a JSON file becomes a one-line `DataError`."""

    path: Path
    part: str
    """The part of the file that is being read, for the message: "image 3"."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind, error, trace) -> None:
        if isinstance(error, (KeyError, TypeError, AttributeError)):
            raise DataError(f"{self.path}: {self.part} does not fit its kind ({error!r}); is --kind right?") from None
