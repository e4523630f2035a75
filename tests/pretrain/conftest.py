"""Fixtures of the pretraining tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


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
