"""Figures of a run, by step: `metrics.jsonl` for programs and tensorboard events for people."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

from runtime.files import write_text
from runtime.lease import Lease


class MetricsLog:
    """Appends one JSON object a step. Opened again at `step`, it first forgets what an interrupted run logged after it."""

    def __init__(self, folder: Path, step: int = 0, lease: Lease | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.path, self.lease = Path(folder) / "metrics.jsonl", lease
        kept = [line for line in read_metrics(folder) if line["step"] <= step]
        # A new file: lines of a process that the lease was taken from go on into the old one, which has no name any more.
        with lease.guarded() if lease else nullcontext() as staging:
            write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept), staging)
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (open for the length of the run)
        self._board = SummaryWriter(str(Path(folder) / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, figures: dict[str, float]) -> None:
        """Raises Superseded where another process has taken the run over."""
        if self.lease:
            self.lease.check()
        self._file.write(json.dumps({"step": step, **{name: float(value) for name, value in figures.items()}}) + "\n")
        self._file.flush()
        for name, value in figures.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        self._board.close()


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """All logged steps of a run, oldest first; empty where nothing was logged. A last line cut by a crash is left out."""
    path = Path(folder) / "metrics.jsonl"
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
