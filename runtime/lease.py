"""The lease: which process may write into a run's folder. A job thought dead cannot write into its successor's run.

    <run>/lease/job=4711,restart=1,host=node-3,machine=…,pid=812,start=93441/work-812-93441/alive

The one folder in `lease/` names the holder (`free` after an orderly end). Taking over is to rename that folder: the file
system lets one of many do it. Whatever the holder commits is prepared in its `work-…` folder and renamed from there; whatever
it throws away is renamed into there first. The successor removes that folder before it reads anything, and from then on no
rename of its predecessor can succeed, also one that was checked before and delayed: its source, or its goal, is gone.

Who may take over: anybody, of a free lease; a job that SLURM restarted (same job, higher restart count), at once; on the same
machine, once the holder's process is dead; from elsewhere, once its heartbeat has stood still for EXPIRY seconds by our own clock.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

from runtime.errors import LigatureError, RunHeld, Superseded

HEARTBEAT = 10.0
"""Seconds between two signs of life."""
EXPIRY = 60.0
"""Seconds without one after which a holder on another machine is taken for dead."""
POLL = 1.0
FREE = "free"


@dataclass(frozen=True)
class Holder:
    """A process that holds, or held, a run."""

    job: str
    """SLURM's job id; empty outside SLURM."""
    restart: int
    """How often SLURM has restarted that job."""
    host: str
    machine: str
    """This boot of this machine and its process namespace, where process numbers mean something; empty where unknown."""
    pid: int
    start: str
    """When the process started, in the kernel's ticks: a process number comes back, the pair does not."""

    @classmethod
    def this_process(cls) -> Holder:
        job = re.sub(r"[^\w.-]", "-", os.environ.get("SLURM_JOB_ID", ""))
        host = re.sub(r"[^\w.-]", "-", socket.gethostname())
        restart = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
        return cls(job, restart, host, _machine(), os.getpid(), _started(os.getpid()) or f"{time.time():.0f}")

    @classmethod
    def parse(cls, name: str) -> Holder:
        """The holder that a folder's name states."""
        try:
            stated: dict[str, Any] = dict(part.split("=", 1) for part in name.split(","))
            return cls(**(stated | {"restart": int(stated["restart"]), "pid": int(stated["pid"])}))
        except (ValueError, KeyError, TypeError):
            raise LigatureError(f"`{name}` in a run's lease/ names no process; remove it when none runs") from None

    @property
    def name(self) -> str:
        return ",".join(f"{field.name}={value}" for field, value in zip(fields(self), astuple(self), strict=True))

    @property
    def work(self) -> str:
        return f"work-{self.pid}-{self.start}"

    def __str__(self) -> str:
        job = f"job {self.job} (restart {self.restart}), " if self.job else ""
        return f"{job}process {self.pid} on {self.host}"


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}.{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""  # not Linux: heartbeats decide


def _started(pid: int) -> str | None:
    """Start of a process that lives; None of one that does not, or is a zombie."""
    try:
        values = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if values[0] in "ZX" else values[19]


class Lease:
    """A run's folder, held. Made by `take_lease`; end it with `release`."""

    def __init__(self, run: Path, holder: Holder) -> None:
        self.run, self.folder, self.holder = run, run / "lease", holder
        self.work = self.folder / holder.name / holder.work
        """What will be renamed into the run is prepared here."""
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)

    def check(self) -> None:
        """Raises Superseded once another process has taken the run over."""
        if self.work.is_dir():
            return
        try:
            others = [name for name in _entries(self.folder) if name != self.holder.name]
        except OSError as error:  # a mount that went away is no successor
            raise LigatureError(f"cannot read {self.folder}: {error.strerror}; is its disk still there?") from error
        if not others:
            raise LigatureError(f"{self.work} is gone, and nobody has taken the run over: was it deleted by hand?")
        by = "nobody that still runs" if others[0] == FREE else str(Holder.parse(others[0]))
        raise Superseded(
            f"{self.run} was taken over from {self.holder} by {by}; this process stops and writes no more into it"
        )

    @contextlib.contextmanager
    def guarded(self) -> Iterator[Path]:
        """Yield the folder to prepare a commit in. A failure because the run was taken over meanwhile is told as Superseded."""
        self.check()
        try:
            yield self.work
        except (OSError, LigatureError) as error:
            self.check()
            if isinstance(error, LigatureError):
                raise
            raise LigatureError(f"cannot write {error.filename or self.run}: {error.strerror}") from error

    def release(self) -> None:
        """Leave the run to whoever comes next. Nothing happens where somebody has taken it already."""
        self._stopping.set()
        self._thread.join()
        shutil.rmtree(self.work, ignore_errors=True)
        with contextlib.suppress(OSError):  # taken over, or its disk is gone: heartbeats will tell
            os.rename(self.folder / self.holder.name, self.folder / FREE)

    def _beat(self) -> None:
        while not self._stopping.wait(HEARTBEAT):
            with contextlib.suppress(OSError):  # `check` finds out why, where it matters
                os.utime(self.work / "alive")


def _entries(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def take_lease(run: Path) -> Lease:
    """Hold the run's folder from here on. Raises RunHeld while another process does."""
    me = Holder.this_process()
    lease = Lease(run, me)
    run.mkdir(parents=True, exist_ok=True)
    while not _take(lease.folder, me):
        pass  # another start was faster: judge that one
    # The predecessor's unfinished work, and with it its means to finish it, goes before anything of the run is read.
    for entry in (lease.folder / me.name).iterdir():
        _remove(entry)
    lease.work.mkdir()
    (lease.work / "alive").touch()
    lease._thread.start()
    return lease


def _take(folder: Path, me: Holder) -> bool:
    """One try. -> whether the folder's one entry now names us. Raises RunHeld."""
    try:
        names = _entries(folder)
    except FileNotFoundError:
        names = []
    if len(names) > 1:
        raise LigatureError(f"{folder} names several holders ({'; '.join(names)}); remove it when none of them runs")
    if names:
        if names[0] != FREE:
            _judge(folder, Holder.parse(names[0]), me)
        try:
            os.rename(folder / names[0], folder / me.name)
        except FileNotFoundError:
            return False
        return True
    # The first start of this run. The folder comes into being with its entry in it: it is empty at no moment.
    prepared = folder.with_name(f".lease-{me.work}")
    (prepared / me.name).mkdir(parents=True, exist_ok=True)
    try:
        os.rename(prepared, folder)
    except OSError as error:
        shutil.rmtree(prepared)
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return False
    return True


def _judge(folder: Path, holder: Holder, me: Holder) -> None:
    """Return if the holder is dead or has to give way. Raises RunHeld if not."""
    if holder.job and holder.job == me.job and holder.restart != me.restart:
        if me.restart > holder.restart:
            return
        raise RunHeld(
            f"{folder.parent} belongs to restart {holder.restart} of job {me.job}; this is restart {me.restart}"
        )
    held = f"{folder.parent} is being written by {holder}; stop that first, or choose another --name"
    if holder.machine and holder.machine == me.machine:
        if _started(holder.pid) == holder.start:
            raise RunHeld(held)
        return
    print(f"{folder.parent} was last written by {holder}; waiting {EXPIRY:.0f} s for a sign of life", file=sys.stderr)
    first, deadline = _last_sign(folder, holder), time.monotonic() + EXPIRY
    while time.monotonic() < deadline:
        time.sleep(POLL)
        if _last_sign(folder, holder) != first:
            raise RunHeld(held)


def _last_sign(folder: Path, holder: Holder) -> int | None:
    """When the holder was last heard of, by the file server's clock; None where it has left no sign."""
    try:
        with open(
            folder / holder.name / holder.work / "alive"
        ) as file:  # opened, because NFS answers `stat` from memory
            return os.fstat(file.fileno()).st_mtime_ns
    except OSError:
        return None


def _remove(folder: Path) -> None:
    """Remove a folder into which a process that does not know better may still be writing."""
    for _ in range(100):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
    raise LigatureError(f"cannot remove {folder}; look whether another process writes there")
