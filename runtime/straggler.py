"""The straggler watch finds the rank that the others wait for. It costs one small gather every few steps."""

from __future__ import annotations

import platform
import statistics
import sys
import time
from pathlib import Path

from runtime.errors import LigatureError
from runtime.files import write_json
from runtime.ranks import Ranks, gather_values

SLOW = 1.5
"""A rank falls behind only when its own work takes more than this many times as long as the median rank's."""
SHARE = 0.1
"""A rank falls behind only when its own work exceeds the median rank's by more than this share of the step."""
WRITE_EVERY = 60.0
"""Seconds between two writes of `ranks.json`, at least."""


class StragglerWatch:
    """Compares the own work of the ranks: the time from a step's start until the rank first waits for the others.

    A whole step is equally long on every rank, because the ranks wait for one another. Own work includes waiting for data.
    The slowest rank is the one with the most own work. On a GPU the host runs ahead of the device, so the host waits for the
    device where own work ends (`Watchdog.enter_collective`).
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self._data_wait, self._own_work, self._step_seconds, self._count = 0.0, 0.0, 0.0, 0
        self._reported_rank = -1
        """The rank that was behind at the last report, -1 for none. It is not printed again while it stays behind."""
        self._last_write = -WRITE_EVERY
        """When `ranks.json` was last written, in seconds of the monotonic clock."""

    def add(self, data_wait: float, own_work: float, step_seconds: float) -> None:
        """Add a step of this rank.

        Args:
            data_wait: seconds it waited for data.
            own_work: seconds of own work, `data_wait` included.
            step_seconds: seconds of the whole step.
        """
        self._data_wait += data_wait
        self._own_work += own_work
        self._step_seconds += step_seconds
        self._count += 1

    def report(self, step: int, folder: Path) -> dict[str, float]:
        """Return the figures to log, as means over the steps since the last report. A collective.

        The first rank prints a line when a rank begins to fall behind, and writes the figures of all ranks to `ranks.json`.

        Args:
            step: the current step.
            folder: the run's folder, for `ranks.json`.
        """
        count = max(1, self._count)
        means = (self._data_wait / count, self._own_work / count, self._step_seconds / count, platform.node())
        rows = gather_values(means)
        self._data_wait, self._own_work, self._step_seconds, self._count = 0.0, 0.0, 0.0, 0
        own_work = [row[1] for row in rows]
        # Of two ranks, the slower is compared with the faster, not with the mean of both.
        median = statistics.median_low(own_work)
        step_seconds = statistics.fmean(row[2] for row in rows)
        slowest = max(range(len(own_work)), key=own_work.__getitem__)
        lost = own_work[slowest] - median
        is_behind = own_work[slowest] > SLOW * median and lost > SHARE * step_seconds
        if self.ranks.first:
            if is_behind and slowest != self._reported_rank:
                data_wait, _, _, host = rows[slowest]
                print(
                    f"ligature: rank {slowest} ({host}) falls behind at step {step}: {own_work[slowest]:.3g} s of own work a "
                    f"step ({data_wait:.3g} s of it waiting for data) where the median rank has {median:.3g} s; all ranks wait "
                    f"{lost:.3g} s ({lost / step_seconds:.0%}) of each step for it",
                    file=sys.stderr,
                )
            self._write(step, rows, folder)
        self._reported_rank = slowest if is_behind else -1
        return {
            "step_seconds": step_seconds,
            "data_wait": statistics.fmean(row[0] for row in rows) / max(step_seconds, 1e-9),
            "own_work_slowest": own_work[slowest],
            "own_work_median": median,
            "slowest_rank": float(slowest),
        }

    def _write(self, step: int, rows: list[tuple[float, float, float, str]], folder: Path) -> None:
        now = time.monotonic()
        # If the mount has gone away, a write would create the folder on the disk below it.
        if now - self._last_write < WRITE_EVERY or not folder.is_dir():
            return
        self._last_write = now
        names = ("data_wait_seconds", "own_work_seconds", "step_seconds", "host")
        ranks = [{"rank": rank} | dict(zip(names, row, strict=True)) for rank, row in enumerate(rows)]
        try:
            write_json(folder / "ranks.json", {"step": step, "ranks": ranks})
        except LigatureError as error:
            print(f"ligature: {error}", file=sys.stderr)
