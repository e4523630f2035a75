"""The lease: which process may write into a run's folder. A job thought dead cannot write into its successor's run.

    <run>/lease/job=4711,restart=1,host=node-3,machine=…,pid=812,start=93441/work-812-93441/alive

The one folder in `lease/` names the holder, or is called `free` after an orderly end. A process takes over by renaming that
folder, and the file system lets only one of many do it. The holder prepares its commits in its `work-…` folder and renames
them from there. Before it removes something, it renames it into that folder. The successor removes the folder before it reads
anything. From then on no rename of its predecessor can succeed, because its source or its target is gone. This holds even for a
rename that passed its check earlier and was delayed.

Who may take over:

- a free lease: any process
- a held one, when SLURM restarted the holder's job (same job, higher restart count): at once
- on the holder's machine: once the holder's process is dead
- from another machine: once the heartbeat has stood still for EXPIRY seconds by the waiting process's own clock
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
"""Seconds between two heartbeats."""
EXPIRY = 60.0
"""Seconds without a heartbeat after which a holder on another machine counts as dead."""
POLL = 1.0
"""Seconds between two looks at the heartbeat of a holder on another machine."""
FREE = "free"
"""Name of the folder in `lease/` that nobody holds."""


@dataclass(frozen=True)
class Holder:
    """A process that holds, or held, a run."""

    job: str
    """SLURM's job id; empty outside SLURM."""
    restart: int
    """How often SLURM has restarted that job."""
    host: str
    machine: str
    """The machine, its boot and its process namespace, within which a process id is unique; empty where unknown."""
    pid: int
    start: str
    """When the process started, in the kernel's ticks. A process id is used again; id and start together are not."""

    @classmethod
    def this_process(cls) -> Holder:
        """Return the holder that this process is."""
        # The values become parts of a folder's name, where `,` and `=` separate them.
        job = re.sub(r"[^\w.-]", "-", os.environ.get("SLURM_JOB_ID", ""))
        host = re.sub(r"[^\w.-]", "-", socket.gethostname())
        restart = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
        return cls(job, restart, host, _machine(), os.getpid(), _start_of(os.getpid()) or f"{time.time():.0f}")

    @classmethod
    def parse(cls, name: str) -> Holder:
        """Return the holder that a folder's name states.

        Raises:
            LigatureError: the name states no process.
        """
        try:
            values: dict[str, Any] = dict(part.split("=", 1) for part in name.split(","))
            return cls(**(values | {"restart": int(values["restart"]), "pid": int(values["pid"])}))
        except (ValueError, KeyError, TypeError):
            raise LigatureError(f"`{name}` in a run's lease/ names no process; remove it when none runs") from None

    @property
    def name(self) -> str:
        """The name of the holder's folder in `lease/`."""
        return ",".join(f"{field.name}={value}" for field, value in zip(fields(self), astuple(self), strict=True))

    @property
    def work(self) -> str:
        """The name of the work folder within the holder's folder."""
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


def _start_of(pid: int) -> str | None:
    """Return when a living process started, in ticks; None where it is dead or a zombie."""
    try:
        # The command's name may hold blanks and parentheses, so the fields are counted from the last one.
        values = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    # The state is field 3 of proc(5), and the start time field 22.
    return None if values[0] in "ZX" else values[19]


class Lease:
    """This process's hold on a run's folder. `take_lease` makes it, and `release` ends it."""

    def __init__(self, run: Path, holder: Holder) -> None:
        self.run, self.folder, self.holder = run, run / "lease", holder
        self.work = self.folder / holder.name / holder.work
        """The folder in which commits are prepared before they are renamed into the run."""
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)

    def check(self) -> None:
        """Check that this process still holds the run.

        Raises:
            Superseded: another process has taken the run over.
            LigatureError: the disk is gone, or the lease was deleted by hand.
        """
        if self.work.is_dir():
            return
        try:
            others = [name for name in _entries(self.folder) if name != self.holder.name]
        except OSError as error:  # a mount that has gone away is no successor
            raise LigatureError(f"cannot read {self.folder}: {error.strerror}; is its disk still there?") from error
        if not others:
            raise LigatureError(f"{self.work} is gone, and nobody has taken the run over: was it deleted by hand?")
        # A successor that has ended again leaves the lease free.
        by = "nobody that still runs" if others[0] == FREE else str(Holder.parse(others[0]))
        raise Superseded(
            f"{self.run} was taken over from {self.holder} by {by}; this process stops and writes no more into it"
        )

    @contextlib.contextmanager
    def guarded(self) -> Iterator[Path]:
        """Yield the folder in which to prepare a commit.

        Raises:
            Superseded: another process has taken the run over, before the block or during it.
            LigatureError: any other failure of the disk within the block.
        """
        self.check()
        try:
            yield self.work
        except (OSError, LigatureError) as error:
            # A successor removes the work folder, which shows here as a file that is missing.
            self.check()
            if isinstance(error, LigatureError):
                raise
            raise LigatureError(f"cannot write {error.filename or self.run}: {error.strerror}") from error

    def release(self) -> None:
        """Give the run up for the next process. It changes nothing where another process has already taken it over."""
        self._stopping.set()
        self._thread.join()
        shutil.rmtree(self.work, ignore_errors=True)
        with contextlib.suppress(OSError):  # taken over, or the disk is gone: then the heartbeat stops
            os.rename(self.folder / self.holder.name, self.folder / FREE)

    def _beat(self) -> None:
        while not self._stopping.wait(HEARTBEAT):
            with contextlib.suppress(OSError):  # `check` finds the reason before the next commit
                os.utime(self.work / "alive")


def _entries(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def take_lease(run: Path) -> Lease:
    """Hold the run's folder from here on. The folder is created where it is missing.

    Raises:
        RunHeld: another process holds it.
        LigatureError: the lease names several holders, or none that can be read.
    """
    holder = Holder.this_process()
    lease = Lease(run, holder)
    run.mkdir(parents=True, exist_ok=True)
    while not _try_to_take(lease.folder, holder):
        pass  # another process was faster; look again at the lease that it left
    # Remove the predecessor's unfinished work before reading anything of the run, so that it can no longer finish that work.
    for entry in (lease.folder / holder.name).iterdir():
        _remove(entry)
    lease.work.mkdir()
    (lease.work / "alive").touch()
    lease._thread.start()
    return lease


def living_holder(run: Path) -> Holder | None:
    """Return the process that writes into a run, or None if there seems to be none. For people to read: only `take_lease` decides.

    A process of this machine is looked up. On another machine a heartbeat of the last EXPIRY seconds, by this machine's clock, counts.
    """
    try:
        names = _entries(run / "lease")
        holder = Holder.parse(names[0]) if len(names) == 1 and names[0] != FREE else None
    except (OSError, LigatureError):
        return None
    if holder and holder.machine and holder.machine == _machine():
        return holder if _start_of(holder.pid) == holder.start else None
    beat = _last_heartbeat(run / "lease", holder) if holder else None
    return holder if beat is not None and time.time() - beat / 1e9 < EXPIRY else None


def _try_to_take(folder: Path, me: Holder) -> bool:
    """Put `me` into `folder` as its only entry. Return False if another process was faster.

    Raises:
        RunHeld: another process holds the lease.
    """
    try:
        names = _entries(folder)
    except FileNotFoundError:
        names = []
    if len(names) > 1:
        raise LigatureError(f"{folder} names several holders ({'; '.join(names)}); remove it when none of them runs")
    if names:
        if names[0] != FREE:
            _refuse_living_holder(folder, Holder.parse(names[0]), me)
        try:
            os.rename(folder / names[0], folder / me.name)
        except FileNotFoundError:
            return False
        return True
    # The first start of this run. The folder appears with its entry already in it, so it is never empty.
    prepared = folder.with_name(f".lease-{me.work}")
    (prepared / me.name).mkdir(parents=True, exist_ok=True)
    try:
        os.rename(prepared, folder)
    except OSError as error:
        shutil.rmtree(prepared)
        # POSIX allows either code where the target folder is not empty, which means that another process was faster.
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return False
    return True


def _refuse_living_holder(folder: Path, holder: Holder, me: Holder) -> None:
    """Refuse to take over from a holder that is alive and need not give way to `me`.

    Raises:
        RunHeld: the holder is alive.
    """
    if holder.job and holder.job == me.job and holder.restart != me.restart:
        if me.restart > holder.restart:
            return
        raise RunHeld(
            f"{folder.parent} belongs to restart {holder.restart} of job {me.job}; this is restart {me.restart}"
        )
    message = f"{folder.parent} is being written by {holder}; stop that first, or choose another --name"
    if holder.machine and holder.machine == me.machine:
        if _start_of(holder.pid) == holder.start:
            raise RunHeld(message)
        return
    print(f"{folder.parent} was last written by {holder}; waiting {EXPIRY:.0f} s for a sign of life", file=sys.stderr)
    # Clocks of two machines are never compared: what counts is whether the heartbeat changes meanwhile.
    first, deadline = _last_heartbeat(folder, holder), time.monotonic() + EXPIRY
    while time.monotonic() < deadline:
        time.sleep(POLL)
        if _last_heartbeat(folder, holder) != first:
            raise RunHeld(message)


def _last_heartbeat(folder: Path, holder: Holder) -> int | None:
    """Return the time of the holder's last heartbeat by the file server's clock; None where there was none."""
    try:
        # Opened, because NFS answers a `stat` of a path from its cache.
        with open(folder / holder.name / holder.work / "alive") as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except OSError:
        return None


def _remove(folder: Path) -> None:
    """Remove a folder into which a superseded process may still be writing."""
    for _ in range(100):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
    raise LigatureError(f"cannot remove {folder}; check whether another process writes there")
