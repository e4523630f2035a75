"""Inverted lists by faiss beside an index, for collections too large to compare every row. Their recall is measured and kept.

A query reads only the lists whose centres are nearest to it. The rows of those lists are scored and ordered as in exact search,
so every answer has its exact score. Rows of other lists are missed. Published recalls of such indexes are measured with queries
from the data's own distribution. Words are not from it, so the recall is measured with captions where the collection has some.

Tested in tests/retrieval/test_index.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from retrieval.index import Index, check_queries, exact_scores, merge_best, nearest
from runtime.errors import DataError, LigatureError
from runtime.files import read_json, replaced_file, write_json

LISTS, ABOUT = "lists.faiss", "lists.json"
"""The lists, and the file that describes them, in the index's folder."""
RECALL_AT = 10
"""The recall is the share of the exact first ten rows that the lists find."""
TRAINING_ROWS = 64
"""Rows per list, at most, from which k-means learns the centres of the lists."""


def load_faiss() -> Any:
    """Return the faiss library.

    Raises:
        LigatureError: it is not installed.
    """
    try:
        import faiss
    except ImportError:
        raise LigatureError(
            "approximate search needs faiss: `pip install '.[search]'` in Ligature's checkout"
        ) from None
    return faiss


def read_lists_info(index: Index) -> dict[str, Any] | None:
    """Return what `lists.json` says of an index's lists, or None where it has none."""
    path = index.folder / ABOUT
    return read_json(path) if path.is_file() else None


def build_lists(index: Index, queries: np.ndarray, kind: str, target: float) -> str:
    """Sort the rows into about 4 √rows lists, and choose how many lists a query reads.

    The number of lists to read doubles until the recall reaches `target`.

    Args:
        index: the index to add the lists to.
        queries: (queries, width), with which the recall is measured.
        kind: what the queries are, in words.
        target: least recall, from 0 to 1.

    Returns:
        One line that describes the lists.

    Raises:
        LigatureError: faiss is not installed, or the disk refuses the files.
    """
    faiss = load_faiss()
    rows, width = index.vectors.shape
    lists = max(1, min(int(4 * rows**0.5), rows // 39))  # faiss asks for 39 rows or more per centre
    quantizer = faiss.IndexFlatIP(width)
    inverted = faiss.IndexIVFFlat(quantizer, width, lists, faiss.METRIC_INNER_PRODUCT)
    # A fixed seed, so that the same vectors train on the same rows.
    training_rows = np.random.default_rng(0).permutation(rows)[: lists * TRAINING_ROWS]
    inverted.train(np.ascontiguousarray(index.vectors[np.sort(training_rows)]))  # sorted: the vectors are on a disk
    for start in range(0, rows, 1 << 18):  # a part at a time, because the vectors may not fit into memory twice
        inverted.add(np.ascontiguousarray(index.vectors[start : start + (1 << 18)]))
    exact = nearest(index.vectors, queries, RECALL_AT)[0]
    recalls: list[tuple[int, float]] = []
    read = 1
    while True:
        scores = search_lists(inverted, read, index.vectors, queries, RECALL_AT)[0]
        # Compared by score, because a row that ties with the tenth is as good as the tenth.
        recalls.append((read, float((scores >= exact[:, -1:]).mean())))
        if recalls[-1][1] >= target or read == lists:
            break
        read = min(2 * read, lists)
    with replaced_file(index.folder / LISTS) as temporary:
        faiss.write_index(inverted, str(temporary))
    about = {
        "lists": lists,
        "read": read,
        "target": target,
        f"recall@{RECALL_AT}": recalls[-1][1],
        "queries": len(queries),
        "measured_with": kind,
        "by_lists_read": recalls,
        "bytes": (index.folder / LISTS).stat().st_size,
        "faiss": faiss.__version__,
    }
    # Written after the lists, which do not count without it.
    write_json(index.folder / ABOUT, about)
    return describe_lists(about)


def describe_lists(about: dict[str, Any]) -> str:
    """Return one line about the lists, from the content of `lists.json`."""
    return (
        f"inverted lists: {about['read']:,} of {about['lists']:,} read, recall@{RECALL_AT} against exact search "
        f"{about[f'recall@{RECALL_AT}']:.3f} over {about['queries']:,} queries ({about['measured_with']})"
    )


def open_lists(index: Index) -> tuple[Any, int, str]:
    """Open the lists of an index.

    Returns:
        The lists, mapped into memory; how many of them a query reads; and one line about their recall.

    Raises:
        DataError: the index has no lists, or their file is missing or cut short.
        LigatureError: faiss is not installed.
    """
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
    """Return the best rows of each query as `nearest` does, but search only the lists nearest to the query.

    Args:
        lists: as `open_lists` returns them.
        read: how many lists to read per query.
        vectors: (rows, width), the vectors of the index.
        queries: (queries, width).
        count: answers per query, at most.

    Returns:
        Scores and rows as `nearest` returns them. Where the lists of a query hold fewer than `count` rows, the rest have
        the score -inf and the row -1.
    """
    queries = check_queries(queries, vectors.shape[1], count)
    count = min(count, len(vectors))
    lists.nprobe = read
    # Sixteen more than needed, because float32 may order the rows around the last place differently from float64.
    _, candidates = lists.search(queries, min(count + 16, len(vectors)))
    scores = np.full((len(queries), count), -np.inf)
    rows = np.full((len(queries), count), -1, dtype=np.int64)
    for query, listed in enumerate(candidates):
        # faiss fills up with -1 where the lists hold too few rows. Sorted, because the vectors are on a disk.
        listed = np.sort(listed[listed >= 0])
        merge_best(scores[query], rows[query], exact_scores(np.asarray(vectors[listed]), queries[query]), listed)
    return scores, rows
