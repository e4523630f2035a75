"""ALBEF's and BLIP's json: a string is one caption, and rows of one image are joined."""

from __future__ import annotations

import pytest
from source_files import raises_one_line, write_value

from data_tools.sources import collect
from runtime.errors import DataError


def test_a_caption_string_is_one_caption_and_lines_of_an_image_are_joined(tmp_path, images):
    rows = [
        {"image": "a.jpg", "caption": "abc", "image_id": "coco_7"}, {"image": "b.jpg", "caption": ["x", "y"]},
        {"image": "a.jpg", "caption": "second", "image_id": "coco_7"}, {"image": "sub/c.jpg", "caption": "", "image_id": 3},
    ]  # fmt: skip
    collected = collect(write_value(tmp_path, rows), images)
    assert collected.kind == "albef" and collected.dropped == {"empty captions": 1, "images without a caption": 1}
    assert [(item.key, item.image_id, item.captions) for item in collected.items] == [
        ("a", "coco_7", ["abc", "second"]), ("b", "b", ["x", "y"]),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ({"image": "a.jpg"}, "is not a list of images"), ([{"url": "http://x/1.jpg", "caption": "x"}], "img2dataset"),
        ([{"image": "a.jpg", "caption": 5}], "entry 0"), ([{"image": "a.jpg", "caption": {"a": 1}}], "entry 0"),
        ([{"image": "a.jpg", "caption": [["x"]]}], "is list, not text"), ([{"image": "a.jpg"}], "entry 0 .*'caption'"),
        ([["a.jpg", "x"]], "entry 0"),
    ],
)  # fmt: skip
def test_an_albef_json_of_another_shape_gives_a_one_line_error(tmp_path, images, rows, words):
    raises_one_line(DataError, words, lambda: collect(write_value(tmp_path, rows), images, kind="albef"))
