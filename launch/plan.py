"""How much memory, time and traffic a pretraining run takes on a cluster. Formulas are in `pretrain/budget.py`; no torch is needed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from data_tools.shards.manifest import read_manifest
from pretrain.budget import Budget
from pretrain.config import PretrainRecipe


@dataclass
class Cluster:
    """What the plan assumes of the machines. Every number but the first two is an option with a default."""

    nodes: int
    gpus_per_node: int
    gpu_memory: float
    """GB (10^9 bytes)."""
    peak_tflops: float
    utilisation: float
    """Share of the peak that a step's arithmetic reaches."""
    gpu_gbps: float
    """Gigabits a second that a GPU sends within its node."""
    network_gbps: float
    """Gigabits a second that a GPU sends to other nodes."""
    overlap: float
    """Share of the traffic that hides behind arithmetic."""
    disk_gb: float
    """GB a second that one process writes to the run's disk."""

    @property
    def world(self) -> int:
        """World size: one rank a GPU."""
        return self.nodes * self.gpus_per_node

    @property
    def bytes_per_second(self) -> float:
        """Bytes a second that a GPU sends. With several nodes the network between them, the slower part, decides."""
        return (self.network_gbps if self.nodes > 1 else self.gpu_gbps) / 8 * 1e9


@dataclass
class Pace:
    """How fast a run is on a cluster, by the plan."""

    compute: float
    """Seconds of arithmetic a step."""
    traffic: float
    """Seconds of communication a step, before overlap."""
    samples_per_second: float

    @classmethod
    def of(cls, budget: Budget, stage: int, cluster: Cluster) -> Pace:
        """Return the pace of a run under a ZeRO stage."""
        batch = budget.recipe.training.global_batch
        compute = budget.flops_per_sample * batch / cluster.world / (cluster.peak_tflops * 1e12 * cluster.utilisation)
        traffic = sum(budget.traffic(stage, cluster.world).values()) / cluster.bytes_per_second
        # Traffic hides behind arithmetic for at most as long as the arithmetic takes.
        hidden = min(cluster.overlap * traffic, compute)
        return cls(compute, traffic, batch / (compute + traffic - hidden))


def count_samples(recipe: PretrainRecipe) -> int | None:
    """Return the samples of the recipe's shards before any selection, or None if a shard folder is not on this machine."""
    train = recipe.data.train
    folders = [Path(folder) for folder in ([train] if isinstance(train, str) else train) if folder]
    if not folders or not all((folder / "manifest.json").is_file() for folder in folders):
        return None
    return sum(read_manifest(folder, check=False).samples for folder in folders)
