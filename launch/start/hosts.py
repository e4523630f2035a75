"""Run a stage on several machines without SLURM, over ssh: `ligature launch hosts --hostfile hosts.txt pretrain --config …`.

The machines see the same folders under the same names and let ssh in without a password. One process on each machine,
started through ssh, starts that machine's ranks. It listens to its standard input: a line asks it to stop, and the end
of the input means that the connection, or the launcher, is gone.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from launch.stages import check_batch, read_stage
from launch.start.command import ligature_command
from launch.start.local import GRACE, raise_failure, run_ranks, wait_for
from runtime.errors import LigatureError, RecipeError

CARRIED = (
    "PYTHONPATH",
    "OMP_NUM_THREADS",
    "HF_HUB_OFFLINE",
    "NCCL_SOCKET_IFNAME",
    "GLOO_SOCKET_IFNAME",
    "DS_ACCELERATOR",
)
"""Environment variables that the ranks get from the launcher: ssh passes none on."""
STOP = b"stop\n"
"""The line that asks a machine to stop its ranks."""


@dataclass(frozen=True)
class Host:
    """A machine, and the number of ranks it runs."""

    name: str
    slots: int


def launch_hosts(stage: str, arguments: list[str], hostfile: Path, port: int | None) -> None:
    """Run a stage on the machines of a hostfile.

    Args:
        stage: One of `launch.start.local.STAGES`.
        arguments: The stage's own command-line arguments.
        hostfile: Text file with one machine a line.
        port: TCP port of the first machine at which the ranks meet; None: one from 20000 to 32000.

    Raises:
        RecipeError: The hostfile or the recipe is wrong; nothing has started.
        LigatureError: A rank failed; the error has the first failure's exit code.
    """
    hosts = read_hosts(hostfile)
    recipe = read_stage(stage, arguments)  # a mistake is answered before anything starts
    if stage in ("pretrain", "finetune"):
        check_batch(recipe, sum(host.slots for host in hosts))
    if not shutil.which("ssh"):
        raise LigatureError("no ssh on this machine; install a client, or use `ligature launch local`")
    # The first machine may be another one, where no free port can be looked up.
    # The process id keeps two launches apart.
    code = run_hosts(hosts, ligature_command(stage, *arguments), port or 20000 + os.getpid() * 7 % 12000)
    raise_failure(stage, code)


def read_hosts(path: Path) -> list[Host]:
    """Return the machines of a hostfile, in the format of MPI and DeepSpeed.

    A line is `name slots=8`, or a name alone for one slot. `#` starts a comment.

    Raises:
        RecipeError: The file is missing or empty, a line has another form, or a machine appears twice.
    """
    if not path.is_file():
        raise RecipeError(f"--hostfile {path}: no such file; write one machine a line: node1 slots=8")
    hosts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not (words := line.partition("#")[0].split()):
            continue
        slots = words[1].removeprefix("slots=") if len(words) == 2 else "1"
        # A name with a leading dash would be an option to ssh.
        if len(words) > 2 or not slots.isdigit() or not int(slots) or words[0].startswith("-"):
            raise RecipeError(f"{path}, line {number}: {line.strip()!r} is no machine; write: node1 slots=8")
        hosts.append(Host(words[0], int(slots)))
    if not hosts:
        raise RecipeError(f"{path} names no machine; write one machine a line: node1 slots=8")
    if len({host.name for host in hosts}) < len(hosts):
        raise RecipeError(f"{path} names a machine twice; give all its ranks in one line: node1 slots=8")
    return hosts


def run_hosts(hosts: list[Host], command: list[str], port: int) -> int:
    """Run `command` as one rank for each slot of the hosts.

    Returns:
        0, or the exit code of the first machine that failed (255 is ssh's own).
    """
    world, first = sum(host.slots for host in hosts), 0
    machines: list[subprocess.Popen] = []

    def request_stop(number: int, frame: object) -> None:
        for machine in machines:
            if machine.poll() is None and machine.stdin:
                try:
                    machine.stdin.write(STOP)
                    machine.stdin.flush()
                except BrokenPipeError:
                    pass  # it is ending by itself

    # Set before any machine starts, as in `run_ranks`: an early signal must not leave ranks running.
    previous = {
        number: signal.signal(number, request_stop) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    }
    try:
        for host in hosts:
            part = {"command": command, "count": host.slots, "first": first, "world": world}
            part |= {"address": hosts[0].name, "port": port}
            variables = [f"{name}={os.environ[name]}" for name in CARRIED if name in os.environ]
            remote = shlex.join(["env", *variables, sys.executable, "-m", "launch.start.hosts", json.dumps(part)])
            # ssh starts in the home folder, but the recipe's paths may be relative to this one.
            line = f"cd {shlex.quote(os.getcwd())} && exec {remote}"
            # BatchMode: where a password is needed, ssh fails at once instead of waiting for one.
            # A session of its own: ctrl-C here must reach the ranks as a request, not end their connection.
            machines.append(
                subprocess.Popen(
                    ["ssh", "-o", "BatchMode=yes", host.name, line], stdin=subprocess.PIPE, start_new_session=True
                )
            )
            first += host.slots
        return wait_for(machines, GRACE)
    finally:
        # All connections end before the first wait, so that all machines use the same grace period.
        for machine in machines:
            if machine.stdin:
                machine.stdin.close()  # the remote process ends its ranks when it sees this
        for machine in machines:
            try:
                machine.wait(GRACE)
            except subprocess.TimeoutExpired:
                machine.kill()
                machine.wait()
        for number, handler in previous.items():
            signal.signal(number, handler)


def serve(part: dict) -> int:
    """Run one machine's ranks, on that machine, and stop them when the launcher asks or disappears.

    Args:
        part: The arguments of `run_ranks`.

    Returns:
        0, or the exit code of the first rank that failed.
    """

    def listen() -> None:
        while os.read(0, 64):  # not through `sys.stdin`: its lock would be held when this process ends
            os.kill(os.getpid(), signal.SIGUSR1)  # `run_ranks` hands it to the ranks, which save and leave
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE)
        # The ranks have asked the kernel for a signal at their parent's end: they do not outlive it for long.
        os._exit(1)

    # A daemon: its read waits for input, and must not keep this process alive after the ranks' end.
    threading.Thread(target=listen, name="listen", daemon=True).start()
    return run_ranks(**part)


if __name__ == "__main__":
    sys.exit(serve(json.loads(sys.argv[1])))
