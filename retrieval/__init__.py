"""Retrieval: scores become ranks, protocols and records. Arrays in, numbers out: this floor knows no model.

`metrics` turns score matrices into ranks. `protocols` turns ranks into R@K with intervals. `records` turns those into a JSON
record and a table. `index` searches a collection. Names load on first use, so that `import retrieval` costs nothing.
"""

from importlib import import_module
from typing import Any

_MODULES = {
    "rank_positives": "metrics",
    "rerank": "metrics",
    "measure": "protocols",
    "About": "records",
    "score": "records",
    "write_record": "records",
    "read_record": "records",
    "table": "records",
    "compare_records": "compare",
    "Index": "index",
    "nearest": "index",
}
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'retrieval' has no attribute {name!r}")
    return getattr(import_module(f"retrieval.{_MODULES[name]}"), name)
