"""The samples that a run could not read: one file of JSON lines, shared by all ranks, each sample in it once."""

from __future__ import annotations

import fcntl
import json
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import IO


def sample_id(failure: dict[str, str]) -> str:
    """What names a sample among all folders of a run."""
    return f"{failure['shard']}/{failure['key']}"


class Quarantine:
    """Lines of shard, key and reason."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._read_to = 0
        self._listed: set[str] = set()
        self._waiting: dict[str, dict[str, str]] = {}
        self._told = False

    def add(self, failures: list[dict[str, str]]) -> set[str]:
        """Append failures that are not listed yet -> the ids that others, or an earlier life of the run, had listed.

        Other ranks write there as well, so it is locked; a line that a crash cut short counts for nothing. A disk that cannot be
        written ends no run: what it did not take waits in memory for the next call, which may add nothing of its own.
        """
        known = set(self._listed)
        self._waiting |= {sample_id(failure): failure for failure in failures}
        try:
            if self._waiting:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            # What is only read is not opened for writing: a mount may have become read-only.
            with open(self.path, "ab+" if self._waiting else "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX if self._waiting else fcntl.LOCK_SH)
                self._read(file)
                known = set(self._listed)
                self._append(file, [failure for one, failure in self._waiting.items() if one not in known])
        except OSError as error:
            if self._waiting and not self._told:
                print(f"ligature: WARNING: {self.path}: {error}; its lines wait in memory", file=sys.stderr)
            self._told = bool(self._waiting)
        else:
            self._listed |= self._waiting.keys()
            self._waiting, self._told = {}, False
        return known

    def _read(self, file: IO[bytes]) -> None:
        if file.seek(0, os.SEEK_END) < self._read_to:  # somebody emptied it
            self._read_to, self._listed = 0, set()
        file.seek(self._read_to)
        text = file.read()
        for line in text.splitlines():
            with suppress(ValueError, KeyError, TypeError):
                self._listed.add(sample_id(json.loads(line)))
        self._read_to += text.rfind(b"\n") + 1

    def _append(self, file: IO[bytes], failures: list[dict[str, str]]) -> None:
        if not failures:
            return
        text = "".join(json.dumps(failure) + "\n" for failure in failures).encode()
        if file.seek(0, os.SEEK_END) > self._read_to:  # a line that was cut short must not take the next one with it
            text = b"\n" + text
        file.write(text)
        file.flush()
        self._read_to = file.tell()
