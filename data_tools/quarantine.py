"""The samples that a run could not read: one file of JSON lines, shared by all ranks, each sample in it once."""

from __future__ import annotations

import fcntl
import json
from contextlib import suppress
from pathlib import Path


def sample_id(failure: dict[str, str]) -> str:
    """What names a sample among all folders of a run."""
    return f"{failure['shard']}/{failure['key']}"


class Quarantine:
    """Lines of shard, key and reason."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._read_to = 0
        self._listed: set[str] = set()

    def add(self, failures: list[dict[str, str]]) -> set[str]:
        """Append failures that are not listed yet -> the ids that others, or an earlier life of the run, had listed.

        Other ranks write there as well, so it is locked; a line that a crash cut short counts for nothing.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if file.seek(0, 2) < self._read_to:  # somebody emptied it
                self._read_to, self._listed = 0, set()
            file.seek(self._read_to)
            text = file.read()
            for line in text.splitlines():
                with suppress(ValueError, KeyError, TypeError):
                    self._listed.add(sample_id(json.loads(line)))
            before = set(self._listed)
            new = {sample_id(failure): failure for failure in failures if sample_id(failure) not in before}
            if new:
                cut = b"" if not text or text.endswith(b"\n") else b"\n"
                file.write(cut + "".join(json.dumps(failure) + "\n" for failure in new.values()).encode())
                file.flush()
            self._listed |= new.keys()
            self._read_to = file.seek(0, 2)
        return before
