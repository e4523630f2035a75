"""A simulated run of up to 1,024 ranks through 50 node failures: the shipped order, cursor, lease and checkpoint classes, no tensors.

What is simulated is what ranks do with them. What is real: every position that a rank reads, every cursor, every file, every lease
that is taken over, and every process that is killed while it saves (a child that ends by `os._exit` at one of its file operations).
"""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

import numpy as np
import pytest

from data_tools.shards.manifest import Manifest, Shard
from data_tools.stream.shard_stream import ShardStream
from pretrain.config import divide_batch
from runtime.checkpoint import CheckpointFolder, write_checkpoint
from runtime.errors import Superseded
from runtime.files import read_json
from runtime.lease import Lease, take_lease

GLOBAL_BATCH = 15_360
WORLDS = (1024, 960, 768, 512, 480)
"""128 nodes of 8 and what is left of them; each divides the global batch."""
SHARDS, SHARD_SAMPLES = 121, 9_973
FAILURES, STEPS, SAVE_EVERY = 50, 240, 4
CALLS = ("rename", "replace", "fsync", "mkdir")


def manifest(folder: Path) -> Manifest:
    shards = [
        Shard(
            f"shard-{n:05}.tar",
            SHARD_SAMPLES - n % 7,
            5 * SHARD_SAMPLES,
            10**9,
            f"{n:064x}",
            f"shard-{n:05}.parquet",
            "",
        )
        for n in range(SHARDS)
    ]
    return Manifest(folder, tuple(shards))


class Job:
    """One start of the run, on some number of ranks."""

    def __init__(self, run: Path, world: int, restart: int) -> None:
        os.environ |= {"SLURM_JOB_ID": "4711", "SLURM_RESTART_COUNT": str(restart)}
        self.world, self.run = world, run
        micro_batch, accumulation = divide_batch(GLOBAL_BATCH, 64, world)
        self.local = micro_batch * accumulation
        self.lease: Lease = take_lease(run)
        self.checkpoints = CheckpointFolder(run / "checkpoints", keep_last=2)
        self.checkpoints.lease = self.lease
        # Every rank has such a stream; they differ in the rank alone, and rank 0's state is what is saved.
        self.stream = ShardStream(manifest(run / "data"), self.local, 0, world, seed=5)
        self.step = 0
        if (newest := self.checkpoints.newest_valid()) is not None:
            state = read_json(newest / "state.json")
            self.step = state["step"]
            self.stream.load_state_dict(state["stream"])

    def take_step(self, chance: random.Random) -> np.ndarray:
        """The samples of a global batch, in rank order; some ranks are asked one by one as well."""
        walk, start = self.stream.examples.walk, self.stream.consumed
        samples = walk.at(np.arange(start, start + GLOBAL_BATCH))[0].reshape(self.world, self.local)
        for rank in chance.sample(range(self.world), 2):
            first = start + rank * self.local
            assert (walk.at(np.arange(first, first + self.local))[0] == samples[rank]).all()
        self.stream.consumed += GLOBAL_BATCH
        self.step += 1
        return samples.ravel()

    def save(self) -> None:
        state = {"step": self.step, "world": self.world, "stream": self.stream.state_dict()}
        self.checkpoints.commit(
            self.step,
            False,
            lambda path, staging: write_checkpoint(path, {}, {"state": state}, lambda _: None, staging),
        )

    def save_and_be_killed(self, at: int) -> None:
        """Save in a child that is gone, without a word, at its `at`-th file operation."""
        child = os.fork()
        if child == 0:
            left = [at]
            for name in CALLS:
                setattr(os, name, _counted(getattr(os, name), left))
            try:
                self.save()
            finally:
                os._exit(0)
        os.waitpid(child, 0)

    def die(self) -> None:
        """The process ends; its lease stays as it is."""
        self.lease._stopping.set()
        self.lease._thread.join()


def _counted(call, left):
    def counted(*arguments, **named):
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*arguments, **named)

    return counted


@pytest.fixture
def slurm(monkeypatch):
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.setenv(name, "0")


def test_every_sample_is_seen_once_through_fifty_failures_and_changes_of_the_world(tmp_path, slurm):
    chance, run = random.Random(3), tmp_path / "run"
    moments = sorted(chance.sample(range(1, STEPS), FAILURES), reverse=True)
    """Steps at which a node fails for the first time; a run goes back a little each time, so they are met in order."""
    lineage: dict[int, np.ndarray] = {}
    worlds, failures, in_save, fenced, replayed, restart = set(), 0, 0, 0, 0, 0
    job = Job(run, WORLDS[0], restart)
    while job.step < STEPS:
        worlds.add(job.world)
        samples = job.take_step(chance)
        if job.step in lineage:  # taken before, by another number of ranks, and lost: it must be the same batch
            replayed += 1
            assert (lineage[job.step] == samples).all(), job.step
        lineage[job.step] = samples
        fails = bool(moments) and job.step == moments[-1]
        due = job.step % SAVE_EVERY == 0 or job.step == STEPS
        if fails:
            moments.pop()
            failures += 1
            former = job
            if due or chance.random() < 0.5:
                in_save += 1
                former.save_and_be_killed(chance.randrange(12))
            thought_dead = chance.random() < 0.3
            if not thought_dead:
                former.die()
            restart += 1
            job = Job(run, chance.choice([world for world in WORLDS if world != former.world]), restart)
            if thought_dead:  # it lives on, and comes to save what its successor must not get
                fenced += 1
                before = job.checkpoints.steps()
                with pytest.raises(Superseded):
                    former.save()
                assert job.checkpoints.steps() == before
                former.die()
        elif due:
            job.save()
    job.lease.release()
    assert (failures, len(worlds)) == (FAILURES, len(WORLDS)) and in_save > 10 and fenced > 5 and replayed > 20
    total = len(job.stream)
    seen = np.concatenate([lineage[step] for step in range(1, STEPS + 1)])
    assert len(seen) == STEPS * GLOBAL_BATCH > 3 * total
    for epoch in range(len(seen) // total):
        counts = np.bincount(seen[epoch * total : (epoch + 1) * total], minlength=total)
        assert (counts == 1).all(), f"epoch {epoch}: {np.sum(counts != 1)} samples were not seen once"
    rest = seen[len(seen) // total * total :]
    assert len(np.unique(rest)) == len(rest)
    print(
        f"{FAILURES} node failures ({in_save} in a save, {fenced} thought dead wrongly), worlds {sorted(worlds)}, {STEPS} steps of "
        f"{GLOBAL_BATCH:,}: {replayed} steps replayed, {len(seen):,} samples seen, none twice in an epoch, none lost"
    )
