"""What the tests of fine-tuning share."""

from __future__ import annotations

import pytest
import small


@pytest.fixture(scope="session")
def pretrained(drawn, tmp_path_factory):
    """A run folder after one step of pretraining."""
    return small.pretrain(tmp_path_factory.mktemp("pretrained"), drawn)
