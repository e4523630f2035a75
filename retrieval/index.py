"""A search index on disk, and exact search in it: unit vectors in, the nearest rows out. It knows no model.

index.json         describes the index; it is written last, so an index is complete or absent
embeddings.npy     (rows, width) float32 of unit length; it is mapped into memory, never read whole
images.parquet     per row: `number` and `name` of the image in the indexed collection, and its `captions`
broken.jsonl       the images that could not be read, each with the reason
parts/             runs of consecutive rows, committed one by one while the index is being built
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
"""Rows and queries that are compared at once. Their float32 similarities take 16 MB."""
PARTS_A_GROUP = 16
"""Parts per row group of `images.parquet`. A search reads only the row groups of its answers."""
LENGTH_ERROR = 1e-3
"""Largest difference between the length of a stored vector and 1."""


@dataclass
class Part:
    """A run of consecutive rows of an index that is being built."""

    vectors: np.ndarray
    """(rows, width) float32."""
    numbers: list[int]
    names: list[str]
    captions: list[list[str]]
    broken: list[dict[str, Any]]
    """`number`, `name`, `reason` of each image that could not be read."""


def part_path(folder: Path, part: int) -> Path:
    """Return the path of a part in the index's folder, which need not exist."""
    return folder / "parts" / f"part-{part:08}"


def write_part(folder: Path, part: int, content: Part) -> None:
    """Write a part, complete or not at all.

    Raises:
        DataError: a vector is not of unit length.
        LigatureError: the disk refuses the part.
    """
    lengths = np.linalg.norm(content.vectors.astype(np.float64), axis=1)
    wrong = np.flatnonzero(~(np.abs(lengths - 1) < LENGTH_ERROR))  # written so that NaN is wrong too
    if len(wrong):
        row = int(wrong[0])
        raise DataError(
            f"the vector of {content.names[row]} has the length {lengths[row]:.4g}, not 1: the checkpoint is broken, or its "
            "training went wrong; evaluate it, or index with another one"
        )
    with committed_folder(part_path(folder, part)) as temporary:
        np.save(temporary / VECTORS, np.ascontiguousarray(content.vectors, dtype=np.float32))
        rows = [content.numbers, content.names, content.captions]
        pq.write_table(pa.table(dict(zip(SCHEMA.names, rows, strict=True)), schema=SCHEMA), temporary / IMAGES)
        (temporary / BROKEN).write_text(_lines(content.broken), encoding="utf-8")


def join_parts(folder: Path, parts: int, about: dict[str, Any]) -> dict[str, Any]:
    """Join all parts into an index, and remove them.

    Args:
        folder: the index's folder.
        parts: number of parts; all of them must be there.
        about: what was indexed and by what. It has no time and no machine name, so that the same work gives the same bytes.

    Returns:
        The content of `index.json`.
    """
    remove_leftovers(folder)
    paths = [part_path(folder, part) for part in range(parts)]
    rows = sum(pq.read_metadata(path / IMAGES).num_rows for path in paths)
    width = np.load(paths[0] / VECTORS).shape[1]
    with replaced_file(folder / VECTORS) as temporary:
        # open_memmap, because `np.save` appends .npy to a name.
        joined = np.lib.format.open_memmap(str(temporary), mode="w+", dtype=np.float32, shape=(rows, width))
        start = 0
        for path in paths:  # one open at a time: a million images have more parts than a process may open files
            array = np.load(path / VECTORS)
            joined[start : start + len(array)] = array
            start += len(array)
        joined.flush()
        del joined  # closes the map before the file is renamed
    with replaced_file(folder / IMAGES) as temporary, pq.ParquetWriter(temporary, SCHEMA) as writer:
        for first in range(0, parts, PARTS_A_GROUP):
            group = paths[first : first + PARTS_A_GROUP]
            writer.write_table(pa.concat_tables(pq.read_table(path / IMAGES, schema=SCHEMA) for path in group))
    broken = "".join((path / BROKEN).read_text(encoding="utf-8") for path in paths)
    write_text(folder / BROKEN, broken)
    files = {name: _describe_file(folder / name) for name in (VECTORS, IMAGES, BROKEN)}
    counts = {"rows": rows, "width": width, "broken": broken.count("\n")}
    content = {"format": FORMAT, "version": VERSION, **about, **counts, "files": files}
    # The parts leave only after this: a run that is killed earlier joins them again.
    write_json(folder / MANIFEST, content)
    remove_parts(folder)
    return content


def remove_parts(folder: Path) -> None:
    """Remove what a complete index no longer needs: its parts, and the leftovers of killed processes."""
    remove_leftovers(folder)
    shutil.rmtree(folder / "parts", ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files that killed processes left in the index's folder."""
    for path in folder.glob(f".*{PARTIAL}"):
        path.unlink()


def _describe_file(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def _lines(values: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values)


class Index:
    """A complete index, with its vectors mapped into memory.

    Raises:
        DataError: there is no index, it is not finished, or a file of it was altered.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / MANIFEST).is_file():
            if (folder / "parts").is_dir():
                raise DataError(
                    f"the index {folder} is not finished; the same `ligature index` goes on where it stopped"
                )
            advice = f"make one: ligature index --checkpoint RUN --data IMAGES --out {folder}"
            raise DataError(f"{folder} is no index; {advice}" if folder.exists() else f"no index {folder}; {advice}")
        self.about: dict[str, Any] = read_json(folder / MANIFEST)
        if self.about.get("format") != FORMAT or self.about.get("version") != VERSION:
            raise DataError(f"{folder / MANIFEST} is not a {FORMAT} of version {VERSION}")
        for name, entry in self.about["files"].items():
            path = folder / name
            # Sizes alone, because hashing the vectors would read them whole before every search.
            if not path.is_file() or path.stat().st_size != entry["bytes"]:
                raise DataError(f"{path} is missing or cut short; remove {folder} and index again")
        try:
            self.vectors: np.ndarray = np.load(folder / VECTORS, mmap_mode="r", allow_pickle=False)
            self._images = pq.ParquetFile(folder / IMAGES)
        except (ValueError, OSError, pa.ArrowException) as error:
            raise DataError(f"{folder} cannot be read ({error}); remove it and index again") from error
        if self.vectors.shape != (self.about["rows"], self.about["width"]) or self.vectors.dtype != np.float32:
            raise DataError(f"{folder / VECTORS} is not what {MANIFEST} says; remove {folder} and index again")
        counts = [self._images.metadata.row_group(group).num_rows for group in range(self._images.num_row_groups)]
        self._group_ends = np.cumsum(counts)
        """(row groups,) number of the first row after each row group."""

    def __len__(self) -> int:
        return len(self.vectors)

    def images(self, rows: np.ndarray) -> list[dict[str, Any]]:
        """Return `number`, `name` and `captions` of each row. Only the row groups of these rows are read.

        Args:
            rows: row numbers in any order; an array of any shape is flattened.
        """
        rows = np.asarray(rows).ravel()
        groups = np.searchsorted(self._group_ends, rows, side="right")
        images: dict[int, dict[str, Any]] = {}
        for group in np.unique(groups).tolist():
            table = self._images.read_row_group(group)
            first = int(self._group_ends[group]) - table.num_rows
            rows_of_group = np.unique(rows[groups == group])
            images |= dict(zip(rows_of_group.tolist(), table.take(rows_of_group - first).to_pylist(), strict=True))
        return [images[row] for row in rows.tolist()]


def nearest(vectors: np.ndarray, queries: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the `count` rows most similar to each query, exactly: ordered by dot products in float64, and equal ones by row.

    A float32 product over blocks finds every row that can be among the best. Its rounding error for n terms is at most n·2^-24
    times the product of the lengths (Higham 2002, section 3.1). Float64 then orders those rows, so the result depends neither on
    the block size nor on the BLAS.

    Args:
        vectors: (rows, width) float32 of unit length, mapped or in memory.
        queries: (queries, width), of any length but 0.
        count: answers per query; a smaller index returns all its rows.

    Returns:
        Scores (queries, count) float64, best first, and their rows (queries, count) int64.

    Raises:
        LigatureError: a query has another width than the index or is not finite, or the count is below 1.
    """
    queries = check_queries(queries, vectors.shape[1], count)
    count = min(count, len(vectors))
    scores = np.full((len(queries), count), -np.inf)
    rows = np.full((len(queries), count), -1, dtype=np.int64)
    width = vectors.shape[1]
    # How far a float32 product may lie from the exact one: 1 % on top of the bound, for the terms of second order.
    slack = 1.01 * width * 2.0**-24 * (1 + LENGTH_ERROR) * np.linalg.norm(queries.astype(np.float64), axis=1)
    for start in range(0, len(vectors), BLOCK_ROWS):
        block = np.asarray(vectors[start : start + BLOCK_ROWS])
        for first in range(0, len(queries), BLOCK_QUERIES):
            part = slice(first, first + BLOCK_QUERIES)
            coarse = queries[part] @ block.T
            # A row can be among the best only if its coarse score reaches both bounds. One is the count-th best of the
            # block, where both scores may be wrong by the slack. The other is the worst exact answer so far.
            bounds = np.full(len(coarse), -np.inf)
            if count <= len(block):
                bounds = np.partition(coarse, len(block) - count, axis=1)[:, len(block) - count] - 2 * slack[part]
            bounds = np.maximum(bounds, scores[part, -1] - slack[part])
            for query, (similarities, bound) in enumerate(zip(coarse, bounds, strict=True), start=first):
                candidates = np.flatnonzero(similarities >= bound)
                if len(candidates):
                    exact = exact_scores(block[candidates], queries[query])
                    merge_best(scores[query], rows[query], exact, candidates + start)
    return scores, rows


def exact_scores(vectors: np.ndarray, query: np.ndarray) -> np.ndarray:
    """Return dot products (rows,) in float64. Each row is summed by itself, so equal vectors score the same in any position."""
    return (vectors.astype(np.float64) * query.astype(np.float64)).sum(axis=1)


def merge_best(scores: np.ndarray, rows: np.ndarray, more_scores: np.ndarray, more_rows: np.ndarray) -> None:
    """Merge candidates into the best answers so far, in place: the highest scores first, and equal ones by row."""
    all_scores, all_rows = np.concatenate([scores, more_scores]), np.concatenate([rows, more_rows])
    order = np.lexsort((all_rows, -all_scores))[: len(scores)]
    scores[:], rows[:] = all_scores[order], all_rows[order]


def check_queries(queries: np.ndarray, width: int, count: int) -> np.ndarray:
    """Return the queries as contiguous float32.

    Raises:
        LigatureError: the queries or the count do not fit an index of this width; see `nearest`.
    """
    queries = np.ascontiguousarray(queries, dtype=np.float32)
    if queries.ndim != 2 or queries.shape[1] != width:
        raise LigatureError(f"queries have the shape {queries.shape}; this index holds vectors of width {width}")
    if not np.isfinite(queries).all():
        raise LigatureError("a query's vector is not finite: the checkpoint is broken")
    if count < 1:
        raise LigatureError(f"the number of results is {count}; it must be 1 or more")
    return queries
