"""What the logs in a run's folder say: its last error, and what befell its job.

Tested in tests/launch/commands/test_status.py.
"""

from __future__ import annotations

import re
from pathlib import Path

ERROR = re.compile(r"^(ligature[^:]*: |srun: error: |[A-Za-z_.]*(Error|Exception)(:|$))")
NO_ERROR = re.compile(r"stopped at step \d+|received; stopping")
"""Lines that look like errors, but come from a run that stopped on request."""


def last_error(run: Path) -> str:
    """Return the last line that looks like an error in the newest log that has one, with the log's name; else ""."""
    logs = sorted((run / "logs").glob("*.log"), key=lambda path: path.stat().st_mtime)
    for log in reversed(logs):
        lines = _last_lines(log)
        # A log holds all starts of a job; only the last one counts.
        started = max((number for number, line in enumerate(lines) if line.startswith("=== ")), default=0)
        errors = [line for line in lines[started:] if ERROR.match(line) and not NO_ERROR.search(line)]
        if errors:
            return f"{errors[-1]} ({log.name})"
    return ""


def _last_lines(log: Path, size: int = 1 << 18) -> list[str]:
    with open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - size))
        # The cut may fall into the middle of a character.
        return file.read().decode("utf-8", "replace").splitlines()


def read_events(run: Path) -> list[str]:
    """Return the lines on what befell the run's job: started, asked to stop, requeued and why, held and why."""
    path = run / "launch" / "events.log"
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []
