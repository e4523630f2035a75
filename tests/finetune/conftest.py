"""Fixtures of the fine-tuning tests."""

from __future__ import annotations

import pytest
import small


@pytest.fixture(scope="session")
def pretrained(drawn, tmp_path_factory):
    """A run folder after one step of pretraining."""
    return small.pretrain(tmp_path_factory.mktemp("pretrained"), drawn)


@pytest.fixture(scope="session")
def single(drawn, tmp_path_factory):
    """The same with a single-stream fusion encoder."""
    return small.pretrain(tmp_path_factory.mktemp("single"), drawn, *small.SINGLE)
