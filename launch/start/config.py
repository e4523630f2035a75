"""The options of a SLURM job, as a site's file (`configs/launch/`) and the command line state them. Nothing here imports torch.

To add an option: a field of `SlurmConfig` with its docstring, which becomes its help, and the place in
`launch/start/script.py` that renders it (`_head` for options of sbatch).

Tested in tests/launch/start/test_launch_slurm.py.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from runtime.errors import RecipeError

TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")
"""A time limit as SLURM writes it: an optional number of days, then one to three numbers."""


@dataclass
class ContainerConfig:
    """The container that the ranks run in. The batch script itself runs outside, where `scontrol` is."""

    kind: Literal["none", "pyxis", "apptainer"] = "none"
    """What runs the container: srun's plugin pyxis, or `apptainer exec`. `none`: no container."""
    image: str = ""
    """pyxis: a squashfs file or a registry address. apptainer: a .sif file or a folder."""
    mounts: list[str] = field(default_factory=list)
    """Folders to mount, as `outside:inside`. The run's folder and the working folder are always mounted, under their own names."""
    options: list[str] = field(default_factory=list)
    """More options of srun (pyxis) or of `apptainer exec`."""

    def __post_init__(self) -> None:
        if (self.kind != "none") != bool(self.image):
            raise RecipeError(
                f"container.kind is {self.kind!r} and container.image {self.image!r}; give both, or neither"
            )


@dataclass
class SlurmConfig:
    """The size, time limit and environment of a job. A site's file holds what all jobs of a cluster share."""

    nodes: int = 1
    """Number of nodes."""
    gpus_per_node: int = 1
    """GPUs of each node, with one rank each. 0: a job on CPUs."""
    tasks_per_node: int | None = None
    """Ranks of each node of a job on CPUs (default 1). Leave it out with GPUs: there is one rank a GPU."""
    cpus_per_task: int | None = None
    """Cores of each rank (default: one more than the recipe's loader workers). With GPUs one core trains and the others load."""
    memory: str | None = None
    """Memory of each node, as in `500G`; `0` is all of it."""
    time: str | int = "24:00:00"
    """Time limit of one start, as SLURM writes it: `days-hours:minutes:seconds`. A longer run resumes in the next start."""
    partition: str | None = None
    """Partition to submit to; several names separated by commas."""
    account: str | None = None
    """Account to charge."""
    qos: str | None = None
    """Quality of service."""
    constraint: str | None = None
    """Features that nodes must have."""
    gpu_type: str | None = None
    """Kind of GPU, on a cluster with several kinds: `a100`."""
    launcher: Literal["srun", "torchrun"] = "srun"
    """`srun` starts one task a rank. `torchrun` starts one task a node, which starts that node's ranks."""
    modules: list[str] = field(default_factory=list)
    """Environment modules to load."""
    conda: str | None = None
    """Conda environment to activate, by name or folder."""
    venv: str | None = None
    """Folder of a virtual environment to activate. Without conda, venv or container, the launching Python runs the job."""
    container: ContainerConfig = field(default_factory=ContainerConfig)
    """The container that the ranks run in."""
    network_interface: str | None = None
    """Network interface for NCCL and gloo, as in `ib0` (default: they choose)."""
    node_disk: str | None = None
    """Folder on each node's own disk, which may name variables (`$TMPDIR`). Shards are copied there as they are read, from mounted disks too."""
    environment: dict[str, str] = field(default_factory=dict)
    """Environment variables to export."""
    setup: list[str] = field(default_factory=list)
    """Shell lines that run once, on the first node, before the ranks start."""
    sbatch: list[str] = field(default_factory=list)
    """More options of sbatch, one a line: `--exclusive`, `--mail-type=FAIL`."""
    stop_before: int = 120
    """Seconds before the time limit at which a run is asked to stop. It must finish a step and write a checkpoint in this time."""
    max_crashes: int = 3
    """Crashes after which a job is requeued; it is held at the next one. Time limits, preemption and lost nodes are not crashes."""

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
        # YAML reads an unquoted 24:00:00 as a number to the base 60.
        # The field's type admits it, so that this message can explain it.
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
                f"time {self.time} leaves nothing before stop_before ({self.stop_before} s); give the job more time"
            )
        for line in self.sbatch:
            if not line.startswith("-"):
                raise RecipeError(f"sbatch has the line {line!r}; its lines are options, as in `--exclusive`")

    @property
    def ranks_per_node(self) -> int:
        """Ranks of each node."""
        return self.gpus_per_node or self.tasks_per_node or 1

    @property
    def world(self) -> int:
        """World size."""
        return self.nodes * self.ranks_per_node

    @property
    def seconds(self) -> int:
        """The time limit in seconds.

        SLURM reads `minutes`, `minutes:seconds`, `hours:minutes:seconds` and `days-hours[:minutes[:seconds]]`.
        """
        match = TIME.fullmatch(str(self.time))
        if not match:
            raise RecipeError(
                f"time is {self.time!r}; write it as SLURM does: 24:00:00, 90 (minutes) or 2-12 (days-hours)"
            )
        days, first, second, third = (int(part) if part else None for part in match.groups())
        assert first is not None  # the pattern has at least this number
        if days is not None or third is not None:
            return (days or 0) * 86400 + first * 3600 + (second or 0) * 60 + (third or 0)
        return first * 60 + (second or 0)


@dataclass
class LaunchOptions(SlurmConfig):
    """Options of `ligature launch slurm`: a job's, and those of this one launch."""

    array: str | None = None
    """Submit a job array. The value is a file with one task's further options a line or, for `shard`, a number of slices."""
    dry_run: bool = False
    """Print the batch script, but write and submit nothing."""
    resume_with_changes: bool = False
    """Resume a run although its recipe has changed; the changes are printed."""
