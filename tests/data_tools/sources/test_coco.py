"""COCO's json: captions join their images, and a json of another shape is one line."""

from __future__ import annotations

import pytest
from source_files import coco_json, raises_one_line, write_value

from data_tools.sources import collect
from runtime.errors import DataError


def test_coco_joins_captions_to_images(tmp_path, images):
    value = coco_json([(7, "b.jpg"), (3, "a.jpg"), (5, "c.jpg")], [(3, "x"), (7, "y"), (9, "orphan"), (3, "z")])
    collected = collect(write_value(tmp_path, value), images)
    assert collected.kind == "coco"
    assert [(item.key, item.image_id, item.captions) for item in collected.items] == [
        ("b", "7", ["y"]), ("a", "3", ["x", "z"]),
    ]  # fmt: skip
    assert collected.dropped == {"captions of unlisted images": 1, "images without a caption": 1}


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("[1", "line 1: not valid JSON"),
        ("[]", "no list 'images'"),
        ('{"images": []}', "no list 'annotations'"),
        ('{"images": [{"id": 1}], "annotations": []}', "image 0 does not fit.*file_name"),
        ('{"images": [], "annotations": [{"image_id": 1, "bbox": []}]}', "annotation 0 does not fit.*caption"),
        ('{"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 1, "caption": 5}]}', "is int"),
        ('{"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": []}', "present and captioned, of 1"),
    ],
)
def test_a_json_of_another_shape_gives_a_one_line_error(tmp_path, images, value, words):
    path = tmp_path / "captions.json"
    path.write_text(value)
    raises_one_line(DataError, words, lambda: collect(path, images, kind="coco"))


@pytest.mark.parametrize(("split", "count", "captions"), [("train", 80, 400), ("val", 159, 795)])
def test_coco_mini_is_read_whole(data, split, count, captions):
    folder = data / "coco_mini"
    collected = collect(folder / f"annotations/captions_{split}2017.json", folder / "coco_mini_images_256.tar")
    assert len(collected.items) == count and sum(len(item.captions) for item in collected.items) == captions
    assert not collected.dropped
