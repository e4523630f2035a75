"""On a CPU a process keeps freed memory for its next tensors, unless the user's environment says otherwise."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

WORK = """
import ctypes, resource
from runtime.host_memory import keep_freed_memory

library = ctypes.CDLL(None)
library.malloc.restype, library.malloc.argtypes, library.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]

def fill():  # ten blocks of 40 MB: more than glibc's threshold for mappings can grow to
    for _ in range(10):
        block = library.malloc(40_000_000)
        ctypes.memset(block, 1, 40_000_000)
        library.free(block)

kept = keep_freed_memory()
fill()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
fill()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(work: str = WORK, **environment: str) -> tuple[bool, int]:
    """Whether the setting was made, and the page faults of ten large blocks taken and freed one after another."""
    own = {
        name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_", "LD_PRELOAD"))
    }
    output = subprocess.run([sys.executable, "-c", work], env=own | environment, check=True, capture_output=True).stdout
    kept, count = output.split()[-2:]  # DeepSpeed prints lines of its own where it is imported
    return kept == b"True", int(count)


def test_blocks_are_faulted_in_once():
    kept, count = faults()
    assert kept and count < 50


def test_a_rank_on_a_cpu_keeps_freed_memory():
    """Every stage that runs on ranks joins them first, however it was launched."""
    ranks = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    work = WORK.replace("from runtime.host_memory import keep_freed_memory", "from runtime.ranks import join")
    work = work.replace("keep_freed_memory()", "bool(join('cpu'))")
    kept, count = faults(work, **ranks)
    assert kept and count < 50


@pytest.mark.parametrize(
    "environment",
    [
        {"MALLOC_MMAP_THRESHOLD_": "131072"},
        {"MALLOC_MMAP_MAX_": "65536"},
        {"MALLOC_TRIM_THRESHOLD_": "131072"},
        {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=131072"},
    ],
)
def test_a_users_own_setting_wins(environment):
    kept, count = faults(**environment)
    assert not kept
    assert count > 100  # mapped anew each time: 97,660 faults in pages of 4 kB, 200 in pages of 2 MB


def test_a_tunable_of_something_else_does_not_switch_it_off():
    kept, count = faults(GLIBC_TUNABLES="glibc.malloc.arena_max=4")
    assert kept and count < 50
