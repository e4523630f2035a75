"""Fixtures of all tests: one thread, the folder of real data, and a small drawn shard folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from gloo_pool import GlooPool
from hypothesis import settings

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")

# Before torch is imported: two threads of each process on shared cores are far slower than one.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # loaders fork
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that needs the network would hang without it

ROOT = Path(__file__).parents[1]
COUNTS = {"train": 64, "validation": 24, "test": 24}


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Figures and real images that do not travel with the code: `$LIGATURE_SHARED`, else `shared` beside the checkout."""
    folder = Path(os.environ.get("LIGATURE_SHARED", ROOT.parent / "shared"))
    if not folder.is_dir():
        reason = f"no shared data at {folder}; set LIGATURE_SHARED to its folder"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)  # nobody reads a skip there
        pytest.skip(reason)
    return folder


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the shard folders `train` (64 images in 4 shards), `validation` and `test` (24 each), 32 px, and their
    `source`. Read it only: copy what you want to break."""
    from data_tools.making.writer import ShardOptions, shard
    from data_tools.shapes.source import write_source

    folder = tmp_path_factory.mktemp("drawn")
    write_source(folder / "source", COUNTS, size=32)
    for split in COUNTS:
        captions = folder / "source" / f"captions_{split}.json"
        shard(ShardOptions(captions, folder / split, folder / "source" / "images", shard_samples=16, workers=1))
    return folder


@pytest.fixture(scope="session")
def gloo_pool() -> Iterator[GlooPool]:
    """Two processes joined by gloo: `gloo_pool.run(function, ...)` -> the result of each rank."""
    pool = GlooPool(2)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def lone_process() -> Iterator[GlooPool]:
    """One process in a group of its own: what the two are compared with."""
    pool = GlooPool(1)
    yield pool
    pool.close()
