"""Real SLURM daemons in a folder: munged, slurmctld and one slurmd a node, all on this machine, started and stopped by tests.

Nothing of the machine is touched: configuration, keys, sockets, state and logs live in the folder, and the daemons run as
whoever starts them. By hand, for a look around:

    python tests/slurm/cluster.py /tmp/cluster      # runs until ctrl-C
    export SLURM_CONF=/tmp/cluster/slurm.conf; sinfo
"""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd", "slurmstepd")
PACKAGES = "apt-get install -y --no-install-recommends slurm-wlm munge"

CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# A requeued job waits until credentials of its last start have expired: 120 s unless this is lowered (5 is the least).
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmctldDebug=verbose
SlurmdDebug=verbose
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=100000,defer=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
JobRequeue=1
KillWait={kill_wait}
SlurmdTimeout={slurmd_timeout}
InactiveLimit=0
MinJobAge=600
JobCompType=jobcomp/none
AccountingStorageType=accounting_storage/none
SlurmdParameters=config_overrides
NodeName=n[1-{nodes}] NodeHostname={host} NodeAddr=127.0.0.1 Port={first_node_port}-{last_node_port} CPUs=8 RealMemory=4000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace} MaxTime=INFINITE State=UP
PartitionName=urgent Nodes=ALL PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE State=UP
"""


class ClusterFailed(Exception):
    """A daemon or a command of SLURM did not do what it should; the message holds what it said."""


class Cluster:
    """`start()` it, use its `environment` for sbatch and the like, `stop()` it."""

    def __init__(
        self, folder: Path, nodes: int = 2, kill_wait: int = 30, slurmd_timeout: int = 10, grace: int = 30
    ) -> None:
        self.folder, self.nodes = Path(folder).resolve(), [f"n{number}" for number in range(1, nodes + 1)]
        self.environment = os.environ | {"SLURM_CONF": str(self.folder / "slurm.conf")}
        self._settings = {"kill_wait": kill_wait, "slurmd_timeout": slurmd_timeout, "grace": grace}
        self._daemons: dict[str, subprocess.Popen] = {}

    def start(self) -> None:
        """Start all daemons and wait until every node is idle. Raises ClusterFailed."""
        if missing := [name for name in DAEMONS if not find_daemon(name)]:
            raise ClusterFailed(f"no {', '.join(missing)} on this machine; as root: {PACKAGES}")
        for name in ("state", *(f"spool/{node}" for node in self.nodes)):
            (self.folder / name).mkdir(parents=True)
        self.folder.chmod(0o755)  # munge refuses a socket below a folder that others may write
        ports = free_ports(1 + len(self.nodes))
        configuration = CONFIGURATION.format(
            folder=self.folder,
            host=socket.gethostname(),
            user=getpass.getuser(),
            nodes=len(self.nodes),
            port=ports[0],
            first_node_port=ports[1],
            last_node_port=ports[-1],
            **self._settings,
        )
        (self.folder / "slurm.conf").write_text(configuration)
        try:
            self._start_munge()
            self._spawn("slurmctld", ["-D", "-c"])
            for node in self.nodes:
                self.start_node(node)
            self.wait_for(lambda: set(self.node_states().values()) == {"IDLE"}, "all nodes to be idle", 60)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Cancel what runs, end every daemon, and the tasks that outlived theirs."""
        if "slurmctld" in self._daemons and self._daemons["slurmctld"].poll() is None:
            with suppress(ClusterFailed, subprocess.TimeoutExpired):
                self.run("scancel", "--full", "--signal=KILL", f"--user={getpass.getuser()}", timeout=10)
        for process in reversed(self._daemons.values()):
            process.terminate()
        for process in self._daemons.values():
            try:
                process.wait(3)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._daemons.clear()
        for process in self.processes():
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def start_node(self, node: str) -> None:
        self._spawn(f"slurmd-{node}", ["-D", "-N", node])

    def kill_node(self, node: str) -> None:
        """Kill a node's slurmd, as if the node had gone: its tasks live on."""
        process = self._daemons.pop(f"slurmd-{node}")
        process.kill()
        process.wait()

    def run(self, *command: str, timeout: float = 60) -> str:
        """A command of SLURM -> its standard output. Raises ClusterFailed with what it said."""
        result = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=timeout, check=False
        )
        if result.returncode:
            raise ClusterFailed(f"{' '.join(command)}: {result.stderr.strip() or result.stdout.strip()}")
        return result.stdout

    def node_states(self) -> dict[str, str]:
        """Node -> state in capitals (`IDLE`, `ALLOCATED`, `DOWN*` …); empty where the controller does not answer yet."""
        with suppress(ClusterFailed):
            lines = self.run("sinfo", "--noheader", "--Node", "--partition=main", "--format=%N %T").splitlines()
            return {line.split()[0]: line.split()[1].upper() for line in lines}
        return {}

    def job(self, number: int) -> dict[str, str]:
        """What `scontrol show job` tells of a job: `JobState`, `Restarts`, `Reason` …"""
        told = self.run("scontrol", "--oneliner", "show", "job", str(number)).splitlines()[0]
        return dict(part.split("=", 1) for part in told.split() if "=" in part)

    def processes(self) -> list[int]:
        """Processes of this cluster that still live: their environment names its configuration."""
        mark, pids = f"SLURM_CONF={self.folder}/slurm.conf".encode(), []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                with suppress(OSError):
                    if mark in (entry / "environ").read_bytes().split(b"\0"):
                        pids.append(int(entry.name))
        return pids

    def wait_for(self, condition: Callable[[], bool], what: str, seconds: float = 120) -> None:
        """Ask four times a second until `condition()`. Raises ClusterFailed with the logs' ends."""
        deadline = time.monotonic() + seconds
        while not condition():
            dead = [name for name, process in self._daemons.items() if process.poll() is not None]
            if dead or time.monotonic() > deadline:
                why = f"{', '.join(dead)} died" if dead else f"waited {seconds:.0f} s"
                raise ClusterFailed(f"{why} for {what}\n{self.log_ends()}")
            time.sleep(0.25)

    def log_ends(self, lines: int = 15) -> str:
        return "\n".join(
            f"--- {path.name}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-lines:])
            for path in sorted(self.folder.glob("*.log"))
        )

    def _start_munge(self) -> None:
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        names = ("socket", "pid", "log", "seed")
        files = {name: f"{self.folder}/munge.{name}" for name in names}
        options = [f"--socket={files['socket']}", f"--key-file={key}", f"--pid-file={files['pid']}"]
        options += [f"--log-file={files['log']}", f"--seed-file={files['seed']}"]
        self._spawn("munged", ["--foreground", "--force", *options])
        self.wait_for(Path(files["socket"]).exists, "munge's socket", 20)

    def _spawn(self, name: str, arguments: list[str]) -> None:
        with open(self.folder / f"{name}.out.log", "ab") as out:
            self._daemons[name] = subprocess.Popen(
                [find_daemon(name.split("-")[0]), *arguments],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )


def find_daemon(name: str) -> str:
    """Its path; empty where it is not installed. Daemons are not always on a user's PATH."""
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin", "/usr/lib/slurm", "/usr/lib64/slurm"])
    return shutil.which(name, path=path) or ""


def free_ports(count: int) -> list[int]:
    """`count` neighbouring TCP ports that are free now, below those the kernel hands out by itself."""
    for first in range(17000 + os.getpid() % 1000 * 10, 32000, count):
        try:
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return list(range(first, first + count))
    raise ClusterFailed("no free ports")


if __name__ == "__main__":
    cluster = Cluster(Path(sys.argv[1]), nodes=int(sys.argv[2]) if len(sys.argv) > 2 else 2)
    cluster.start()
    print(f"export SLURM_CONF={cluster.environment['SLURM_CONF']}", flush=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    with suppress(KeyboardInterrupt):
        signal.pause()
    cluster.stop()
