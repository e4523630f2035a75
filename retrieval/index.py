"""A search index on disk, and asking it: unit vectors in, the nearest rows out. It knows no model.

index.json         what it is: written last, so an index is complete or absent
embeddings.npy     (rows, width) float32, unit length; read by mapping it, never whole
images.parquet     a row each: `number` and `name` of the image in what was indexed, and its `captions`
broken.jsonl       the images that could not be read, each with its reason
parts/             while it is made: runs of rows, committed one by one
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from runtime.errors import DataError, LigatureError
from runtime.files import PARTIAL, committed_folder, read_json, replaced_file, sha256_of, write_json, write_text

FORMAT, VERSION = "ligature-index", 1
MANIFEST, VECTORS, IMAGES, BROKEN = "index.json", "embeddings.npy", "images.parquet", "broken.jsonl"
SCHEMA = pa.schema([("number", pa.int64()), ("name", pa.string()), ("captions", pa.list_(pa.string()))])
BLOCK_ROWS, BLOCK_QUERIES = 16_384, 256
"""Rows and queries compared at once: their float32 similarities take 16 MB."""
PARTS_A_GROUP = 16
"""Parts whose rows are a row group of `images.parquet`: a search reads the groups of what it found."""
LENGTH_ERROR = 1e-3
"""How far from 1 the length of a stored vector may be."""


@dataclass
class Part:
    """A run of rows, as it is made."""

    vectors: np.ndarray
    """(rows, width) float32"""
    numbers: list[int]
    names: list[str]
    captions: list[list[str]]
    broken: list[dict[str, Any]]
    """`number`, `name`, `reason` of each image that could not be read."""


def part_path(folder: Path, part: int) -> Path:
    return folder / "parts" / f"part-{part:08}"


def write_part(folder: Path, part: int, content: Part) -> None:
    """Commit a part under its final name. Raises DataError for a vector that is not of unit length."""
    lengths = np.linalg.norm(content.vectors.astype(np.float64), axis=1)
    wrong = np.flatnonzero(~(np.abs(lengths - 1) < LENGTH_ERROR))  # not a number included
    if len(wrong):
        row = int(wrong[0])
        raise DataError(
            f"the vector of {content.names[row]} has the length {lengths[row]:.4g}, not 1: the checkpoint is broken, or its "
            "training went wrong; evaluate it, and index with another"
        )
    with committed_folder(part_path(folder, part)) as temporary:
        np.save(temporary / VECTORS, np.ascontiguousarray(content.vectors, dtype=np.float32))
        rows = [content.numbers, content.names, content.captions]
        pq.write_table(pa.table(dict(zip(SCHEMA.names, rows, strict=True)), schema=SCHEMA), temporary / IMAGES)
        (temporary / BROKEN).write_text(_lines(content.broken), encoding="utf-8")


def join_parts(folder: Path, parts: int, about: dict[str, Any]) -> dict[str, Any]:
    """Make the index of its parts, all of which must be there, and remove them. -> what `index.json` says.

    about: what it was made of and by; nothing of the moment or the machine, so that the same work gives the same bytes.
    """
    remove_leftovers(folder)
    paths = [part_path(folder, part) for part in range(parts)]
    rows = sum(pq.read_metadata(path / IMAGES).num_rows for path in paths)
    width = np.load(paths[0] / VECTORS).shape[1]
    with replaced_file(folder / VECTORS) as temporary:
        # Not by name: numpy would append .npy to it.
        whole = np.lib.format.open_memmap(str(temporary), mode="w+", dtype=np.float32, shape=(rows, width))
        start = 0
        for path in paths:  # one at a time: a million images are more parts than a process may have files open
            array = np.load(path / VECTORS)
            whole[start : start + len(array)] = array
            start += len(array)
        whole.flush()
        del whole
    with replaced_file(folder / IMAGES) as temporary, pq.ParquetWriter(temporary, SCHEMA) as writer:
        for first in range(0, parts, PARTS_A_GROUP):
            own = paths[first : first + PARTS_A_GROUP]
            writer.write_table(pa.concat_tables(pq.read_table(path / IMAGES, schema=SCHEMA) for path in own))
    broken = "".join((path / BROKEN).read_text(encoding="utf-8") for path in paths)
    write_text(folder / BROKEN, broken)
    files = {name: _described(folder / name) for name in (VECTORS, IMAGES, BROKEN)}
    counts = {"rows": rows, "width": width, "broken": broken.count("\n")}
    content = {"format": FORMAT, "version": VERSION, **about, **counts, "files": files}
    write_json(folder / MANIFEST, content)
    remove_parts(folder)
    return content


def remove_parts(folder: Path) -> None:
    """Remove what a complete index needs no more: its parts, and what killed processes left."""
    remove_leftovers(folder)
    shutil.rmtree(folder / "parts", ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    for path in folder.glob(f".*{PARTIAL}"):
        path.unlink()


def _described(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def _lines(values: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values)


class Index:
    """A complete index, its vectors mapped. Raises DataError in one line where there is none, or a file of it was altered."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / MANIFEST).is_file():
            if (folder / "parts").is_dir():
                raise DataError(
                    f"the index {folder} is not finished; the same `ligature index` goes on where it stopped"
                )
            make = f"make one: ligature index --checkpoint RUN --data IMAGES --out {folder}"
            raise DataError(f"{folder} is no index; {make}" if folder.exists() else f"no index {folder}; {make}")
        self.about: dict[str, Any] = read_json(folder / MANIFEST)
        if self.about.get("format") != FORMAT or self.about.get("version") != VERSION:
            raise DataError(f"{folder / MANIFEST} is not a {FORMAT} of version {VERSION}")
        for name, stated in self.about["files"].items():
            path = folder / name
            if not path.is_file() or path.stat().st_size != stated["bytes"]:
                raise DataError(f"{path} is missing or cut short; remove {folder} and index again")
        try:
            self.vectors: np.ndarray = np.load(folder / VECTORS, mmap_mode="r", allow_pickle=False)
            self._images = pq.ParquetFile(folder / IMAGES)
        except (ValueError, OSError, pa.ArrowException) as error:
            raise DataError(f"{folder} cannot be read ({error}); remove it and index again") from error
        if self.vectors.shape != (self.about["rows"], self.about["width"]) or self.vectors.dtype != np.float32:
            raise DataError(f"{folder / VECTORS} is not what {MANIFEST} says; remove {folder} and index again")
        counts = [self._images.metadata.row_group(group).num_rows for group in range(self._images.num_row_groups)]
        self._ends = np.cumsum(counts)

    def __len__(self) -> int:
        return len(self.vectors)

    def images(self, rows: np.ndarray) -> list[dict[str, Any]]:
        """`number`, `name` and `captions` of these rows (any order, any shape flattened); only their parts of the file are read."""
        rows = np.asarray(rows).ravel()
        groups = np.searchsorted(self._ends, rows, side="right")
        found: dict[int, dict[str, Any]] = {}
        for group in np.unique(groups).tolist():
            table = self._images.read_row_group(group)
            first = int(self._ends[group]) - table.num_rows
            own = np.unique(rows[groups == group])
            found |= dict(zip(own.tolist(), table.take(own - first).to_pylist(), strict=True))
        return [found[row] for row in rows.tolist()]


def nearest(vectors: np.ndarray, queries: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The `count` rows most similar to each query, exactly: the order is that of dot products in float64, equal ones by row.

    A float32 product over blocks finds every row that can be among the best (its rounding error is at most n·2^-24 times the
    lengths' product for n terms, Higham 2002, section 3.1), and float64 orders those: so neither the block nor the BLAS shows.

    Args:
        vectors: (rows, width) float32 of unit length, mapped or in memory.
        queries: (queries, width), of any length that is not 0.
        count: at most so many; a smaller index gives all its rows.

    Returns:
        scores (queries, count) float64, best first, and their rows (queries, count) int64.

    Raises:
        LigatureError: a width that is not the index's, a query that is not finite, a count below 1.
    """
    queries = check_queries(queries, vectors.shape[1], count)
    count = min(count, len(vectors))
    scores = np.full((len(queries), count), -np.inf)
    rows = np.full((len(queries), count), -1, dtype=np.int64)
    width = vectors.shape[1]
    slack = 1.01 * width * 2.0**-24 * (1 + LENGTH_ERROR) * np.linalg.norm(queries.astype(np.float64), axis=1)
    for start in range(0, len(vectors), BLOCK_ROWS):
        block = np.asarray(vectors[start : start + BLOCK_ROWS])
        for first in range(0, len(queries), BLOCK_QUERIES):
            own = slice(first, first + BLOCK_QUERIES)
            coarse = queries[own] @ block.T
            least = np.full(len(coarse), -np.inf)
            if count <= len(block):
                least = np.partition(coarse, len(block) - count, axis=1)[:, len(block) - count] - 2 * slack[own]
            least = np.maximum(least, scores[own, -1] - slack[own])
            for query, (similar, bound) in enumerate(zip(coarse, least, strict=True), start=first):
                chosen = np.flatnonzero(similar >= bound)
                if len(chosen):
                    merge_best(scores[query], rows[query], exact_scores(block[chosen], queries[query]), chosen + start)
    return scores, rows


def exact_scores(vectors: np.ndarray, query: np.ndarray) -> np.ndarray:
    """Dot products (rows,) in float64. Each row is summed by itself, so that equal vectors score equal wherever they stand."""
    return (vectors.astype(np.float64) * query.astype(np.float64)).sum(axis=1)


def merge_best(scores: np.ndarray, rows: np.ndarray, more: np.ndarray, their_rows: np.ndarray) -> None:
    """Put candidates among the best so far, in place: the highest scores first, equal ones by row."""
    all_scores, all_rows = np.concatenate([scores, more]), np.concatenate([rows, their_rows])
    order = np.lexsort((all_rows, -all_scores))[: len(scores)]
    scores[:], rows[:] = all_scores[order], all_rows[order]


def check_queries(queries: np.ndarray, width: int, count: int) -> np.ndarray:
    """The queries as contiguous float32. Raises LigatureError where they do not fit an index."""
    queries = np.ascontiguousarray(queries, dtype=np.float32)
    if queries.ndim != 2 or queries.shape[1] != width:
        raise LigatureError(f"queries are of shape {queries.shape}; this index holds vectors of width {width}")
    if not np.isfinite(queries).all():
        raise LigatureError("a query's vector is not finite: the checkpoint is broken")
    if count < 1:
        raise LigatureError(f"{count} results are asked for; it must be 1 or more")
    return queries
