"""The straggler watch: which rank the others wait for. One small gather every few steps, nothing in between."""

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
"""A rank falls behind when its own work takes this many times the median rank's …"""
SHARE = 0.1
"""… and what it takes beyond the median is this share of the step or more."""
WRITE_EVERY = 60.0
"""Seconds between two `ranks.json`."""


class StragglerWatch:
    """Steps are as long on every rank, for they wait for one another. What differs is the own work: the time from a step's start
    until the rank first needs the others (waiting for its data included). The slowest rank is the one with the most of it.

    On a GPU the host runs ahead of the device, so the stage lets the device catch up where the own work ends (`Watchdog.enter_collective`).
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self._waited, self._own, self._taken, self._count = 0.0, 0.0, 0.0, 0
        self._named, self._written = -1, -WRITE_EVERY

    def add(self, waited: float, own: float, taken: float) -> None:
        """A step: seconds it waited for data, seconds of own work (data included), seconds in all."""
        self._waited, self._own, self._taken = self._waited + waited, self._own + own, self._taken + taken
        self._count += 1

    def report(self, step: int, folder: Path) -> dict[str, float]:
        """Means since the last look -> figures to log; the slowest rank is named on stderr when it begins to fall behind, and the
        ranks' figures are in `ranks.json` of `folder`. A collective."""
        count = max(1, self._count)
        rows = gather_values((self._waited / count, self._own / count, self._taken / count, platform.node()))
        self._waited, self._own, self._taken, self._count = 0.0, 0.0, 0.0, 0
        own = [row[1] for row in rows]
        usual = statistics.median_low(own)
        taken = statistics.fmean(row[2] for row in rows)
        slowest = max(range(len(own)), key=own.__getitem__)
        behind = own[slowest] > SLOW * usual and own[slowest] - usual > SHARE * taken
        if self.ranks.first:
            if behind and slowest != self._named:
                waited, lost = rows[slowest][0], own[slowest] - usual
                print(
                    f"ligature: rank {slowest} ({rows[slowest][3]}) falls behind at step {step}: {own[slowest]:.3g} s of own work a "
                    f"step ({waited:.3g} s of it waiting for data) where the median rank has {usual:.3g} s; all ranks wait "
                    f"{lost:.3g} s ({lost / taken:.0%}) of each step for it",
                    file=sys.stderr,
                )
            self._write(step, rows, folder)
        self._named = slowest if behind else -1
        return {
            "step_seconds": taken,
            "data_wait": statistics.fmean(row[0] for row in rows) / max(taken, 1e-9),
            "own_work_slowest": own[slowest],
            "own_work_median": usual,
            "slowest_rank": float(slowest),
        }

    def _write(self, step: int, rows: list[tuple[float, float, float, str]], folder: Path) -> None:
        now = time.monotonic()
        if now - self._written < WRITE_EVERY or not folder.is_dir():  # a mount that went is not to be written beneath
            return
        self._written = now
        names = ("data_wait_seconds", "own_work_seconds", "step_seconds", "host")
        ranks = [{"rank": rank} | dict(zip(names, row, strict=True)) for rank, row in enumerate(rows)]
        try:
            write_json(folder / "ranks.json", {"step": step, "ranks": ranks})
        except LigatureError as error:
            print(f"ligature: {error}", file=sys.stderr)
