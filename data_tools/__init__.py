"""The data floor: sources become shards, shards a stream, and the stream batches. `from data_tools import ShardStream`."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_tools.in_order.collection import Collection as Collection
    from data_tools.stream.shard_stream import ShardStream as ShardStream

_HOMES = {"ShardStream": "data_tools.stream.shard_stream", "Collection": "data_tools.in_order.collection"}


def __getattr__(name: str) -> Any:
    """Load a public class on its first use (PEP 562), so that importing the package does not import torch."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
