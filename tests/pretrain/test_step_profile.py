"""The profile of a training step: its table names every part, and every operation counts once."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import tiny
import torch
from torch.autograd import DeviceType

from pretrain.step_profile import StepProfile, time_by_part


def test_the_table_has_every_part():
    task = tiny.task(tiny.recipe())
    profile = StepProfile(1, task.student.model, task.teacher.model, torch.device("cpu"))
    profile.start()
    (inputs,), _ = task.prepare(tiny.batch(8), 2.0, 8)
    loss, _ = task.student(inputs)
    loss.backward()
    task.finish(task.student.model.named_parameters())
    rows = {line[:48].strip(): line[48:71].split() for line in profile.stop().splitlines()[1:-1]}
    both = ["student / images", "student / words", "matching / fusion", "masked_language / fusion", "contrastive"]
    both += ["masked_language / word head", "matching / keys and values of images"]
    assert all(len(rows[part]) == 2 for part in both), rows
    assert {"teacher / images", "teacher / words", "transport", "EMA", "queue"} <= set(rows)
    assert "gradients added and reduced" in rows
    assert not task.student.model.image_encoder._forward_hooks


@pytest.mark.parametrize(("steps", "message"), [(1, "no profile"), (2, "no profile"), (3, "student / images"), (5, "")])
def test_a_run_that_ends_early_prints_the_steps_there_were(steps, message, capsys):
    task = tiny.task(tiny.recipe())
    profile = StepProfile(3, task.student.model, task.teacher.model, torch.device("cpu"))
    (inputs,), _ = task.prepare(tiny.batch(8), 2.0, 8)
    for _ in range(steps):
        task.student(inputs)
        profile.after_step()
    capsys.readouterr()
    profile.finish()
    printed = capsys.readouterr().out
    assert message in printed and bool(printed) == bool(message)
    assert not task.student.model.image_encoder._forward_hooks


def test_a_kernel_counts_once_in_its_operation():
    """torch reports a GPU kernel twice: its time in the operation that launched it, and as an event of its own."""
    common = {
        "scope": 0,
        "sequence_nr": -1,
        "thread": 1,
        "is_async": False,
        "cpu_parent": None,
        "self_cpu_time_total": 5.0,
    }
    marked = SimpleNamespace(
        **{**common, "name": "part: transport"}, self_device_time_total=0.0, device_type=DeviceType.CPU
    )
    launched = SimpleNamespace(
        **{**common, "cpu_parent": marked}, name="aten::mm", self_device_time_total=7.0, device_type=DeviceType.CPU
    )
    kernel = SimpleNamespace(**common, name="gemm", self_device_time_total=7.0, device_type=DeviceType.CUDA)
    span = SimpleNamespace(**common, name="part: transport", self_device_time_total=9.0, device_type=DeviceType.CUDA)
    assert time_by_part([marked, launched, kernel, span], gpu=True) == {("transport", "forward"): pytest.approx(7e-6)}
