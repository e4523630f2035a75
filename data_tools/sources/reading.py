"""Text files of a source -> values, with one line for what is broken in them."""

from __future__ import annotations

import gzip
import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.errors import DataError


def read_text(path: Path) -> str:
    """A UTF-8 file's text, gzipped or plain. A byte that is not UTF-8 is a `DataError` naming its line."""
    try:
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is a broken gzip file ({error}); fetch it again") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
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
    """The beginning of a text file, gzipped or plain, to tell its kind by; bytes that are no text are replaced."""
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
    """A JSON file's value, gzipped or plain."""
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno}: not valid JSON ({error.msg}); fetch the file again") from None


def read_object(path: Path, *wanted: str) -> dict[str, Any]:
    """A JSON object that has lists of these names."""
    value = read_value(path)
    for key in wanted:
        if not isinstance(value, dict) or not isinstance(value.get(key), list):
            raise DataError(f"{path} has no list {key!r}: it is of another kind, give the right --kind")
    return value


@dataclass(slots=True)
class Place:
    """Turns a missing field deep in a JSON file into one line."""

    path: Path
    what: str

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind, error, trace) -> None:
        if isinstance(error, (KeyError, TypeError, AttributeError)):
            raise DataError(f"{self.path}: {self.what} does not fit its kind ({error!r}); is --kind right?") from None
