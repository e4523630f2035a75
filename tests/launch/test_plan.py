"""`ligature plan`: answered without torch, from the recipe alone."""

from __future__ import annotations

import subprocess
import sys

import pytest

from launch.cli import main
from launch.plan import Cluster, Pace
from pretrain.budget import Budget
from pretrain.config import PretrainRecipe

PLAN = ["plan", "--config", "pretrain/codis_base.yaml", "--nodes", "4", "--gpus-per-node", "8"]


def test_the_plan_names_every_part_and_its_assumptions(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    assert main([*PLAN, "--samples", "14000000"]) == 0
    said = capsys.readouterr().out
    for part in ("parameters", "masters", "moments", "teacher", "queue", "gradients", "activations", "fullest moment"):
        assert f"\n {part} " in said or f"\n{part} " in said, part
    assert "ZeRO 1 *" in said and "Assumed: 989 TFLOP/s" in said and "days" in said and "Checkpoint: 3.5" in said
    assert "820,313 steps (30 epochs of 14,000,000 samples)" in said


def test_the_plan_needs_no_torch():
    program = f"import sys\nfrom launch.cli import main\ncode = main({PLAN})\nassert 'torch' not in sys.modules\nsys.exit(code)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "Days are not known" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (["--training.global_batch", "500"], "does not divide over 32 ranks"),
        (["--nodes", "0"], "--nodes is 0"),
        (["--gpu-gbps", "0"], "--gpu-gbps is 0; it must be above 0"),
        (["--network-gbps", "-1"], "--network-gbps is -1; it must be above 0"),
        (["--utilisation", "0"], "--utilisation is 0; it must be above 0"),
        (["--utilisation", "2"], "--utilisation is 2; it is a share, at most 1"),
        (["--overlap", "1.5"], "--overlap is 1.5; it is a share, at most 1"),
        (["--disk-gb", "0"], "--disk-gb is 0"),
        (["--gpu-memory", "0"], "--gpu-memory is 0"),
        (["--peak-tflops", "nan"], "--peak-tflops is nan"),
        (["--samples", "0"], "--samples is 0"),
        (["--model.image.architecture", "vit_wow"], "vit_wow has no sizes known here"),
        (["--optimizer.lrr", "1"], "did you mean optimizer.lr?"),
    ],
)
def test_a_mistake_gives_a_one_line_error(capsys, change, says):
    assert main([*PLAN, *change]) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1


def test_zero_divides_the_stated_parts():
    budget = Budget(PretrainRecipe(), 8)
    memory = {stage: budget.memory(stage, 64) for stage in range(4)}
    assert memory[1]["moments"] * 64 == memory[0]["moments"] == 8 * budget.total_parameters
    assert memory[1]["gradients"] == memory[0]["gradients"] == 64 * memory[2]["gradients"]
    assert memory[3]["parameters"] * 64 == memory[2]["parameters"] == 2 * budget.total_parameters


def test_more_machines_are_faster_and_a_slower_network_slower():
    def pace(nodes: int, gbps: float = 400.0) -> float:
        return Pace.of(
            Budget(PretrainRecipe(), 8), 1, Cluster(nodes, 8, 80, 989, 0.4, 3600, gbps, 0.5, 1)
        ).samples_per_second

    assert pace(8) < pace(8, 3600) and pace(1) < pace(8, 3600)
