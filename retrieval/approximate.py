"""Inverted lists by faiss beside an index, for sets too large to compare every row: how much they find is measured, and kept.

The rows of the lists that are read are scored and ordered as in exact search, so what is found has its exact score; what lies in
other lists is missed. Published figures for such indexes are of queries from the data's own distribution; words are not, so the
recall is measured with captions where the collection has some.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from retrieval.index import Index, check_queries, exact_scores, merge_best, nearest
from runtime.errors import DataError, LigatureError
from runtime.files import read_json, replaced_file, write_json

LISTS, ABOUT = "lists.faiss", "lists.json"
RECALL_AT = 10
TRAINING_ROWS = 64
"""Rows a list, at most, that the lists' centres are learned from (k-means)."""


def load_faiss() -> Any:
    """The library. Raises LigatureError where it is not installed."""
    try:
        import faiss
    except ImportError:
        raise LigatureError(
            "approximate search needs faiss: `pip install '.[search]'` in Ligature's checkout"
        ) from None
    return faiss


def read_lists_info(index: Index) -> dict[str, Any] | None:
    """What is known of an index's lists; None where it has none."""
    path = index.folder / ABOUT
    return read_json(path) if path.is_file() else None


def build_lists(index: Index, queries: np.ndarray, kind: str, target: float) -> str:
    """Sort the rows into about 4 √rows lists, and read as many a query as find `target` of the exact first ten. -> a line.

    queries: (queries, width), by which the recall is measured; kind: what they are, in words.
    """
    faiss = load_faiss()
    rows, width = index.vectors.shape
    lists = max(1, min(int(4 * rows**0.5), rows // 39))  # faiss wants 39 rows or more to learn a centre from
    quantizer = faiss.IndexFlatIP(width)
    made = faiss.IndexIVFFlat(quantizer, width, lists, faiss.METRIC_INNER_PRODUCT)
    drawn = np.random.default_rng(0).permutation(rows)[: lists * TRAINING_ROWS]
    made.train(np.ascontiguousarray(index.vectors[np.sort(drawn)]))
    for start in range(0, rows, 1 << 18):
        made.add(np.ascontiguousarray(index.vectors[start : start + (1 << 18)]))
    best = nearest(index.vectors, queries, RECALL_AT)[0]
    tried: list[tuple[int, float]] = []
    read = 1
    while True:
        found = search_lists(made, read, index.vectors, queries, RECALL_AT)[0]
        # By score: a row that ties with the tenth is as good as it.
        tried.append((read, float((found >= best[:, -1:]).mean())))
        if tried[-1][1] >= target or read == lists:
            break
        read = min(2 * read, lists)
    with replaced_file(index.folder / LISTS) as temporary:
        faiss.write_index(made, str(temporary))
    about = {
        "lists": lists,
        "read": read,
        "target": target,
        f"recall@{RECALL_AT}": tried[-1][1],
        "queries": len(queries),
        "measured_with": kind,
        "by_lists_read": tried,
        "bytes": (index.folder / LISTS).stat().st_size,
        "faiss": faiss.__version__,
    }
    write_json(index.folder / ABOUT, about)
    return describe_lists(about)


def describe_lists(about: dict[str, Any]) -> str:
    return (
        f"inverted lists: {about['read']:,} of {about['lists']:,} read, recall@{RECALL_AT} against exact search "
        f"{about[f'recall@{RECALL_AT}']:.3f} over {about['queries']:,} queries ({about['measured_with']})"
    )


def open_lists(index: Index) -> tuple[Any, int, str]:
    """The lists of an index, mapped; how many to read; and what is known of their recall, in words."""
    about = read_lists_info(index)
    if about is None:
        raise DataError(f"{index.folder} has no inverted lists; add them: ligature index … --approximate ivf")
    faiss = load_faiss()
    path: Path = index.folder / LISTS
    if not path.is_file() or path.stat().st_size != about["bytes"]:
        raise DataError(f"{path} is missing or cut short; remove {index.folder / ABOUT} and add the lists again")
    return (
        faiss.read_index(str(path), faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY),
        about["read"],
        describe_lists(about),
    )


def search_lists(
    lists: Any, read: int, vectors: np.ndarray, queries: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """As `nearest`, of the `read` lists whose centres are nearest to each query. A query whose lists hold fewer than `count`
    rows gets -inf and row -1 for the rest."""
    queries = check_queries(queries, vectors.shape[1], count)
    count = min(count, len(vectors))
    lists.nprobe = read
    # A few more than asked for: float32 may order rows at the edge in another way than float64.
    _, candidates = lists.search(queries, min(count + 16, len(vectors)))
    scores = np.full((len(queries), count), -np.inf)
    rows = np.full((len(queries), count), -1, dtype=np.int64)
    for query, found in enumerate(candidates):
        found = found[found >= 0]
        merge_best(
            scores[query],
            rows[query],
            exact_scores(np.asarray(vectors[np.sort(found)]), queries[query]),
            np.sort(found),
        )
    return scores, rows
