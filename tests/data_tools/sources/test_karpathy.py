"""Karpathy's json: one split at a time, and the splits it has where none fits."""

from __future__ import annotations

import pytest
from source_files import karpathy_json, raises_one_line, write_value

from data_tools.sources import Choice, collect
from runtime.errors import RecipeError


@pytest.fixture
def split_json(tmp_path):
    rows = [("a.jpg", "train", {}), ("b.jpg", "restval", {"cocoid": 42}), ("c.jpg", "test", {"filepath": "sub"})]
    return write_value(tmp_path, karpathy_json(*rows))


def test_karpathy_respects_its_splits(split_json, images):
    def keys(**options):
        return [item.key for item in collect(split_json, images, choice=Choice(**options)).items]

    assert keys(split="train") == ["a"]
    assert keys(split="train", restval=True) == ["a", "b"]
    assert keys(split="test") == ["c"]
    assert collect(split_json, images, choice=Choice("test")).items[0].source == "sub/c.jpg"
    assert [item.image_id for item in collect(split_json, images, choice=Choice("restval")).items] == ["42"]


def test_karpathy_lists_its_splits_where_none_fits(tmp_path, split_json, images):
    splits = r"one of: train \(1\), restval \(1\), test \(1\)"
    raises_one_line(RecipeError, "several splits.*" + splits, lambda: collect(split_json, images))
    raises_one_line(RecipeError, "no split 'val'.*" + splits, lambda: collect(split_json, images, choice=Choice("val")))
    raises_one_line(RecipeError, "--restval", lambda: collect(split_json, images, choice=Choice("test", True)))
    path = write_value(tmp_path, karpathy_json(("a.jpg", "val", {})))
    assert len(collect(path, images).items) == 1
