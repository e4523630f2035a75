"""Keys and captions are made safe."""

from __future__ import annotations

import pytest

from data_tools.sources import clean_caption, safe_key


@pytest.mark.parametrize(
    ("name", "key", "changed"),
    [
        ("sub/a.jpg", "a", False), ("a.b.jpg", "a_b", True), ("dir\\a.jpg", "dir_a", True), ("a b.jpg", "a_b", True),
        ("2258277193_586949ec62.jpg.1", "2258277193_586949ec62_jpg", True), ("naïve-1.png", "naïve-1", False),
    ],
)  # fmt: skip
def test_keys_are_made_safe_and_changes_are_reported(name, key, changed):
    assert safe_key(name) == (key, changed)


def test_lone_surrogates_are_rejected_as_captions():
    assert clean_caption("a \ud83d dog") == "" and clean_caption(" a\n\u2003dog ") == "a dog"
