"""Run a stage as several processes on this machine: `ligature launch local --nproc 2 pretrain --config …`."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time

from launch.stages import check_batch, read_stage
from launch.start.command import end_with_parent, error_with_code, ligature_command
from runtime.errors import RecipeError

STAGES = ("pretrain", "finetune", "evaluate", "index")
"""Stages that run on several ranks."""
GRACE = 30.0
"""Seconds that the other ranks have to stop after one has failed."""


def launch_local(stage: str, arguments: list[str], count: int) -> None:
    """Run a stage as `count` ranks on this machine. Signals are passed on, and one failure stops all ranks.

    Args:
        stage: One of STAGES.
        arguments: The stage's own command-line arguments.
        count: Number of processes.

    Raises:
        RecipeError: The recipe cannot run on this machine; nothing has started.
        LigatureError: A rank failed; the error has the first failure's exit code.
    """
    recipe = read_stage(stage, arguments)  # a mistake is answered before anything starts
    if stage in ("pretrain", "finetune"):
        check_batch(recipe, count)
    check_gpus(getattr(recipe, "device", "") or recipe.training.device, count)
    raise_failure(stage, run_ranks(ligature_command(stage, *arguments), count))


def raise_failure(stage: str, code: int) -> None:
    """Raise LigatureError with a stage's exit code, unless it is 0."""
    if code:
        raise error_with_code(f"{stage} stopped with exit code {code}; the reason is in its own line above", code)


def check_gpus(device: str, count: int) -> None:
    """Raise RecipeError if more ranks would run on GPUs than this machine has GPUs."""
    if device == "cpu" or not shutil.which("nvidia-smi"):
        return
    import torch  # takes two seconds, so only where there are GPUs to count

    # Where torch sees no GPU, `auto` means the CPU, which takes any number of ranks.
    if 0 < (gpus := torch.cuda.device_count()) < count:
        raise RecipeError(f"--nproc is {count}, but torch sees {gpus} GPUs here; start one rank a GPU, or on the CPU")


# Not torchrun: it wraps a failure into a page of its own and replaces the rank's exit code.
def run_ranks(
    command: list[str], count: int, first: int = 0, world: int | None = None, address: str = "127.0.0.1", port: int = 0
) -> int:
    """Run `command` as `count` ranks on this machine, all of the world or a part of it.

    Args:
        command: Command line of every rank; the variables that torchrun sets tell it its rank.
        count: Ranks to start here.
        first: Number of the first rank here.
        world: World size; None: `count`.
        address: Host at which all ranks meet.
        port: TCP port at which they meet; 0: a free one of this machine.

    Returns:
        0, or the exit code of the first rank that failed.
    """
    shared = {
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port or free_port()),
        "WORLD_SIZE": str(world or count),
        "LOCAL_WORLD_SIZE": str(count),
    }
    ranks: list[subprocess.Popen] = []

    def forward(number: int, frame: object) -> None:
        for process in ranks:
            if process.poll() is None:
                process.send_signal(number)

    # The handlers are set before any rank starts: otherwise an early signal would end this process and leave its ranks running.
    previous = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    try:
        for rank in range(count):
            # Each rank leads a process group: `killpg` below ends its loader workers too.
            # Ctrl-C reaches it through `forward` alone.
            own = {"RANK": str(first + rank), "LOCAL_RANK": str(rank)}
            ranks.append(
                subprocess.Popen(
                    command,
                    env=os.environ | shared | own,
                    start_new_session=True,
                    preexec_fn=end_with_parent(os.getpid()),
                )
            )
        return wait_for(ranks, GRACE)
    finally:
        for process in ranks:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        for number, handler in previous.items():
            signal.signal(number, handler)


def wait_for(processes: list[subprocess.Popen], grace: float) -> int:
    """Wait until all processes have ended, or until `grace` seconds after the first failure.

    Returns:
        0, or the exit code of the first failure; 128 + N for a process that signal N ended, as shells have it.
    """
    failed, since = 0, 0.0
    while None in (codes := [process.poll() for process in processes]):
        if not failed and any(codes):
            failed, since = next(code for code in codes if code), time.monotonic()
        if failed and time.monotonic() - since >= grace:
            break
        # Polling watches all processes at once. Waiting for one of them would miss the failure of another.
        time.sleep(0.1)
    # The last processes may have ended between two polls, before the loop could note a failure.
    failed = failed or next((code for code in codes if code), 0)
    return failed if failed >= 0 else 128 - failed


def free_port() -> int:
    """Return a TCP port that is free on this machine now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
