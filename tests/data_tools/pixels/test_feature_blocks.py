"""Cached features: what is written is read, killed writing goes on, draws are functions of the seed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from data_tools.pixels.feature_blocks import BLOCK, CachedViews, FeatureBlocks
from runtime.errors import DataError

VIEWS, WIDTH = 3, 2


def rows(block: range) -> np.ndarray:
    return np.array([[[sample, view] for view in range(VIEWS)] for sample in block], np.float16)


@pytest.fixture
def blocks(tmp_path) -> FeatureBlocks:
    blocks = FeatureBlocks(tmp_path / "features", BLOCK + 5)
    for number in blocks.missing():
        blocks.write(number, rows(blocks.members(number)), {BLOCK + 1: "it is no image"} if number else {})
    return blocks


def test_every_sample_has_its_own_row_in_the_last_short_block_too(blocks):
    for sample in (0, 1, BLOCK - 1, BLOCK, BLOCK + 4):
        assert blocks.views(sample).tolist() == rows(range(sample, sample + 1))[0].tolist()
    assert blocks.first_views(range(BLOCK - 1, BLOCK + 1)).tolist() == [[BLOCK - 1, 0], [BLOCK, 0]]


def test_a_block_that_was_not_committed_is_missing(blocks):
    assert blocks.missing() == []
    (blocks.folder / "block-000001.npy").unlink()
    assert FeatureBlocks(blocks.folder, BLOCK + 5).missing() == [1]
    assert FeatureBlocks(blocks.folder.parent / "elsewhere", BLOCK + 5).missing() == [0, 1]


def test_a_broken_image_is_named_by_its_reason(blocks):
    with pytest.raises(ValueError, match="it is no image"):
        CachedViews(blocks, 1).check(BLOCK + 1)
    with pytest.raises(DataError, match=r"cannot be read \(it is no image\); scores need every image"):
        blocks.first_views(range(BLOCK, BLOCK + 3))


def test_drawn_views_differ_and_are_a_function_of_the_seed(blocks):
    views = CachedViews(blocks, 2)
    pairs = {tuple(views(7, seed)[:, 1].int().tolist()) for seed in range(60)}
    assert pairs == {(a, b) for a in range(VIEWS) for b in range(VIEWS) if a != b}
    assert torch.equal(views(7, 5), views(7, 5)) and views(7, 5)[:, 0].tolist() == [7, 7]


def test_more_views_than_are_cached_repeat(blocks):
    assert sorted(CachedViews(blocks, 6)(0, 1)[:, 1].int().tolist()) == [0, 0, 1, 1, 2, 2]
