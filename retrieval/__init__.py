"""Scores to ranks, protocols and records. Arrays in, numbers out: this floor knows no model.

`metrics` turns score matrices into ranks, `protocols` ranks into R@K with intervals, `records` those into a JSON
record and a table. Names load on first use, so that `import retrieval` costs nothing.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "rank_positives": "metrics",
    "rerank": "metrics",
    "measure": "protocols",
    "score": "records",
    "write_record": "records",
    "read_record": "records",
    "table": "records",
    "compare": "compare",
    "Index": "index",
    "nearest": "index",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'retrieval' has no attribute {name!r}")
    return getattr(import_module(f"retrieval.{_HOME[name]}"), name)
