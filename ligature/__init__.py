"""Ligature's version and the names that a notebook starts from. They load on first use: `import ligature` costs nothing.

Tested in tests/test_package.py.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from runtime.version import VERSION as __version__

if TYPE_CHECKING:
    from data_tools import ShardStream as ShardStream
    from pretrain import load_model as load_model

_HOMES = {"load_model": "pretrain", "ShardStream": "data_tools"}
__all__ = ["ShardStream", "__version__", "load_model"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'ligature' has no attribute {name!r}")
