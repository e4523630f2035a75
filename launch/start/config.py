"""Where and how a job runs on a SLURM cluster: what a site's file (`configs/launch/`) and the command line say. Imports nothing heavy."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from runtime.errors import RecipeError

TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")


@dataclass
class ContainerConfig:
    """The image that the ranks run in; the batch script itself runs outside, where `scontrol` is."""

    kind: Literal["none", "pyxis", "apptainer"] = "none"
    image: str = ""
    """A squashfs file or registry address (pyxis), a .sif file or folder (apptainer)."""
    mounts: list[str] = field(default_factory=list)
    """`outside:inside`, beside the run's folder and the working folder, which are mounted under their own names."""
    options: list[str] = field(default_factory=list)
    """Further options of srun (pyxis) or of `apptainer exec`."""

    def __post_init__(self) -> None:
        if (self.kind != "none") != bool(self.image):
            raise RecipeError(
                f"container.kind is {self.kind!r} and container.image {self.image!r}; give both, or neither"
            )


@dataclass
class SlurmConfig:
    """A job: how large, how long, where. A site's file holds what all jobs of a cluster share; the command line adds to it."""

    nodes: int = 1
    gpus_per_node: int = 1
    """GPUs, and so ranks, of each node; 0 for a job on CPUs."""
    tasks_per_node: int | None = None
    """Ranks of each node of a job on CPUs; none: 1. With GPUs there is one a GPU."""
    cpus_per_task: int | None = None
    """Cores of each rank. With GPUs one trains and the others become loader workers; none: as many as the recipe's workers need."""
    memory: str | None = None
    """Of each node (`500G`; `0` is all of it)."""
    time: str | int = "24:00:00"
    """Limit of one start, as SLURM writes it (`days-hours:minutes:seconds`); a run goes on in the next start."""
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    """Features that nodes must have."""
    gpu_type: str | None = None
    """Where a cluster has several kinds: `a100`."""
    launcher: Literal["srun", "torchrun"] = "srun"
    """`srun` starts one task a GPU; `torchrun` one task a node, which starts that node's ranks."""
    modules: list[str] = field(default_factory=list)
    """Environment modules to load."""
    conda: str | None = None
    """Conda environment to activate: a name or a folder."""
    venv: str | None = None
    """Virtual environment to activate: a folder. Without conda, venv and container the Python that launched is used."""
    container: ContainerConfig = field(default_factory=ContainerConfig)
    network_interface: str | None = None
    """What NCCL and gloo talk over (`ib0`); none: they choose."""
    node_disk: str | None = None
    """A folder on each node's own disk, variables allowed (`$TMPDIR`): shards are staged there as they are read, also from disks that are mounted."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables to export."""
    setup: list[str] = field(default_factory=list)
    """Shell lines to run once on the first node before the ranks start."""
    sbatch: list[str] = field(default_factory=list)
    """Further options of sbatch, one a line: `--exclusive`, `--mail-type=FAIL`."""
    stop_before: int = 120
    """Seconds before the time limit at which a run is asked to stop; it must finish a step and write a checkpoint in them."""
    max_crashes: int = 3
    """A job that crashes is requeued so many times, and held when it crashes once more. Time limits, preemption and lost nodes do not count."""

    def __post_init__(self) -> None:
        for name, least in (
            ("nodes", 1),
            ("gpus_per_node", 0),
            ("tasks_per_node", 1),
            ("cpus_per_task", 1),
            ("stop_before", 10),
            ("max_crashes", 0),
        ):
            if (value := getattr(self, name)) is not None and value < least:
                raise RecipeError(f"{name} is {value}; it must be {least} or more")
        if self.gpus_per_node and self.tasks_per_node not in (None, self.gpus_per_node):
            raise RecipeError(
                f"tasks_per_node is {self.tasks_per_node} with gpus_per_node {self.gpus_per_node}; there is one rank a GPU: "
                "leave tasks_per_node out, or set gpus_per_node to 0 for a job on CPUs"
            )
        if isinstance(self.time, int):
            raise RecipeError(
                f'time is {self.time}, a number to YAML; write it in quotes as SLURM does: time: "24:00:00"'
            )
        if self.conda and self.venv:
            raise RecipeError(f"conda ({self.conda}) and venv ({self.venv}) are both set; a job activates one of them")
        if (self.conda or self.venv) and self.container.kind != "none":
            raise RecipeError("container.image brings its own Python; leave conda and venv out")
        if self.seconds <= self.stop_before + 30:
            raise RecipeError(
                f"time {self.time} leaves nothing before stop_before {self.stop_before} s; give the job more time"
            )
        for line in self.sbatch:
            if not line.startswith("-"):
                raise RecipeError(f"sbatch has the line {line!r}; its lines are options, as in `--exclusive`")

    @property
    def ranks_per_node(self) -> int:
        return self.gpus_per_node or self.tasks_per_node or 1

    @property
    def world(self) -> int:
        return self.nodes * self.ranks_per_node

    @property
    def seconds(self) -> int:
        """The time limit; SLURM reads `minutes`, `minutes:seconds`, `hours:minutes:seconds`, `days-hours[:minutes[:seconds]]`."""
        found = TIME.fullmatch(str(self.time))
        if not found:
            raise RecipeError(
                f"time is {self.time!r}; write it as SLURM does: 24:00:00, 90 (minutes) or 2-12 (days-hours)"
            )
        days, first, second, third = (int(part) if part else None for part in found.groups())
        assert first is not None
        if days is not None or third is not None:
            return (days or 0) * 86400 + first * 3600 + (second or 0) * 60 + (third or 0)
        return first * 60 + (second or 0)


@dataclass
class LaunchOptions(SlurmConfig):
    """Submit a stage to SLURM: `ligature launch slurm STAGE [the stage's own options] [these]`; a site's file by --site."""

    array: str | None = None
    """A job array: a file with one task's further options a line (ablations), or, for `shard`, a number of slices."""
    dry_run: bool = False
    """Print the batch script; write and submit nothing."""
    resume_with_changes: bool = False
    """Go on with a run's folder although the recipe has changed; the changes are shown."""
