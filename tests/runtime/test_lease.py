"""One process writes into a run. Its successor takes it over by one rename, and from then on it can change nothing there."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
from pathlib import Path

import pytest
import torch

from runtime import files
from runtime import lease as leases
from runtime.checkpoint import CheckpointFolder, verify_checkpoint, write_checkpoint
from runtime.errors import LigatureError, RunHeld, Superseded
from runtime.files import write_text
from runtime.lease import FREE, Holder, Lease, take_lease
from runtime.metrics import MetricsLog, read_metrics


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def in_a_child():
    """in_a_child(act): a process that does `act()` and then lives until killed; returns, once it is done, its number."""
    children = []

    def start(act) -> int:
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            try:
                act()
                os.write(writing, b"y")
            except BaseException as error:
                os.write(writing, repr(error).encode())
            signal.pause()
        children.append(child)
        os.close(writing)
        assert (answer := os.read(reading, 1000)) == b"y", answer
        os.close(reading)
        return child

    yield start
    for child in children:
        kill(child)


def kill(child: int) -> None:
    try:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    except (ProcessLookupError, ChildProcessError):
        pass


def as_job(monkeypatch, job: int, restart: int) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", str(job))
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))


def pretend_machine(monkeypatch, name: str) -> None:
    monkeypatch.setattr(leases, "_machine", lambda: name)


def entry(run: Path) -> str:
    (name,) = (path.name for path in (run / "lease").iterdir())
    return name


def test_the_folder_names_its_holder(run, monkeypatch):
    as_job(monkeypatch, 4711, 2)
    lease = take_lease(run)
    assert Holder.parse(entry(run)) == lease.holder == Holder.this_process()
    assert (lease.holder.job, lease.holder.restart, lease.holder.pid) == ("4711", 2, os.getpid())
    lease.release()
    assert entry(run) == FREE
    take_lease(run).release()


def test_a_living_holder_is_not_disturbed(run, in_a_child):
    child = in_a_child(lambda: take_lease(run))
    before = entry(run)
    with pytest.raises(RunHeld) as error:
        take_lease(run)
    assert f"process {child} on " in str(error.value) and "--name" in str(error.value) and "\n" not in str(error.value)
    assert entry(run) == before


def test_a_killed_holder_is_succeeded_at_once(run, in_a_child, monkeypatch):
    monkeypatch.setattr(leases.time, "sleep", lambda seconds: pytest.fail("waited"))
    kill(in_a_child(lambda: take_lease(run)))
    take_lease(run).release()


def test_a_zombie_is_dead(run, in_a_child):
    child = in_a_child(lambda: take_lease(run))
    os.kill(child, signal.SIGKILL)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)  # dead, and still in the table
    take_lease(run).release()


def test_a_reused_process_number_is_another_process(run, in_a_child, monkeypatch):
    started = leases._start_of
    monkeypatch.setattr(leases, "_start_of", lambda pid: "1")
    in_a_child(lambda: take_lease(run))
    monkeypatch.setattr(leases, "_start_of", started)
    take_lease(run).release()


def test_a_job_that_slurm_restarted_takes_over_at_once(run, in_a_child, monkeypatch):
    """Also from a holder that still runs, as far as anybody can see."""
    as_job(monkeypatch, 4711, 0)
    in_a_child(lambda: take_lease(run))
    as_job(monkeypatch, 4711, 1)
    lease = take_lease(run)
    lease.check()
    as_job(monkeypatch, 4711, 0)
    with pytest.raises(RunHeld, match="belongs to restart 1 of job 4711; this is restart 0"):
        take_lease(run)
    lease.release()


def test_another_job_waits_for_the_first_one(run, in_a_child, monkeypatch):
    as_job(monkeypatch, 4711, 0)
    in_a_child(lambda: take_lease(run))
    as_job(monkeypatch, 4712, 5)
    with pytest.raises(RunHeld, match=r"job 4711 \(restart 0\), process"):
        take_lease(run)


def test_from_another_machine_the_heartbeat_decides(run, in_a_child, monkeypatch, capsys):
    monkeypatch.setattr(leases, "POLL", 0.01)
    pretend_machine(monkeypatch, "there")
    monkeypatch.setattr(leases, "HEARTBEAT", 0.01)
    child = in_a_child(lambda: take_lease(run))
    pretend_machine(monkeypatch, "here")
    with pytest.raises(RunHeld):
        take_lease(run)
    assert "waiting 60 s for a sign of life" in capsys.readouterr().err
    os.kill(child, signal.SIGSTOP)
    monkeypatch.setattr(leases, "EXPIRY", 0.2)
    take_lease(run).release()


def test_without_machine_names_the_heartbeat_decides(run, in_a_child, monkeypatch):
    """Not Linux: both say nothing, which is not the same machine."""
    pretend_machine(monkeypatch, "")
    monkeypatch.setattr(leases, "POLL", 0.01)
    monkeypatch.setattr(leases, "EXPIRY", 0.05)
    kill(in_a_child(lambda: take_lease(run)))
    take_lease(run).release()


@pytest.mark.parametrize("former", ["nobody", "released", "dead"])
def test_only_one_of_many_starts_wins(run, in_a_child, former):
    if former == "released":
        take_lease(run).release()
    if former == "dead":
        kill(in_a_child(lambda: take_lease(run)))
    ready, go = os.pipe()
    children, pipes = [], []
    for _ in range(8):
        ours, theirs = os.pipe()
        child = os.fork()
        if not child:
            os.read(ready, 1)
            try:
                take_lease(run)
                os.write(theirs, b"won")
            except RunHeld:
                os.write(theirs, b"refused")
            except BaseException as error:
                os.write(theirs, repr(error).encode())
            signal.pause()
        os.close(theirs)
        children.append(child)
        pipes.append(ours)
    os.write(go, b"." * 8)
    answers = [os.read(pipe, 1000) for pipe in pipes]
    winner = children[answers.index(b"won")]
    assert sorted(answers) == [b"refused"] * 7 + [b"won"]
    assert Holder.parse(entry(run)).pid == winner
    for child in children:
        kill(child)
    assert not list(run.glob(".lease*"))


def write(path: Path, staging: Path) -> None:
    write_checkpoint(
        path, {"model": {"w": torch.ones(3)}}, {}, lambda inside: write_text(inside / "note.txt", "a"), staging
    )


def commit_all(folder: CheckpointFolder, log: MetricsLog | None) -> None:
    """What a step may commit: a line, a checkpoint with both pointers, an abandoned future and an old one thrown away."""
    if log:
        log.write(3, {"train/loss": 1.0})
    folder.commit(3, True, write)
    folder.commit(4, False, write)


def contents(run: Path) -> dict[str, bytes]:
    files = [path for path in run.rglob("*") if path.is_file() and "tensorboard" not in path.parts]
    return {str(path.relative_to(run)): path.read_bytes() for path in files if path.name != "alive"}


calls: list[str] = []
disturb = threading.local()


def _hook(event: str, arguments: tuple) -> None:
    if not getattr(disturb, "at", None) or event not in ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "open"):
        return
    if event == "open" and not (arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
        return
    calls.append(event)
    if len(calls) == disturb.at[0]:
        act, disturb.at = disturb.at[1], None
        act()


sys.addaudithook(_hook)  # for good: Python has no way to take one out


def superseded_holder(run: Path) -> Lease:
    """The lease of this process, which another one is going to take from it."""
    lease = take_lease(run)
    lease._stopping.set()
    return lease


def before(run: Path, lease: Lease) -> CheckpointFolder:
    folder = CheckpointFolder(run / "checkpoints", keep_last=1)
    folder.lease = lease
    folder.commit(1, True, write)
    folder.commit(2, False, write)
    (run / "checkpoints" / "step-00000009").mkdir()  # of a future that was left
    return folder


def test_a_superseded_holder_changes_nothing_from_any_moment_on(tmp_path, monkeypatch):
    """The successor comes before each call by which the holder changes the disk, checks that went well before included."""
    monkeypatch.setattr(
        files, "sync_file", lambda path: None
    )  # hundreds of them, and the order of calls is what matters
    as_job(monkeypatch, 1, 0)
    run = tmp_path / "counted"
    folder = before(run, superseded_holder(run))
    calls.clear()
    disturb.at = (10**6, None)
    commit_all(folder, None)
    disturb.at = None
    count = len(calls)
    assert count > 30

    disturbed = set()
    for call in range(1, count + 1):
        as_job(monkeypatch, 1, 0)
        run = tmp_path / f"call-{call}"
        folder = before(run, superseded_holder(run))
        left: dict[str, bytes] = {}

        def succeed(run=run, left=left) -> None:
            as_job(monkeypatch, 1, 1)
            take_lease(run)
            left |= contents(run)

        calls.clear()
        disturb.at = (call, succeed)
        try:
            commit_all(folder, None)
        except Superseded as error:
            assert "restart 1" in str(error) and "writes no more" in str(error)
        else:
            # Too late to hurt: it had committed everything, and was cleaning up what it had thrown away.
            assert calls[call - 1] in ("os.remove", "os.rmdir"), calls[call - 1]
        finally:
            disturb.at = None
        assert contents(run) == left, f"changed after call {call}, {calls[call - 1]}"
        kept = CheckpointFolder(run / "checkpoints", keep_last=1)
        assert kept.newest_valid() is not None, call
        for step in kept.steps():
            if step != 9:
                verify_checkpoint(kept.path_of(step))
        disturbed.add(calls[call - 1])
        shutil.rmtree(run)
    assert {"os.rename", "os.mkdir", "open"} <= disturbed


def test_lines_of_a_superseded_holder_do_not_reach_the_log(run, monkeypatch):
    as_job(monkeypatch, 1, 0)
    former = MetricsLog(run, 0, take_lease(run))
    former.write(1, {"train/loss": 1.0})
    as_job(monkeypatch, 1, 1)
    lease = take_lease(run)
    log = MetricsLog(run, 1, lease)
    former._file.write(b'{"step": 2, "train/loss": 9.0}\n')  # checked before, written after
    with pytest.raises(Superseded):
        former.write(2, {"train/loss": 9.0})
    log.write(2, {"train/loss": 2.0})
    assert [line["train/loss"] for line in read_metrics(run)] == [1.0, 2.0]
    log.close()
    former.close()
    lease.release()


def test_a_release_by_a_superseded_holder_has_no_effect(run, monkeypatch):
    as_job(monkeypatch, 1, 0)
    former = take_lease(run)
    as_job(monkeypatch, 1, 1)
    lease = take_lease(run)
    former.release()
    assert entry(run) == lease.holder.name
    lease.check()
    lease.release()


def test_leftovers_of_a_dead_holder_are_removed(run, in_a_child):
    def leave() -> None:
        (take_lease(run).work / ".step-00000003.partial").mkdir()

    kill(in_a_child(leave))
    lease = take_lease(run)
    assert [path.name for path in lease.work.iterdir()] == ["alive"]
    lease.release()


def test_a_vanished_disk_is_not_taken_for_a_successor(run):
    lease = take_lease(run)
    os.rename(run / "lease", run / "elsewhere")
    with pytest.raises(LigatureError) as error:
        lease.check()
    assert not isinstance(error.value, Superseded)
    os.rename(run / "elsewhere", run / "lease")
    lease.check()
    lease.release()


def test_a_lease_that_names_nobody_is_refused_in_one_line(run):
    (run / "lease" / "what").mkdir(parents=True)
    with pytest.raises(LigatureError, match="`what` in a run's lease/ names no process"):
        take_lease(run)
