"""Progress with its rate and the time left: a live bar on a terminal, a plain line every few seconds elsewhere (logs, SLURM)."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

PLAIN_INTERVAL = 15.0
"""Seconds between two plain lines, at least."""


def format_duration(seconds: float) -> str:
    """Return seconds as hours, minutes and seconds: 3725 as `1:02:05`, 65 as `1:05`."""
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class Progress:
    """A count of finished units of work that is not shown. `progress` makes one, or one of the subclasses that show it."""

    def __init__(self, title: str, total: int, unit: str, done: int) -> None:
        self.title, self.total, self.unit, self.done = title, total, unit, done
        self.note = ""
        self._first, self._began = done, time.monotonic()

    def advance(self, count: int = 1, note: str | None = None) -> None:
        """Count `count` more units as done. `note`, such as a loss, stays beside the count until the next note replaces it."""
        self.done += count
        self.note = self.note if note is None else note
        self.show()

    def rate(self) -> float:
        """Return the units done per second since this process began counting."""
        return (self.done - self._first) / max(time.monotonic() - self._began, 1e-9)

    def time_left(self) -> str:
        """Return the time that the remaining units take at this rate, or `?` before the first unit is done."""
        rate = self.rate()
        return format_duration(max(0, self.total - self.done) / rate) if rate > 0 else "?"

    def show(self) -> None:
        """Show nothing: ranks other than the first stay silent."""


class PlainProgress(Progress):
    """Progress as plain lines on stderr, at most one every `PLAIN_INTERVAL` seconds, and one at the end."""

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self._shown = self._began

    def show(self) -> None:
        """Print a line when one is due."""
        now = time.monotonic()
        if self.done >= self.total or now - self._shown >= PLAIN_INTERVAL:
            self._shown = now
            line = (
                f"{self.title}: {self.done:,}/{self.total:,} {self.unit}, {self.rate():,.1f}/s, {self.time_left()} left"
            )
            print(f"{line}  {self.note}".rstrip(), file=sys.stderr, flush=True)


class BarProgress(Progress):
    """Progress as a live bar on the terminal."""

    def __init__(self, *args) -> None:
        from rich import progress as rich

        super().__init__(*args)
        columns = (rich.TextColumn("{task.description}"), rich.BarColumn(bar_width=24), rich.MofNCompleteColumn())
        tail = (
            rich.TextColumn("{task.fields[rate]}"),
            rich.TimeElapsedColumn(),
            rich.TextColumn("{task.fields[left]} left"),
        )
        from rich.console import Console

        self._bar = rich.Progress(*columns, *tail, rich.TextColumn("{task.fields[note]}"), console=Console(stderr=True))
        self._task = self._bar.add_task(self.title, total=self.total, completed=self.done, rate="", left="?", note="")
        self._bar.start()

    def show(self) -> None:
        """Redraw the bar."""
        rate = f"{self.rate():,.1f} {self.unit}/s"
        self._bar.update(self._task, completed=self.done, rate=rate, left=self.time_left(), note=self.note)

    def stop(self) -> None:
        """Leave the bar as it is and give the terminal back."""
        self._bar.stop()


@contextmanager
def progress(title: str, total: int, unit: str = "samples", done: int = 0, silent: bool = False) -> Iterator[Progress]:
    """Show how far a piece of work is while the block runs.

    Args:
        title: what is being done.
        total: units of the whole work.
        unit: what is counted, in the plural.
        done: units that an earlier process finished; they do not count for the rate.
        silent: show nothing, for ranks other than the first.
    """
    if silent:
        yield Progress(title, total, unit, done)
    elif sys.stderr.isatty():
        bar = BarProgress(title, total, unit, done)
        try:
            yield bar
        finally:
            bar.stop()
    else:
        yield PlainProgress(title, total, unit, done)
