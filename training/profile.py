"""Marks in the code for the parts of a step, which `ligature pretrain --profile 3` reports (pretrain/step_profile.py)."""

from __future__ import annotations

from torch.profiler import record_function

PREFIX = "part: "


def profiled(name: str) -> record_function:
    """`with profiled("optimizer"):` what is done within counts there. Costs microseconds where no profile is taken."""
    return record_function(PREFIX + name)
