"""What went wrong in a run, for its page: skipped steps, samples that could not be read, ranks that lag, the last error and event.

Tested in tests/finetune/report/test_run_page.py.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from runtime.page import escape
from runtime.run_logs import last_error, read_events

SHOWN = 20
"""Rows of a table at most; the last ones are shown."""


def read_sick_steps(run: Path) -> list[dict[str, Any]]:
    """Return the steps that the run skipped, as its `sick_steps.jsonl` lists them."""
    return _read_lines(run / "sick_steps.jsonl")


def troubles_html(run: Path, sick_steps: list[dict[str, Any]]) -> list[str]:
    """Return the section on what went wrong; nothing where nothing did.

    Args:
        run: the run's folder.
        sick_steps: what `read_sick_steps` returned.
    """
    parts = []
    if error := last_error(run):
        parts.append(f"<p class=note>Last error: {escape(error)}</p>")
    if sick_steps:
        parts.append(_sick_steps_html(sick_steps))
    if quarantined := _read_lines(run / "quarantine.jsonl"):
        reasons = Counter(str(entry.get("reason", "no reason given")) for entry in quarantined)
        rows = "".join(
            f"<tr><td class=number>{n:,}</td><td>{escape(reason)}</td></tr>" for reason, n in reasons.most_common(SHOWN)
        )
        parts.append(f"<p>Samples that could not be read: {len(quarantined):,}</p><table>{rows}</table>")
    if events := read_events(run):
        lines = "\n".join(events[-SHOWN:])
        parts.append(f"<p>What befell the job, last at the bottom:</p><pre class=card>{escape(lines)}</pre>")
    return ["<h2>Errors and events</h2>", *parts] if parts else []


def _sick_steps_html(sick_steps: list[dict[str, Any]]) -> str:
    rows = []
    for entry in sick_steps[-SHOWN:]:
        keys = [key for rank in entry["ranks"] for key in rank["keys"]]
        samples = ", ".join(keys[:4]) + (f" and {len(keys) - 4:,} more" if len(keys) > 4 else "")
        numbers = "".join(f"<td class=number>{_number(entry[name])}</td>" for name in ("loss", "gradient_norm"))
        rows.append(
            f"<tr><td class=number>{entry['step']:,}</td><td>{escape(entry['reason'])}</td>{numbers}<td class=soft>{escape(samples)}</td></tr>"
        )
    head = "".join(f"<th>{name}</th>" for name in ("step", "reason", "loss", "gradient norm", "samples"))
    shown = f", the last {SHOWN} here" if len(sick_steps) > SHOWN else ""
    return f"<p>Skipped steps: {len(sick_steps):,}{shown}. The curves mark them in red.</p><table><tr>{head}</tr>{''.join(rows)}</table>"


def _number(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"  # text: "nan" or "inf"


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a file of JSON lines, or nothing where there is no such file. A line that a crash cut short is left out."""
    if not path.is_file():
        return []
    entries = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entries.append(json.loads(line))
        except ValueError:  # cut short; the line after it may be whole
            continue
    return entries
