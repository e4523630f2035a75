"""Which process this is among those of a run, and the few collectives the stages share."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from runtime.errors import LigatureError, RecipeError

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
                local_world = int(os.environ.get("SLURM_NTASKS_PER_NODE", world))
            return Ranks(rank, world, local, local_world)
    return Ranks()


def choose_device(asked: str, ranks: Ranks) -> torch.device:
    """`auto` takes a GPU where there is one; `cuda` without a GPU is an error, never a silent CPU."""
    import torch

    if asked == "cuda" and not torch.cuda.is_available():
        raise RecipeError(
            "training.device is `cuda` but torch sees no GPU here; use a node with one, or --training.device cpu"
        )
    if asked == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", ranks.local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def join(asked_device: str = "auto") -> tuple[Ranks, torch.device]:
    """Join (or, alone, make) the process group of this run: NCCL on GPUs, gloo on CPUs. Divides the cores among local ranks."""
    import torch
    from torch import distributed

    ranks = ranks_from_environment()
    device = choose_device(asked_device, ranks)
    if not distributed.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        if ranks.world == 1:
            distributed.init_process_group(backend, store=distributed.HashStore(), rank=0, world_size=1)
        else:
            try:
                distributed.init_process_group(backend, rank=ranks.rank, world_size=ranks.world)
            except ValueError as error:
                raise LigatureError(
                    f"rank {ranks.rank} of {ranks.world} cannot join the run ({error}); start it with `ligature launch`"
                ) from error
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks.local_world))
    return ranks, device


def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """(n, …) on each rank -> (world * n, …), in rank order, without gradient. Every rank must bring the same n."""
    import torch
    from torch import distributed

    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return rows
    gathered = torch.empty(
        distributed.get_world_size() * rows.shape[0], *rows.shape[1:], dtype=rows.dtype, device=rows.device
    )
    distributed.all_gather_into_tensor(gathered, rows.contiguous())
    return gathered


def sum_over_ranks(value: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over all ranks, as a new tensor."""
    from torch import distributed

    value = value.clone()
    if distributed.is_initialized() and distributed.get_world_size() > 1:
        distributed.all_reduce(value)
    return value


def from_first(ranks: Ranks, make: Callable[[], T]) -> T:
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


def barrier() -> None:
    from torch import distributed

    if distributed.is_initialized() and distributed.get_world_size() > 1:
        distributed.barrier()
