"""Which process of a run this is, and the few collectives that the stages share.

A rank is one process of a run, numbered from 0. The world size is their number. A collective is a call that returns only
when every rank has made it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from runtime.errors import LigatureError, RankLost, RecipeError
from runtime.host_memory import keep_freed_memory

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process: rank `rank` of `world` ranks, and `local_rank` of `local_world` on its node."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which alone writes files and prints to the terminal."""
        return self.rank == 0


def ranks_from_environment() -> Ranks:
    """Return the ranks by torchrun's variables, else by SLURM's (one task per device), else a world of one."""
    for names in (
        ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
        ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", None),
    ):
        # Any command in a SLURM allocation has SLURM's variables. A launched run has MASTER_ADDR beside them.
        if all(name in os.environ for name in names[:2]) and (names[0] == "RANK" or "MASTER_ADDR" in os.environ):
            # "0101" holds the defaults: rank 0 of 1, and local rank 0 of 1.
            rank, world, local, local_world = (
                int(os.environ.get(name or "", default)) for name, default in zip(names, "0101", strict=True)
            )
            if names[3] is None:
                local_world = _slurm_tasks_here(world)
            return Ranks(rank, world, local, local_world)
    return Ranks()


def _slurm_tasks_here(world: int) -> int:
    """Return the number of tasks on this node, or `world` where SLURM does not say.

    SLURM writes the nodes' tasks as `2(x3),1`: two on each of three nodes and one on a fourth. `SLURM_NODEID` counts into it.
    """
    task_counts = os.environ.get("SLURM_STEP_TASKS_PER_NODE", os.environ.get("SLURM_TASKS_PER_NODE", ""))
    counts: list[int] = []
    for tasks, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", task_counts):
        counts += [int(tasks)] * int(times or 1)
    node = int(os.environ.get("SLURM_NODEID", "0"))
    return counts[node] if node < len(counts) else world


def choose_device(name: str, ranks: Ranks) -> torch.device:
    """Return the device that this rank computes on.

    Args:
        name: `auto` takes a GPU where there is one; `cpu`; or `cuda`, which without a GPU is an error, never a silent CPU.
        ranks: this process among the ranks. Each rank of a node gets a GPU of its own.

    Raises:
        RecipeError: there is no GPU for `cuda`, or the node has more ranks than GPUs.
    """
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise RecipeError(
            "training.device is `cuda` but torch sees no GPU here; use a node with one, or --training.device cpu"
        )
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if 1 < count < ranks.local_world:  # SLURM may have bound a single GPU of its own to each rank
        raise RecipeError(f"{ranks.local_world} ranks on this node, but torch sees {count} GPUs; start one rank a GPU")
    device = torch.device("cuda", ranks.local_rank % count)
    torch.cuda.set_device(device)
    # DeepSpeed and accelerate read LOCAL_RANK as the number of the GPU. It differs where a rank sees only its own GPU.
    os.environ["LOCAL_RANK"] = str(device.index)
    return device


def use_precision(precision: str, device: torch.device) -> None:
    """Set how this process computes float32 products and convolutions from now on.

    Tensors stay float32, so scores are not rounded into ties.

    Args:
        precision: `fp32`, or `tf32` on a GPU's tensor cores.
        device: what this process computes on.

    Raises:
        RecipeError: `tf32` without a GPU.
    """
    import torch

    if precision == "tf32" and device.type != "cuda":
        raise RecipeError(f"precision is tf32, which a GPU computes in, and this runs on the {device.type}; use fp32")
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"  # torch allows it by default


def join(device_name: str = "auto", timeout: float = 600.0) -> tuple[Ranks, torch.device]:
    """Join the process group of this run, or make it for a world of one: NCCL on GPUs, gloo on CPUs.

    On CPUs it also divides the cores among the ranks of this node, and keeps freed memory (`runtime/host_memory.py`).

    Args:
        device_name: as in `choose_device`.
        timeout: seconds to wait for the other ranks.

    Returns:
        This process among the ranks, and its device.

    Raises:
        RankLost: some ranks did not come in time; the message names them.
        RecipeError: as in `choose_device`.
    """
    import torch
    from torch import distributed

    ranks = ranks_from_environment()
    if ranks.world > 1 and "RANK" not in os.environ:  # started by srun; accelerate reads torchrun's names only
        numbers = (("RANK", ranks.rank), ("LOCAL_RANK", ranks.local_rank))
        sizes = (("WORLD_SIZE", ranks.world), ("LOCAL_WORLD_SIZE", ranks.local_world))
        os.environ.update({name: str(value) for name, value in numbers + sizes})
    device = choose_device(device_name, ranks)
    if not distributed.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        # A world of one needs no port, so several such runs can share a machine without an address.
        store = distributed.HashStore() if ranks.world == 1 else _rendezvous(ranks, timeout)
        # The watchdog ends a run that hangs, and names the rank. A collective's own timeout aborts without names, so it
        # comes later, for the case that the watchdog cannot act.
        last_resort = timedelta(seconds=2 * timeout + 60)
        distributed.init_process_group(
            backend, store=store, rank=ranks.rank, world_size=ranks.world, timeout=last_resort
        )
    if device.type == "cpu":
        keep_freed_memory()
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks.local_world))
    return ranks, device


def _rendezvous(ranks: Ranks, timeout: float) -> Any:
    """Return the store at MASTER_ADDR:MASTER_PORT once every rank has come to it."""
    import time

    from torch import distributed

    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if not address or not port:
        raise LigatureError(
            f"rank {ranks.rank} of {ranks.world} has no MASTER_ADDR and MASTER_PORT; start it with `ligature launch`"
        )
    # torchrun serves the store itself, and says so in this variable.
    is_server = ranks.first and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    limit = timedelta(seconds=timeout)
    start = time.monotonic()
    try:
        # It does not wait for the others here, because only the wait below can name those that are missing.
        store = distributed.TCPStore(address, int(port), None, is_server, limit, wait_for_workers=False)
        # torchrun's store outlives a restart of the ranks, and the keys of the last start must not count.
        run = distributed.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        run.set(f"came/{ranks.rank}", "")
    except (distributed.DistError, ValueError) as error:
        raise RankLost(
            f"rank {ranks.rank} cannot reach rank 0 at {address}:{port} ({str(error).splitlines()[0]}); look at rank 0's log"
        ) from error
    names = [f"came/{rank}" for rank in range(ranks.world)]
    try:
        run.wait(names, timedelta(seconds=max(1.0, timeout - (time.monotonic() - start))))
    except distributed.DistError as error:
        missing = [rank for rank, name in enumerate(names) if not run.check([name])]
        names_missing = ", ".join(map(str, missing[:8])) + f" and {len(missing) - 8} more" * (len(missing) > 8)
        raise RankLost(
            f"rank {ranks.rank} waited {timeout:.0f} s at {address}:{port}, but of {ranks.world} ranks {names_missing} did not come"
        ) from error
    return run


def rendezvous_store(name: str) -> Any:
    """Return a new connection to the store that the ranks joined through, with keys under `name`."""
    from torch import distributed
    from torch.distributed.distributed_c10d import _get_default_store

    return distributed.PrefixStore(name, _get_default_store().clone())


def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """Gather the rows of all ranks, in rank order and without gradient. A collective.

    Args:
        rows: (n, …), with the same n on every rank.

    Returns:
        (world * n, …).
    """
    import torch
    from torch import distributed

    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return rows
    gathered = torch.empty(
        distributed.get_world_size() * rows.shape[0], *rows.shape[1:], dtype=rows.dtype, device=rows.device
    )
    all_gather_into(gathered, rows.contiguous())
    return gathered


def all_gather_into(gathered: torch.Tensor, part: torch.Tensor) -> None:
    """Fill `gathered`, (world * n, …), with the `part`, (n, …), of every rank, in rank order. A collective."""
    from torch import distributed

    # torch 2.13 renamed this collective, and the old name warns on every call since then.
    gather = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
    gather(gathered, part)


def sum_over_ranks(value: torch.Tensor) -> torch.Tensor:
    """Return the sum of a tensor over all ranks, as a new tensor. A collective."""
    from torch import distributed

    # all_reduce works in place, and the caller's tensor must stay as it is.
    value = value.clone()
    if distributed.is_initialized() and distributed.get_world_size() > 1:
        distributed.all_reduce(value)
    return value


def run_on_first(ranks: Ranks, make: Callable[[], T]) -> T:
    """Call `make()` on the first rank, and return its result on every rank. A collective.

    Args:
        ranks: this process among the ranks.
        make: called on the first rank alone; its result must be picklable.

    Raises:
        LigatureError: raised by `make`. It stops every rank; only the first rank's error has the message.
    """
    import torch
    from torch import distributed

    outcome: list[Any] = [None, None]  # the result, the error
    if ranks.first:
        try:
            outcome[0] = make()
        except LigatureError as error:
            # Not raised here, because the other ranks wait in the broadcast below.
            outcome[1] = error
    if ranks.world > 1:
        device = torch.device("cpu") if distributed.get_backend() == "gloo" else None
        distributed.broadcast_object_list(outcome, device=device)
    result, failure = outcome
    if failure is not None:
        raise failure if ranks.first else type(failure)()
    return result


_control: Any = None
"""The default group, and the control group that was made beside it."""


def control_group() -> Any:
    """Return a gloo group of all ranks for small values on the host, whatever backend carries the tensors.

    It carries flags (stop, sick) and speeds, and does not wait for the work that a GPU has queued. Its first use creates it,
    which is a collective.
    """
    global _control
    from torch import distributed

    default = distributed.group.WORLD
    # A group made beside an earlier default group has ended with it.
    if _control is None or _control[0] is not default:
        _control = (default, distributed.new_group(backend="gloo"))
    return _control[1]


def any_rank(flag: bool) -> bool:
    """Return whether the flag is set on any rank. Every rank gets the same answer. A collective."""
    import torch
    from torch import distributed

    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return flag
    flags = torch.tensor([int(flag)])
    distributed.all_reduce(flags, op=distributed.ReduceOp.MAX, group=control_group())
    return bool(flags.item())


def gather_values(value: Any) -> list[Any]:
    """Return a small value of every rank, in rank order, on every rank. A collective."""
    from torch import distributed

    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value, group=control_group())
    return values


def barrier() -> None:
    """Wait until every rank has come here. A collective."""
    from torch import distributed

    if distributed.is_initialized() and distributed.get_world_size() > 1:
        distributed.barrier()
