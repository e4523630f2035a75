"""Marks in the code for the parts of a step, which `ligature pretrain --profile 3` reports (pretrain/step_profile.py).

Tested in tests/pretrain/test_step_profile.py.
"""

from __future__ import annotations

from torch.profiler import record_function

PREFIX = "part: "
"""What the names of these marks begin with in a profile, among the names of torch's own operations."""


def profiled(name: str) -> record_function:
    """Count the time spent in a `with` block under a name. Without a profiler it costs microseconds."""
    return record_function(PREFIX + name)
