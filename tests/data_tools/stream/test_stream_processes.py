"""Loader workers leave no memory behind over epochs, nor shared memory after kill -9."""

from __future__ import annotations

import ctypes
import gc
import json
import multiprocessing
import os
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from rank_processes import start_ranks
from tiny_shards import make

from data_tools import ShardStream
from data_tools.stream.training_set import TrainingSet

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")
fork = multiprocessing.get_context("fork")
EPOCHS = 50
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def private_bytes(process: int | str) -> int:
    """Memory that is this process's alone: what a leak would add to."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Private_Dirty"))


def pixels(image, seed: int) -> torch.Tensor:
    return torch.zeros(2, 3, 64, 64, dtype=torch.uint8)


def measure(folder: Path, workers: int, output: Path) -> None:
    """Write down the private memory of this process and its workers, once an epoch. In a lean process: a fork of the test's own
    copies page after page of what the test holds, wherever it counts references."""
    # Freed blocks go back at once instead of lying in the heap; the workers inherit it.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 14), ctypes.CDLL(None).mallopt(M_TRIM_THRESHOLD, 1 << 16)
    gc.freeze()  # else the workers' collector writes to every page they share with this process, and so copies it
    data = TrainingSet(str(folder))
    stream, sizes = ShardStream(data, 20, workers=workers, transform=pixels), []
    for batch in stream:
        if batch["positions"][-1] % 60 == 59:
            children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
            sizes.append([private_bytes(process) for process in ("self", *children)])
        if len(sizes) == EPOCHS:
            break
    output.write_text(json.dumps(sizes))


@pytest.mark.parametrize("workers", [0, 2])
def test_fifty_epochs_cost_no_memory(tmp_path, workers):
    shards, output = make(tmp_path / "shards", "m", 60, 20), tmp_path / "told.json"
    codes, logs = start_ranks(tmp_path / "ranks", 1, measure, shards, workers, output).wait()
    assert codes == [0], logs
    sizes = torch.tensor(json.loads(output.read_text()), dtype=torch.float64)
    assert sizes.shape == (EPOCHS, 1 + workers)
    # The first epochs fill caches. After them 60 samples an epoch, of 24 kB each, would show at once if they stayed.
    growth = (sizes[-10:].median(0).values - sizes[5:15].median(0).values) / (EPOCHS - 15)
    assert (growth < 20_000).all(), f"bytes an epoch: {growth.tolist()}"


def read_for_ever(folder: Path, sent) -> None:
    for number, _ in enumerate(ShardStream(str(folder), 20, workers=2, transform=pixels)):
        if number == 5:
            children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
            sent.put([int(process) for process in children])


def test_no_batch_is_left_in_shared_memory_after_kill_9(tmp_path):
    folder, results = make(tmp_path / "shards", "m", 40, 20), fork.SimpleQueue()
    victim = fork.Process(target=read_for_ever, args=(folder, results))
    victim.start()
    workers = results.get()
    assert len(workers) == 2
    for process in (*workers[:1], victim.pid):
        os.kill(process, signal.SIGKILL)
    victim.join()
    names = [str(process) for process in (victim.pid, *workers)]
    # torch unlinks a buffer as soon as it has made it: one that was just being made may stay, of each that was killed; none that was
    # on its way (two batches a worker, several tensors each).
    left = [name for name in os.listdir("/dev/shm") if any(number in name for number in names)]
    for name in left:
        os.unlink(f"/dev/shm/{name}")
    assert len(left) <= 2
    for process in workers[1:]:
        os.kill(process, signal.SIGKILL)  # it would notice within seconds


def test_workers_leave_signals_to_the_training_process(tmp_path):
    """A launcher or SLURM signals every process of a job; a worker that ended of it would be an error of the run."""
    folder = make(tmp_path / "shards", "m", 40, 20)
    undisturbed, batches = iter(ShardStream(folder, 8)), iter(ShardStream(folder, 8, workers=2))
    assert next(batches)["keys"] == next(undisturbed)["keys"]
    workers = multiprocessing.active_children()
    for name in ("TERM", "INT", "USR1"):
        subprocess.run(["kill", f"-{name}", *(str(worker.pid) for worker in workers)], check=True)
        for _ in range(6):  # more than were on their way
            assert next(batches)["keys"] == next(undisturbed)["keys"]
    batches.close()
    assert len(workers) == 2 and [worker.exitcode for worker in workers] == [0, 0]


def leave_a_loader_behind(folder: Path, sent) -> None:
    """The stream stays reachable, as in a traceback: at the exit, Python sends the workers SIGTERM and waits for them."""
    leave_a_loader_behind.kept = iter(ShardStream(folder, 8, workers=2))
    next(leave_a_loader_behind.kept)
    sent.put([worker.pid for worker in multiprocessing.active_children()])


@pytest.mark.parametrize("life", [leave_a_loader_behind, read_for_ever])
def test_workers_end_when_the_training_process_stops_them_or_dies(tmp_path, life):
    folder, results = make(tmp_path / "shards", "m", 40, 20), fork.SimpleQueue()
    victim = fork.Process(target=life, args=(folder, results))
    victim.start()
    workers = results.get()
    if life is read_for_ever:
        victim.kill()
        os.waitid(os.P_PID, victim.pid, os.WEXITED | os.WNOWAIT)
        for worker in workers:
            with suppress(ProcessLookupError):
                os.kill(worker, signal.SIGTERM)
    victim.join(60)  # and for its workers, which hold the same pipe
    assert victim.exitcode == (-signal.SIGKILL if life is read_for_ever else 0)
