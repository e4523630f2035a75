"""Jobs of the fault tests: a tiny pretraining run with a fault at a chosen step."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny
from torch import Tensor

from data_tools.stream.shard_stream import ShardStream
from pretrain.task import Student
from pretrain.train import pretrain
from runtime.checkpoint import CheckpointFolder

RANK = "RANK"
At = dict[int, Callable[[], Any]]


def run(changes: dict[str, Any], wounds: dict[int, float] | None = None, at: At | None = None, rank: int = 0) -> None:
    """Pretrain by the tiny recipe. On `rank`, forward number n's loss is multiplied by `wounds[n]`, after `at[n]()` was called."""
    forward, calls = Student.forward, [0]

    def wounded(self: Student, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        calls[0] += 1
        loss, figures = forward(self, batch)
        if int(os.environ[RANK]) != rank:
            return loss, figures
        if at and calls[0] in at:
            at[calls[0]]()
        loss = loss * (wounds or {}).get(calls[0], 1.0)
        return loss, figures | {"loss": loss.detach()}

    Student.forward = wounded  # type: ignore[method-assign]
    pretrain(tiny.recipe(**changes))


def signalled(changes: dict[str, Any], step: int) -> None:
    """SIGUSR1 to rank 1 alone in a step, and SIGTERM to every rank while the checkpoint is written."""
    commit = CheckpointFolder.commit

    def disturbed(self: CheckpointFolder, *arguments: Any) -> Path:
        os.kill(os.getpid(), signal.SIGTERM)
        done = commit(self, *arguments)
        os.kill(os.getpid(), signal.SIGINT)
        return done

    CheckpointFolder.commit = disturbed  # type: ignore[method-assign]
    run(changes, at={step: lambda: os.kill(os.getpid(), signal.SIGUSR1)}, rank=1)


def full_disk(changes: dict[str, Any], folder: str, full: int, free: int) -> None:
    """The disk is full from one step until another."""
    filler = Path(folder) / "filler"

    def fill() -> None:
        with open(filler, "wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(1 << 12))
            except OSError:
                pass

    run(changes, at={full: fill, free: filler.unlink})


def mounted(changes: dict[str, Any], lose: list[str], lost_at: int, restore: list[str], back_at: int) -> None:
    """A mount goes at one forward pass and comes back at another; a lone rank makes two passes a step."""
    run(changes, at={lost_at: lambda: mount(*lose), back_at: lambda: mount(*restore)})


def mount(*command: str) -> None:
    subprocess.run(command, check=True)


def slow_data(changes: dict[str, Any], seconds: float) -> None:
    """Rank 1 waits longer for each batch."""
    batches = ShardStream.__iter__

    def slowed(self: ShardStream) -> Any:
        for batch in batches(self):
            if os.environ[RANK] == "1":
                time.sleep(seconds)
            yield batch

    ShardStream.__iter__ = slowed  # type: ignore[method-assign]
    run(changes)


def memory(changes: dict[str, Any], marks: list[int], output: str) -> None:
    """Resident bytes of the rank and its loader workers at some steps, a line each."""

    def look() -> None:
        with open(output, "a") as file:
            file.write(f"{resident(os.getpid())}\n")

    run(changes, at=dict.fromkeys(marks, look))


def resident(pid: int) -> int:
    """Memory of a process and its children that is theirs: without pages shared with the process they were forked from."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    own = sum(
        int(line.split()[1]) * 1024
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        if line.startswith(("Private_Clean", "Private_Dirty"))
    )
    return own + sum(resident(int(child)) for child in children)
