"""Checks of a node, or of a job's nodes: versions, GPUs, memory limits, disk, data, network, clocks. They take seconds."""

from __future__ import annotations

import os
import platform
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.errors import DataError, LigatureError
from runtime.ranks import Ranks
from runtime.run_folder import PACKAGES

MIB, GIB = 1 << 20, 1 << 30
WRITTEN = 64 * MIB
"""Bytes that the check of the disk writes."""
PATIENCE = 60
"""Seconds that the ranks have to meet and to reduce."""


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    level: str
    """ok, warn or FAIL; a FAIL would stop a run."""
    name: str
    """Name of the check."""
    text: str
    """What the check measured and, unless the level is ok, what to do."""


@dataclass(frozen=True)
class Checks:
    """What a run will need of the nodes."""

    runs: Path
    """Folder that runs will write to."""
    data: list[Path]
    """Shard folders that will be read."""
    device: str
    """auto, cpu or cuda."""


def examine(options: Checks, ranks: Ranks) -> list[tuple[str, Finding]]:
    """Check this node, then the ranks together. All ranks call this at once.

    Returns:
        (host, finding) pairs of all nodes if the ranks can meet, else of this node alone. The first rank of a node
        checks the node; every rank checks its own GPU.
    """
    # Imported here, as in all of this file: `ligature doctor --help` must not wait for torch.
    import torch

    gpu = options.device != "cpu" and torch.cuda.is_available()
    findings = check_gpu(options.device, ranks)
    if ranks.local_rank == 0:
        findings = [
            check_versions(),
            *check_machine(),
            *check_disk(options.runs),
            *(check_data(folder) for folder in options.data),
            *findings,
        ]
    # SLURM's name of a node may differ from its host name, and is the one that SLURM's commands take.
    host = os.environ.get("SLURMD_NODENAME", platform.node())
    mine = [(host, finding) for finding in findings]
    try:
        findings_of_all, clocks = meet(mine, ranks, gpu)
    except (RuntimeError, ValueError) as error:
        fix = (
            "the ranks must reach MASTER_ADDR at MASTER_PORT (a firewall?) and each other: name the interface with a route "
            "between the nodes in network_interface (NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME)"
        )
        return [*mine, (host, Finding("FAIL", "all-reduce", f"{_first_line(error)}; {fix}"))]
    findings_of_all.append((host, check_clocks(clocks)))
    if len({finding.text for _, finding in findings_of_all if finding.name == "versions"}) > 1:
        findings_of_all.append(
            (host, Finding("FAIL", "nodes", "versions differ between nodes; give all of them one environment"))
        )
    return findings_of_all


def meet(mine: list[tuple[str, Finding]], ranks: Ranks, gpu: bool) -> tuple[list[tuple[str, Finding]], list[float]]:
    """Join all ranks, time an all-reduce, and gather the findings.

    Args:
        mine: (host, finding) pairs of this rank.
        ranks: This process's rank.
        gpu: Whether to use NCCL on GPUs; else gloo on CPUs.

    Returns:
        The pairs of all ranks, and each rank's clock right after a barrier (seconds since the epoch).
    """
    from datetime import timedelta

    import torch
    from torch import distributed

    device = torch.device("cuda", ranks.local_rank % torch.cuda.device_count()) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    backend = "nccl" if gpu else "gloo"
    limit = timedelta(seconds=PATIENCE)
    # By default torch waits ten minutes or more for a missing rank; a check has to answer within one.
    distributed.init_process_group(backend, rank=ranks.rank, world_size=ranks.world, timeout=limit)
    try:
        block = torch.full((16 * MIB // 4,), float(ranks.rank + 1), device=device)
        distributed.all_reduce(block)  # the first one also makes the connections
        correct = bool((block == ranks.world * (ranks.world + 1) / 2).all())
        distributed.barrier()
        clock, began = time.time(), time.monotonic()
        distributed.all_reduce(block)
        # NCCL returns before the GPU has finished.
        if gpu:
            torch.cuda.synchronize()
        seconds = time.monotonic() - began
        gathered: list[Any] = [None] * ranks.world
        distributed.all_gather_object(gathered, (mine, clock, correct))
    finally:
        distributed.destroy_process_group()
    rate = 16 / 1024 / seconds
    group = f"{backend} over {ranks.world} ranks"
    wrong = [rank for rank, (_, _, correct) in enumerate(gathered) if not correct]
    finding = (
        Finding(
            "FAIL",
            "all-reduce",
            f"{group}: wrong sums on ranks {wrong}; a GPU or a link is broken, leave that node out",
        )
        if wrong
        else Finding("ok", "all-reduce", f"{group}, {rate:.2g} GiB/s for 16 MiB")
    )
    host = mine[0][0] if mine else platform.node()
    findings = [pair for pairs, _, _ in gathered for pair in pairs]
    findings += [(host, finding), (host, Finding("ok", "together", _format_ranks(ranks)))]
    return findings, [clock for _, clock, _ in gathered]


def _format_ranks(ranks: Ranks) -> str:
    job = os.environ.get("SLURM_JOB_ID")
    cores = len(os.sched_getaffinity(0))
    requested = os.environ.get("SLURM_CPUS_PER_TASK")
    return (
        f"{ranks.world} ranks, {ranks.local_world} a node, {cores} cores each"
        + (f" ({requested} requested)" if requested else "")
        + (f", job {job}" if job else "")
    )


def check_versions() -> Finding:
    """Check that the installed packages fit together: every requirement that one of ours states of another is met."""
    from importlib.metadata import PackageNotFoundError, requires, version

    from packaging.requirements import Requirement

    problems = []
    for package in PACKAGES:
        try:
            requirements = [Requirement(line) for line in requires(package) or ()]
        except PackageNotFoundError:
            problems.append(f"{package} is not installed")
            continue
        for need in requirements:
            # Requirements of optional extras do not count.
            if need.marker and not need.marker.evaluate({"extra": ""}):
                continue
            try:
                if not need.specifier.contains(version(need.name), prereleases=True):
                    problems.append(
                        f"{package} {version(package)} needs {need.name}{need.specifier}, not {version(need.name)}"
                    )
            except PackageNotFoundError:
                problems.append(f"{package} needs {need.name}, which is not installed")
    if problems:
        return Finding(
            "FAIL", "versions", "; ".join(problems) + "; run `pip install --upgrade .` in Ligature's checkout"
        )
    import torch

    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    text = f"Python {platform.python_version()}, torch {torch.__version__} ({cuda}), deepspeed {version('deepspeed')}"
    return Finding("ok", "versions", text)


def gpus_here() -> int:
    """Return the number of GPUs that torch sees on this machine."""
    import torch

    return torch.cuda.device_count()


def check_gpu(device: str, ranks: Ranks) -> list[Finding]:
    """Check that this rank's GPU is there, is free, and multiplies small matrices correctly."""
    import torch

    if device == "cpu":
        return []
    if not torch.cuda.is_available():
        # Having no GPU is fine on a machine without any. With a driver or a job's GPUs, torch must see them.
        if device == "cuda" or shutil.which("nvidia-smi") or os.environ.get("SLURM_GPUS_ON_NODE", "0") != "0":
            built = torch.version.cuda or "no CUDA at all"
            fix = f"torch is built for {built}; compare it with the driver (`nvidia-smi`) and request GPUs for the job (gpus_per_node)"
            return [Finding("FAIL", "gpu", f"torch sees none; {fix}")]
        return [Finding("ok", "gpu", "none here; runs on CPUs")] if ranks.local_rank == 0 else []
    index = ranks.local_rank % torch.cuda.device_count()
    if ranks.local_world > torch.cuda.device_count():
        text = f"{ranks.local_world} ranks on this node but {torch.cuda.device_count()} GPUs visible; request one a rank (gpus_per_node)"
        return [Finding("FAIL", "gpu", text)]
    free, total = torch.cuda.mem_get_info(index)
    name = f"{index}: {torch.cuda.get_device_name(index)}, {free / GIB:.0f} of {total / GIB:.0f} GiB free"
    # Every entry of the product is 1024, which bfloat16 holds exactly.
    square = torch.ones(1024, 1024, dtype=torch.bfloat16, device=f"cuda:{index}")
    if not bool((square @ square == 1024).all()):
        return [Finding("FAIL", "gpu", f"{name}; a matrix product is wrong; leave this node out and tell its owners")]
    if free < 0.9 * total:
        return [Finding("warn", "gpu", f"{name}; another process holds the rest (`nvidia-smi` names it)")]
    return [Finding("ok", "gpu", name)]


def check_machine() -> list[Finding]:
    """Check the limits that loader workers run into: shared memory and open files."""
    import resource

    findings = []
    if Path("/dev/shm").is_dir():
        shared = shutil.disk_usage("/dev/shm")
        low = shared.free < GIB
        fix = (
            "; loader workers pass batches through it, so give the container more (--shm-size, --ipc=host)"
            if low
            else ""
        )
        findings.append(Finding("warn" if low else "ok", "shm", f"{shared.free / GIB:.1f} GiB free in /dev/shm{fix}"))
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    # -1 means no limit.
    if 0 <= files < 4096:
        findings.append(
            Finding("warn", "files", f"a process may open {files} files; put `ulimit -n {min(65536, most)}` into setup")
        )
    return findings


def check_disk(runs: Path) -> list[Finding]:
    """Check the space, write speed and clock of the disk that runs are written to."""
    import errno

    folder = runs.absolute()
    # The folder may not exist yet, and a check creates none.
    while not folder.exists():
        folder = folder.parent
    usage = shutil.disk_usage(folder)
    space = f"{usage.free / GIB:.0f} GiB free in {folder}"
    if usage.free < 4 * GIB:
        return [
            Finding(
                "FAIL",
                "disk",
                f"{space}; a checkpoint and its successor need 4 GiB or more; free some space, or choose another --runs",
            )
        ]
    # All nodes of a job write to this folder at the same time.
    probe = folder / f".doctor-{platform.node()}-{os.getpid()}"
    try:
        block, began = os.urandom(MIB), time.monotonic()
        with open(probe, "wb") as file:
            for _ in range(WRITTEN // MIB):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            now = time.time()
            # A file server stamps the file with its own clock.
            difference = os.fstat(file.fileno()).st_mtime - now
        speed = WRITTEN / MIB / (time.monotonic() - began)
    except OSError as error:
        fix = "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "choose another --runs"
        return [Finding("FAIL", "disk", f"cannot write to {folder} ({error.strerror}); {fix}")]
    finally:
        probe.unlink(missing_ok=True)
    slow = speed < 50
    fix = "; checkpoints will delay the run, so choose a faster disk for --runs" if slow else ""
    findings = [Finding("warn" if slow else "ok", "disk", f"{space}, {speed:.0f} MiB/s written and synced{fix}")]
    if abs(difference) > 5:
        text = f"the file server's clock is {difference:+.0f} s from this node's; set both by NTP"
        findings.append(Finding("warn", "clock", text))
    return findings


def check_data(folder: Path) -> Finding:
    """Check that every shard of the manifest is there with its size, and that this node can read the first and last."""
    from data_tools.shards.manifest import read_manifest

    try:
        manifest = read_manifest(folder)
        began = time.monotonic()
        for shard in {manifest.shards[0].name, manifest.shards[-1].name}:
            with open(folder / shard, "rb") as file:
                file.read(4 * MIB)
    except (DataError, LigatureError) as error:
        return Finding("FAIL", "data", str(error))
    except OSError as error:
        return Finding(
            "FAIL", "data", f"cannot read {error.filename}: {error.strerror}; is {folder} mounted on this node?"
        )
    seconds = time.monotonic() - began
    return Finding(
        "ok",
        "data",
        f"{folder}: {manifest.samples:,} samples in {len(manifest.shards):,} shards, opened in {seconds:.2f} s",
    )


def check_clocks(clocks: list[float]) -> Finding:
    """Check that the ranks' clocks agree.

    Args:
        clocks: Each rank's time, read at one moment (seconds since the epoch).
    """
    skew = max(clocks) - min(clocks)
    if skew > 2:
        slowest = clocks.index(min(clocks))
        text = f"clocks are up to {skew:.1f} s apart (rank {slowest} is the furthest behind); set them by NTP, as logs and caches rely on them"
        return Finding("warn", "clocks", text)
    return Finding("ok", "clocks", f"within {max(skew, 0.001):.3f} s of each other")


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
