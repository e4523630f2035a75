"""Exact search is exact: the order of float64 dot products, equal ones by row, whatever the block; and what an index refuses."""

from __future__ import annotations

import os
import resource

import numpy as np
import pytest

from retrieval import index as module
from retrieval.index import Index, Part, join_parts, nearest, write_part
from runtime.errors import DataError, LigatureError


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def by_sorting(vectors: np.ndarray, queries: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The whole matrix in float64, sorted stably."""
    scores = queries.astype(np.float64) @ vectors.astype(np.float64).T
    rows = np.argsort(-scores, axis=1, kind="stable")[:, :count]
    return np.take_along_axis(scores, rows, axis=1), rows


@pytest.mark.parametrize("block", [7, 64, 1000])
@pytest.mark.parametrize("count", [1, 10, 300])
def test_the_order_is_that_of_float64(monkeypatch, block, count):
    monkeypatch.setattr(module, "BLOCK_ROWS", block)
    monkeypatch.setattr(module, "BLOCK_QUERIES", 3)
    random = np.random.default_rng(0)
    vectors, queries = unit(random.normal(size=(300, 24))), random.normal(size=(8, 24)).astype(np.float32) * 5
    scores, rows = nearest(vectors, queries, count)
    expected = by_sorting(vectors, queries, count)
    assert np.array_equal(rows, expected[1])
    np.testing.assert_allclose(scores, expected[0], rtol=0, atol=1e-12)


def test_rows_closer_than_float32_can_tell_are_ordered_by_float64():
    """Vectors that differ in the last bits: their float32 products come out in another order, or equal."""
    random = np.random.default_rng(1)
    centre = random.normal(size=256)
    vectors = unit(centre + 1e-7 * random.normal(size=(2000, 256)))
    query = unit(random.normal(size=(1, 256)))
    expected = by_sorting(vectors, query, 50)[1]
    coarse = np.argsort(-(query @ vectors.T), axis=1, kind="stable")[:, :50]
    assert not np.array_equal(coarse, expected), "the case is too easy: float32 gets it right"
    assert np.array_equal(nearest(vectors, query, 50)[1], expected)


@pytest.mark.parametrize("block", [5, 16, 100])
def test_equal_vectors_come_in_the_order_of_their_rows(monkeypatch, block):
    monkeypatch.setattr(module, "BLOCK_ROWS", block)
    random = np.random.default_rng(2)
    kinds = unit(random.normal(size=(4, 19)))
    kind = random.integers(0, 4, 100)
    query = random.normal(size=(1, 19)).astype(np.float32)
    scores, rows = nearest(kinds[kind], query, 60)
    best = sorted(range(100), key=lambda row: (-float(kinds[kind[row]].astype(float) @ query[0].astype(float)), row))
    assert rows[0].tolist() == best[:60]
    assert len(np.unique(scores)) <= 4


def test_requests_beyond_the_index_give_all_rows():
    vectors = unit(np.eye(3) + 0.1)
    assert nearest(vectors, vectors[:1], 10)[1].shape == (1, 3)


@pytest.mark.parametrize(
    ("queries", "count", "message"),
    [(np.ones((1, 4)), 1, "width 3"), (np.full((1, 3), np.nan), 1, "not finite"), (np.ones((1, 3)), 0, "1 or more")],
)
def test_queries_that_do_not_fit_are_refused(queries, count, message):
    with pytest.raises(LigatureError, match=message):
        nearest(unit(np.eye(3)), queries, count)


def part(first: int, vectors: np.ndarray, broken: int = 0) -> Part:
    numbers = list(range(first, first + len(vectors)))
    lost = [{"number": 900 + place, "name": f"lost {place}", "reason": "cut short"} for place in range(broken)]
    return Part(
        vectors, numbers, [f"image {number}" for number in numbers], [["a", "b"][: n % 3] for n in numbers], lost
    )


@pytest.fixture
def joined(tmp_path, monkeypatch):
    """An index of 7 rows in three parts, one of which is empty; two row groups."""
    monkeypatch.setattr(module, "PARTS_A_GROUP", 2)
    vectors = unit(np.random.default_rng(0).normal(size=(7, 5)))
    for number, content in enumerate([part(0, vectors[:4], 1), part(0, vectors[:0], 2), part(4, vectors[4:])]):
        write_part(tmp_path / "index", number, content)
    join_parts(tmp_path / "index", 3, {"checkpoint": "abc"})
    return tmp_path / "index", vectors


def test_an_index_may_have_more_parts_than_a_process_may_have_files_open(tmp_path):
    vectors = unit(np.random.default_rng(1).normal(size=(80, 5)))
    for number in range(80):
        write_part(tmp_path / "index", number, part(number, vectors[number : number + 1]))
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (opened + 40, allowed[1]))
    try:
        join_parts(tmp_path / "index", 80, {"checkpoint": "abc"})
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, allowed)
    assert np.array_equal(Index(tmp_path / "index").vectors, vectors)


def test_parts_become_one_index(joined):
    folder, vectors = joined
    index = Index(folder)
    assert np.array_equal(index.vectors, vectors) and isinstance(index.vectors, np.memmap)
    assert (index.about["rows"], index.about["broken"], index.about["checkpoint"]) == (7, 3, "abc")
    images = index.images(np.array([[6, 0], [5, 6]]))
    assert [one["name"] for one in images] == ["image 6", "image 0", "image 5", "image 6"]
    assert images[2] == {"number": 5, "name": "image 5", "captions": ["a", "b"]}
    assert len((folder / "broken.jsonl").read_text().splitlines()) == 3
    assert sorted(path.name for path in folder.iterdir()) == [
        "broken.jsonl",
        "embeddings.npy",
        "images.parquet",
        "index.json",
    ]


def test_a_vector_that_is_not_unit_or_not_a_number_is_refused(tmp_path):
    for bad in (2.0, np.nan):
        vectors = unit(np.eye(3))
        vectors[1] *= bad
        with pytest.raises(DataError, match="image 1 has the length"):
            write_part(tmp_path, 0, part(0, vectors))
    assert not list(tmp_path.rglob("*.npy"))


def test_an_index_that_is_not_whole_is_refused(joined, tmp_path):
    folder, _ = joined
    with pytest.raises(DataError, match="no index .*nowhere; make one"):
        Index(tmp_path / "nowhere")
    data = (folder / "embeddings.npy").read_bytes()
    (folder / "embeddings.npy").write_bytes(data[:-4])
    with pytest.raises(DataError, match="embeddings.npy is missing or cut short"):
        Index(folder)
    (folder / "index.json").unlink()
    with pytest.raises(DataError, match="is no index"):
        Index(folder)
    (folder / "parts").mkdir()
    with pytest.raises(DataError, match="not finished"):
        Index(folder)


def test_inverted_lists_reach_their_stated_recall(tmp_path):
    pytest.importorskip("faiss")
    from retrieval.approximate import build_lists, open_lists, read_lists_info, search_lists

    random = np.random.default_rng(3)
    vectors = unit(random.normal(size=(40, 1, 16)).repeat(50, 1).reshape(-1, 16) + 0.4 * random.normal(size=(2000, 16)))
    queries = unit(vectors[::20] + 0.3 * random.normal(size=(100, 16)))
    write_part(tmp_path, 0, part(0, vectors))
    join_parts(tmp_path, 1, {})
    index = Index(tmp_path)
    with pytest.raises(DataError, match="no inverted lists"):
        open_lists(index)
    assert "recall@10" in build_lists(index, queries, "noisy copies", 0.9)
    about = read_lists_info(index)
    assert about["recall@10"] >= 0.9 and about["read"] < about["lists"], "all lists read: nothing is approximate here"
    lists, read, _ = open_lists(index)
    approximate = search_lists(lists, read, index.vectors, queries, 10)
    best = nearest(index.vectors, queries, 10)
    share = np.mean([len(set(some) & set(all_of)) / 10 for some, all_of in zip(approximate[1], best[1], strict=True)])
    assert share == pytest.approx(about["recall@10"])  # no ties here, so counting rows is counting scores
    every = search_lists(lists, about["lists"], index.vectors, queries, 10)
    assert np.array_equal(every[1], best[1]) and np.array_equal(every[0], best[0])
