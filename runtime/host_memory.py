"""What the C library does with memory that this process frees."""

from __future__ import annotations

import ctypes
import os

SETTINGS = ("trim_threshold", "mmap_max", "mmap_threshold")
"""glibc's settings of freed memory. A user sets one as MALLOC_TRIM_THRESHOLD_ or by GLIBC_TUNABLES."""
TRIM_THRESHOLD, MMAP_MAX = -1, -4
"""The numbers of two of them in malloc.h."""


def keep_freed_memory() -> bool:
    """Make glibc keep the memory of freed tensors for the next ones, in this process and in those that it forks.

    By default a large block is a mapping of its own that ends with the block, and the heap's free end goes back to the
    system. The next tensor's pages are then faulted in one by one. With this setting the process holds what its fullest
    moment needed, until it ends.

    A user's own setting wins. Other allocators, such as jemalloc, and other C libraries are not changed.

    Returns:
        Whether glibc took the setting.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if any(f"MALLOC_{name.upper()}_" in os.environ or f"glibc.malloc.{name}=" in tunables for name in SETTINGS):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt"):
        return False
    return bool(library.mallopt(TRIM_THRESHOLD, 2**31 - 1) and library.mallopt(MMAP_MAX, 0))
