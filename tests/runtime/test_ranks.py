"""Which process this is: torchrun's word, else SLURM's, else one alone. Devices are never chosen silently."""

from __future__ import annotations

import os

import pytest
import torch

from runtime.errors import RecipeError
from runtime.ranks import Ranks, choose_device, gather_rows, ranks_from_environment, sum_over_ranks, use_precision

NAMES = [
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "SLURM_PROCID",
    "SLURM_NTASKS",
    "SLURM_LOCALID",
    "SLURM_NODEID",
    "SLURM_TASKS_PER_NODE",
    "SLURM_STEP_TASKS_PER_NODE",
]
TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
SLURM = {
    "SLURM_PROCID": "3",
    "SLURM_NTASKS": "4",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_TASKS_PER_NODE": "2(x2)",
}


@pytest.fixture
def environment(monkeypatch):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)

    def make(**values: str) -> Ranks:
        for name, value in values.items():
            monkeypatch.setenv(name, value)
        return ranks_from_environment()

    return make


def test_without_a_launcher_there_is_one_rank(environment):
    assert environment() == Ranks(0, 1, 0, 1)
    assert environment().first


def test_torchruns_variables_are_read(environment):
    ranks = environment(**TORCHRUN)
    assert ranks == Ranks(5, 8, 1, 4) and not ranks.first


def test_slurms_variables_are_read_where_the_ranks_can_meet(environment):
    assert environment(**SLURM, MASTER_ADDR="node1") == Ranks(3, 4, 1, 2)


@pytest.mark.parametrize(
    ("tasks_per_node", "node", "tasks"),
    [("2(x3),1", 0, 2), ("2(x3),1", 3, 1), ("8", 0, 8), ("1(x2)", 1, 1), ("4,2(x2)", 2, 2)],
)
def test_ranks_share_a_node_with_its_own_tasks_only(environment, tasks_per_node, node, tasks):
    ranks = environment(
        **SLURM | {"SLURM_TASKS_PER_NODE": tasks_per_node, "SLURM_NODEID": str(node)}, MASTER_ADDR="node1"
    )
    assert ranks.local_world == tasks


def test_an_interactive_slurm_shell_is_one_rank(environment):
    """salloc sets SLURM_NTASKS too; nothing there has started the other ranks."""
    assert environment(**SLURM) == Ranks(0, 1, 0, 1)


def test_torchrun_inside_slurm_decides(environment):
    assert environment(**SLURM, **TORCHRUN, MASTER_ADDR="node1") == Ranks(5, 8, 1, 4)


def test_cuda_without_a_gpu_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RecipeError, match="`cuda` but torch sees no GPU"):
        choose_device("cuda", Ranks())


@pytest.mark.parametrize("name", ["auto", "cpu"])
def test_without_a_gpu_the_cpu_is_chosen(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device(name, Ranks()) == torch.device("cpu")


def test_cpu_is_used_on_request_even_beside_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("cpu", Ranks()) == torch.device("cpu")


@pytest.mark.parametrize(("local_rank", "local_world", "visible", "number"), [(3, 8, 8, 3), (3, 8, 1, 0), (0, 1, 8, 0)])
def test_a_rank_takes_the_gpu_it_sees_under_the_number_it_has_there(
    monkeypatch, local_rank, local_world, visible, number
):
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    device = choose_device("auto", Ranks(local_rank, local_world, local_rank, local_world))
    assert device == torch.device("cuda", number) and chosen == [device] and os.environ["LOCAL_RANK"] == str(number)


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(RecipeError, match="8 ranks on this node, but torch sees 4 GPUs"):
        choose_device("auto", Ranks(0, 8, 0, 8))


def test_collectives_of_one_rank_change_nothing():
    rows = torch.arange(6.0).reshape(3, 2)
    assert torch.equal(gather_rows(rows), rows)
    summed = sum_over_ranks(rows)
    assert torch.equal(summed, rows) and summed is not rows


def test_tf32_needs_a_gpu_and_float32_stays_exact_elsewhere():
    before = torch.get_float32_matmul_precision()
    try:
        use_precision("tf32", torch.device("cuda"))
        assert torch.get_float32_matmul_precision() == "high"
        use_precision("fp32", torch.device("cuda"))
        assert torch.get_float32_matmul_precision() == "highest"
        with pytest.raises(RecipeError, match="precision is tf32, which a GPU computes in, and this runs on the cpu"):
            use_precision("tf32", torch.device("cpu"))
    finally:
        torch.set_float32_matmul_precision(before)
