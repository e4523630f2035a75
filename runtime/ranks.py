"""Which process this is among those of a run, and the few collectives the stages share."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from runtime.errors import LigatureError, RankLost, RecipeError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process's place: `rank` of `world`, and `local_rank` of `local_world` on its node."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1

    @property
    def first(self) -> bool:
        """Rank 0 alone writes files and speaks to the terminal."""
        return self.rank == 0


def ranks_from_environment() -> Ranks:
    """Read torchrun's variables, else SLURM's (one task per device), else a world of one."""
    for names in (
        ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
        ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", None),
    ):
        if all(name in os.environ for name in names[:2]) and (names[0] == "RANK" or "MASTER_ADDR" in os.environ):
            rank, world, local, local_world = (
                int(os.environ.get(name or "", default)) for name, default in zip(names, "0101", strict=True)
            )
            if names[3] is None:
                local_world = _slurm_tasks_here(world)
            return Ranks(rank, world, local, local_world)
    return Ranks()


def _slurm_tasks_here(world: int) -> int:
    """Tasks on this node: `SLURM_NODEID` counted into SLURM's `2(x3),1`. `world` where SLURM does not tell."""
    told = os.environ.get("SLURM_STEP_TASKS_PER_NODE", os.environ.get("SLURM_TASKS_PER_NODE", ""))
    counts: list[int] = []
    for tasks, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", told):
        counts += [int(tasks)] * int(times or 1)
    node = int(os.environ.get("SLURM_NODEID", "0"))
    return counts[node] if node < len(counts) else world


def choose_device(name: str, ranks: Ranks) -> torch.device:
    """`auto` takes a GPU where there is one; `cuda` without a GPU is an error, never a silent CPU."""
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise RecipeError(
            "training.device is `cuda` but torch sees no GPU here; use a node with one, or --training.device cpu"
        )
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if 1 < count < ranks.local_world:  # one alone may be each rank's own, bound to it by SLURM
        raise RecipeError(f"{ranks.local_world} ranks on this node, but torch sees {count} GPUs; start one rank a GPU")
    device = torch.device("cuda", ranks.local_rank % count)
    torch.cuda.set_device(device)
    # DeepSpeed and accelerate take it for the GPU's number, which it is not where a rank sees its own GPU alone.
    os.environ["LOCAL_RANK"] = str(device.index)
    return device


def use_precision(asked: str, device: torch.device) -> None:
    """Of float32 products and convolutions in this process from now on: `fp32`, or `tf32` on a GPU's tensor cores.

    Tensors stay float32, so scores are not rounded into ties. Raises RecipeError for `tf32` where there is no GPU.
    """
    import torch

    if asked == "tf32" and device.type != "cuda":
        raise RecipeError(f"precision is tf32, which a GPU computes in, and this runs on the {device.type}; use fp32")
    torch.set_float32_matmul_precision("high" if asked == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = asked == "tf32"  # torch allows it of itself


def join(device_name: str = "auto", timeout: float = 600.0) -> tuple[Ranks, torch.device]:
    """Join (or, alone, make) the process group of this run: NCCL on GPUs, gloo on CPUs. Divides the cores among local ranks.

    Raises RankLost naming the ranks that did not come within `timeout` seconds.
    """
    import torch
    from torch import distributed

    ranks = ranks_from_environment()
    if ranks.world > 1 and "RANK" not in os.environ:  # started by srun alone: accelerate knows torchrun's names only
        places = (("RANK", ranks.rank), ("LOCAL_RANK", ranks.local_rank))
        worlds = (("WORLD_SIZE", ranks.world), ("LOCAL_WORLD_SIZE", ranks.local_world))
        os.environ.update({name: str(value) for name, value in places + worlds})
    device = choose_device(device_name, ranks)
    if not distributed.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        store = distributed.HashStore() if ranks.world == 1 else _meet(ranks, timeout)
        # The watchdog ends a run that hangs; a collective's own timeout, an abort without names, is for when it cannot.
        later = timedelta(seconds=2 * timeout + 60)
        distributed.init_process_group(backend, store=store, rank=ranks.rank, world_size=ranks.world, timeout=later)
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks.local_world))
    return ranks, device


def _meet(ranks: Ranks, timeout: float) -> Any:
    """The store at MASTER_ADDR:MASTER_PORT, once every rank has come to it."""
    import time

    from torch import distributed

    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if not address or not port:
        raise LigatureError(
            f"rank {ranks.rank} of {ranks.world} has no MASTER_ADDR and MASTER_PORT; start it with `ligature launch`"
        )
    # torchrun keeps the store itself and says so.
    serves = ranks.first and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    limit = timedelta(seconds=timeout)
    began = time.monotonic()
    try:
        store = distributed.TCPStore(address, int(port), None, serves, limit, wait_for_workers=False)
        run = distributed.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        run.set(f"came/{ranks.rank}", "")
    except (distributed.DistError, ValueError) as error:
        raise RankLost(
            f"rank {ranks.rank} cannot reach rank 0 at {address}:{port} ({str(error).splitlines()[0]}); look at rank 0's log"
        ) from error
    names = [f"came/{rank}" for rank in range(ranks.world)]
    try:
        run.wait(names, timedelta(seconds=max(1.0, timeout - (time.monotonic() - began))))
    except distributed.DistError as error:
        missing = [rank for rank, name in enumerate(names) if not run.check([name])]
        shown = ", ".join(str(rank) for rank in missing[:8]) + f" and {len(missing) - 8} more" * (len(missing) > 8)
        raise RankLost(
            f"rank {ranks.rank} waited {timeout:.0f} s at {address}:{port}, but of {ranks.world} ranks {shown} did not come"
        ) from error
    return run


def rendezvous_store(name: str) -> Any:
    """A connection of its own, with names of its own, to the store that the ranks of the default group met at."""
    from torch import distributed
    from torch.distributed.distributed_c10d import _get_default_store

    return distributed.PrefixStore(name, _get_default_store().clone())


def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """(n, …) on each rank -> (world * n, …), in rank order, without gradient. Every rank must bring the same n."""
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
    """Fill `gathered`, (world * n, …), with every rank's `part`, (n, …), in rank order."""
    from torch import distributed

    # torch 2.13 renamed the collective; the old name warns on every call from then on.
    gather = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
    gather(gathered, part)


def sum_over_ranks(value: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over all ranks, as a new tensor."""
    from torch import distributed

    value = value.clone()
    if distributed.is_initialized() and distributed.get_world_size() > 1:
        distributed.all_reduce(value)
    return value


def run_on_first(ranks: Ranks, make: Callable[[], T]) -> T:
    """What `make()` returns on the first rank, on every rank. A LigatureError it raises stops them all; the first rank tells it."""
    import torch
    from torch import distributed

    told: list[Any] = [None, None]
    if ranks.first:
        try:
            told[0] = make()
        except LigatureError as error:
            told[1] = error
    if ranks.world > 1:
        device = torch.device("cpu") if distributed.get_backend() == "gloo" else None
        distributed.broadcast_object_list(told, device=device)
    if told[1] is not None:
        raise told[1] if ranks.first else type(told[1])()
    return told[0]


_control: Any = None
"""(default group, the control group made beside it)."""


def control_group() -> Any:
    """A small gloo group of all ranks for words on the host's side (stop? sick? how fast?), whatever carries the tensors.

    Made on first use, which is a collective; a GPU's queue of work is not waited for by what it carries.
    """
    global _control
    from torch import distributed

    default = distributed.group.WORLD
    if _control is None or _control[0] is not default:
        _control = (default, distributed.new_group(backend="gloo"))
    return _control[1]


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any rank: every rank gets the same answer. A collective."""
    import torch
    from torch import distributed

    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return flag
    flags = torch.tensor([int(flag)])
    distributed.all_reduce(flags, op=distributed.ReduceOp.MAX, group=control_group())
    return bool(flags.item())


def gather_values(value: Any) -> list[Any]:
    """A small value of each rank, in rank order, on every rank. A collective."""
    from torch import distributed

    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return [value]
    told: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(told, value, group=control_group())
    return told


def barrier() -> None:
    from torch import distributed

    if distributed.is_initialized() and distributed.get_world_size() > 1:
        distributed.barrier()
