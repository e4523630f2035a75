"""What a run's folder, and SLURM where there is one, say of the run: job, step, rate, time left, last checkpoint, last error.

Tested in tests/launch/commands/test_status.py.
"""

from __future__ import annotations

import re
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

from launch.start.slurm import GONE, slurm
from runtime.errors import LigatureError, RecipeError
from runtime.files import read_json
from runtime.lease import living_holder
from runtime.metrics import read_metrics
from runtime.progress import format_duration
from runtime.run_logs import last_error, read_events

RECENT = 20
"""Number of logged steps whose median rate is shown."""


def read_status(folder: Path) -> dict[str, str]:
    """Return what is known of a run: the name of each line, and its text.

    Raises:
        RecipeError: The folder is not a run's folder.
    """
    if not (folder / "config.yaml").exists() and not (folder / "launch").is_dir():
        raise RecipeError(
            f"{folder} is not a run's folder: it has neither config.yaml nor launch/; name a folder under runs/"
        )
    lines = {"run": str(folder)}
    if job := job_line(folder):
        lines["job"] = job
    if (folder / "config.yaml").exists():
        lines |= progress_lines(folder)
    if error := last_error(folder):
        lines["last error"] = error
    if events := read_events(folder):
        lines["last event"] = events[-1]
    return lines


COLUMNS = ("run", "state", "step", "time left", "checkpoint")
"""Columns of the list of runs."""


def runs_below(folder: Path, depth: int = 3) -> list[Path]:
    """Return the folders of runs in a folder, at most `depth` levels down. Runs are not searched for further runs."""
    runs: list[Path] = []
    for entry in sorted(folder.iterdir()) if folder.is_dir() else []:
        if entry.is_dir() and is_run(entry):
            runs.append(entry)
        elif entry.is_dir() and depth > 1:
            runs += runs_below(entry, depth - 1)
    return runs


def is_run(folder: Path) -> bool:
    """Return whether a folder is of a training run, or of one that was submitted; an ablation's folder only holds some."""
    config = folder / "config.yaml"
    trained = config.is_file() and re.search(r"^training:", config.read_text(encoding="utf-8"), re.MULTILINE)
    return bool(trained) or (folder / "launch").is_dir()


def list_runs(folders: list[Path]) -> list[dict[str, str]]:
    """Return what is known of each run in short: a text for each of COLUMNS."""
    rows = []
    for folder in folders:
        lines = progress_lines(folder) if (folder / "config.yaml").exists() else {}
        short = {"step": lines.get("step", "").removesuffix(", finished")}
        short["time left"] = lines.get("time left", "").removesuffix(" of training")
        rows.append(
            {"run": str(folder), "state": state(folder), **short, "checkpoint": lines.get("checkpoint", "none yet")}
        )
    return rows


def state(folder: Path) -> str:
    """Return a run's state in a word: finished, running, stopped, or what SLURM calls a job that waits."""
    if (folder / "finished.json").exists():
        return "finished"
    if living_holder(folder):
        return "running"
    waiting = re.match(r"\d+ (PENDING|CONFIGURING|REQUEUED|RUNNING|SUSPENDED)", job_line(folder))
    return waiting[1].lower() if waiting else "stopped"


def format_runs(rows: list[dict[str, str]]) -> str:
    """Return the list of runs as an aligned table."""
    cells = [list(COLUMNS), *([row[column] for column in COLUMNS] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in cells
    )


def job_line(folder: Path) -> str:
    """Return the state of the run's SLURM job: nodes, time, starts. Empty if none was submitted."""
    record = folder / "launch" / "job.json"
    if not record.exists():
        return ""
    number = read_json(record)["job"]
    if not shutil.which("scontrol"):
        return f"{number}; no SLURM on this machine to ask"
    try:
        answers = slurm("scontrol", "--oneliner", "show", "job", number).splitlines()
    except LigatureError as error:
        if GONE not in str(error):
            return f"{number}; {error}"
        return f"{number} is over" + ("" if (folder / "finished.json").exists() else "; launch it again to resume")
    jobs = [dict(re.findall(r"(\w+(?::\w+)?)=(\S*)", line)) for line in answers]
    if len(jobs) > 1:
        states = [job["JobState"] for job in jobs]
        return f"{number}: " + ", ".join(f"{states.count(state)} {state}" for state in sorted(set(states)))
    job = jobs[0]
    parts = [f"{number} {job['JobState']}"]
    if job["JobState"] == "PENDING":
        parts.append(f"({job['Reason']})")
        if job.get("StartTime", "Unknown") not in ("Unknown", "N/A"):
            parts.append(f"expected to start {job['StartTime']}")
    elif job["JobState"] == "RUNNING":
        parts.append(f"on {job['NodeList']}, {job['RunTime']} of {job['TimeLimit']}")
    if job.get("Restarts", "0") != "0":
        parts.append(f"started {int(job['Restarts']) + 1} times")
    # The comment has spaces, at which the pairs above would cut it off.
    comment = re.search(r" Comment=(held .*?)(?= [A-Z]\w+=|$)", answers[0])
    return ", ".join(parts) + (f"; {comment[1]}" if comment else "")


def progress_lines(folder: Path) -> dict[str, str]:
    """Return the lines on step, rate, time left and last checkpoint."""
    config = _config(folder)
    metrics = read_metrics(folder)
    step = int(max((line["step"] for line in metrics), default=0))
    steps = total_steps(config["training"], metrics)
    lines = {"step": f"{step:,}" + (f" of {steps:,} ({100 * step / steps:.0f} %)" if steps else "")}
    if (folder / "finished.json").exists():
        lines["step"] += ", finished"
    recent = [line["train/samples_per_second"] for line in metrics if "train/samples_per_second" in line][-RECENT:]
    if recent:
        samples = statistics.median(recent)
        rate = samples / config["training"]["global_batch"]
        lines["rate"] = f"{rate:.3g} steps/s, {samples:,.0f} samples/s"
        if steps and step < steps:
            lines["time left"] = f"{format_duration((steps - step) / rate)} of training"
    latest = folder / "checkpoints" / "latest"
    if latest.is_file():
        # A file server's clock may be ahead of this machine's.
        age = format_duration(max(0.0, time.time() - latest.stat().st_mtime))
        lines["checkpoint"] = f"{latest.read_text().strip()}, {age} ago"
    else:
        lines["checkpoint"] = "none yet"
    return lines


def _config(folder: Path) -> dict[str, Any]:
    import yaml

    return yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))


def total_steps(training: dict[str, Any], metrics: list[dict[str, float]]) -> int | None:
    """Return the steps of the whole run, or None if that is not known yet.

    The recipe states steps or epochs. For epochs, the size of the training data follows from the epoch logged with the last step.

    Args:
        training: The recipe's `training` group.
        metrics: Lines of `metrics.jsonl`.
    """
    from training.config import LoopConfig

    if training["steps"]:
        return training["steps"]
    epochs = [(line["step"], line["train/epoch"]) for line in metrics if line.get("train/epoch")]
    if not epochs:
        return None
    step, epoch = epochs[-1]
    samples = round(step * training["global_batch"] / epoch)
    return LoopConfig(epochs=training["epochs"], global_batch=training["global_batch"]).total_steps(samples)
