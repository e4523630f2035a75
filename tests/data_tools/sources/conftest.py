"""Fixtures of the tests of sources: the real data, and a folder of images."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

SHARED = Path(os.environ.get("LIGATURE_SHARED", Path(__file__).parents[3].parent / "shared"))


@pytest.fixture
def data():
    """The real data, or a skip with its reason (a failure where CI promises to have it)."""
    if not (SHARED / "data").is_dir():
        if os.environ.get("CI") == "true":
            pytest.fail(f"no data in {SHARED}")
        pytest.skip(f"no data in {SHARED}; set LIGATURE_SHARED")
    return SHARED / "data"


@pytest.fixture
def images(tmp_path):
    """A folder with files a.jpg, b.jpg, sub/c.jpg; sources open no image, so any bytes do."""
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    for name in ("a.jpg", "b.jpg", "sub/c.jpg"):
        (folder / name).write_bytes(name.encode())
    return folder
