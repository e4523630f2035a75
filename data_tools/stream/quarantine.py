"""The quarantine: a file of JSON lines with each sample that a run could not read, shared by all ranks.

Tested in tests/data_tools/stream/test_shard_stream.py.
"""

from __future__ import annotations

import fcntl
import json
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import IO


def sample_id(failure: dict[str, str]) -> str:
    """Return what identifies a sample among all folders of a run: `shard/key`."""
    return f"{failure['shard']}/{failure['key']}"


class Quarantine:
    """The list of unreadable samples: one line of shard, key and reason each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._read_to = 0
        """Bytes of the file that are in `_listed`."""
        self._listed: set[str] = set()
        self._waiting: dict[str, dict[str, str]] = {}
        """Failures that the disk has not taken yet, by sample id."""
        self._warned = False

    def add(self, failures: list[dict[str, str]]) -> set[str]:
        """Append the failures that are not listed yet.

        Other ranks write the file too, so it is locked. A line that a crash cut short is ignored. A disk that cannot be
        written ends no run: what it did not take waits in memory for the next call, which may pass no failures.

        Returns:
            The ids of the samples that other ranks, or an earlier start of the run, had listed.
        """
        known = set(self._listed)
        self._waiting |= {sample_id(failure): failure for failure in failures}
        try:
            if self._waiting:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            # Without failures the file is opened for reading only, because a mount may have become read-only.
            with open(self.path, "ab+" if self._waiting else "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX if self._waiting else fcntl.LOCK_SH)
                self._read(file)
                known = set(self._listed)
                self._append(file, [failure for name, failure in self._waiting.items() if name not in known])
        except OSError as error:
            if self._waiting and not self._warned:
                print(f"ligature: WARNING: {self.path}: {error}; its lines wait in memory", file=sys.stderr)
            self._warned = bool(self._waiting)
        else:
            self._listed |= self._waiting.keys()
            self._waiting, self._warned = {}, False
        return known

    def _read(self, file: IO[bytes]) -> None:
        """Read the lines that were added since the last call."""
        if file.seek(0, os.SEEK_END) < self._read_to:  # somebody emptied it
            self._read_to, self._listed = 0, set()
        file.seek(self._read_to)
        text = file.read()
        for line in text.splitlines():
            with suppress(ValueError, KeyError, TypeError):
                self._listed.add(sample_id(json.loads(line)))
        # A line that was cut short does not count as read, by which `_append` notices it.
        self._read_to += text.rfind(b"\n") + 1

    def _append(self, file: IO[bytes], failures: list[dict[str, str]]) -> None:
        if not failures:
            return
        text = "".join(json.dumps(failure) + "\n" for failure in failures).encode()
        # A line that a crash cut short must not spoil the next one.
        if file.seek(0, os.SEEK_END) > self._read_to:
            text = b"\n" + text
        file.write(text)
        file.flush()
        self._read_to = file.tell()
