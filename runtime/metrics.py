"""Figures of a run, by step: `metrics.jsonl` for programs and tensorboard events for people.

Tested in tests/runtime/test_metrics_log.py.
"""

from __future__ import annotations

import errno
import json
import math
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from runtime.errors import LigatureError, Superseded
from runtime.files import write_text
from runtime.lease import Lease


class MetricsLog:
    """Appends one JSON object per logged step.

    A log that is opened again at `step` first removes what an interrupted run logged after that step. A full disk does not
    stop the run. Lines wait in memory until the disk takes them, and tensorboard's events end with a warning.
    """

    def __init__(self, folder: Path, step: int = 0, lease: Lease | None = None) -> None:
        self.folder, self.path, self.lease = Path(folder), Path(folder) / "metrics.jsonl", lease
        self._waiting: list[str] = []
        self._open(step)

    def _open(self, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        kept = [line for line in read_metrics(self.folder) if line["step"] <= step]
        # A new file. A process that has lost the lease keeps appending to the old one, which no longer has a name.
        with self.lease.guarded() if self.lease else nullcontext() as staging:
            write_text(self.path, "".join(_format_line(line) for line in kept), staging)
        # Unbuffered, so that a write that does not fit is noticed at once and can be undone.
        self._file: Any = open(self.path, "ab", buffering=0)  # noqa: SIM115 (open for the length of the run)
        # From `purge_step` on, tensorboard hides what an interrupted run logged.
        self._board: Any = SummaryWriter(str(self.folder / "tensorboard"), purge_step=step + 1)

    def forget_after(self, step: int) -> None:
        """Remove what was logged after `step`. The run went back to it, so those figures belong to weights that are gone."""
        self.close()
        self._open(step)

    def write(self, step: int, figures: dict[str, float]) -> None:
        """Append the figures of a step.

        Raises:
            Superseded: another process has taken the run over.
        """
        self._waiting.append(_format_line({"step": step, **{name: float(value) for name, value in figures.items()}}))
        self._flush()
        try:
            for name, value in figures.items():
                if self._board:
                    self._board.add_scalar(name, value, step)
        except OSError as error:  # raised by tensorboard's writing thread, at a later call
            self._board = None
            print(
                f"ligature: WARNING: tensorboard's events end here: {error}; {self.path} has all figures",
                file=sys.stderr,
            )

    def _flush(self) -> None:
        """Append the waiting lines, all or none."""
        try:
            # Late lines do no harm, but here a process that has lost the run notices it first and stops.
            if self.lease:
                self.lease.check()
            end, text = self._file.seek(0, os.SEEK_END), "".join(self._waiting).encode()
            if self._file.write(text) < len(text):  # the disk had room for a part only
                self._file.truncate(end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except Superseded:
            self._waiting.clear()
            raise
        except (OSError, LigatureError) as error:
            if len(self._waiting) == 1:  # warn at the first line that has to wait, not at every one
                print(f"ligature: WARNING: {self.path}: {error}; its lines wait in memory", file=sys.stderr)
        else:
            self._waiting.clear()

    def close(self) -> None:
        """Try once more to append the waiting lines, and close the files."""
        if self._waiting:
            self._flush()
        self._file.close()
        if self._board:
            self._board.close()


def _format_line(line: dict[str, float]) -> str:
    """Return the line as JSON, which has no NaN and no infinity: null stands for both."""
    return json.dumps({name: value if math.isfinite(value) else None for name, value in line.items()}) + "\n"


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """Return the logged steps of a run, oldest first, or an empty list where nothing was logged.

    A last line that a crash cut short is left out. A figure that was not finite is NaN.
    """
    path = Path(folder) / "metrics.jsonl"
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    return [{name: math.nan if value is None else value for name, value in line.items()} for line in lines]
