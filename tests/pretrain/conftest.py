"""Fixtures of the pretraining tests."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))  # for gloo_pool, which other floors' tests may share

from gloo_pool import GlooPool  # noqa: E402


@pytest.fixture(scope="session")
def gloo_pool():
    """Two processes joined by gloo: `gloo_pool.run(function, ...)` -> the result of each rank."""
    pool = GlooPool(2)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def lone_process():
    """One process in a group of its own: what the two are compared with."""
    pool = GlooPool(1)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def shared():
    """The project's shared folder of fixtures; without it the test is skipped, except in CI, where it must be there."""
    folder = Path(os.environ.get("LIGATURE_SHARED", Path(__file__).parents[2] / ".." / "shared"))
    if not folder.is_dir():
        reason = "no folder of shared fixtures: set LIGATURE_SHARED"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return folder
